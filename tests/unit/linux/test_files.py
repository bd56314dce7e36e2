"""Paths inside a root: what leaves it in a plain open stays in it here."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisord_ctr.linux import files


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/passwd").write_text("inside")
    fd = files.open_root(tmp_path / "root")
    yield fd
    os.close(fd)


@pytest.mark.parametrize("path", ["etc/passwd", "/etc/passwd", "../../etc/passwd", "/../etc/./passwd", "up/etc/passwd"])
def test_every_spelling_stays_inside(root: int, tmp_path: Path, path: str) -> None:
    (tmp_path / "root/up").symlink_to("../../..")
    assert files.read_in_root(root, path, 100) == b"inside"


def test_s2_links_resolve_inside_the_root(root: int, tmp_path: Path) -> None:
    (tmp_path / "root/absolute").symlink_to("/etc/passwd")
    (tmp_path / "root/escape").symlink_to(f"{tmp_path}/outside/secret")
    assert files.read_in_root(root, "absolute", 100) == b"inside"
    with pytest.raises(FileNotFoundError):
        files.read_in_root(root, "escape", 100)


def test_s3_magic_links_are_refused(root: int, tmp_path: Path) -> None:
    proc = files.open_root("/proc")
    try:
        with pytest.raises(OSError) as caught:
            files.open_in_root(proc, "self/root")
        assert caught.value.errno == errno.ELOOP
    finally:
        os.close(proc)


def test_descriptors_are_close_on_exec(root: int) -> None:
    with files.opened_in_root(root, "etc") as fd:
        assert not os.get_inheritable(fd)


def test_a_fifo_is_refused_without_blocking(root: int, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "root/pipe")
    with pytest.raises(OSError) as caught:
        files.read_in_root(root, "pipe", 100)
    assert caught.value.errno == errno.EINVAL


def test_s8_a_file_beyond_the_limit_is_refused(root: int) -> None:
    with pytest.raises(OSError) as caught:
        files.read_in_root(root, "etc/passwd", 5)
    assert caught.value.errno == errno.EFBIG
    assert files.read_in_root(root, "etc/passwd", 6) == b"inside"


def test_a_nul_byte_is_an_os_error(root: int) -> None:
    with pytest.raises(OSError) as caught:
        files.open_in_root(root, "a\0b")
    assert caught.value.errno == errno.EINVAL


def test_directories_are_made_through_links_and_never_outside(root: int, tmp_path: Path) -> None:
    (tmp_path / "root/link").symlink_to("/../../far/away")
    made: list[str] = []
    os.close(files.make_dirs_in_root(root, "link/deep", 0o755, made))
    assert (tmp_path / "root/far/away/deep").is_dir()
    assert made == ["far", "far/away", "far/away/deep"]
    assert not (tmp_path / "far").exists()


def test_a_loop_of_links_ends(root: int, tmp_path: Path) -> None:
    (tmp_path / "root/a").symlink_to("b/x")
    (tmp_path / "root/b").symlink_to("a/x")
    with pytest.raises(OSError) as caught:
        files.make_dirs_in_root(root, "a/deep")
    assert caught.value.errno == errno.ELOOP


def test_a_file_in_the_way_is_not_a_directory(root: int) -> None:
    with pytest.raises(NotADirectoryError):
        files.make_dirs_in_root(root, "etc/passwd/x")


def test_copies_keep_bytes_and_holes(tmp_path: Path) -> None:
    with open(tmp_path / "source", "wb+") as source:
        source.write(b"head")
        source.seek(1 << 22)
        source.write(b"tail")
        source.flush()
        with open(tmp_path / "target", "wb+") as target:
            assert files.copy_contents(source.fileno(), target.fileno()) == (1 << 22) + 4
    assert (tmp_path / "source").read_bytes() == (tmp_path / "target").read_bytes()
    assert (tmp_path / "target").stat().st_blocks <= (tmp_path / "source").stat().st_blocks


def test_rename_without_replacing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(FileExistsError):
        files.rename(str(tmp_path / "a"), str(tmp_path / "b"), files.RENAME_NOREPLACE)
    files.rename(str(tmp_path / "a"), str(tmp_path / "b"), files.RENAME_EXCHANGE)
    assert (tmp_path / "a").read_text() == "b"


def test_holes_are_punched(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb+") as handle:
        handle.write(b"x" * (1 << 20))
        handle.flush()
        files.punch_hole(handle.fileno(), 0, 1 << 19)
        assert os.pread(handle.fileno(), 4, 0) == b"\0\0\0\0"
        assert os.fstat(handle.fileno()).st_size == 1 << 20


def test_marking_a_top_directory_is_harmless_everywhere(tmp_path: Path) -> None:
    assert files.spread_subdirectories(tmp_path) in (True, False)
    assert files.spread_subdirectories(tmp_path) in (True, False)
    (tmp_path / "below").mkdir()
