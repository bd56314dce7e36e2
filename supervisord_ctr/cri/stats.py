"""Stats of containers and pods, read centrally from the kernel's files (P11).

One list call reads the control groups of all containers in one visit to a thread, without asking a
shim. What a writable layer holds cannot be read off anywhere, so a paced background pass measures
it and calls get the last result; layers of images are accounted by the snapshotter.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri.state import Container, Pod, matches_labels
from supervisord_ctr.linux import cgroup_metrics, cgroups, namespaces
from supervisord_ctr.model import SnapshotKind, Usage
from supervisord_ctr.names import CRI_NAMESPACE

if TYPE_CHECKING:
    from supervisord_ctr.cri.core import Core

log = logging.getLogger(__name__)

#: Between two passes over writable layers in seconds: at least this, and this many times what a pass took.
_PAUSE, _PAUSE_FACTOR = 10.0, 50.0
#: Nanoseconds between two samples that make a rate.
_RATE_GAP = 1_000_000_000
_NO_LIMIT = 1 << 62
_USER_TICK = 1000
#: Controllers of cgroup v1 that stats tell of; metrics tell of more.
_TOLD_V1 = frozenset({"pids", "cpuacct", "memory"})


@dataclass
class _CpuSample:
    at: int
    total: int
    rate: int = 0


@dataclass
class StatsCollector:
    """Samples for rates, and measured layers by container ID."""

    layers: dict[str, Usage] = field(default_factory=dict)
    images: Usage = field(default_factory=Usage)
    _cpu: dict[str, _CpuSample] = field(default_factory=dict)
    _measured_at: dict[str, int] = field(default_factory=dict)
    _final: set[str] = field(default_factory=set)

    def forget(self, container_id: str) -> None:
        """The container is gone."""
        for known in (self.layers, self._cpu, self._measured_at):
            known.pop(container_id, None)
        self._final.discard(container_id)

    def rate(self, key: str, at: int, total: int) -> int:
        """Nanoseconds of processor time a second since the sample before, the last rate when that is too near."""
        known = self._cpu.get(key)
        if known is None or total < known.total:
            self._cpu[key] = _CpuSample(at, total)
            return 0
        if at - known.at < _RATE_GAP:
            return known.rate
        rate = (total - known.total) * 1_000_000_000 // (at - known.at)
        self._cpu[key] = _CpuSample(at, total, rate)
        return rate

    def layer(self, container_id: str) -> tuple[Usage, int]:
        """What the writable layer held when it was measured last, and when (0: not yet)."""
        return self.layers.get(container_id, Usage()), self._measured_at.get(container_id, 0)

    async def measure_new(self, core: Core, containers: Iterable[Container]) -> None:
        """Measure layers that were never looked at: those of containers that just started, which hold little."""
        for container in containers:
            if container.id not in self.layers and container.running:
                await self._measure_one(core, container)

    async def run(self, core: Core) -> None:
        """Measure layers, again and again, until cancelled."""
        while True:
            begun = time.monotonic()
            try:
                await self.measure(core)
            except errors.Error as error:
                log.warning("layers could not be measured: %s", error.message)
            await asyncio.sleep(max(_PAUSE, (time.monotonic() - begun) * _PAUSE_FACTOR))

    async def measure(self, core: Core) -> None:
        """One pass: the writable layers of containers that run or just ended, and the sum of all layers."""
        for container in core.state.containers():
            if container.stage in ("creating", "created") or container.id in self._final:
                continue
            await self._measure_one(core, container)
            if container.stage == "exited":
                self._final.add(container.id)
        size = inodes = 0
        snapshotter = core.database.snapshotter(core.settings.snapshots.default)
        for info in await snapshotter.walk(CRI_NAMESPACE):
            if info.kind == SnapshotKind.COMMITTED:
                try:
                    usage = await snapshotter.usage(CRI_NAMESPACE, info.name)
                except errors.NotFound:
                    continue
                size, inodes = size + usage.size, inodes + usage.inodes
        for usage in self.layers.values():
            size, inodes = size + usage.size, inodes + usage.inodes
        self.images = Usage(size, inodes)


    async def _measure_one(self, core: Core, container: Container) -> None:
        try:
            snapshotter = core.database.snapshotter(container.snapshotter)
            usage = await snapshotter.usage(CRI_NAMESPACE, container.id)
        except errors.NotFound:
            return
        self.layers[container.id], self._measured_at[container.id] = usage, time.time_ns()


def pod_group(pod: Pod) -> cgroups.Cgroup | None:
    """The control group that the kubelet made for the pod, None without one."""
    parent = pod.config.linux.cgroup_parent
    if not parent:
        return None
    if parent.endswith(".slice") and "/" not in parent:
        # A slice is below the slices that its name begins with.
        return cgroups.at(os.path.dirname(cgroups.systemd_path(parent, "", "any")))
    return cgroups.at(parent)


@dataclass(frozen=True)
class Reading:
    """One control group, read: fields of the metrics message of its version."""

    at: int
    v2: bool
    fields: Mapping[str, Any]

    def part(self, *names: str) -> Any:
        """A nested field, {} or 0 standing in for what is not there."""
        value: Any = self.fields
        for name in names:
            value = value.get(name, {}) if isinstance(value, Mapping) else {}
        return value

    def number(self, *names: str) -> int:
        """A nested number."""
        value = self.part(*names)
        return int(value) if isinstance(value, int | float) else 0


def read_group(group: cgroups.Cgroup, *, everything: bool = False) -> Reading | None:
    """Read a control group, None when it is gone; without `everything` what no stats message tells is left out.

    Blocking. A node has hundreds of groups, and most of the files of one are of no interest to stats.
    """
    try:
        if everything or group.is_v2:
            return Reading(time.time_ns(), group.is_v2, group.metrics())
        folders = {name: folder for name, folder in group.folders.items() if name in _TOLD_V1 and os.path.isdir(folder)}
        return Reading(time.time_ns(), False, cgroup_metrics.legacy(folders, _read_told)) if folders else None
    except (OSError, ValueError):
        return None


def _read_container(container: Container, *, everything: bool = False) -> Reading | None:
    return read_group(cgroups.of_runtime_path(container.cgroup), everything=everything) if container.cgroup else None


def _read_told(path: str) -> str:
    """A control file, unless it is about memory that the kernel itself uses."""
    return "" if "/memory.kmem." in path else cgroups.read(path)


def _value(number: int) -> pb.UInt64Value:
    return pb.UInt64Value(value=max(0, number))


def _psi(reading: Reading, part: str) -> pb.PsiStats | None:
    found = reading.part(part, "psi")
    if not found:
        return None
    message = pb.PsiStats()
    for name, target in (("full", message.Full), ("some", message.Some)):
        values = found.get(name, {})
        target.Total = int(values.get("total", 0))
        target.Avg10, target.Avg60, target.Avg300 = (float(values.get(key, 0)) for key in ("avg10", "avg60", "avg300"))
    return message


def cpu_total(reading: Reading) -> int:
    """Processor time used, in nanoseconds."""
    return reading.number("cpu", "usage_usec") * _USER_TICK if reading.v2 else reading.number("cpu", "usage", "total")


def working_set(reading: Reading) -> int:
    """Memory in use without what the kernel would drop first."""
    if reading.v2:
        return max(0, reading.number("memory", "usage") - reading.number("memory", "inactive_file"))
    return max(0, reading.number("memory", "usage", "usage") - reading.number("memory", "total_inactive_file"))


def memory_usage(reading: Reading) -> int:
    """Memory charged to the group."""
    return reading.number("memory", "usage") if reading.v2 else reading.number("memory", "usage", "usage")


def memory_limit(reading: Reading) -> int:
    """The limit, 0 for none."""
    limit = reading.number("memory", "usage_limit") if reading.v2 else reading.number("memory", "usage", "limit")
    return limit if 0 < limit < _NO_LIMIT else 0


def _cpu(collector: StatsCollector, key: str, reading: Reading) -> pb.CpuUsage:
    total = cpu_total(reading)
    return pb.CpuUsage(
        timestamp=reading.at, usage_core_nano_seconds=_value(total),
        usage_nano_cores=_value(collector.rate(key, reading.at, total)), psi=_psi(reading, "cpu"),
    )


def _memory(reading: Reading) -> pb.MemoryUsage:
    used, limit = working_set(reading), memory_limit(reading)
    prefix = "" if reading.v2 else "total_"
    return pb.MemoryUsage(
        timestamp=reading.at, working_set_bytes=_value(used), usage_bytes=_value(memory_usage(reading)),
        available_bytes=_value(limit - used if limit else 0),
        rss_bytes=_value(reading.number("memory", "anon" if reading.v2 else "total_rss")),
        page_faults=_value(reading.number("memory", "pgfault" if reading.v2 else f"{prefix}pg_fault")),
        major_page_faults=_value(reading.number("memory", "pgmajfault" if reading.v2 else f"{prefix}pg_maj_fault")),
        psi=_psi(reading, "memory"),
    )


def _swap(reading: Reading) -> pb.SwapUsage:
    if reading.v2:
        used, limit = reading.number("memory", "swap_usage"), reading.number("memory", "swap_limit")
    else:
        used = max(0, reading.number("memory", "swap", "usage") - reading.number("memory", "usage", "usage"))
        total, memory = reading.number("memory", "swap", "limit"), reading.number("memory", "usage", "limit")
        limit = max(0, total - memory) if total < _NO_LIMIT else _NO_LIMIT
    return pb.SwapUsage(
        timestamp=reading.at, swap_usage_bytes=_value(used),
        swap_available_bytes=_value(limit - used if limit < _NO_LIMIT else 0),
    )


def container_stats(core: Core, container: Container, reading: Reading | None) -> pb.ContainerStats:
    """The message; without a reading (a container that does not run) it holds the layer alone."""
    stats = pb.ContainerStats(attributes=pb.ContainerAttributes(
        id=container.id, metadata=container.config.metadata, labels=container.config.labels,
        annotations=container.config.annotations,
    ))
    usage, measured = core.stats.layer(container.id)
    stats.writable_layer.CopyFrom(pb.FilesystemUsage(
        timestamp=measured or time.time_ns(), used_bytes=_value(usage.size), inodes_used=_value(usage.inodes),
        fs_id=pb.FilesystemIdentifier(mountpoint=_mountpoint(core, container.snapshotter)),
    ))
    if reading is not None:
        stats.cpu.CopyFrom(_cpu(core.stats, container.id, reading))
        stats.memory.CopyFrom(_memory(reading))
        stats.swap.CopyFrom(_swap(reading))
        stats.io.CopyFrom(pb.IoUsage(timestamp=reading.at, psi=_psi(reading, "io")))
    return stats


def _mountpoint(core: Core, snapshotter: str) -> str:
    from supervisord_ctr.cri.images import snapshot_folder

    return snapshot_folder(core, snapshotter)


async def read_containers(core: Core, containers: Iterable[Container]) -> list[tuple[Container, Reading | None]]:
    """Read the groups of all containers that run, in one go on one thread."""
    wanted = list(containers)

    def read() -> list[Reading | None]:
        return [_read_container(item) if item.running else None for item in wanted]

    return list(zip(wanted, await core.executors.run_io(read), strict=True))


async def one_container(core: Core, identity: str) -> pb.ContainerStats:
    """Stats of one running container; raises `NotFound` or `FailedPrecondition`."""
    container = core.state.container(identity)
    if not container.running:
        raise errors.FailedPrecondition(
            f"container {container.id!r} is in {pb.ContainerState.Name(container.state)} state", kind="container",
            key=container.id,
        )
    await core.stats.measure_new(core, [container])
    [(_, reading)] = await read_containers(core, [container])
    return container_stats(core, container, reading)


async def list_containers(core: Core, wanted: pb.ContainerStatsFilter) -> list[pb.ContainerStats]:
    """Stats of the containers that match; those that do not run are left out, as nothing can be read of them."""
    from supervisord_ctr.cri.container_report import select_containers

    found = select_containers(core, wanted.id, wanted.pod_sandbox_id, wanted.label_selector)
    running = [container for container in found if container.running]
    await core.stats.measure_new(core, running)
    return [container_stats(core, container, reading) for container, reading in await read_containers(core, running)]


def read_interfaces(path: str) -> dict[str, list[int]]:
    """Counters of every interface but `lo` in a network namespace ("": the host's), as proc(5) has them. Blocking."""

    def read() -> str:
        with open("/proc/thread-self/net/dev", encoding="ascii") as handle:
            return handle.read()

    try:
        text = namespaces.in_netns(path, read) if path else read()
    except OSError:
        return {}
    found: dict[str, list[int]] = {}
    for line in text.splitlines()[2:]:
        name, _, rest = line.partition(":")
        if name.strip() != "lo":
            found[name.strip()] = [int(word) for word in rest.split()]
    return found


def _network(interfaces: Mapping[str, list[int]]) -> pb.NetworkUsage:
    usage = pb.NetworkUsage(timestamp=time.time_ns())
    for name, values in sorted(interfaces.items()):
        entry = pb.NetworkInterfaceUsage(
            name=name, rx_bytes=_value(values[0]), rx_errors=_value(values[2]), tx_bytes=_value(values[8]),
            tx_errors=_value(values[10]),
        )
        if name == "eth0" or (not usage.HasField("default_interface") and len(interfaces) == 1):
            usage.default_interface.CopyFrom(entry)
        else:
            usage.interfaces.append(entry)
    return usage


@dataclass(frozen=True)
class PodReading:
    """What is read for one pod."""

    pod: Pod
    own: Reading | None
    interfaces: Mapping[str, list[int]]
    containers: list[tuple[Container, Reading | None]]


async def read_pods(core: Core, pods: Iterable[Pod], *, everything: bool = False) -> list[PodReading]:
    """Read groups and interfaces of pods and their containers, in one go on one thread; see `read_group`."""
    wanted = [(pod, [item for item in core.state.containers_of(pod.id) if item.running]) for pod in pods]

    def read() -> list[PodReading]:
        found: list[PodReading] = []
        for pod, containers in wanted:
            group = pod_group(pod)
            path = "" if pod.host_network else str(core.environments.namespace(pod.id, "net"))
            found.append(PodReading(
                pod, read_group(group, everything=everything) if group is not None else None,
                {} if pod.host_network else read_interfaces(path),
                [(item, _read_container(item, everything=everything)) for item in containers],
            ))
        return found

    return await core.executors.run_io(read)


def pod_stats(core: Core, read: PodReading) -> pb.PodSandboxStats:
    """The message: the pod's own group where there is one, else the sum of its containers."""
    pod = read.pod
    stats = pb.PodSandboxStats(attributes=pb.PodSandboxAttributes(
        id=pod.id, metadata=pod.config.metadata, labels=pod.config.labels, annotations=pod.config.annotations
    ))
    linux = stats.linux
    linux.containers.extend(container_stats(core, item, reading) for item, reading in read.containers)
    if read.interfaces:
        linux.network.CopyFrom(_network(read.interfaces))
    parts = [reading for _, reading in read.containers if reading is not None]
    readings = [read.own] if read.own is not None else parts
    now = time.time_ns()
    linux.process.CopyFrom(pb.ProcessUsage(
        timestamp=now, process_count=_value(sum(reading.number("pids", "current") for reading in readings))
    ))
    if not readings:
        return stats
    if read.own is not None:
        linux.cpu.CopyFrom(_cpu(core.stats, pod.id, read.own))
        linux.memory.CopyFrom(_memory(read.own))
        linux.io.CopyFrom(pb.IoUsage(timestamp=read.own.at, psi=_psi(read.own, "io")))
        return stats
    total = sum(cpu_total(reading) for reading in readings)
    linux.cpu.CopyFrom(pb.CpuUsage(
        timestamp=now, usage_core_nano_seconds=_value(total),
        usage_nano_cores=_value(core.stats.rate(pod.id, now, total)),
    ))
    linux.memory.timestamp = now
    for memory in (_memory(reading) for reading in readings):
        for name in ("working_set_bytes", "usage_bytes", "rss_bytes", "page_faults", "major_page_faults"):
            getattr(linux.memory, name).value += getattr(memory, name).value
    return stats


async def one_pod(core: Core, identity: str) -> pb.PodSandboxStats:
    """Stats of one pod; raises `NotFound`."""
    [read] = await read_pods(core, [core.state.pod(identity)])
    return pod_stats(core, read)


async def list_pods(core: Core, wanted: pb.PodSandboxStatsFilter) -> list[pb.PodSandboxStats]:
    """Stats of the ready pods that match."""
    if wanted.id:
        pod = core.state.pod_or_none(wanted.id)
        pods: Iterable[Pod] = [] if pod is None else [pod]
    else:
        pods = core.state.pods()
    chosen = [pod for pod in pods if pod.ready and matches_labels(pod.config.labels, wanted.label_selector)]
    return [pod_stats(core, read) for read in await read_pods(core, chosen)]
