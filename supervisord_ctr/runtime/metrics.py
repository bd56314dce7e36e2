"""Metrics of tasks: the daemon reads control groups itself, so that asking wakes no shim (P11).

Only for shims of our own; what others measure is theirs to tell.
"""

from __future__ import annotations

from supervisord_ctr.linux import cgroup_messages, cgroups
from supervisord_ctr.model import TypedValue
from supervisord_ctr.runtime.task import Task


def read(task: Task) -> TypedValue | None:
    """What the control group of a task says; None when only its shim knows the group. Blocking."""
    group = task.group or _find(task)
    if group is None:
        return None
    try:
        message = cgroup_messages.metrics(group)
    except OSError:
        return None
    task.group = group
    return TypedValue(message.DESCRIPTOR.full_name, message.SerializeToString())


def _find(task: Task) -> cgroups.Cgroup | None:
    """By the spec. Other forms are relative to the group of whoever runs the OCI runtime."""
    path = str((task.bundle.spec().get("linux") or {}).get("cgroupsPath") or "")
    if path.startswith("/") or path.count(":") == 2:
        return cgroups.of_runtime_path(path)
    return None
