"""containerd.services.events.v1.Events: what happens, as it happens."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from google.protobuf import any_pb2, empty_pb2

from supervisord_ctr.api.services.events.v1 import events_pb2 as pb
from supervisord_ctr.api.services.events.v1 import events_pb2_grpc
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.events import Exchange
from supervisord_ctr.model import Event, TypedValue
from supervisord_ctr.rpc import Context, any_from_value, any_to_value, namespace_of, seconds, timestamp


def _typed(message: any_pb2.Any) -> TypedValue:
    """An event may be empty: its topic says enough."""
    return any_to_value(message) or TypedValue("", b"")


class EventsService(events_pb2_grpc.EventsServicer):
    """The exchange, for clients and for shims that speak gRPC."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def Publish(self, request: pb.PublishRequest, context: Context) -> empty_pb2.Empty:
        """INVALID_ARGUMENT for a topic that is not `/` and identifiers."""
        event = Event(time.time(), namespace_of(context), request.topic, _typed(request.event))
        self._exchange.forward(event)
        return empty_pb2.Empty()

    async def Forward(self, request: pb.ForwardRequest, context: Context) -> empty_pb2.Empty:
        """Hands on an event with its own time (or the present one) and namespace."""
        envelope = request.envelope
        at = seconds(envelope.timestamp) if envelope.HasField("timestamp") else 0.0
        event = Event(at or time.time(), envelope.namespace, envelope.topic, _typed(envelope.event))
        self._exchange.forward(event)
        return empty_pb2.Empty()

    async def Subscribe(self, request: pb.SubscribeRequest, context: Context) -> AsyncIterator[types_pb2.Envelope]:
        """Events of every namespace from now on; RESOURCE_EXHAUSTED ends a client that does not keep up (P9)."""
        async with self._exchange.subscribe(request.filters) as subscription:
            await context.send_initial_metadata(())
            async for event in subscription:
                yield types_pb2.Envelope(
                    timestamp=timestamp(event.timestamp), namespace=event.namespace, topic=event.topic,
                    event=any_from_value(event.event),
                )
