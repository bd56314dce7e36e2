"""ListPodSandboxMetrics: cAdvisor's metrics from one reading of the control groups."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import metric_names, stats
from supervisord_ctr.cri.core import Core
from supervisord_ctr.cri.images import snapshot_folder
from supervisord_ctr.cri.state import Container, Pod
from supervisord_ctr.linux import cgroups

_NANO = 1_000_000_000
_NO_LIMIT = 1 << 62
_V2_IO = (("reads_bytes", "rbytes"), ("writes_bytes", "wbytes"), ("reads", "rios"), ("writes", "wios"))
_ULIMIT_SOFT = (("Max open files", "max_open_files"), ("Max processes", "max_processes"))


@dataclass(frozen=True)
class Processes:
    """What /proc says of the processes of a container."""

    processes: int = 0
    threads: int = 0
    descriptors: int = 0
    sockets: int = 0
    ulimits: tuple[tuple[str, int], ...] = ()


def look_at_processes(pids: Iterable[int]) -> Processes:
    """Count threads, descriptors and sockets; a process that ends meanwhile counts for nothing. Blocking."""
    processes = threads = descriptors = sockets = 0
    ulimits: tuple[tuple[str, int], ...] = ()
    for pid in pids:
        with contextlib.suppress(OSError):
            threads += len(os.listdir(f"/proc/{pid}/task"))
            processes += 1
            if not ulimits:
                ulimits = tuple(_ulimits(pid))
            for name in os.listdir(f"/proc/{pid}/fd"):
                descriptors += 1
                with contextlib.suppress(OSError):
                    sockets += os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
    return Processes(processes, threads, descriptors, sockets, ulimits)


def _ulimits(pid: int) -> Iterator[tuple[str, int]]:
    with open(f"/proc/{pid}/limits", encoding="ascii") as handle:
        for line in handle:
            for words, name in _ULIMIT_SOFT:
                if line.startswith(words):
                    soft = line[len(words):].split()[0]
                    if soft.isdigit():
                        yield name, int(soft)


class _Metrics:
    """Collects metrics with the same first labels."""

    def __init__(self, labels: tuple[str, ...], at: int) -> None:
        self.found: list[pb.Metric] = []
        self._labels = labels
        self._at = at

    def add(self, name: str, value: int, *labels: str) -> None:
        kind = pb.GAUGE if name in metric_names.GAUGES else pb.COUNTER
        self.found.append(pb.Metric(
            name=name, timestamp=self._at, metric_type=kind, label_values=[*self._labels, *labels],
            value=pb.UInt64Value(value=max(0, min(value, (1 << 64) - 1))),
        ))


def _cpu(metrics: _Metrics, reading: stats.Reading) -> None:
    if reading.v2:
        usage = {key: reading.number("cpu", f"{key}_usec") * 1000 for key in ("usage", "user", "system")}
        throttled = reading.number("cpu", "throttled_usec") * 1000
        periods, times = reading.number("cpu", "nr_periods"), reading.number("cpu", "nr_throttled")
    else:
        usage = {
            "usage": reading.number("cpu", "usage", "total"), "user": reading.number("cpu", "usage", "user"),
            "system": reading.number("cpu", "usage", "kernel"),
        }
        throttled = reading.number("cpu", "throttling", "throttled_time")
        periods = reading.number("cpu", "throttling", "periods")
        times = reading.number("cpu", "throttling", "throttled_periods")
    for key, value in usage.items():
        metrics.add(f"container_cpu_{key}_seconds_total", value // _NANO)
    metrics.add("container_cpu_cfs_periods_total", periods)
    metrics.add("container_cpu_cfs_throttled_periods_total", times)
    metrics.add("container_cpu_cfs_throttled_seconds_total", throttled // _NANO)


def _memory(metrics: _Metrics, reading: stats.Reading) -> None:
    def number(v1: tuple[str, ...], v2: str) -> int:
        return reading.number("memory", v2) if reading.v2 else reading.number("memory", *v1)

    v1_swap = max(0, reading.number("memory", "swap", "usage") - reading.number("memory", "usage", "usage"))
    metrics.add("container_memory_cache", number(("total_cache",), "file"))
    metrics.add("container_memory_rss", number(("total_rss",), "anon"))
    metrics.add("container_memory_kernel_usage", number(("kernel", "usage"), "kernel_stack"))
    metrics.add("container_memory_mapped_file", number(("total_mapped_file",), "file_mapped"))
    metrics.add("container_memory_swap", reading.number("memory", "swap_usage") if reading.v2 else v1_swap)
    metrics.add("container_memory_failcnt", 0 if reading.v2 else reading.number("memory", "usage", "failcnt"))
    metrics.add("container_memory_usage_bytes", stats.memory_usage(reading))
    metrics.add("container_memory_max_usage_bytes", number(("usage", "max"), "max_usage"))
    metrics.add("container_memory_working_set_bytes", stats.working_set(reading))
    metrics.add("container_memory_total_active_file_bytes", number(("total_active_file",), "active_file"))
    metrics.add("container_memory_total_inactive_file_bytes", number(("total_inactive_file",), "inactive_file"))
    metrics.add("container_memory_failures_total", number(("pg_fault",), "pgfault"), "pgfault", "container")
    metrics.add("container_memory_failures_total", number(("pg_maj_fault",), "pgmajfault"), "pgmajfault", "container")


def _pressure(metrics: _Metrics, reading: stats.Reading) -> None:
    for part in ("cpu", "memory", "io"):
        psi = reading.part(part, "psi")
        if psi:
            for kind, word in (("full", "stalled"), ("some", "waiting")):
                total = int(psi.get(kind, {}).get("total", 0))
                metrics.add(f"container_pressure_{part}_{word}_seconds_total", total // 1_000_000)


def _disk(metrics: _Metrics, reading: stats.Reading) -> None:
    if reading.v2:
        for entry in reading.part("io", "usage") or ():
            device = f"{entry['major']}:{entry['minor']}"
            for name, key in _V2_IO:
                metrics.add(f"container_fs_{name}_total", entry[key], device)
            for operation, key in (("Read", "rbytes"), ("Write", "wbytes")):
                metrics.add(
                    "container_blkio_device_usage_total", entry[key], device, str(entry["major"]), str(entry["minor"]),
                    operation,
                )
        return
    for entry in reading.part("blkio", "io_service_bytes_recursive") or ():
        metrics.add(
            "container_blkio_device_usage_total", entry["value"], entry["device"], str(entry["major"]),
            str(entry["minor"]), entry["op"],
        )
        if entry["op"].lower() in ("read", "write"):
            metrics.add(f"container_fs_{entry['op'].lower()}s_bytes_total", entry["value"], entry["device"])
    for entry in reading.part("blkio", "io_serviced_recursive") or ():
        if entry["op"].lower() in ("read", "write"):
            metrics.add(f"container_fs_{entry['op'].lower()}s_total", entry["value"], entry["device"])


def _spec(metrics: _Metrics, container: Container) -> None:
    resources = container.resources or pb.LinuxContainerResources()
    for name, value in (
        ("cpu_period", resources.cpu_period), ("cpu_shares", resources.cpu_shares),
        ("memory_limit_bytes", resources.memory_limit_in_bytes),
        ("memory_swap_limit_bytes", resources.memory_swap_limit_in_bytes), ("memory_reservation_limit_bytes", 0),
    ):
        metrics.add(f"container_spec_{name}", value)
    if resources.cpu_quota > 0:
        metrics.add("container_spec_cpu_quota", resources.cpu_quota)


def _processes(metrics: _Metrics, reading: stats.Reading, found: Processes) -> None:
    limit = reading.number("pids", "limit")
    metrics.add("container_processes", found.processes)
    metrics.add("container_threads", found.threads)
    metrics.add("container_threads_max", limit if limit < _NO_LIMIT else 0)
    metrics.add("container_file_descriptors", found.descriptors)
    metrics.add("container_sockets", found.sockets)
    for name, value in found.ulimits:
        metrics.add("container_ulimits_soft", value, name)


def _file_system(metrics: _Metrics, core: Core, container: Container) -> None:
    usage, _ = core.stats.layer(container.id)
    try:
        about = os.statvfs(snapshot_folder(core, container.snapshotter))
    except OSError:
        return
    for name, value in (
        ("usage_bytes", usage.size), ("limit_bytes", about.f_blocks * about.f_frsize), ("inodes_total", about.f_files),
        ("inodes_free", about.f_ffree),
    ):
        metrics.add(f"container_fs_{name}", value, "/")


def _huge_pages(metrics: _Metrics, reading: stats.Reading) -> None:
    for entry in reading.part("hugetlb") or ():
        size = str(entry.get("pagesize", ""))
        metrics.add("container_hugetlb_usage_bytes", int(entry.get("current" if reading.v2 else "usage", 0)), size)
        metrics.add("container_hugetlb_max_usage_bytes", int(entry.get("max", 0)), size)


def _container(
    core: Core, pod: Pod, container: Container, reading: stats.Reading, found: Processes, kills: int
) -> pb.ContainerMetrics:
    image = container.config.image.user_specified_image or container.image_name
    metadata = pod.config.metadata
    metrics = _Metrics(
        (metadata.name, metadata.namespace, container.config.metadata.name, container.id, image), reading.at
    )
    metrics.add("container_last_seen", int(time.time()))
    metrics.add("container_start_time_seconds", container.started_at // _NANO)
    _cpu(metrics, reading)
    _memory(metrics, reading)
    metrics.add("container_oom_events_total", kills)
    _pressure(metrics, reading)
    _disk(metrics, reading)
    _file_system(metrics, core, container)
    _processes(metrics, reading, found)
    _huge_pages(metrics, reading)
    _spec(metrics, container)
    return pb.ContainerMetrics(container_id=container.id, metrics=metrics.found)


_COUNTERS = (
    ("receive_bytes", 0), ("receive_packets", 1), ("receive_errors", 2), ("receive_packets_dropped", 3),
    ("transmit_bytes", 8), ("transmit_packets", 9), ("transmit_errors", 10), ("transmit_packets_dropped", 11),
)


def _network(pod: Pod, interfaces: dict[str, list[int]]) -> list[pb.Metric]:
    metadata = pod.config.metadata
    metrics = _Metrics((metadata.name, metadata.namespace, "", pod.id, ""), time.time_ns())
    for interface, values in sorted(interfaces.items()):
        for name, index in _COUNTERS:
            metrics.add(f"container_network_{name}_total", values[index], interface)
    return metrics.found


async def list_metrics(core: Core) -> list[pb.PodSandboxMetrics]:
    """Metrics of every ready pod."""
    readings = await stats.read_pods(core, [pod for pod in core.state.pods() if pod.ready], everything=True)
    groups: list[cgroups.Cgroup] = [
        cgroups.of_runtime_path(container.cgroup) for read in readings for container, reading in read.containers
        if reading is not None
    ]

    def look() -> list[tuple[Processes, int]]:
        found = []
        for group in groups:
            try:
                found.append((look_at_processes(group.pids()), group.oom_kills()))
            except OSError:
                found.append((Processes(), 0))
        return found

    looked = iter(await core.executors.run_io(look))
    result: list[pb.PodSandboxMetrics] = []
    for read in readings:
        message = pb.PodSandboxMetrics(
            pod_sandbox_id=read.pod.id, metrics=_network(read.pod, dict(read.interfaces))
        )
        for container, reading in read.containers:
            if reading is not None:
                found, kills = next(looked)
                message.container_metrics.append(_container(core, read.pod, container, reading, found, kills))
        result.append(message)
    return result
