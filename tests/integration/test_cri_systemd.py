"""Containers in scopes that systemd makes, below the slices of a kubelet: limits, numbers, out of memory, clean-up."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.linux import cgroups
from tests.support.cri import Cri, running_cri
from tests.support.daemon import wait_until

pytestmark = pytest.mark.skipif(
    not os.path.isdir("/run/systemd/system"), reason="systemd is not the init system of this host"
)

MIB = 1 << 20
#: Keeps writing to memory that is its own: a variable of the shell, twice as long each time.
EATER = "x=0123456789abcdef; while :; do x=$x$x; done"


@pytest.fixture(scope="module")
def cri() -> Iterator[Cri]:
    with running_cri('cgroup_driver = "systemd"') as made:
        made.pull()
        yield made


@pytest.fixture
def slices(cri: Cri) -> Iterator[str]:
    """The slice of a pod as a kubelet names it; gone afterwards."""
    top = f"pctr{secrets.token_hex(4)}"
    yield f"{top}-burstable-pod{secrets.token_hex(4)}.slice"
    cri.sweep()
    subprocess.run(["systemctl", "stop", f"{top}.slice"], check=True)
    wait_until(lambda: not cgroups.at(f"/{top}.slice").exists(), "the slices are gone", 30)


@pytest.fixture(scope="module", autouse=True)
def no_failed_units() -> Iterator[None]:
    """What ends, ends without a failed unit."""
    command = ["systemctl", "list-units", "--failed", "--no-legend", "--plain"]
    before = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    yield
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == before


def scopes(container: str) -> str:
    """What systemd knows of the container's scope, also when it failed."""
    command = ["systemctl", "list-units", "--all", "--no-legend", "--plain", f"*{container}*"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def pod_in(cri: Cri, parent: str, **fields: object) -> tuple[str, pb.PodSandboxConfig]:
    config = cri.pod_config(**fields)
    config.linux.cgroup_parent = f"/{parent}" if parent else ""
    return cri.run_pod(config)


def init_pid(cri: Cri, container: str) -> int:
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    return int(json.loads(cri.runtime.ContainerStatus(request, timeout=60).info["info"])["pid"])


def group_in(parent: str, container: str) -> cgroups.Cgroup:
    return cgroups.at(cgroups.systemd_path(parent, "cri-containerd", container))


def control(group: cgroups.Cgroup, name: str) -> str:
    return Path(group.folder("memory"), name).read_text().strip()


needs_v2 = pytest.mark.skipif(cgroups.hierarchy().mode != "v2", reason="the controllers are not in one tree")


def test_the_kubelet_is_told_of_the_driver(cri: Cri) -> None:
    assert cri.runtime.RuntimeConfig(pb.RuntimeConfigRequest(), timeout=60).linux.cgroup_driver == pb.SYSTEMD


@needs_v2
def test_limits_arrive_and_change(cri: Cri, slices: str) -> None:
    pod, config = pod_in(cri, slices)
    wanted = cri.container_config("exec sleep 600")
    wanted.linux.resources.MergeFrom(pb.LinuxContainerResources(
        cpu_shares=512, cpu_quota=50_000, cpu_period=100_000, memory_limit_in_bytes=64 * MIB,
        memory_swap_limit_in_bytes=64 * MIB, cpuset_cpus="0", unified={"memory.high": str(60 * MIB), "pids.max": "77"},
        hugepage_limits=[pb.HugepageLimit(page_size="2MB", limit=0)],
    ))
    container = cri.create(pod, config, wanted)
    cri.start(container)
    group = group_in(slices, container)
    assert cgroups.of_pid(init_pid(cri, container)) == group
    assert group.pids() == [init_pid(cri, container)]
    assert (control(group, "memory.max"), control(group, "memory.high")) == (str(64 * MIB), str(60 * MIB))
    assert control(group, "memory.swap.max") == "0"
    assert (control(group, "cpu.weight"), control(group, "cpu.max")) == ("20", "50000 100000")
    assert (control(group, "pids.max"), control(group, "cpuset.cpus")) == ("77", "0")
    if os.path.isdir("/sys/kernel/mm/hugepages/hugepages-2048kB"):
        assert control(group, "hugetlb.2MB.max") == "0"
    assert f"cri-containerd-{container}.scope" in scopes(container)

    update = pb.UpdateContainerResourcesRequest(container_id=container)
    update.linux.MergeFrom(pb.LinuxContainerResources(
        cpu_shares=1024, cpu_quota=70_000, cpu_period=100_000, memory_limit_in_bytes=96 * MIB,
        memory_swap_limit_in_bytes=128 * MIB,
    ))
    cri.runtime.UpdateContainerResources(update, timeout=120)
    assert (control(group, "memory.max"), control(group, "memory.swap.max")) == (str(96 * MIB), str(32 * MIB))
    assert (control(group, "cpu.weight"), control(group, "cpu.max")) == ("39", "70000 100000")
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    assert (control(group, "memory.max"), control(group, "cpu.max")) == (str(96 * MIB), "70000 100000")
    assert control(group, "pids.max") == "77"


def test_numbers_come_from_the_scope_and_the_slice(cri: Cri, slices: str) -> None:
    pod, config = pod_in(cri, slices)
    container = cri.run(pod, config, "head -c 8000000 /dev/zero > /tmp/file; exec sleep 600")
    wait_until(lambda: cri.exec(container, "ps").stdout.count(b"sleep 600"), "the file is written", 60)
    stats = cri.runtime.ContainerStats(pb.ContainerStatsRequest(container_id=container), timeout=60).stats
    assert stats.cpu.usage_core_nano_seconds.value > 0
    assert stats.memory.usage_bytes.value > 4_000_000
    told = cri.runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=pod), timeout=60).stats.linux
    assert told.memory.usage_bytes.value >= stats.memory.usage_bytes.value
    assert told.process.process_count.value == 1
    assert [entry.attributes.id for entry in told.containers] == [container]


@pytest.mark.parametrize("again", range(3))
def test_a_container_out_of_memory_is_told_as_such(cri: Cri, slices: str, again: int) -> None:
    pod, config = pod_in(cri, slices)
    wanted = cri.container_config(EATER)
    wanted.linux.resources.memory_limit_in_bytes = wanted.linux.resources.memory_swap_limit_in_bytes = 20 * MIB
    container = cri.create(pod, config, wanted)
    cri.start(container)
    status = cri.wait_exited(container)
    assert (status.reason, status.exit_code) == ("OOMKilled", 137)
    cri.remove(container)
    assert scopes(container) == ""


@needs_v2
def test_a_group_that_dies_together_is_told_once_and_as_such(cri: Cri, slices: str) -> None:
    pod, config = pod_in(cri, slices)
    wanted = cri.container_config(f"sleep 600 & sh -c '{EATER}'; echo survived; sleep 600")
    wanted.linux.resources.memory_limit_in_bytes = wanted.linux.resources.memory_swap_limit_in_bytes = 20 * MIB
    wanted.linux.resources.unified["memory.oom.group"] = "1"
    container = cri.create(pod, config, wanted)
    cri.start(container)
    status = cri.wait_exited(container)
    assert (status.reason, status.exit_code) == ("OOMKilled", 137)
    assert cri.log(config) == []


def test_a_child_out_of_memory_leaves_the_container_running(cri: Cri, slices: str) -> None:
    pod, config = pod_in(cri, slices)
    wanted = cri.container_config(f"sh -c '{EATER}'; echo survived; sleep 600")
    wanted.linux.resources.memory_limit_in_bytes = wanted.linux.resources.memory_swap_limit_in_bytes = 20 * MIB
    container = cri.create(pod, config, wanted)
    cri.start(container)
    wait_until(lambda: [text for _, _, text in cri.log(config) if text == "survived"], "the shell goes on", 60)
    assert cri.status(container).state == pb.CONTAINER_RUNNING
    assert group_in(slices, container).oom_kills() == 1


def test_nothing_is_left_of_what_ended(cri: Cri, slices: str) -> None:
    pod, config = pod_in(cri, slices, pid=pb.POD)
    ends = cri.run(pod, config, "exit 3", name="ends")
    stays = cri.run(pod, config, "exec sleep 600", name="stays", pid=pb.POD)
    assert cri.exec(stays, "cat", "/proc/self/cgroup").exit_code == 0
    assert cri.wait_exited(ends).exit_code == 3
    cri.remove_pod(pod)
    for container in (ends, stays):
        wait_until(lambda container=container: not scopes(container), f"systemd forgot {container[:12]}", 30)
        assert not group_in(slices, container).exists()


def test_processes_that_outlive_the_first_are_killed(cri: Cri, slices: str) -> None:
    pod, config = pod_in(cri, slices, pid=pb.NODE)
    container = cri.run(pod, config, "sleep 7777 & sleep 7778 & exec sleep 600", pid=pb.NODE)
    group = group_in(slices, container)
    wait_until(lambda: len(group.pids()) == 3, "all three run", 60)
    cri.stop(container)
    wait_until(lambda: not group.exists(), "the scope is gone", 30)
    assert scopes(container) == ""


def test_a_pod_without_a_parent_is_in_the_slice_of_the_system(cri: Cri) -> None:
    pod, config = pod_in(cri, "")
    container = cri.run(pod, config, "exec sleep 600")
    assert group_in("system.slice", container).pids() == [init_pid(cri, container)]
    told = cri.runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=pod), timeout=60).stats.linux
    assert told.memory.usage_bytes.value > 0


def test_the_scope_of_a_container_whose_shim_died_is_removed(cri: Cri, slices: str) -> None:
    pod, config = pod_in(cri, slices)
    container = cri.run(pod, config, "exec sleep 600")
    group = group_in(slices, container)
    pid = init_pid(cri, container)
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    status = cri.wait_exited(container)
    assert status.exit_code in (137, 255)
    wait_until(lambda: not group.exists(), "the scope is gone", 60)
    cri.remove_pod(pod)
    wait_until(lambda: not scopes(container), "systemd forgot the scope", 30)


def test_containers_live_on_while_the_daemon_is_killed(cri: Cri, slices: str) -> None:
    pod, config = pod_in(cri, slices)
    stays = cri.run(pod, config, "exec sleep 600", name="stays")
    ends = cri.run(pod, config, "sleep 2; exit 5", name="ends")
    eats = cri.create(pod, config, cri.container_config(f"sleep 2; {EATER}", name="eats", linux=pb.LinuxContainerConfig(
        resources=pb.LinuxContainerResources(memory_limit_in_bytes=20 * MIB, memory_swap_limit_in_bytes=20 * MIB))))
    cri.start(eats)
    cri.daemon.kill()
    wait_until(lambda: not group_in(slices, ends).pids() and not group_in(slices, eats).pids(), "both ended", 60)
    cri.daemon.start()
    cri.connect()
    assert cri.status(stays).state == pb.CONTAINER_RUNNING
    assert cri.wait_exited(ends).exit_code == 5
    assert cri.wait_exited(eats).reason == "OOMKilled"
    cri.remove_pod(pod)
    for container in (stays, ends, eats):
        wait_until(lambda container=container: not scopes(container), f"systemd forgot {container[:12]}", 30)


def test_a_paused_container_can_be_stopped(cri: Cri, slices: str) -> None:
    pod, config = pod_in(cri, slices)
    container = cri.run(pod, config, "exec sleep 600")
    group = group_in(slices, container)
    group.set_frozen(True)
    wait_until(group.is_frozen, "it stands still", 30)
    cri.stop(container)
    assert cri.status(container).exit_code == 137
    wait_until(lambda: not group.exists(), "the scope is gone", 30)
