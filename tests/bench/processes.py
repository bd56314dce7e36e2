"""Reading /proc: proportional memory, processor time, parents and descendants."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def processes() -> Iterator[int]:
    """Every process id of this pid namespace."""
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third (state) on; empty when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def parent(pid: int) -> int:
    """Parent of `pid`; 0 when it is gone."""
    fields = stat_fields(pid)
    return int(fields[1]) if fields else 0


def command(pid: int) -> str:
    """Command line of `pid`, words joined by spaces; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def program(pid: int) -> str:
    """Name of the program file that `pid` runs; empty when it is gone or has none."""
    return os.path.basename(_link(pid, "exe"))


def directory(pid: int) -> str:
    """Working directory of `pid`; empty when it is gone."""
    return _link(pid, "cwd")


def _link(pid: int, name: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/{name}")
    except OSError:
        return ""


def descendants(pid: int) -> set[int]:
    """`pid` and every process below it."""
    below: dict[int, list[int]] = {}
    for other in processes():
        below.setdefault(parent(other), []).append(other)
    found, queue = set(), [pid]
    while queue:
        item = queue.pop()
        found.add(item)
        queue += below.get(item, [])
    return found


def proportional_memory(pids: Iterable[int]) -> float:
    """Sum of the processes' proportional set sizes (smaps_rollup) in MiB; processes that ended count nothing."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024


def processor_seconds(pids: Iterable[int]) -> float:
    """User and system time that the processes have used, in seconds."""
    total = 0
    for pid in pids:
        fields = stat_fields(pid)
        total += int(fields[11]) + int(fields[12]) if fields else 0
    return total / TICKS


def has_capability(number: int) -> bool:
    """Whether this process has the capability (capabilities(7), number as in linux/capability.h)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("CapEff"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False
