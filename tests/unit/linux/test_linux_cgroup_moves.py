"""A grace period that passes ahead of a move: nobody is moved by it, whatever our own group is."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator

import pytest

from supervisord_ctr.linux import cgroups

_PROGRAM = """
import os, sys
from supervisord_ctr.linux import cgroups
def membership():
    return open("/proc/self/cgroup").read()
def join(path):
    cgroups.join(cgroups.folders_to_join(path), os.getpid())
for path in (sys.argv[1], sys.argv[2], "/", sys.argv[1]):
    join(path)
    before = membership()
    assert f":{path}\\n" in before
    assert cgroups.pass_grace()
    assert membership() == before, (path, before, membership())
join("/")
"""


@pytest.fixture
def groups() -> Iterator[tuple[str, str]]:
    paths = tuple(f"/pctr-grace-{secrets.token_hex(4)}" for _ in range(2))
    for path in paths:
        cgroups.create(path)
    yield paths[0], paths[1]
    for path in paths:
        cgroups.remove_empty(path)


def test_it_leaves_us_where_we_are(groups: tuple[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *groups], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_membership_that_cannot_be_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> str:
        raise PermissionError(13, "permission denied", path)

    monkeypatch.setattr(cgroups, "read", refuse)
    cgroups._procs_of.cache_clear()
    assert not cgroups.pass_grace()


@pytest.mark.parametrize("listed", ["", "1\n2", f"{os.getpid()}0"])
def test_a_group_that_does_not_list_us_is_left_alone(monkeypatch: pytest.MonkeyPatch, listed: str) -> None:
    """As in a container that sees the host's groups under other paths than its own membership names."""
    written: list[str] = []
    monkeypatch.setattr(cgroups, "read", lambda path: listed)
    monkeypatch.setattr(cgroups, "write", lambda path, text: written.append(path))
    cgroups._procs_of.cache_clear()
    try:
        assert not cgroups.pass_grace()
    finally:
        cgroups._procs_of.cache_clear()
    assert written == []


def test_a_group_that_takes_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, text: str) -> None:
        raise PermissionError(13, "permission denied", path)

    monkeypatch.setattr(cgroups, "write", refuse)
    assert not cgroups.pass_grace()
