"""The metrics of pods and containers: names and labels of cAdvisor, which dashboards know, with our words for them."""

from __future__ import annotations

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb

BASE = ("pod", "namespace", "container", "id", "image")
NETWORK = (*BASE, "interface")
DEVICE = (*BASE, "device")
FAILURE = (*BASE, "failure_type", "scope")
BLOCK = (*DEVICE, "major", "minor", "operation")
LIMIT = (*BASE, "ulimit")
PAGES = (*BASE, "pagesize")

_TABLE: dict[tuple[str, ...], dict[str, str]] = {
    BASE: {
        "container_cpu_user_seconds_total": "processor time in user mode, in seconds",
        "container_cpu_system_seconds_total": "processor time in the kernel, in seconds",
        "container_cpu_usage_seconds_total": "processor time, in seconds",
        "container_cpu_cfs_periods_total": "enforcement periods that have passed",
        "container_cpu_cfs_throttled_periods_total": "enforcement periods in which the quota ran out",
        "container_cpu_cfs_throttled_seconds_total": "time spent throttled, in seconds",
        "container_memory_cache": "page cache, in bytes",
        "container_memory_rss": "anonymous memory, in bytes",
        "container_memory_kernel_usage": "memory of the kernel, in bytes",
        "container_memory_mapped_file": "mapped files, in bytes",
        "container_memory_swap": "swap, in bytes",
        "container_memory_failcnt": "times the memory limit was hit (always 0 on cgroup v2)",
        "container_memory_usage_bytes": "all memory charged, in bytes",
        "container_memory_max_usage_bytes": "the most memory charged so far, in bytes",
        "container_memory_working_set_bytes": "memory without inactive page cache, in bytes",
        "container_memory_total_active_file_bytes": "active page cache, in bytes",
        "container_memory_total_inactive_file_bytes": "inactive page cache, in bytes",
        "container_oom_events_total": "processes killed for lack of memory",
        "container_pressure_cpu_stalled_seconds_total": "time in which no task could get a processor, in seconds",
        "container_pressure_cpu_waiting_seconds_total": "time in which some task waited for a processor, in seconds",
        "container_pressure_io_stalled_seconds_total": "time in which all tasks waited for io, in seconds",
        "container_pressure_io_waiting_seconds_total": "time in which some task waited for io, in seconds",
        "container_pressure_memory_stalled_seconds_total": "time in which all tasks waited for memory, in seconds",
        "container_pressure_memory_waiting_seconds_total": "time in which some task waited for memory, in seconds",
        "container_processes": "processes",
        "container_file_descriptors": "open file descriptors",
        "container_sockets": "open sockets",
        "container_threads_max": "most threads allowed, 0 for no limit",
        "container_threads": "threads",
        "container_last_seen": "when the container was seen, in seconds since the epoch",
        "container_start_time_seconds": "when the container started, in seconds since the epoch",
        "container_spec_cpu_period": "processor period of the specification, in microseconds",
        "container_spec_cpu_quota": "processor quota of the specification, in microseconds",
        "container_spec_cpu_shares": "processor shares of the specification",
        "container_spec_memory_limit_bytes": "memory limit of the specification, in bytes",
        "container_spec_memory_reservation_limit_bytes": "memory reservation of the specification, in bytes",
        "container_spec_memory_swap_limit_bytes": "limit of memory and swap of the specification, in bytes",
    },
    NETWORK: {
        f"container_network_{way}_{what}_total": f"{words} {'received' if way == 'receive' else 'sent'}"
        for way in ("receive", "transmit")
        for what, words in (
            ("bytes", "bytes"), ("packets", "packets"), ("packets_dropped", "packets dropped instead of being"),
            ("errors", "errors while packets were"),
        )
    },
    DEVICE: {
        "container_fs_inodes_free": "inodes that are free on the file system",
        "container_fs_inodes_total": "inodes of the file system",
        "container_fs_limit_bytes": "size of the file system, in bytes",
        "container_fs_usage_bytes": "bytes that the container's layer uses",
        "container_fs_reads_bytes_total": "bytes read from the device",
        "container_fs_reads_total": "reads of the device",
        "container_fs_writes_bytes_total": "bytes written to the device",
        "container_fs_writes_total": "writes to the device",
    },
    FAILURE: {"container_memory_failures_total": "page faults, by kind"},
    BLOCK: {"container_blkio_device_usage_total": "bytes moved to and from the device, by operation"},
    LIMIT: {"container_ulimits_soft": "soft limits of the first process"},
    PAGES: {
        "container_hugetlb_usage_bytes": "huge pages in use, in bytes",
        "container_hugetlb_max_usage_bytes": "the most huge pages in use so far, in bytes",
    },
}

LABELS: dict[str, tuple[str, ...]] = {name: labels for labels, names in _TABLE.items() for name in names}
GAUGES = frozenset(
    name for name in LABELS
    if not name.endswith("_total") and name != "container_memory_failcnt"
)


def descriptors() -> list[pb.MetricDescriptor]:
    """What ListMetricDescriptors returns."""
    return [
        pb.MetricDescriptor(name=name, help=words[:1].upper() + words[1:] + ".", label_keys=labels)
        for labels, names in _TABLE.items() for name, words in names.items()
    ]
