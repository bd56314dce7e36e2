"""Shims as this machine's processes show them: no daemon's private interface is asked.

A shim is the ancestor of a task's process that is the subreaper and neither the daemon nor init:
the parent of the task, as long as the task runs.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, NamedTuple

from pctr.command import Context, Failed
from pctr.services import get_task, list_namespaces, list_tasks


class Shim(NamedTuple):
    """One shim; `pid` is 0 and `memory` None when it cannot be seen from here."""

    container: str
    namespace: str
    pid: int
    task_pid: int
    memory: int | None
    command: str


def parent_of(pid: int) -> int:
    """The parent process's id, 0 when the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="latin-1") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def command_of(pid: int) -> str:
    """The process's command line."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def memory_of(pid: int) -> int | None:
    """Proportional memory in bytes (smaps_rollup)."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return None


def _shim_of(container: str, namespace: str, task_pid: int) -> Shim:
    pid = parent_of(task_pid) if task_pid else 0
    if pid <= 1:
        return Shim(container, namespace, 0, task_pid, None, "")
    return Shim(container, namespace, pid, task_pid, memory_of(pid), command_of(pid))


def shims(context: Context, *, every_namespace: bool = False) -> list[Shim]:
    """The shims of the namespace's tasks, or of all namespaces'."""
    client = context.client
    names = [entry.name for entry in list_namespaces(client)] if every_namespace else [client.namespace]
    found = []
    before = client.namespace
    try:
        for name in names:
            client.namespace = name
            found += [_shim_of(task.container_id or task.id, name, task.pid) for task in list_tasks(client)]
    finally:
        client.namespace = before
    return found


def describe(context: Context, container: str) -> dict[str, Any]:
    """What can be seen of a container's shim: process, memory, sockets, descriptors, children."""
    task = get_task(context.client, container)
    shim = _shim_of(container, context.namespace, task.pid)
    if not shim.pid:
        raise Failed(f"shim of {container}: cannot be seen from here (has the task ended?)")
    children = []
    with contextlib.suppress(OSError), open(f"/proc/{shim.pid}/task/{shim.pid}/children", encoding="ascii") as file:
        children = [int(word) for word in file.read().split()]
    descriptors = None
    with contextlib.suppress(OSError):
        descriptors = len(os.listdir(f"/proc/{shim.pid}/fd"))
    folder = None
    with contextlib.suppress(OSError):
        folder = os.readlink(f"/proc/{shim.pid}/cwd")
    return {
        "container": container, "namespace": context.namespace, "pid": shim.pid, "command": shim.command,
        "memory": shim.memory, "descriptors": descriptors, "bundle": folder, "task_pid": task.pid,
        "children": children, "address": _address_in(folder),
    }


def _address_in(folder: str | None) -> str | None:
    if folder is None:
        return None
    with contextlib.suppress(OSError), open(os.path.join(folder, "address"), encoding="utf-8") as file:
        return file.read().strip()
    return None
