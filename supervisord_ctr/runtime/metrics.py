"""Metrics of tasks: the daemon reads control groups itself, so that asking wakes no shim (P11).

Only for shims of our own; what others measure is theirs to tell.
"""

from __future__ import annotations

from typing import Any

from supervisord_ctr.api.cgroups.v1 import metrics_pb2 as metrics_v1
from supervisord_ctr.api.cgroups.v2 import metrics_pb2 as metrics_v2
from supervisord_ctr.linux import cgroups
from supervisord_ctr.model import TypedValue
from supervisord_ctr.runtime.task import Task


def read(task: Task) -> TypedValue | None:
    """What the control group of a task says; None when only its shim knows the group. Blocking."""
    group = task.group or _find(task)
    if group is None:
        return None
    try:
        fields: dict[str, Any] = group.metrics()
    except FileNotFoundError:
        return None
    task.group = group
    message = metrics_v2.Metrics(**fields) if group.is_v2 else metrics_v1.Metrics(**fields)
    return TypedValue(message.DESCRIPTOR.full_name, message.SerializeToString())


def _find(task: Task) -> cgroups.Cgroup | None:
    """By the spec. Other forms are relative to the group of whoever runs the OCI runtime."""
    path = task.bundle.spec().get("linux", {}).get("cgroupsPath", "")
    if path.startswith("/") or path.count(":") == 2:
        return cgroups.of_runtime_path(path)
    return None
