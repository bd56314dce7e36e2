"""Durable files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from supervisord_ctr import durable


def test_replaces_whole_and_keeps_the_mode(tmp_path: Path) -> None:
    target = tmp_path / "record"
    target.write_text("old")
    durable.write_atomic(target, b"new", mode=0o640)
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640 & ~_umask()
    assert [entry.name for entry in tmp_path.iterdir()] == ["record"]


def test_a_failure_leaves_the_old_content_and_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "record"
    target.write_text("old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        durable.write_atomic(target, b"new")
    assert target.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["record"]


def test_leftovers_of_a_killed_writer_are_swept(tmp_path: Path) -> None:
    (tmp_path / "record").write_text("kept")
    (tmp_path / "record.tmp-0011").write_text("half")
    assert durable.remove_leftovers(tmp_path) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["record"]
    assert durable.remove_leftovers(tmp_path / "absent") == 0


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
