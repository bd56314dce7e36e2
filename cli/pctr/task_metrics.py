"""`pctr task metrics`: cgroup numbers of a task, flat."""

from __future__ import annotations

import importlib
from typing import Any

from pctr import output
from pctr.command import Context, Failed
from pctr.rpc import TASKS
from supervisord_ctr import errors
from supervisord_ctr.api.services.tasks.v1 import tasks_pb2

_MODULES = {
    "io.containerd.cgroups.v1.Metrics": "supervisord_ctr.api.cgroups.v1.metrics_pb2",
    "io.containerd.cgroups.v2.Metrics": "supervisord_ctr.api.cgroups.v2.metrics_pb2",
}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"memory": {"usage": 1}}` to `{"memory.usage": 1}`; lists keep their position as a part of the name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(flatten(value, f"{name}."))
        elif isinstance(value, list):
            if all(not isinstance(entry, (dict, list)) for entry in value):
                flat[name] = " ".join(map(str, value))
            else:
                flat.update(flatten({str(number): entry for number, entry in enumerate(value)}, f"{name}."))
        else:
            flat[name] = value
    return flat


def _numbers(values: Any) -> Any:
    """JSON has 64-bit integers as strings; they are numbers again here."""
    if isinstance(values, dict):
        return {key: _numbers(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_numbers(value) for value in values]
    if isinstance(values, str) and values.isdecimal():
        return int(values)
    return values


def read_metrics(context: Context, name: str) -> tuple[Any, dict[str, Any]]:
    """Timestamp and nested numbers of one task."""
    from google.protobuf.json_format import MessageToDict

    response = context.client.unary(
        TASKS + "Metrics", tasks_pb2.MetricsRequest(filters=[f"id=={name}"]), tasks_pb2.MetricsResponse)
    if not response.metrics:
        raise errors.NotFound(f"task {name}: no metrics found", kind="task", key=name)
    metric = response.metrics[0]
    kind = metric.data.type_url.rpartition("/")[2]
    if kind not in _MODULES:
        raise Failed(f"task {name}: metrics of unknown type {kind!r}")
    message = importlib.import_module(_MODULES[kind]).Metrics.FromString(metric.data.value)
    return metric.timestamp, _numbers(MessageToDict(message, preserving_proto_field_name=True))


def show_metrics(context: Context) -> None:
    """Print them."""
    timestamp, values = read_metrics(context, context.args.id)
    if context.args.format == "json":
        output.document([{"id": context.args.id, "timestamp": output.moment(timestamp).raw, **values}])
        return
    print(f"ID           {context.args.id}\nTIMESTAMP    {output.moment(timestamp).text}\n")
    table = output.Table("METRIC", "VALUE")
    for name, value in flatten(values).items():
        table.add(name, value)
    print(table.text())
