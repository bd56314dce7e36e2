"""Questions to a part of the daemon that the published API has no method for.

They go through `Introspection.PluginInfo`, whose options and answer may be anything: here a
`google.protobuf.Struct` each way. A daemon that does not know them answers without `extra`.
"""

from __future__ import annotations

from pctr.rpc import INTROSPECTION
from supervisord_ctr import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pctr.command import Context

STRUCT_URL = "google.protobuf.Struct"
GC_PART = ("io.containerd.gc.v1", "scheduler")
TRANSFER_PART = ("io.containerd.transfer.v1", "local")
DOCTOR_PART = ("io.supervisord-ctr.doctor.v1", "doctor")
EXPLAIN_PART = ("io.supervisord-ctr.explain.v1", "explain")


def ask(context: Context, kind: str, name: str, question: dict[str, Any]) -> dict[str, Any] | None:
    """A part's answer to a question; None when it has none. Raises `NotFound` when there is no such part."""
    from google.protobuf import any_pb2
    from google.protobuf.json_format import MessageToDict
    from google.protobuf.struct_pb2 import Struct

    from supervisord_ctr.api.services.introspection.v1 import introspection_pb2

    options = Struct()
    options.update(question)
    request = introspection_pb2.PluginInfoRequest(
        type=kind, id=name, options=any_pb2.Any(type_url=STRUCT_URL, value=options.SerializeToString()))
    try:
        response = context.client.unary(INTROSPECTION + "PluginInfo", request, introspection_pb2.PluginInfoResponse)
    except errors.Unimplemented:
        return None
    if not response.extra.type_url.endswith(STRUCT_URL):
        return None
    answer: dict[str, Any] = MessageToDict(Struct.FromString(response.extra.value))
    return answer
