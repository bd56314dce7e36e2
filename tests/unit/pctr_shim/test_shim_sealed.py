"""Sealed copies of OCI runtimes: which programs get one, that nobody can change it, and when it serves no more."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pctr_shim import sealed


@pytest.fixture(autouse=True)
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made: dict[str, tuple[tuple[int, int, int, int, int], int]] = {}
    monkeypatch.setattr(sealed, "_copies", made)
    monkeypatch.setattr(sealed, "_SELINUX", "/nowhere")
    yield
    for _, fd in made.values():
        os.close(fd)


@pytest.fixture
def runc(tmp_path: Path) -> str:
    true = shutil.which("true")
    assert true is not None
    shutil.copy(true, tmp_path / "runc")
    return str(tmp_path / "runc")


def test_a_copy_is_sealed_and_closed_on_exec(runc: str) -> None:
    sealed.prepare([runc])
    program = sealed.program(runc)
    assert program.startswith("/proc/self/fd/")
    fd = int(program.rpartition("/")[2])
    assert not os.get_inheritable(fd)
    # Exactly the four that libcontainer looks for.
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == (
        fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    )
    assert Path(program).read_bytes() == Path(runc).read_bytes()
    with pytest.raises(OSError):
        Path(program).write_bytes(b"x")
    writable = os.open(program, os.O_RDWR)
    with pytest.raises(PermissionError):
        os.write(writable, b"x")
    os.close(writable)


def test_a_program_that_was_replaced_is_run_itself_until_it_is_copied_again(runc: str) -> None:
    sealed.prepare([runc])
    first = sealed.program(runc)
    false = shutil.which("false")
    assert false is not None
    os.unlink(runc)
    shutil.copy(false, runc)
    assert sealed.program(runc) == runc
    sealed.prepare([runc])
    assert Path(sealed.program(runc)).read_bytes() == Path(false).read_bytes()
    assert len(sealed._copies) == 1
    assert first
    os.unlink(runc)
    assert sealed.program(runc) == runc


@pytest.mark.parametrize("name", ["crun", "runc-wrapper"])
def test_other_runtimes_are_run_from_their_files(runc: str, name: str) -> None:
    other = str(Path(runc).with_name(name))
    os.rename(runc, other)
    sealed.prepare([other])
    assert sealed.program(other) == other


def test_scripts_and_what_is_not_there_have_no_copy(runc: str) -> None:
    Path(runc).write_text("#!/bin/sh\n")
    sealed.prepare([runc])
    assert sealed.program(runc) == runc
    sealed.prepare([runc + "/runc"])
    assert not sealed._copies


def test_where_selinux_is_in_force_nothing_is_copied(runc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "_SELINUX", "/proc/self/status")
    sealed.prepare([runc])
    assert sealed.program(runc) == runc


def test_a_copy_can_be_executed_and_knows_its_name(runc: str) -> None:
    sealed.prepare([runc])
    pid = os.posix_spawn(sealed.program(runc), [runc], {})
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
