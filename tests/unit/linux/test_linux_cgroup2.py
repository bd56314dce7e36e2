"""Control groups of version 2: on a tree of the kernel's where it needs no controllers, else on one of plain files.

The kernel has one tree of version 2 whatever the machine uses; mounting it once more shows it on any machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisord_ctr.api.cgroups.v2 import metrics_pb2
from supervisord_ctr.linux import cgroups, mounts
from tests.support.daemon import wait_until


def arranged_as_v2(monkeypatch: pytest.MonkeyPatch, top: Path) -> None:
    """Let the module see a machine with nothing but the v2 tree at `top`."""
    monkeypatch.setattr(cgroups, "hierarchy", lambda: cgroups.Hierarchy("v2", {}, str(top)))


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The path of a group of the test's own in the kernel's tree, which does not exist yet."""
    mounts.mount("cgroup2", str(tmp_path), "cgroup2", 0, "")
    arranged_as_v2(monkeypatch, tmp_path)
    parent = f"/test-{secrets.token_hex(4)}"
    try:
        yield f"{parent}/c1"
    finally:
        with contextlib.suppress(FileNotFoundError):
            group = cgroups.at(parent)
            group.signal_all(signal.SIGKILL)
            wait_until(lambda: not group.populated(), "the group to be empty")
            group.delete()
        mounts.umount(str(tmp_path), mounts.MNT_DETACH)


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that do nothing."""
    made = [subprocess.Popen(["/bin/sleep", "1000"]) for _ in range(2)]
    yield made
    for process in made:
        process.kill()
        process.wait(60)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cgroups.Cgroup:
    """A group of plain files in a tree of plain files."""
    arranged_as_v2(monkeypatch, tmp_path)
    (tmp_path / "pod" / "c1").mkdir(parents=True)
    return cgroups.at("/pod/c1")


def test_a_group_is_made_with_its_parents_and_removed(path: str) -> None:
    group = cgroups.create(path)
    assert group.is_v2
    assert group.exists()
    assert group == cgroups.create(path)
    assert group.folder("memory") == group.folder("freezer") == group.folders[""]
    assert cgroups.folders_to_join(path) == [group.folders[""]]
    assert not group.populated()
    group.delete()
    group.delete()
    assert not group.exists()
    with pytest.raises(FileNotFoundError, match="control group is gone"):
        group.metrics()
    with pytest.raises(FileNotFoundError, match=path):
        cgroups.folders_to_join(path)


def test_processes_are_found_where_they_were_put(path: str, sleepers: list[subprocess.Popen[bytes]]) -> None:
    group, first, second = (cgroups.create(path + name) for name in ("", "/first", "/second"))
    first.add(sleepers[0].pid)  # a group that hands controllers down takes no processes itself
    cgroups.join(cgroups.folders_to_join(f"{path}/second"), sleepers[1].pid)
    assert group.pids() == sorted(process.pid for process in sleepers)
    assert second.pids() == [sleepers[1].pid]
    assert group.populated()
    assert cgroups.of_pid(sleepers[1].pid).folders[""].endswith(f"{path}/second")
    with pytest.raises(OSError, match="processes are in the control group"):
        cgroups.remove_empty(path)
    message = metrics_pb2.Metrics(**group.metrics())  # type: ignore[arg-type]
    assert message.HasField("cpu")


def test_a_kill_reaches_the_whole_tree_at_once(path: str, sleepers: list[subprocess.Popen[bytes]]) -> None:
    group = cgroups.create(path)
    for process, name in zip(sleepers, ("first", "second"), strict=True):
        cgroups.create(f"{path}/{name}").add(process.pid)
    assert os.path.exists(f"{group.folders['']}/cgroup.kill")
    assert group.signal_all(signal.SIGKILL) == 2
    assert [process.wait(60) for process in sleepers] == [-signal.SIGKILL] * 2
    wait_until(lambda: not group.populated(), "the group to be empty")
    assert cgroups.remove_empty(path) == [group.folders[""]]
    assert group.signal_all(signal.SIGKILL) == 0


def test_other_signals_reach_each_process(path: str, sleepers: list[subprocess.Popen[bytes]]) -> None:
    group = cgroups.create(path)
    for process in sleepers:
        group.add(process.pid)
    assert group.signal_all(signal.SIGTERM) == 2
    assert [process.wait(60) for process in sleepers] == [-signal.SIGTERM] * 2


def test_a_frozen_group_stands_still_and_can_be_killed(path: str, sleepers: list[subprocess.Popen[bytes]]) -> None:
    group = cgroups.create(path)
    for process in sleepers:
        group.add(process.pid)
    assert not group.is_frozen()
    group.set_frozen(True)
    wait_until(group.is_frozen, "the group to be frozen")
    group.set_frozen(False)
    wait_until(lambda: not group.is_frozen(), "the group to be thawed")
    group.set_frozen(True)
    wait_until(group.is_frozen, "the group to be frozen again")
    group.signal_all(signal.SIGKILL)  # version 2 needs no thaw for it
    assert [process.wait(60) for process in sleepers] == [-signal.SIGKILL] * 2


def test_p13_kills_for_memory_are_counted_and_their_level_is_told(files: cgroups.Cgroup, tmp_path: Path) -> None:
    folder = Path(files.folders[""])
    assert (files.oom_kills(), files.oom_level()) == (0, "node")
    (folder / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 2\noom_kill 3\noom_group_kill 0\n")
    assert (files.oom_kills(), files.oom_level()) == (3, "node")
    (tmp_path / "pod" / "memory.events.local").write_text("low 0\nmax 4\noom 1\noom_kill 0\n")
    assert files.oom_level() == "pod"
    (folder / "memory.events.local").write_text("low 0\nmax 7\noom 2\noom_kill 3\n")
    assert files.oom_level() == "container"


def test_p13_kills_for_memory_wake_who_watches(files: cgroups.Cgroup) -> None:
    with pytest.raises(FileNotFoundError):
        files.watch_oom()
    events = Path(files.folders[""]) / "memory.events"
    events.write_text("oom_kill 0\n")
    fd = files.watch_oom()
    try:
        assert select.select([fd], [], [], 0)[0] == []
        events.write_text("oom_kill 1\n")
        assert select.select([fd], [], [], 60)[0] == [fd]
        assert os.read(fd, 4096)
        assert files.oom_kills() == 1
    finally:
        os.close(fd)


def test_controllers_are_handed_down_to_new_groups(files: cgroups.Cgroup, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "pod"):
        (folder / "cgroup.controllers").write_text("cpu memory pids\n")
        (folder / "cgroup.subtree_control").write_text("")
    made = cgroups.create("/pod/c2")
    assert os.path.isdir(made.folders[""])
    # One write for each: a controller that cannot be enabled keeps none of the others back.
    assert (tmp_path / "pod" / "cgroup.subtree_control").read_text() == "+pids" + "ry"


def test_a_group_without_a_kill_file_is_frozen_and_killed_one_by_one(
    files: cgroups.Cgroup, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    folder = Path(files.folders[""])
    (folder / "cgroup.procs").write_text("".join(f"{process.pid}\n" for process in sleepers))
    (folder / "cgroup.freeze").write_text("0")
    assert files.signal_all(signal.SIGKILL) == 2
    assert [process.wait(60) for process in sleepers] == [-signal.SIGKILL] * 2
    assert (folder / "cgroup.freeze").read_text() == "0"
