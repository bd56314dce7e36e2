"""containerd.services.sandbox.v1.Controller on `runtime.Sandboxes`.

Sandboxers are found by name: "shim" is `runtime.Sandboxes`; others (the CRI room's "podsandbox")
may be given that offer the same methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from google.protobuf.timestamp_pb2 import Timestamp

from supervisord_ctr import errors
from supervisord_ctr.aio import TaskOwner, shielded
from supervisord_ctr.api.events import events_pb2
from supervisord_ctr.api.services.sandbox.v1 import sandbox_pb2 as api
from supervisord_ctr.api.services.sandbox.v1.sandbox_pb2_grpc import ControllerServicer
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.model import Mount, Runtime, Sandbox
from supervisord_ctr.rpc import any_from_value, any_to_value, namespace_of, timestamp
from supervisord_ctr.runtime.sandboxes import Sandboxes

_NEVER = -62135596800


class Publisher(Protocol):
    """Where events go: `events.Exchange`."""

    def publish(self, namespace: str, topic: str, message: Any) -> None:
        """Tell of something that happened just now."""


def _time(at: float) -> Timestamp:
    return timestamp(at) if at else Timestamp(seconds=_NEVER)


class SandboxControllerService(ControllerServicer):
    """The service; `sandboxers` by the name that requests give."""

    def __init__(self, sandboxers: Mapping[str, Sandboxes], publisher: Publisher) -> None:
        self._sandboxers = dict(sandboxers)
        self._publisher = publisher
        self._owner = TaskOwner("sandbox controller")

    async def close(self) -> None:
        """Stop what runs."""
        await self._owner.close()

    def _controller(self, name: str) -> Sandboxes:
        if not name:
            raise errors.InvalidArgument("sandbox controller name can not be empty", kind="sandboxer")
        found = self._sandboxers.get(name)
        if found is None:
            raise errors.NotFound(f"failed to get sandbox controller by {name}", kind="sandboxer", key=name)
        return found

    async def Create(self, request: Any, context: Any) -> api.ControllerCreateResponse:
        return await shielded(self._owner, self._create(namespace_of(context), request), "create")

    async def _create(self, namespace: str, request: Any) -> api.ControllerCreateResponse:
        controller = self._controller(request.sandboxer)
        given = request.sandbox
        sandbox = Sandbox(
            request.sandbox_id or given.sandbox_id, Runtime(given.runtime.name, any_to_value(given.runtime.options)),
            any_to_value(given.spec), dict(given.labels), sandboxer=request.sandboxer,
        )
        await controller.create(
            namespace, sandbox, options=any_to_value(request.options), netns=request.netns_path,
            rootfs=[Mount(item.type, item.source, tuple(item.options), item.target) for item in request.rootfs],
            annotations=dict(request.annotations),
        )
        self._publisher.publish(namespace, "/sandboxes/create", events_pb2.SandboxCreate(sandbox_id=sandbox.id))
        return api.ControllerCreateResponse(sandbox_id=sandbox.id)

    async def Start(self, request: Any, context: Any) -> api.ControllerStartResponse:
        return await shielded(self._owner, self._start(namespace_of(context), request), "start")

    async def _start(self, namespace: str, request: Any) -> api.ControllerStartResponse:
        found = await self._controller(request.sandboxer).start(namespace, request.sandbox_id)
        self._publisher.publish(namespace, "/sandboxes/start", events_pb2.SandboxStart(sandbox_id=request.sandbox_id))
        return api.ControllerStartResponse(
            sandbox_id=found.id, pid=found.pid, created_at=_time(found.created_at), address=found.address,
            version=found.version, spec=any_from_value(found.spec),
        )

    async def Platform(self, request: Any, context: Any) -> api.ControllerPlatformResponse:
        found = await self._controller(request.sandboxer).platform(namespace_of(context), request.sandbox_id)
        return api.ControllerPlatformResponse(
            platform=types_pb2.Platform(os=found.os, architecture=found.architecture, variant=found.variant)
        )

    async def Stop(self, request: Any, context: Any) -> api.ControllerStopResponse:
        controller = self._controller(request.sandboxer)
        work = controller.stop(namespace_of(context), request.sandbox_id, request.timeout_secs)
        await shielded(self._owner, work, "stop")
        return api.ControllerStopResponse()

    async def Wait(self, request: Any, context: Any) -> api.ControllerWaitResponse:
        namespace = namespace_of(context)
        found = await self._controller(request.sandboxer).wait(namespace, request.sandbox_id)
        self._publisher.publish(namespace, "/sandboxes/exit", events_pb2.SandboxExit(
            sandbox_id=request.sandbox_id, exit_status=found.status, exited_at=_time(found.at)
        ))
        return api.ControllerWaitResponse(exit_status=found.status, exited_at=_time(found.at))

    async def Status(self, request: Any, context: Any) -> api.ControllerStatusResponse:
        controller = self._controller(request.sandboxer)
        found = await controller.status(namespace_of(context), request.sandbox_id, request.verbose)
        return api.ControllerStatusResponse(
            sandbox_id=found.id, pid=found.pid, state=found.state, info=dict(found.info),
            created_at=_time(found.created_at), exited_at=_time(found.exited_at), extra=any_from_value(found.extra),
            address=found.address, version=found.version,
        )

    async def Shutdown(self, request: Any, context: Any) -> api.ControllerShutdownResponse:
        work = self._controller(request.sandboxer).shutdown(namespace_of(context), request.sandbox_id)
        await shielded(self._owner, work, "shutdown")
        return api.ControllerShutdownResponse()

    async def Metrics(self, request: Any, context: Any) -> api.ControllerMetricsResponse:
        controller = self._controller(request.sandboxer)
        at, sandbox_id, data = await controller.metrics(namespace_of(context), request.sandbox_id)
        return api.ControllerMetricsResponse(
            metrics=types_pb2.Metric(timestamp=timestamp(at), id=sandbox_id, data=any_from_value(data))
        )

    async def Update(self, request: Any, context: Any) -> api.ControllerUpdateResponse:
        self._controller(request.sandboxer)
        if not request.HasField("sandbox"):
            raise errors.InvalidArgument("sandbox can not be nil", kind="sandbox")
        return api.ControllerUpdateResponse()
