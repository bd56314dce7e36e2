"""What the control files of a group say, in the shape of containerd's Metrics messages.

Only parses; `cgroups.Cgroup.metrics` says which files. Field names and meanings are those of
`io.containerd.cgroups.v1` and `.v2`: nanoseconds in v1, microseconds in v2, bytes, and "no limit"
as the largest unsigned number in v2 and as the kernel prints it in v1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

Read = Callable[[str], str]

UNLIMITED = 2**64 - 1
_TICK = 1_000_000_000 // os.sysconf("SC_CLK_TCK")

_V1_MEMORY = {
    "cache": "cache", "rss": "rss", "rss_huge": "rss_huge", "mapped_file": "mapped_file", "dirty": "dirty",
    "writeback": "writeback", "pgpgin": "pg_pg_in", "pgpgout": "pg_pg_out", "pgfault": "pg_fault",
    "pgmajfault": "pg_maj_fault", "inactive_anon": "inactive_anon", "active_anon": "active_anon",
    "inactive_file": "inactive_file", "active_file": "active_file", "unevictable": "unevictable",
}
_V2_MEMORY = (
    "anon", "file", "kernel_stack", "slab", "sock", "shmem", "file_mapped", "file_dirty", "file_writeback",
    "inactive_anon", "active_anon", "inactive_file", "active_file", "unevictable", "slab_reclaimable",
    "slab_unreclaimable", "pgfault", "pgmajfault", "workingset_nodereclaim", "pgrefill", "pgscan", "pgsteal",
    "pgactivate", "pgdeactivate", "pglazyfree", "pglazyfreed", "thp_fault_alloc", "thp_collapse_alloc",
)
_V1_BLKIO = {
    "io_service_bytes_recursive": ("blkio.bfq.io_service_bytes_recursive", "blkio.io_service_bytes_recursive",
                                   "blkio.throttle.io_service_bytes_recursive", "blkio.throttle.io_service_bytes"),
    "io_serviced_recursive": ("blkio.bfq.io_serviced_recursive", "blkio.io_serviced_recursive",
                              "blkio.throttle.io_serviced_recursive", "blkio.throttle.io_serviced"),
    "io_queued_recursive": ("blkio.bfq.io_queued_recursive", "blkio.io_queued_recursive"),
    "io_service_time_recursive": ("blkio.bfq.io_service_time_recursive", "blkio.io_service_time_recursive"),
    "io_wait_time_recursive": ("blkio.bfq.io_wait_time_recursive", "blkio.io_wait_time_recursive"),
    "io_merged_recursive": ("blkio.bfq.io_merged_recursive", "blkio.io_merged_recursive"),
    "io_time_recursive": ("blkio.bfq.time_recursive", "blkio.time_recursive"),
    "sectors_recursive": ("blkio.bfq.sectors_recursive", "blkio.sectors_recursive"),
}


def number(text: str, unlimited: int = UNLIMITED) -> int:
    """A control file's number; "max" is `unlimited`, anything else that is no number is 0."""
    word = text.strip()
    if word == "max":
        return unlimited
    return int(word) if word.isascii() and word.isdigit() else 0


def keyed(text: str) -> dict[str, int]:
    """Lines of "key number"."""
    found = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        found[key] = number(value)
    return found


def _split(line: str) -> tuple[str, dict[str, str]]:
    """The first word of a line, and its "key=value" words."""
    head, _, rest = line.strip().partition(" ")
    return head, dict(word.split("=", 1) for word in rest.split() if "=" in word)


def _decimal(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def legacy(folders: Mapping[str, str], read: Read) -> dict[str, object]:
    """Fields of io.containerd.cgroups.v1.Metrics for the v1 folders of one group."""
    fields: dict[str, object] = {}
    if "pids" in folders:
        fields["pids"] = {
            "current": number(read(f"{folders['pids']}/pids.current")),
            "limit": number(read(f"{folders['pids']}/pids.max"), 0),
        }
    if "cpuacct" in folders or "cpu" in folders:
        fields["cpu"] = _v1_cpu(folders, read)
    if "memory" in folders:
        fields["memory"] = _v1_memory(folders["memory"], read)
        control = keyed(read(f"{folders['memory']}/memory.oom_control"))
        fields["memory_oom_control"] = {
            name: control.get(name, 0) for name in ("oom_kill_disable", "under_oom", "oom_kill")
        }
    if "blkio" in folders:
        fields["blkio"] = _v1_blkio(folders["blkio"], read)
    if "hugetlb" in folders:
        fields["hugetlb"] = [
            {"usage": number(read(f"{base}.usage_in_bytes")), "max": number(read(f"{base}.max_usage_in_bytes")),
             "failcnt": number(read(f"{base}.failcnt")), "pagesize": size}
            for size, base in _huge_pages(folders["hugetlb"])
        ]
    if "rdma" in folders:
        fields["rdma"] = _rdma(folders["rdma"], read)
    return fields


def _v1_cpu(folders: Mapping[str, str], read: Read) -> dict[str, object]:
    cpu: dict[str, object] = {}
    if account := folders.get("cpuacct"):
        split = keyed(read(f"{account}/cpuacct.stat"))
        cpu["usage"] = {
            "total": number(read(f"{account}/cpuacct.usage")),
            "user": split.get("user", 0) * _TICK,
            "kernel": split.get("system", 0) * _TICK,
            "per_cpu": [number(word) for word in read(f"{account}/cpuacct.usage_percpu").split()],
        }
    if folder := folders.get("cpu"):
        stat = keyed(read(f"{folder}/cpu.stat"))
        cpu["throttling"] = {
            "periods": stat.get("nr_periods", 0),
            "throttled_periods": stat.get("nr_throttled", 0),
            "throttled_time": stat.get("throttled_time", 0),
        }
    return cpu


def _v1_memory(folder: str, read: Read) -> dict[str, object]:
    stat = keyed(read(f"{folder}/memory.stat"))
    memory: dict[str, object] = {}
    for key, name in _V1_MEMORY.items():
        memory[name] = stat.get(key, 0)
        memory[f"total_{name}"] = stat.get(f"total_{key}", 0)
    memory["hierarchical_memory_limit"] = stat.get("hierarchical_memory_limit", 0)
    memory["hierarchical_swap_limit"] = stat.get("hierarchical_memsw_limit", 0)
    for name, part in (("usage", ""), ("swap", "memsw."), ("kernel", "kmem."), ("kernel_tcp", "kmem.tcp.")):
        memory[name] = {
            "limit": number(read(f"{folder}/memory.{part}limit_in_bytes")),
            "usage": number(read(f"{folder}/memory.{part}usage_in_bytes")),
            "max": number(read(f"{folder}/memory.{part}max_usage_in_bytes")),
            "failcnt": number(read(f"{folder}/memory.{part}failcnt")),
        }
    return memory


def _v1_blkio(folder: str, read: Read) -> dict[str, object]:
    blkio: dict[str, object] = {}
    for name, files in _V1_BLKIO.items():
        text = next((found for file in files if (found := read(f"{folder}/{file}")).strip()), "")
        entries = []
        for line in text.splitlines():
            words = line.split()
            if len(words) not in (2, 3) or words[0] == "Total":
                continue
            major, _, minor = words[0].partition(":")
            entries.append({
                "major": number(major), "minor": number(minor), "op": words[1] if len(words) == 3 else "",
                "value": number(words[-1]), "device": _device_name(words[0]),
            })
        blkio[name] = entries
    return blkio


def _device_name(device: str) -> str:
    try:
        return "/dev/" + os.path.basename(os.readlink(f"/sys/dev/block/{device}"))
    except OSError:
        return ""


def _huge_pages(folder: str) -> list[tuple[str, str]]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    marks = (".usage_in_bytes", ".current")
    return sorted(
        (name.split(".")[1], f"{folder}/hugetlb.{name.split('.')[1]}")
        for name in names if name.startswith("hugetlb.") and name.endswith(marks) and "rsvd" not in name
    )


def _rdma(folder: str, read: Read) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, file in (("current", "rdma.current"), ("limit", "rdma.max")):
        entries = []
        for line in read(f"{folder}/{file}").splitlines():
            device, values = _split(line)
            entries.append({
                "device": device,
                "hca_handles": min(number(values.get("hca_handle", "0")), 2**32 - 1),
                "hca_objects": min(number(values.get("hca_object", "0")), 2**32 - 1),
            })
        found[key] = entries
    return found


def unified(folder: str, read: Read) -> dict[str, object]:
    """Fields of io.containerd.cgroups.v2.Metrics for a folder of the v2 tree."""
    fields: dict[str, object] = {}
    if current := read(f"{folder}/pids.current"):
        fields["pids"] = {"current": number(current), "limit": number(read(f"{folder}/pids.max"))}
    if text := read(f"{folder}/cpu.stat"):
        stat = keyed(text)
        cpu: dict[str, object] = {
            name: stat.get(name, 0)
            for name in ("usage_usec", "user_usec", "system_usec", "nr_periods", "nr_throttled", "throttled_usec",
                         "nr_bursts", "burst_usec")
        }
        fields["cpu"] = _with_pressure(cpu, read(f"{folder}/cpu.pressure"))
    if text := read(f"{folder}/memory.stat"):
        fields["memory"] = _with_pressure(_v2_memory(folder, keyed(text), read), read(f"{folder}/memory.pressure"))
        events = keyed(read(f"{folder}/memory.events"))
        fields["memory_events"] = {
            name: events.get(name, 0) for name in ("low", "high", "max", "oom", "oom_kill", "oom_group_kill")
        }
    io: dict[str, object] = {"usage": [_io_line(line) for line in read(f"{folder}/io.stat").splitlines()]}
    fields["io"] = _with_pressure(io, read(f"{folder}/io.pressure"))
    fields["hugetlb"] = [
        {"current": number(read(f"{base}.current")), "max": number(read(f"{base}.max")), "pagesize": size,
         "failcnt": keyed(read(f"{base}.events")).get("max", 0)}
        for size, base in _huge_pages(folder)
    ]
    if read(f"{folder}/rdma.current"):
        fields["rdma"] = _rdma(folder, read)
    return fields


def _v2_memory(folder: str, stat: dict[str, int], read: Read) -> dict[str, object]:
    memory: dict[str, object] = {name: stat.get(name, 0) for name in _V2_MEMORY}
    memory["anon_thp"] = stat.get("anon_thp", 0)
    for name in ("workingset_refault", "workingset_activate"):
        memory[name] = stat.get(name, stat.get(f"{name}_anon", 0) + stat.get(f"{name}_file", 0))
    memory["usage"] = number(read(f"{folder}/memory.current"))
    memory["usage_limit"] = number(read(f"{folder}/memory.max"))
    memory["max_usage"] = number(read(f"{folder}/memory.peak"))
    memory["swap_usage"] = number(read(f"{folder}/memory.swap.current"))
    memory["swap_limit"] = number(read(f"{folder}/memory.swap.max"))
    memory["swap_max_usage"] = number(read(f"{folder}/memory.swap.peak"))
    return memory


def _io_line(line: str) -> dict[str, int]:
    device, values = _split(line)
    major, _, minor = device.partition(":")
    entry = {name: number(values.get(name, "0")) for name in ("rbytes", "wbytes", "rios", "wios")}
    return {"major": number(major), "minor": number(minor), **entry}


def _with_pressure(fields: dict[str, object], text: str) -> dict[str, object]:
    """Add `psi` when the kernel keeps pressure stall information."""
    psi: dict[str, object] = {}
    for line in text.splitlines():
        kind, values = _split(line)
        if kind not in ("some", "full"):
            continue
        psi[kind] = {
            **{name: _decimal(values.get(name, "0")) for name in ("avg10", "avg60", "avg300")},
            "total": number(values.get("total", "0")),
        }
    return {**fields, "psi": psi} if psi else fields
