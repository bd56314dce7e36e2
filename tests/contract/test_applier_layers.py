"""What unpacking a layer must do, in this process and in a worker: the results, and what hostile layers get."""

from __future__ import annotations

import asyncio
import io
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from supervisord_ctr.diff.apply import LayerApplier
from supervisord_ctr.diff.pool import UnpackPool
from supervisord_ctr.diff.stream import Applied, Limits, NeedsLower
from supervisord_ctr.errors import Error, InvalidArgument
from tests.support.images import (
    Member,
    character,
    digest_of,
    fifo,
    file,
    folder,
    hard_link,
    layer,
    opaque,
    pack,
    symlink,
    whiteout,
)

Apply = Callable[..., Applied]


def _direct(data: bytes, target: Path, **options: object) -> Applied:
    return LayerApplier().apply(io.BytesIO(data), target, **options)  # type: ignore[arg-type]


def _worker(data: bytes, target: Path, *, always_spread: bool = False, **options: object) -> Applied:
    async def run() -> Applied:
        pool = UnpackPool(1, always_spread=always_spread)
        blob = target.with_name("blob")
        blob.write_bytes(data)
        source, place = os.open(blob, os.O_RDONLY), os.open(target, os.O_PATH | os.O_DIRECTORY)
        try:
            return await pool.apply(source, len(data), place, **options)  # type: ignore[arg-type]
        finally:
            os.close(source)
            os.close(place)
            await pool.close()

    return asyncio.run(run())


def _two_processes(data: bytes, target: Path, **options: object) -> Applied:
    return _worker(data, target, always_spread=True, **options)


@pytest.fixture(params=[_direct, _worker, _two_processes], ids=["direct", "worker", "two-processes"])
def apply(request: pytest.FixtureRequest) -> Apply:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    os.utime(outside / "secret", (1, 1))
    before = _picture(outside)
    made = tmp_path / "target"
    made.mkdir()
    yield made
    assert _picture(outside) == before, "something outside the target was touched"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "blob") == ["outside", "target"]


def _picture(path: Path) -> list[tuple[object, ...]]:
    found = []
    for entry in sorted(path.rglob("*")):
        status = entry.lstat()
        found.append((str(entry), status.st_mode, status.st_uid, status.st_mtime_ns, status.st_nlink))
    return found


# What comes out.

def test_the_last_entry_may_end_the_stream(apply: Apply, target: Path) -> None:
    whole = layer(file("first", b"1" * 700), file("last", b"2" * 700))
    end = whole.index(b"2" * 700) + 700
    for cut in (end, end + 100, end + 324):
        assert apply(whole[:cut], target, limits=Limits()).diff_id == digest_of(whole[:cut])
        assert (target / "last").read_bytes() == b"2" * 700
    with pytest.raises(InvalidArgument, match="inside an entry"):
        apply(whole[:end - 1], target, limits=Limits())


@pytest.mark.parametrize("compression", ["gzip", "zstd", ""])
def test_every_kind_of_entry_comes_out_exactly(apply: Apply, target: Path, compression: str) -> None:
    tar = layer(
        folder("etc", 0o2750, uid=7, gid=8, mtime=1_500_000_000),
        file("etc/passwd", b"root", mode=0o4755, uid=1000, gid=2000, mtime=1_600_000_001.25),
        file("etc/empty", b"", mode=0o600),
        symlink("etc/link", "/etc/passwd", uid=5, gid=6),
        hard_link("etc/hard", "etc/passwd", mode=0o4755, uid=1000, gid=2000, mtime=1_600_000_001.25),
        fifo("etc/pipe", mode=0o622),
        character("null", 1, 3, mode=0o666),
    )
    applied = apply(pack(tar, compression), target)
    assert applied.diff_id == digest_of(tar)
    assert (applied.size, applied.entries) == (len(tar), 7)
    etc = (target / "etc").stat()
    assert (stat.S_IMODE(etc.st_mode), etc.st_uid, etc.st_gid, etc.st_mtime) == (0o2750, 7, 8, 1_500_000_000)
    passwd = (target / "etc/passwd").stat()
    assert (stat.S_IMODE(passwd.st_mode), passwd.st_uid, passwd.st_gid) == (0o4755, 1000, 2000)
    assert passwd.st_mtime_ns == 1_600_000_001_250_000_000
    assert passwd.st_ino == (target / "etc/hard").stat().st_ino
    assert (target / "etc/empty").stat().st_gid == 0, "a set-group-id parent must not hand its group on"
    link = (target / "etc/link").lstat()
    assert (os.readlink(target / "etc/link"), link.st_uid, link.st_mtime) == ("/etc/passwd", 5, 1_600_000_000)
    assert stat.S_ISFIFO((target / "etc/pipe").lstat().st_mode)
    assert stat.S_IMODE((target / "etc/pipe").lstat().st_mode) == 0o622
    assert (target / "null").stat().st_rdev == os.makedev(1, 3)


def test_umask_does_not_matter(apply: Apply, target: Path) -> None:
    before = os.umask(0o077)
    try:
        apply(layer(folder("a", 0o777), file("a/f", mode=0o666), file("implied/f", mode=0o444)), target)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((target / name).stat().st_mode) for name in ("a", "a/f", "implied", "implied/f")] == [
        0o777, 0o666, 0o755, 0o444
    ]


def test_long_names_in_both_dialects(apply: Apply, target: Path) -> None:
    import tarfile

    name = "/".join(["directory-with-a-long-name"] * 6) + "/" + "f" * 120
    apply(layer(file(name, b"pax")), target)
    assert (target / name).read_bytes() == b"pax"
    apply(layer(file(name + "g", b"gnu"), symlink("link", "x" * 300), form=tarfile.GNU_FORMAT), target)
    assert (target / (name + "g")).read_bytes() == b"gnu"
    assert os.readlink(target / "link") == "x" * 300


def test_names_that_are_not_utf8(apply: Apply, target: Path) -> None:
    tar = bytearray(layer(file("name-XX")))
    tar[5:7] = b"\xff\xfe"
    tar[148:156] = b"%06o\0 " % (sum(tar[:148]) + sum(tar[156:512]) + 8 * 32)
    apply(bytes(tar), target)
    assert os.listdir(os.fsencode(target)) == [b"name-\xff\xfe"]


def test_attributes(apply: Apply, target: Path) -> None:
    applied = apply(layer(
        file("f", pax={"SCHILY.xattr.user.note": "hello", "SCHILY.xattr.trusted.overlay.redirect": "/elsewhere"}),
        folder("d", pax={"SCHILY.xattr.user.note": "dir"}),
    ), target)
    assert os.listxattr(target / "f") == ["user.note"]
    assert os.getxattr(target / "f", "user.note") == b"hello"
    assert os.getxattr(target / "d", "user.note") == b"dir"
    assert "trusted.overlay.redirect" in applied.notes[0]


def test_later_entries_replace_earlier_ones(apply: Apply, target: Path) -> None:
    apply(layer(
        file("a", b"1"), file("a", b"2"), folder("b"), file("b/x"), file("b", b"now a file"), symlink("c", "a"),
        folder("c"), file("c/y"), folder("d", 0o700), folder("d", 0o755),
    ), target)
    assert (target / "a").read_bytes() == b"2"
    assert (target / "b").read_bytes() == b"now a file"
    assert not (target / "c").is_symlink()
    assert (target / "c/y").exists()
    assert stat.S_IMODE((target / "d").stat().st_mode) == 0o755


def test_directory_times_are_those_of_the_layer(apply: Apply, target: Path) -> None:
    apply(layer(folder("a", mtime=100), folder("a/b", mtime=200), file("a/b/f"), file("a/g"), file("h")), target)
    assert ((target / "a").stat().st_mtime, (target / "a/b").stat().st_mtime) == (100, 200)


def test_a_link_on_the_way_is_followed_inside(apply: Apply, target: Path) -> None:
    apply(layer(folder("usr"), folder("usr/lib"), symlink("lib", "usr/lib"), file("lib/x"), symlink("abs", "/usr"),
                file("abs/y")), target)
    assert (target / "usr/lib/x").exists()
    assert (target / "usr/y").exists()


def test_sparse_files_stay_sparse(apply: Apply, target: Path, tmp_path: Path) -> None:
    import subprocess

    source = tmp_path / "outside" / "sparse"
    with open(source, "wb") as handle:
        handle.seek(5 << 20)
        handle.write(b"middle")
        handle.truncate(12 << 20)
    for form in ("gnu", "posix"):
        for version in ("0.0", "0.1", "1.0") if form == "posix" else ("",):
            extra = [f"--sparse-version={version}"] if version else []
            tar = subprocess.run(
                ["tar", "-C", str(source.parent), f"--format={form}", "-S", *extra, "-cf", "-", "sparse"],
                check=True, capture_output=True,
            ).stdout
            apply(tar, target)
            found = target / "sparse"
            assert found.read_bytes() == source.read_bytes()
            assert found.stat().st_blocks * 512 < 1 << 20
            found.unlink()
    source.unlink()


# Whiteouts.

@pytest.fixture
def lower(target: Path) -> Path:
    for name in ("dir/a", "dir/sub/b", "gone/c", "keep/d"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("lower")
    return target


def test_plain_whiteouts_remove_lower_entries_only(apply: Apply, lower: Path) -> None:
    apply(layer(
        folder("dir"), file("dir/new"), opaque("dir"), whiteout("gone"), folder("keep"), file("keep/d", b"upper"),
        whiteout("keep/d"), whiteout("never/was"), Member(".wh..wh.plnk"),
    ), lower)
    assert sorted(str(p.relative_to(lower)) for p in lower.rglob("*")) == [
        "dir", "dir/new", "keep", "keep/d", "never"
    ]
    assert (lower / "keep/d").read_text() == "upper"


def test_overlay_whiteouts_take_overlay_s_own_form(apply: Apply, target: Path) -> None:
    apply(layer(
        folder("dir"), opaque("dir"), file("dir/new"), whiteout("gone"), whiteout("again"), folder("again"),
        file("again/x"), folder("first"), whiteout("first"),
    ), target, style="overlay", complete=False)
    gone = (target / "gone").lstat()
    assert stat.S_ISCHR(gone.st_mode)
    assert gone.st_rdev == 0
    for name in ("dir", "again", "first"):
        assert os.getxattr(target / name, "trusted.overlay.opaque") == b"y"


def test_layers_that_lean_on_lower_ones_say_so(apply: Apply, target: Path) -> None:
    with pytest.raises(NeedsLower):
        apply(layer(hard_link("a", "lower/file")), target, style="overlay", complete=False)
    with pytest.raises(NeedsLower):
        apply(layer(symlink("lib", "usr/lib"), file("lib/x")), target, style="overlay", complete=False)
    applied = apply(layer(file("some/where/x")), target, style="overlay", complete=False)
    assert applied.implied == (b"some", b"some/where")


# Hostile layers (S1, S8).

@pytest.mark.parametrize(("members", "told"), [
    ([file("../../etc/passwd")], "leads out of the root"),
    ([file("a/../../b")], "leads out of the root"),
    ([folder("..")], "leads out of the root"),
    ([hard_link("x", "../outside/secret")], "leads out of the root"),
    ([hard_link("x", "/outside/secret")], "does not exist"),
    ([folder("a"), symlink("a", "OUTSIDE"), file("a/secret")], "replaced a directory of the same layer"),
    ([folder("a"), symlink("a", "../outside"), file("a/b/c/secret")], "replaced a directory of the same layer"),
    ([symlink("a", "OUTSIDE"), file("a/secret")], "absolute link to nothing"),
    ([symlink("a", "OUTSIDE"), hard_link("x", "a/secret")], "absolute link to nothing"),
    ([file("f", uid=1 << 31)], "outside 0 to"),
    ([file("f", gid=1 << 32)], "outside 0 to"),
    ([Member(".wh.")], "invalid whiteout"),
    ([Member("a/.wh...")], "invalid whiteout"),
    ([Member("x", b"D")], "unhandled tar entry type"),
    ([symlink("loop", "loop"), file("loop/x")], "ELOOP"),
    ([file("f"), file("f/below")], "ENOTDIR"),
    ([file("n" * 300)], "ENAMETOOLONG"),
    ([file("d/" * 600 + "f")], "levels deep"),
    ([file("x" * 5000)], "too long"),
    ([character("c", 1 << 20, 0)], "no such device"),
])
def test_s1_hostile_entries_are_refused(
    apply: Apply, target: Path, tmp_path: Path, members: list[Member], told: str
) -> None:
    real = [
        Member(m.name, m.kind, m.data, m.link.replace("OUTSIDE", str(tmp_path / "outside")), m.mode, m.uid, m.gid,
               m.mtime, m.device, m.pax)
        for m in members
    ]
    with pytest.raises(Error, match=told):
        apply(pack(layer(*real)), target)


def test_s1_names_that_look_absolute_stay_below_the_root(apply: Apply, target: Path, tmp_path: Path) -> None:
    apply(layer(file(str(tmp_path / "outside/secret"), b"inside"), file("/top", b"x"), file("./dot", b"y")), target)
    assert (target / str(tmp_path / "outside/secret").lstrip("/")).read_bytes() == b"inside"
    assert (target / "top").exists()
    assert (target / "dot").exists()


def test_s1_a_link_is_never_written_or_changed_through(apply: Apply, target: Path, tmp_path: Path) -> None:
    outside = str(tmp_path / "outside/secret")
    apply(layer(symlink("a", outside), file("a", b"mine", mode=0o777), symlink("b", str(tmp_path / "outside")),
                folder("b", 0o777, uid=9)), target)
    assert (target / "a").read_bytes() == b"mine"
    assert not (target / "b").is_symlink()


def test_s1_an_existing_tree_of_links_is_not_followed(apply: Apply, target: Path, tmp_path: Path) -> None:
    (target / "etc").symlink_to(tmp_path / "outside")
    (target / "up").symlink_to("../outside")
    apply(layer(file("up/x", b"1"), file("etc/y", b"2")), target)
    assert (target / "outside/x").read_bytes() == b"1"
    assert (target / str(tmp_path / "outside/y").lstrip("/")).read_bytes() == b"2"


@pytest.mark.parametrize("cut", [0.3, 0.9])
@pytest.mark.parametrize("compression", ["gzip", "zstd", ""])
def test_a_cut_stream_is_an_error(apply: Apply, target: Path, compression: str, cut: float) -> None:
    whole = pack(layer(*(file(f"f{i}", os.urandom(5000)) for i in range(20))), compression)
    with pytest.raises(InvalidArgument):
        apply(whole[:int(len(whole) * cut)], target)


@pytest.mark.parametrize("data", [b"not a tar at all" * 100, b"\x1f\x8b\x08" + b"junk" * 50, b"BZh91AY", b"x"])
def test_rubbish_is_an_error(apply: Apply, target: Path, data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        apply(data, target)


def test_an_empty_layer_is_fine(apply: Apply, target: Path) -> None:
    assert apply(pack(layer()), target).entries == 0


@pytest.mark.parametrize(("limits", "members", "told"), [
    (Limits(entries=3), [file(f"f{i}") for i in range(5)], "more than 3 entries"),
    (Limits(size=1000), [file("f", b"x" * 2000)], "more than 1000 bytes"),
    (Limits(ratio=10, ratio_from=1 << 20), [file("zeros", bytes(4 << 20))], "more than 10 times"),
    (Limits(depth=3), [file("./a/b/c/d")], "levels deep"),
])
def test_s8_bombs_are_stopped(
    apply: Apply, target: Path, limits: Limits, members: list[Member], told: str
) -> None:
    with pytest.raises(InvalidArgument, match=told):
        apply(pack(layer(*members)), target, limits=limits)


def test_s8_a_huge_extended_header_is_not_read(apply: Apply, target: Path) -> None:
    tar = layer(file("f", pax={"comment": "x" * (2 << 20)}))
    with pytest.raises(InvalidArgument, match="extended header"):
        apply(pack(tar), target)
