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
from dataclasses import dataclass

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.errors import ResourceExhausted

#: Events that may wait for one listener.
QUEUE = 1000
#: Events that are held while nobody listens, and for how long (seconds).
HELD, HELD_FOR = 500, 300.0


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


@dataclass(frozen=True, slots=True)
class _Held:
    """What happened while nobody listened; statuses are shared values, a message is made when somebody comes."""

    container_id: str
    kind: pb.ContainerEventType.ValueType
    at: int
    status: pb.PodSandboxStatus | None
    containers: list[pb.ContainerStatus]

    def message(self) -> pb.ContainerEventResponse:
        return pb.ContainerEventResponse(
            container_id=self.container_id, container_event_type=self.kind, created_at=self.at,
            pod_sandbox_status=self.status, containers_statuses=self.containers,
        )


class EventHub:
    """The listeners, and for a while what happened when there was none: a kubelet that comes back misses nothing."""

    def __init__(self, limit: int = QUEUE, *, held: int = HELD, held_for: float = HELD_FOR) -> None:
        """At most `held` events are held, for at most `held_for` seconds; the first listener to come gets them."""
        self._limit = limit
        self._listeners: set[Listener] = set()
        self._closed = False
        self._held: deque[_Held] = deque(maxlen=held)
        self._held_for = held_for
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._listeners)

    def publish(
        self, container_id: str, kind: pb.ContainerEventType.ValueType, status: pb.PodSandboxStatus | None,
        containers: list[pb.ContainerStatus],
    ) -> None:
        """Tell every listener. For an event of the pod itself `container_id` is the pod's ID."""
        happened = _Held(container_id, kind, time.time_ns(), status, containers)
        if not self._listeners:
            self._hold(happened)
            return
        event = happened.message()
        for listener in self._listeners:
            listener.offer(event)

    def _hold(self, happened: _Held) -> None:
        if self._closed:
            return
        self._held.append(happened)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._held_for, self._forget_old)

    def _forget_old(self) -> None:
        self._timer = None
        oldest = time.time_ns() - int(self._held_for * 1e9)
        while self._held and self._held[0].at <= oldest:
            self._held.popleft()
        if self._held:
            wait = (self._held[0].at - oldest) / 1e9
            self._timer = asyncio.get_running_loop().call_later(wait + 0.01, self._forget_old)

    def _hand_over(self, listener: Listener) -> None:
        """Everything held is the listener's."""
        self._forget_old()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._held:
            listener.offer(self._held.popleft().message())

    def close(self) -> None:
        """End all streams, and those that come."""
        self._closed = True
        self._held.clear()
        if self._timer is not None:
            self._timer.cancel()
        for listener in self._listeners:
            listener.close()

    async def listen(
        self, ready: Callable[[], Awaitable[object]] | None = None
    ) -> AsyncIterator[pb.ContainerEventResponse]:
        """Events from now on, until the caller stops iterating; `ready` is awaited once nothing is missed any more.

        Those that were held because nobody listened come first.
        """
        listener = Listener(self._limit)
        if self._closed:
            listener.close()
        self._hand_over(listener)
        self._listeners.add(listener)
        try:
            if ready is not None:
                await ready()
            async for event in listener.events():
                yield event
        finally:
            self._listeners.discard(listener)
