"""Layers made of two trees: applied to the first, they must give the second."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisord_ctr.diff.apply import LayerApplier
from supervisord_ctr.diff.compression import GZIP, NONE, ZSTD, Deflater, Inflater
from supervisord_ctr.diff.compute import write_layer
from supervisord_ctr.diff.tarwriter import TarWriter


def picture(root: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        text: object = ""
        if path.is_symlink():
            text = os.readlink(path)
        elif path.is_file():
            text = path.read_bytes()
        names = [] if path.is_symlink() else [(n, os.getxattr(path, n)) for n in sorted(os.listxattr(path))]
        found[str(path.relative_to(root))] = (
            status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_rdev, text, names
        )
    return found


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    lower = tmp_path / "lower"
    for name in ("etc/same", "etc/changed", "etc/gone", "dir/deep/er/file", "becomes-dir", "links/a"):
        (lower / name).parent.mkdir(parents=True, exist_ok=True)
        (lower / name).write_text(name)
    os.link(lower / "links/a", lower / "links/b")
    (lower / "link").symlink_to("etc/same")
    (lower / "becomes-file").mkdir()
    (lower / "becomes-file/x").write_text("x")
    os.mkfifo(lower / "pipe")
    os.utime(lower / "etc/same", (1_000_000_000, 1_000_000_000))
    upper = tmp_path / "upper"
    shutil.copytree(lower, upper, symlinks=True, copy_function=shutil.copy2, ignore=shutil.ignore_patterns("pipe"))
    os.mkfifo(upper / "pipe")
    for path in lower.rglob("*"):
        times = (path.lstat().st_atime_ns, path.lstat().st_mtime_ns)
        os.utime(upper / path.relative_to(lower), ns=times, follow_symlinks=False)
    return lower, upper


def change(upper: Path) -> None:
    (upper / "etc/changed").write_text("new text")
    (upper / "etc/gone").unlink()
    (upper / "dir/deep/er/new").write_text("new")
    (upper / "becomes-dir").unlink()
    (upper / "becomes-dir").mkdir()
    (upper / "becomes-dir/y").write_text("y")
    shutil.rmtree(upper / "becomes-file")
    (upper / "becomes-file").write_text("file now")
    (upper / "hard1").write_text("hard")
    os.link(upper / "hard1", upper / "hard2")
    (upper / ("long" * 40)).symlink_to("target" * 40)
    (upper / "unicode-é").write_text("u")
    os.mknod(upper / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.setxattr(upper / "hard1", "user.note", b"\x00\xff")
    os.chown(upper / "dir/deep", 70_000, 3_000_000)
    os.chmod(upper / "dir", 0o2711)
    os.utime(upper / "etc", ns=(5, 1_234_567_890_123_456_789))


def made(lower: Path | None, upper: Path, **options: float) -> bytes:
    out = io.BytesIO()
    layer = write_layer(lower, upper, out.write, **options)
    assert layer.size == len(out.getvalue())
    return out.getvalue()


def test_applied_to_the_lower_tree_it_gives_the_upper(trees: tuple[Path, Path]) -> None:
    lower, upper = trees
    change(upper)
    LayerApplier().apply(io.BytesIO(made(lower, upper)), lower)
    assert picture(lower) == picture(upper)
    assert (lower / "hard1").stat().st_ino == (lower / "hard2").stat().st_ino


def test_only_changes_are_in_it(trees: tuple[Path, Path]) -> None:
    lower, upper = trees
    assert tarfile.open(fileobj=io.BytesIO(made(lower, upper))).getnames() == []
    (upper / "dir/deep/er/file").write_text("changed")
    (upper / "etc/gone").unlink()
    os.utime(upper / "etc", ns=(0, (lower / "etc").stat().st_mtime_ns))
    names = tarfile.open(fileobj=io.BytesIO(made(lower, upper))).getnames()
    assert names == ["dir", "dir/deep", "dir/deep/er", "dir/deep/er/file", "etc", "etc/.wh.gone"]


def test_everything_without_a_lower_tree(trees: tuple[Path, Path], tmp_path: Path) -> None:
    _, upper = trees
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    LayerApplier().apply(io.BytesIO(made(None, upper)), fresh)
    assert picture(fresh) == picture(upper)


def test_source_date_epoch_bounds_times_and_makes_it_reproducible(trees: tuple[Path, Path]) -> None:
    lower, upper = trees
    change(upper)
    first = made(lower, upper, source_date_epoch=1_100_000_000)
    for name in ("etc/changed", "dir/deep/er/new", "hard1", "becomes-dir/y"):
        os.utime(upper / name, (2_000_000_000, 2_000_000_000))
    assert made(lower, upper, source_date_epoch=1_100_000_000) == first
    assert max(info.mtime for info in tarfile.open(fileobj=io.BytesIO(first))) <= 1_100_000_000


def test_the_same_seconds_with_other_bytes_are_a_change(trees: tuple[Path, Path]) -> None:
    lower, upper = trees
    (upper / "etc/same").write_text("etc/sane")
    os.utime(upper / "etc/same", (1_000_000_000, 1_000_000_000))
    os.utime(upper / "etc", ns=(0, (lower / "etc").stat().st_mtime_ns))
    assert tarfile.open(fileobj=io.BytesIO(made(lower, upper))).getnames() == ["etc", "etc/same"]


@pytest.mark.parametrize("compression", [GZIP, ZSTD, NONE])
def test_compression_comes_back_and_is_reproducible(compression: str) -> None:
    data = os.urandom(1 << 16) + bytes(1 << 20)

    def packed() -> bytes:
        out = io.BytesIO()
        deflater = Deflater(compression, out.write)
        for start in range(0, len(data), 100_000):
            deflater.write(data[start:start + 100_000])
        deflater.finish()
        return out.getvalue()

    inflater = Inflater(io.BytesIO(packed()))
    read: Callable[[], bytes] = lambda: inflater.read(70_000)  # noqa: E731
    assert b"".join(iter(read, b"")) == data
    assert inflater.compression == compression
    assert packed() == packed()


def test_the_writer_s_headers_are_read_by_others() -> None:
    out = io.BytesIO()
    writer = TarWriter(out.write)
    name = ("directory/" * 20).encode() + b"f"
    writer.add(name, stat.S_IFREG, mode=0o640, uid=5_000_000, gid=1, size=3, mtime=1_500_000_000_250_000_000,
               xattrs={b"user.a": b"1"})
    writer.data(b"abc")
    writer.add(b"big", stat.S_IFREG, size=0, mtime=-5_000_000_000)
    writer.finish()
    first, second = tarfile.open(fileobj=io.BytesIO(out.getvalue())).getmembers()
    assert (first.name, first.uid, first.mtime, first.size) == (name.decode(), 5_000_000, 1_500_000_000.25, 3)
    assert first.pax_headers["SCHILY.xattr.user.a"] == "1"
    assert second.mtime == -5
