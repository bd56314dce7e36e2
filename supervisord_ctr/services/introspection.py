"""containerd.services.introspection.v1.Introspection: which parts this daemon is made of.

The list is handed in by the composition root: nothing registers itself.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from google.protobuf import any_pb2, empty_pb2
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError, Message
from google.protobuf.struct_pb2 import Struct

from supervisord_ctr import durable, filters
from supervisord_ctr.api.services.introspection.v1 import introspection_pb2 as pb
from supervisord_ctr.api.services.introspection.v1 import introspection_pb2_grpc
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.errors import Code, FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from supervisord_ctr.metadata import Collector, GcReport
from supervisord_ctr.model import Platform
from supervisord_ctr.rpc import Context
from supervisord_ctr.runtime.info import RuntimeInformant
from supervisord_ctr.services.convert import platform_to_message

#: Answers a question to one part; both sides are what a `google.protobuf.Struct` holds.
Info: TypeAlias = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
#: The same for a part whose question and answer have messages of their own.
Answer: TypeAlias = Callable[[any_pb2.Any], Awaitable[Message]]

_Read = TypeVar("_Read", bound=Message)


@dataclass(frozen=True, slots=True)
class Part:
    """One part as clients see it: type and id in containerd's words ("io.containerd.snapshotter.v1", "overlayfs")."""

    type: str
    id: str
    exports: Mapping[str, str] = field(default_factory=dict)
    capabilities: Sequence[str] = ()
    platform: Platform | None = None
    #: Why the part could not be loaded; empty when it was.
    error: str = ""
    #: Answers `PluginInfo` with options (a Struct each way); None for a part that has nothing to add.
    info: Info | None = None
    #: Answers in its stead, with messages of the part's own.
    answer: Answer | None = None


def collector_info(collector: Collector) -> Info:
    """Garbage collection through `PluginInfo`: {"collect": true} runs a pass, {"dry_run": true} only tells what one
    would remove, {"release": true} ends the hold after a repair; nothing of them tells of the last pass."""

    async def info(question: Mapping[str, Any]) -> Mapping[str, Any]:
        if question.get("release"):
            await collector.release()
        if question.get("dry_run"):
            report = await collector.collect(dry_run=True)
        elif question.get("collect"):
            report = await collector.collect()
        else:
            report = collector.last or GcReport()
        removed = [{"namespace": space, "kind": kind, "id": key} for space, kind, key in report.removed]
        return {"removed": removed, "errors": list(report.errors), "seconds": report.seconds, "dry_run": report.dry_run}

    return info


def runtime_info(informant: RuntimeInformant) -> Answer:
    """What a runtime can do: a `containerd.types.RuntimeRequest` is answered with a `RuntimeInfo`."""

    async def answer(options: any_pb2.Any) -> types_pb2.RuntimeInfo:
        return await informant.ask(_read("task", options, types_pb2.RuntimeRequest()))

    return answer


def _read(part: str, options: any_pb2.Any, message: _Read) -> _Read:
    """`options` as `message`: UNIMPLEMENTED when they are something else, INVALID_ARGUMENT when unreadable."""
    if options.type_url.rpartition("/")[2] != message.DESCRIPTOR.full_name:
        raise Unimplemented(f"plugin {part} is asked with a {message.DESCRIPTOR.full_name}", kind="plugin", key=part)
    try:
        message.ParseFromString(options.value)
    except DecodeError as error:
        raise InvalidArgument(f"plugin {part}: unreadable options: {error}", kind="plugin", key=part) from None
    return message


def _adapt(part: Part) -> filters.Adaptor:
    def read(path: Sequence[str]) -> tuple[str, bool]:
        match path[0] if path else "":
            case "type":
                return part.type, bool(part.type)
            case "id":
                return part.id, bool(part.id)
            case "capabilities":
                text = ",".join(part.capabilities)
                return text, bool(text)
            case _:
                return "", False

    return read


def _message(part: Part) -> pb.Plugin:
    platforms: list[types_pb2.Platform] = [] if part.platform is None else [platform_to_message(part.platform)]
    message = pb.Plugin(type=part.type, id=part.id, exports=dict(part.exports), capabilities=part.capabilities,
                        platforms=platforms)
    if part.error:
        message.init_err.code, message.init_err.message = Code.UNKNOWN, part.error
    return message


def server_uuid(root: Path) -> str:
    """The identity of the daemon on `root`, made once and kept."""
    path = root / "uuid"
    try:
        return str(uuid.UUID(path.read_text(encoding="ascii").strip()))
    except (OSError, ValueError):
        made = str(uuid.uuid4())
        durable.write_atomic(path, made.encode())
        return made


class IntrospectionService(introspection_pb2_grpc.IntrospectionServicer):
    """Parts and identity; needs no namespace."""

    def __init__(self, parts: Sequence[Part], identity: str) -> None:
        self._parts = tuple(parts)
        self._identity = identity

    async def Plugins(self, request: pb.PluginsRequest, context: Context) -> pb.PluginsResponse:
        """Those that match the filters (type, id, capabilities)."""
        matching = filters.parse(request.filters)
        return pb.PluginsResponse(plugins=[_message(part) for part in self._parts if matching.matches(_adapt(part))])

    async def Server(self, request: empty_pb2.Empty, context: Context) -> pb.ServerResponse:
        """Identity, pid and the pid namespace's inode."""
        return pb.ServerResponse(uuid=self._identity, pid=os.getpid(), pidns=os.stat("/proc/self/ns/pid").st_ino)

    async def PluginInfo(self, request: pb.PluginInfoRequest, context: Context) -> pb.PluginInfoResponse:
        """NOT_FOUND. With options the part is asked for more: UNIMPLEMENTED when it has nothing to say."""
        for part in self._parts:
            if (part.type, part.id) == (request.type, request.id):
                answer = pb.PluginInfoResponse(plugin=_message(part))
                if request.HasField("options"):
                    await _ask(part, request, answer)
                return answer
        raise NotFound(f"plugin {request.type}.{request.id}: not found", kind="plugin", key=request.id)


async def _ask(part: Part, request: pb.PluginInfoRequest, answer: pb.PluginInfoResponse) -> None:
    if part.error:
        raise FailedPrecondition(
            f"plugin {part.type}.{part.id} was not loaded: {part.error}", kind="plugin", key=part.id)
    if part.answer is not None:
        found = await part.answer(request.options)
        answer.extra.type_url, answer.extra.value = found.DESCRIPTOR.full_name, found.SerializeToString()
        return
    if part.info is None:
        raise Unimplemented(f"plugin {part.type}.{part.id} has no extra information", kind="plugin", key=part.id)
    question = _read(part.id, request.options, Struct())
    extra = Struct()
    extra.update(await part.info(MessageToDict(question)))
    answer.extra.type_url = Struct.DESCRIPTOR.full_name
    answer.extra.value = extra.SerializeToString()
