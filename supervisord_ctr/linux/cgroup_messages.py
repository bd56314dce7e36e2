"""A control group's numbers as the message of containerd's API: that of cgroup v1 or of v2."""

from __future__ import annotations

from typing import Any

from supervisord_ctr.api.cgroups.v1 import metrics_pb2 as metrics_v1
from supervisord_ctr.api.cgroups.v2 import metrics_pb2 as metrics_v2
from supervisord_ctr.linux.cgroups import Cgroup


def metrics(group: Cgroup) -> metrics_v1.Metrics | metrics_v2.Metrics:
    """`io.containerd.cgroups.v1.Metrics` or that of v2; `FileNotFoundError` when the whole group is gone."""
    fields: dict[str, Any] = group.metrics()
    return metrics_v2.Metrics(**fields) if group.is_v2 else metrics_v1.Metrics(**fields)
