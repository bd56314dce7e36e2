"""containerd.services.introspection.v1.Introspection: which parts this daemon is made of.

The list is handed in by the composition root: nothing registers itself.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import empty_pb2

from supervisord_ctr import durable, filters
from supervisord_ctr.api.services.introspection.v1 import introspection_pb2 as pb
from supervisord_ctr.api.services.introspection.v1 import introspection_pb2_grpc
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.errors import NotFound
from supervisord_ctr.model import Platform
from supervisord_ctr.rpc import Context
from supervisord_ctr.services.convert import platform_to_message


@dataclass(frozen=True, slots=True)
class Part:
    """One part as clients see it: type and id in containerd's words ("io.containerd.snapshotter.v1", "overlayfs")."""

    type: str
    id: str
    exports: Mapping[str, str] = field(default_factory=dict)
    capabilities: Sequence[str] = ()
    platform: Platform | None = None


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
    return pb.Plugin(type=part.type, id=part.id, exports=dict(part.exports), capabilities=part.capabilities,
                     platforms=platforms)


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
        """NOT_FOUND."""
        for part in self._parts:
            if (part.type, part.id) == (request.type, request.id):
                return pb.PluginInfoResponse(plugin=_message(part))
        raise NotFound(f"plugin {request.type}.{request.id}: not found", kind="plugin", key=request.id)
