"""What the numbers were made on: processor, memory, kernel, disk and the versions of every program."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path


def _first_line(command: list[str]) -> str:
    """First line that the command prints, or why there is none."""
    if shutil.which(command[0]) is None:
        return "not installed"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    text = (done.stdout or done.stderr).strip()
    return text.splitlines()[0] if text else "unknown"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory() -> str:
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemTotal"):
            return f"{int(line.split()[1]) / (1 << 20):.1f} GiB"
    return "unknown"


def file_system(path: Path) -> str:
    """Device and type of the file system that holds `path`, from the mount table."""
    target = os.path.realpath(path)
    best, answer = -1, "unknown"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields, _, rest = line.partition(" - ")
        point = fields.split()[4].replace("\\040", " ")
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:
            best = len(point)
            kind, source = rest.split()[:2]
            answer = f"{kind} on {source}"
    return answer


def cgroup_mode() -> str:
    """"v2", "hybrid" or "v1"."""
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        return "v2"
    return "hybrid" if Path("/sys/fs/cgroup/unified").is_dir() else "v1"


def describe(work: Path, containerd: str) -> dict[str, str]:
    """Words for the head of a report, in the order in which they are printed."""
    return {
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "memory": _memory(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}, cgroup {cgroup_mode()}",
        "disk": file_system(work),
        "python": platform.python_version(),
        "containerd": _first_line([containerd, "--version"]) if containerd else "none",
        "runc": _first_line(["runc", "--version"]),
        "registry": _first_line(["docker-registry", "--version"]),
    }
