"""Events of shims: the ttrpc sockets of the daemon where `containerd.services.events.ttrpc.v1` is served,
and, for our own shims, the same for several events at once.

A listener is told of each event before subscribers are, so that what an event tells is already
true for who asks (P14).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from google.protobuf.empty_pb2 import Empty

from supervisord_ctr.api.services.ttrpc.events.v1 import events_pb2
from supervisord_ctr.api.shim.v1 import shim_pb2
from supervisord_ctr.api.types.types_pb2 import Envelope
from supervisord_ctr.model import Event, TypedValue
from supervisord_ctr.runtime.connection import seconds
from supervisord_ctr.ttrpc.server import Context, Method, Server, listen


class Sink(Protocol):
    """Where events go: `events.Exchange`."""

    def forward(self, event: Event) -> None:
        """Hand one on."""


class EventServer:
    """Serves the sockets at `paths` (mode 0600) from `start` until `close`."""

    def __init__(self, paths: Sequence[Path], sink: Sink, listener: Callable[[Event], None] | None = None) -> None:
        self.paths = tuple(paths)
        self._sink = sink
        self._listener = listener
        self._server = Server({
            "containerd.services.events.ttrpc.v1.Events": {
                "Forward": Method(events_pb2.ForwardRequest, self._forward),
            },
            "pctr.shim.v1.Events": {"ForwardAll": Method(shim_pb2.ForwardAllRequest, self._forward_all)},
        })

    async def start(self) -> None:
        """Listen. `FileExistsError` when another daemon does."""
        for path in self.paths:
            await self._server.serve(listen(str(path)))

    async def _forward(self, request: Any, context: Context) -> Empty:
        self._pass_on(request.envelope)
        return Empty()

    async def _forward_all(self, request: Any, context: Context) -> Empty:
        for envelope in request.envelopes:
            self._pass_on(envelope)
        return Empty()

    def _pass_on(self, envelope: Envelope) -> None:
        event = Event(
            seconds(envelope.timestamp) or time.time(), envelope.namespace, envelope.topic,
            TypedValue(envelope.event.type_url, envelope.event.value),
        )
        if self._listener is not None:
            self._listener(event)
        self._sink.forward(event)

    async def close(self) -> None:
        """Stop serving and remove the sockets."""
        await self._server.close()
        for path in self.paths:
            path.unlink(missing_ok=True)
