"""GetContainerEvents: what happened to pods and containers, told after it can be seen (P14).

Owns the fan-out to kubelets. Each listener has a bounded queue; one that does not read loses its
stream with RESOURCE_EXHAUSTED and lists again, as a kubelet does after any break, and holds up
nobody (P9).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.errors import ResourceExhausted

#: Events that may wait for one listener.
QUEUE = 1000


class Listener:
    """One stream."""

    def __init__(self, limit: int) -> None:
        self._queue: deque[pb.ContainerEventResponse] = deque()
        self._limit = limit
        self._overrun = False
        self._closed = False
        self._ready = asyncio.Event()

    def offer(self, event: pb.ContainerEventResponse) -> None:
        """Queue an event, or mark the stream as lost."""
        if len(self._queue) >= self._limit:
            self._overrun = True
        else:
            self._queue.append(event)
        self._ready.set()

    def close(self) -> None:
        """End after what is queued."""
        self._closed = True
        self._ready.set()

    async def events(self) -> AsyncIterator[pb.ContainerEventResponse]:
        """Events in order; raises `ResourceExhausted` after an overrun."""
        while True:
            while self._queue:
                yield self._queue.popleft()
            if self._overrun:
                raise ResourceExhausted(f"the reader of container events is {self._limit} events behind")
            if self._closed:
                return
            self._ready.clear()
            await self._ready.wait()


class EventHub:
    """The listeners."""

    def __init__(self, limit: int = QUEUE) -> None:
        self._limit = limit
        self._listeners: set[Listener] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._listeners)

    def publish(
        self, container_id: str, kind: pb.ContainerEventType.ValueType, status: pb.PodSandboxStatus | None,
        containers: list[pb.ContainerStatus],
    ) -> None:
        """Tell every listener. For an event of the pod itself `container_id` is the pod's ID."""
        if not self._listeners:
            return
        event = pb.ContainerEventResponse(
            container_id=container_id, container_event_type=kind, created_at=time.time_ns(),
            pod_sandbox_status=status, containers_statuses=containers,
        )
        for listener in self._listeners:
            listener.offer(event)

    def close(self) -> None:
        """End all streams, and those that come."""
        self._closed = True
        for listener in self._listeners:
            listener.close()

    async def listen(
        self, ready: Callable[[], Awaitable[object]] | None = None
    ) -> AsyncIterator[pb.ContainerEventResponse]:
        """Events from now on, until the caller stops iterating; `ready` is awaited once nothing is missed any more."""
        listener = Listener(self._limit)
        if self._closed:
            listener.close()
        self._listeners.add(listener)
        try:
            if ready is not None:
                await ready()
            async for event in listener.events():
                yield event
        finally:
            self._listeners.discard(listener)
