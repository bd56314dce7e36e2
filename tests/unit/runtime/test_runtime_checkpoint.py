"""Checkpoint images: what comes out is what went in, and what must not come out does not."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.runtime import checkpoint


def _chunks(data: bytes) -> Callable[[], bytes]:
    stream = io.BytesIO(data)
    return lambda: stream.read(700)


def _archive(*members: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"x" * member.size) if member.size else None)
    return out.getvalue()


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, link, size
    return made


def test_an_image_comes_back(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep/er").mkdir(parents=True)
    target.mkdir()
    (source / "core-1.img").write_bytes(bytes(range(256)) * 40)
    (source / "deep/er/pages-1.img").write_bytes(b"\0" * 5000)
    (source / "empty").write_bytes(b"")
    parts: list[bytes] = []
    checkpoint.pack(source, parts.append)
    checkpoint.unpack(_chunks(b"".join(parts)), target)
    for path in source.rglob("*"):
        copied = target / path.relative_to(source)
        assert copied.is_dir() if path.is_dir() else copied.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("member", [
    _member("link", tarfile.SYMTYPE, "/etc"), _member("hard", tarfile.LNKTYPE, "/etc/passwd"),
    _member("null", tarfile.CHRTYPE), _member("pipe", tarfile.FIFOTYPE), _member("../out", size=3),
    _member("a/../../out", size=3),
], ids=lambda member: member.name)
def test_s5_only_files_and_folders_inside_come_out(tmp_path: Path, member: tarfile.TarInfo) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(InvalidArgument):
        checkpoint.unpack(_chunks(_archive(member)), target)
    assert list(target.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_s5_absolute_names_are_below_the_target(tmp_path: Path) -> None:
    checkpoint.unpack(_chunks(_archive(_member("/etc/x", size=3))), tmp_path)
    assert (tmp_path / "etc/x").read_bytes() == b"xxx"


def test_s5_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SIZE", 5)
    with pytest.raises(InvalidArgument, match="too large"):
        checkpoint.unpack(_chunks(_archive(_member("a", size=3), _member("b", size=3))), tmp_path)
    monkeypatch.setattr(checkpoint, "MAX_ENTRIES", 1)
    with pytest.raises(InvalidArgument, match="too large"):
        checkpoint.unpack(_chunks(_archive(_member("c"), _member("d"))), tmp_path)


def test_a_broken_image_is_an_error(tmp_path: Path) -> None:
    data = _archive(_member("a", size=3000))
    with pytest.raises(InvalidArgument):
        checkpoint.unpack(_chunks(data[:1500]), tmp_path)
