"""Out-of-memory kills of groups that stay and of groups that are gone when they are asked, on a tree of plain files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pctr_shim.oom import OomCount

from supervisord_ctr.linux import cgroups


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pod's group with two containers in it, in which two processes were killed before."""
    monkeypatch.setattr(cgroups, "hierarchy", lambda: cgroups.Hierarchy("v2", {}, str(tmp_path)))
    for name in ("pod/c1", "pod/c2"):
        (tmp_path / name).mkdir(parents=True)
        kills(tmp_path / name, 0)
    kills(tmp_path / "pod", 2)
    return tmp_path / "pod"


def kills(folder: Path, number: int) -> None:
    (folder / "memory.events").write_text(f"low 0\nmax 9\noom {number}\noom_kill {number}\n")


def test_a_group_that_is_there_tells_itself(pod: Path) -> None:
    count = OomCount(cgroups.at("/pod/c1"), {})
    assert not count.update()
    kills(pod / "c1", 2)
    kills(pod, 4)
    (pod / "c1" / "memory.events.local").write_text("oom 1\n")
    assert count.update()
    assert (count.kills, count.level) == (2, "container")
    assert not count.update(killed=True)


def test_the_parent_tells_of_a_group_that_is_gone(pod: Path) -> None:
    told: dict[str, int] = {}
    first, second = (OomCount(cgroups.at(f"/pod/{name}"), told) for name in ("c1", "c2"))
    kills(pod, 3)
    shutil.rmtree(pod / "c1")
    assert not first.update(), "it is not known yet how the process ended"
    assert first.update(killed=True)
    assert (first.kills, first.level) == (1, "container")
    shutil.rmtree(pod / "c2")
    assert not second.update(killed=True), "the kill was the first one's"
    assert (second.kills, second.level) == (0, "")


def test_kills_that_others_told_of_are_theirs(pod: Path) -> None:
    told: dict[str, int] = {}
    first, second = (OomCount(cgroups.at(f"/pod/{name}"), told) for name in ("c1", "c2"))
    kills(pod / "c2", 1)
    kills(pod, 3)
    assert second.update()
    shutil.rmtree(pod / "c1")
    assert not first.update(killed=True)


def test_the_limit_may_have_been_the_pods(pod: Path) -> None:
    count = OomCount(cgroups.at("/pod/c1"), {})
    kills(pod, 3)
    (pod / "memory.events.local").write_text("oom 1\n")
    shutil.rmtree(pod / "c1")
    assert count.update(killed=True)
    assert (count.kills, count.level) == (1, "pod")


def test_groups_of_version_1_count_for_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "hierarchy", lambda: cgroups.Hierarchy("v1", {"memory": str(tmp_path)}, ""))
    (tmp_path / "c1").mkdir()
    count = OomCount(cgroups.at("/c1"), {})
    (tmp_path / "c1" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert count.update()
    (tmp_path / "c1" / "memory.oom_control").unlink()
    (tmp_path / "c1").rmdir()
    assert not count.update(killed=True)
    assert count.kills == 1
