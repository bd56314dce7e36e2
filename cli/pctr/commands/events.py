"""`pctr events`: what happens, as it happens."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pctr import output
from pctr.command import Command, Context, filters_argument

if TYPE_CHECKING:
    from pctr.command import Arguments

_MODULES = {
    "containerd.events.": "supervisord_ctr.api.events.events_pb2",
    "containerd.services.images.v1.": "supervisord_ctr.api.services.images.v1.images_pb2",
}


def _arguments(parser: Arguments) -> None:
    parser.add_argument("--format", choices=("table", "json"), default="table",
                        help="how to print; json prints one object a line")
    filters_argument(parser)


def decode(event: Any) -> dict[str, Any]:
    """The event's fields as JSON has them; its type alone when it is unknown."""
    name = event.type_url.rpartition("/")[2]
    for prefix, module in _MODULES.items():
        kind = getattr(importlib.import_module(module), name.removeprefix(prefix), None)
        if name.startswith(prefix) and kind is not None:
            from google.protobuf.json_format import MessageToDict

            fields: dict[str, Any] = MessageToDict(
                kind.FromString(event.value), preserving_proto_field_name=True)
            return fields
    return {"type_url": event.type_url}


def _run(context: Context) -> None:
    import json

    from pctr.rpc import EVENTS
    from supervisord_ctr.api.services.events.v1 import events_pb2
    from supervisord_ctr.api.types import types_pb2

    request = events_pb2.SubscribeRequest(filters=context.args.filters)
    for envelope in context.client.start(EVENTS + "Subscribe", request, types_pb2.Envelope):
        fields = decode(envelope.event)
        time = output.rfc3339(envelope.timestamp.seconds, envelope.timestamp.nanos)
        if context.args.format == "json":
            line = json.dumps({
                "timestamp": time, "namespace": envelope.namespace, "topic": envelope.topic, "event": fields})
        else:
            line = output.plain(f"{time} {envelope.namespace} {envelope.topic} {json.dumps(fields)}")
        print(line, flush=True)


COMMAND = Command(
    "events", "print events as they happen", "pctr events 'topic~=/tasks/'\npctr events --format json",
    _arguments, _run,
)
