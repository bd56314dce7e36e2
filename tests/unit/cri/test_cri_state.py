"""The memory of pods and containers, and its records."""

from __future__ import annotations

import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri.state import CONTAINER_KIND, SANDBOX_KIND, Container, Pod, State
from supervisord_ctr.errors import InvalidArgument, NotFound
from tests.unit.cri.memory import MemoryRecords


def pod(identity: str = "a1", **fields: object) -> Pod:
    config = pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name=identity, uid="u"), labels={"k": "v"})
    return Pod(identity, f"name-{identity}", config, stage="ready", created_at=5, **fields)  # type: ignore[arg-type]


def container(identity: str = "c1", pod_id: str = "a1") -> Container:
    return Container(identity, f"name-{identity}", pod_id, pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name=identity)), stage="created", groups=[1, 2])


def test_records_read_back() -> None:
    made = pod(addresses=["10.0.0.1", "fd00::1"], pause_pid=7, pause_start=8, selinux="u:r:t:s0:c1,c2")
    made.resources = pb.LinuxContainerResources(cpu_shares=3)
    assert Pod.decode(made.encode()) == made
    kept = container()
    kept.resources = pb.LinuxContainerResources(memory_limit_in_bytes=9)
    kept.stage, kept.exit_code, kept.oom, kept.message = "exited", 137, True, "because"
    assert Container.decode(kept.encode()) == kept


async def test_a_restart_reads_what_was_saved() -> None:
    records = MemoryRecords()
    state = State(records)
    for thing in (pod(), pod("b2")):
        state.add_pod(thing)
        await state.save_pod(thing)
    state.add_container(container())
    await state.save_container(state.container("c1"))
    again = State(records)
    await again.load()
    assert [each.id for each in again.pods()] == ["a1", "b2"]
    assert [each.id for each in again.containers_of("a1")] == ["c1"]
    await again.forget_container(again.container("c1"))
    await again.forget_pod(again.pod("a1"))
    assert [key for key in records.kept if key[0] == CONTAINER_KIND] == []
    assert [key[1] for key in records.kept if key[0] == SANDBOX_KIND] == ["b2"]


async def test_a_damaged_record_costs_only_itself() -> None:
    records = MemoryRecords()
    records.kept[SANDBOX_KIND, "broken"] = b"{}"
    await records.put(SANDBOX_KIND, "a1", pod().encode())
    state = State(records)
    await state.load()
    assert [each.id for each in state.pods()] == ["a1"]
    assert records.kept[SANDBOX_KIND, "broken"] == b"{}"


def test_short_ids_work_while_they_are_unique() -> None:
    state = State(MemoryRecords())
    for identity in ("abc1", "abc2", "xyz"):
        state.add_pod(pod(identity))
    assert state.pod("x").id == "xyz"
    assert state.pod("abc1").id == "abc1"
    with pytest.raises(InvalidArgument, match="beginning of 2 ids"):
        state.pod("abc")
    with pytest.raises(NotFound):
        state.pod("nothing")
    with pytest.raises(NotFound):
        state.pod("")


def test_messages_are_built_once_for_each_change() -> None:
    made = pod(addresses=["10.0.0.1", "10.0.0.2"])
    first = made.status()
    assert made.status() is first
    assert first.network.ip == "10.0.0.1"
    assert [entry.ip for entry in first.network.additional_ips] == ["10.0.0.2"]
    made.stage = "stopped"
    made.changed()
    assert made.status().state == pb.SANDBOX_NOTREADY
    assert made.status().network.ip == ""
    assert made.item().labels["k"] == "v"


@pytest.mark.parametrize(("stage", "state"), [
    ("creating", pb.CONTAINER_CREATED), ("created", pb.CONTAINER_CREATED), ("running", pb.CONTAINER_RUNNING),
    ("exited", pb.CONTAINER_EXITED), ("unknown", pb.CONTAINER_UNKNOWN),
])
def test_stages_are_states_of_cri(stage: str, state: int) -> None:
    made = container()
    made.stage = stage
    made.changed()
    assert made.item().state == state
