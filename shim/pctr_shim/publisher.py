"""Events on their way to the daemon: in order, kept until somebody took them.

Owns the queue and the connection to the daemon's ttrpc events service, or, for a foreign daemon
without one, the runs of its publish program. An event is put in after the state that it tells of is
visible, and the queue is sent strictly in order, one call after the other, so no event overtakes another.
Our own daemon takes what waits in one call; containerd takes one event with each.

A daemon that is away is tried again for as long as it takes (0.1 s growing to 2 s); `nudge` tries
at once. When nobody listens any more, a daemon of ours is not tried but awaited: it asks for the state of
every task when it starts, and the shim may rest until then, its queue with it. The queue is bounded: beyond
that, the oldest go and the loss is logged.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import logging
import os
import time
from collections.abc import Iterable

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from pctr_shim.config import ShimConfig
from pctr_shim.reaper import Reaper
from pctr_shim.values import any_of, timestamp
from supervisord_ctr import errors
from supervisord_ctr.aio import TaskOwner
from supervisord_ctr.api.services.ttrpc.events.v1 import events_pb2 as forward_pb2
from supervisord_ctr.api.shim.v1 import shim_pb2
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.ttrpc.client import Client

log = logging.getLogger(__name__)

SERVICE = "containerd.services.events.ttrpc.v1.Events"
OWN_SERVICE = "pctr.shim.v1.Events"
LIMIT = 65536
#: Events, and bytes of them, that one call may carry.
_BATCH = 64
_BATCH_BYTES = 1 << 20
_CALL_TIMEOUT = 5.0
_FIRST_RETRY, _LONGEST_RETRY = 0.1, 2.0
#: Seconds that an event may wait: the answer to the call that caused it goes first, and keeps the daemon busy. That of
#: a start that follows at once takes that of the creation along; exits are waited for. No longer: who subscribes once
#: a task has started must not be told of its creation.
_LINGER, _LINGER_OF_EXITS = 0.004, 0.002
_EXIT = "/tasks/exit"


class Publisher:
    """`publish` never blocks; `close` gives what is left a bounded chance."""

    def __init__(self, config: ShimConfig, reaper: Reaper) -> None:
        self._config = config
        self._reaper = reaper
        self._queue: collections.deque[types_pb2.Envelope] = collections.deque()
        self._wake = asyncio.Event()
        self._retry = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._client: Client | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._owner = TaskOwner("publisher")
        self._nobody = False
        self._awaits = False
        self._lost = 0

    def start(self) -> None:
        """Begin to send, on the running loop."""
        if self._config.events or self._config.publish_binary:
            self._owner.start(self._run(), "forward")

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def busy(self) -> bool:
        """Whether an event is on its way: not while the next daemon is awaited."""
        return (bool(self._queue) and not self._awaits) or self._timer is not None

    @property
    def tasks(self) -> int:
        """Tasks on the loop that are its own."""
        return len(self._owner)

    @property
    def descriptor(self) -> int:
        """That of the connection to the daemon; -1 without one."""
        return self._client.descriptor if self._client is not None else -1

    def leave(self) -> list[str]:
        """What waits for a daemon, in hexadecimal, for the next worker."""
        return [event.SerializeToString().hex() for event in self._queue]

    def take_up(self, left: Iterable[str]) -> None:
        """Go on with what `leave` gave: to be sent before what comes now."""
        self._queue.extend(types_pb2.Envelope.FromString(bytes.fromhex(event)) for event in left)
        if self._queue:
            self._empty.clear()
            self._wake.set()

    def publish(self, topic: str, message: Message) -> None:
        """Queue an event with the time of now."""
        if not (self._config.events or self._config.publish_binary):
            return
        if len(self._queue) >= LIMIT:
            self._queue.popleft()
            self._lost += 1
            if self._lost & (self._lost - 1) == 0:
                log.error("%d events lost: nobody took %d of them", self._lost, LIMIT)
        self._queue.append(types_pb2.Envelope(
            timestamp=timestamp(time.time()), namespace=self._config.namespace, topic=topic, event=any_of(message)
        ))
        self._empty.clear()
        if not self._wake.is_set():
            self._send_within(_LINGER_OF_EXITS if topic == _EXIT else _LINGER)

    def _send_within(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            if self._timer.when() <= loop.time() + seconds:
                return
            self._timer.cancel()
        self._timer = loop.call_later(seconds, self._send_now)

    def _send_now(self) -> None:
        self._timer = None
        self._wake.set()

    def nudge(self) -> None:
        """Try again at once: a daemon has just shown up."""
        self._retry.set()

    async def _run(self) -> None:
        delay = _FIRST_RETRY
        while True:
            while self._queue:
                batch = self._batch()
                self._retry.clear()  # before the try: a daemon that shows up while one fails is not overlooked
                if await self._send(batch):
                    delay = _FIRST_RETRY
                    for event in batch:
                        if self._queue and self._queue[0] is event:
                            self._queue.popleft()
                else:
                    self._awaits = self._nobody and self._config.batches and delay == _LONGEST_RETRY
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._retry.wait(), None if self._awaits else delay)
                    self._awaits = False
                    delay = min(delay * 2, _LONGEST_RETRY)
            self._empty.set()
            self._wake.clear()
            await self._wake.wait()

    def _batch(self) -> list[types_pb2.Envelope]:
        """What goes out next: the oldest event, with those after it if the daemon takes several."""
        if not self._config.batches or len(self._queue) == 1:
            return [self._queue[0]]
        batch: list[types_pb2.Envelope] = []
        size = 0
        for event in itertools.islice(self._queue, _BATCH):
            size += event.ByteSize()
            if batch and size > _BATCH_BYTES:
                break
            batch.append(event)
        return batch

    async def _send(self, batch: list[types_pb2.Envelope]) -> bool:
        try:
            if self._config.events:
                await self._forward(batch)
            else:
                await self._run_binary(batch[0])
            return True
        except (errors.Error, OSError) as error:
            if isinstance(error, errors.Unimplemented):
                self._config.batches = False  # a daemon of ours from before there were any
            log.debug("event %s stays queued: %s", batch[0].topic, error)
            return False

    async def _forward(self, batch: list[types_pb2.Envelope]) -> None:
        if self._client is None or self._client.closed:
            if self._client is not None:
                await self._client.close()
                self._client = None
            self._nobody = False
            try:
                self._client = await Client.connect(self._config.events)
            except errors.Unavailable as error:
                self._nobody = isinstance(error.__cause__, ConnectionRefusedError | FileNotFoundError)
                raise
        request: Message
        service, method, request = SERVICE, "Forward", forward_pb2.ForwardRequest(envelope=batch[0])
        if len(batch) > 1:
            service, method, request = OWN_SERVICE, "ForwardAll", shim_pb2.ForwardAllRequest(envelopes=batch)
        await self._client.call(
            service, method, request, Empty, timeout=_CALL_TIMEOUT,
            metadata={"containerd-namespace-ttrpc": [self._config.namespace]},
        )

    async def _run_binary(self, event: types_pb2.Envelope) -> None:
        arguments = [
            self._config.publish_binary, "--address", self._config.address, "publish",
            "--topic", event.topic, "--namespace", event.namespace,
        ]
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            os.write(writer, event.event.SerializeToString())
        finally:
            os.close(writer)
        try:
            status = await self._reaper.run(arguments, os.environ, {0: reader})
        finally:
            os.close(reader)
        if status:
            raise errors.Unavailable(f"{self._config.publish_binary} publish ended with status {status}")

    async def close(self, timeout: float = 5.0) -> None:
        """Send what is queued for at most `timeout` seconds, then let go."""
        self.nudge()
        if self._timer is not None:
            self._timer.cancel()
            self._send_now()
        if self._queue:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), timeout)
        if self._queue:
            log.error("%d events were never taken", len(self._queue))
        await self._owner.close()
        if self._client is not None:
            await self._client.close()
