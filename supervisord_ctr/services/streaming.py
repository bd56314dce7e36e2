"""containerd.services.streaming.v1.Streaming: streams that clients open ahead of a transfer.

Owns the streams by namespace and name. The transfer service takes one by the name in its request and
speaks over it: progress out, credentials asked and told, archives in and out. A stream ends with its
call, and a slow client delays only what is sent to it (P9).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from google.protobuf import any_pb2, empty_pb2
from google.protobuf.message import DecodeError, Message

from supervisord_ctr.api.services.streaming.v1 import streaming_pb2 as pb
from supervisord_ctr.api.services.streaming.v1 import streaming_pb2_grpc
from supervisord_ctr.api.types.transfer import transfer_pb2 as transfer
from supervisord_ctr.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable
from supervisord_ctr.images.progress import Progress
from supervisord_ctr.rpc import Context, namespace_of
from supervisord_ctr.services.convert import descriptor_to_message

#: Bytes in one Data message, and how many may be under way unconfirmed (as containerd's clients expect).
_PIECE = 32 << 10
_WINDOW = 2 * _PIECE
#: Messages that may wait for one client.
_OUTGOING = 16


def pack(message: Message) -> any_pb2.Any:
    """An Any with the type URL that containerd writes: the full name alone."""
    return any_pb2.Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def type_name(value: any_pb2.Any) -> str:
    """The full name of the message in `value`."""
    return str(value.type_url).rpartition("/")[2]


class Stream:
    """One open stream. `receive` gives None at the end; `send` raises Unavailable after it."""

    def __init__(self, requests: AsyncIterator[any_pb2.Any]) -> None:
        self._requests = requests
        self._outgoing: deque[any_pb2.Any] = deque()
        self._closed = False
        self._room = asyncio.Event()
        self._ready = asyncio.Event()

    async def send(self, message: Message) -> None:
        """Send one message; waits while the client does not read."""
        while len(self._outgoing) >= _OUTGOING and not self._closed:
            self._room.clear()
            await self._room.wait()
        if self._closed:
            raise Unavailable("the stream is closed", kind="stream")
        self._outgoing.append(pack(message))
        self._ready.set()

    async def outgoing(self) -> AsyncIterator[any_pb2.Any]:
        """What is sent, for the call that carries it; ends after `close`."""
        while True:
            while not self._outgoing and not self._closed:
                self._ready.clear()
                await self._ready.wait()
            if not self._outgoing:
                return
            message = self._outgoing.popleft()
            self._room.set()
            yield message

    async def receive(self) -> any_pb2.Any | None:
        """The next message of the client."""
        if self._closed:
            return None
        try:
            return await anext(self._requests)
        except StopAsyncIteration:
            return None

    def close(self) -> None:
        """End the call when everything is sent; twice is fine."""
        self._closed = True
        self._room.set()
        self._ready.set()


class Streams:
    """Streams that are open, by namespace and name."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], Stream] = {}

    def register(self, namespace: str, name: str, stream: Stream) -> None:
        """AlreadyExists for a name in use."""
        if (namespace, name) in self._open:
            raise AlreadyExists(f"stream {name}: already exists", kind="stream", key=name)
        self._open[(namespace, name)] = stream

    def get(self, namespace: str, name: str) -> Stream:
        """NotFound."""
        found = self._open.get((namespace, name))
        if found is None:
            raise NotFound(f"stream {name}: not found", kind="stream", key=name)
        return found

    def forget(self, namespace: str, name: str) -> None:
        """The stream's call ended."""
        self._open.pop((namespace, name), None)

    def __len__(self) -> int:
        return len(self._open)


class StreamingService(streaming_pb2_grpc.StreamingServicer):
    """Lets clients open streams."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    async def Stream(
        self, request_iterator: AsyncIterator[any_pb2.Any], context: Context
    ) -> AsyncIterator[any_pb2.Any]:
        """The first message names the stream; the call lasts until either side is done with it."""
        namespace = namespace_of(context)
        try:
            first = await anext(request_iterator)
            init = pb.StreamInit.FromString(first.value)
        except StopAsyncIteration:
            return
        except DecodeError as error:
            raise InvalidArgument(f"the first message of a stream must be a StreamInit: {error}") from error
        if not init.id:
            raise InvalidArgument("a stream needs an id", kind="stream")
        stream = Stream(request_iterator)
        self._streams.register(namespace, init.id, stream)
        try:
            yield pack(empty_pb2.Empty())
            async for message in stream.outgoing():
                yield message
        finally:
            self._streams.forget(namespace, init.id)
            stream.close()


class ByteReader:
    """The bytes that a client sends in Data messages, asked for window by window."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._window = 0

    async def read(self) -> bytes:
        """The next piece, b"" at the end."""
        while True:
            if self._window < _WINDOW:
                await self._stream.send(transfer.WindowUpdate(update=_WINDOW))
                self._window += _WINDOW
            message = await self._stream.receive()
            if message is None:
                return b""
            if type_name(message) != transfer.Data.DESCRIPTOR.full_name:
                continue
            data = transfer.Data.FromString(message.value).data
            self._window -= len(data)
            if data:
                return data

    def close(self) -> None:
        """End the stream."""
        self._stream.close()


class ByteWriter:
    """Sends bytes in Data messages, as many as the client has asked for."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._window = 0

    async def write(self, data: bytes) -> None:
        """Send all of `data`; waits for the client's window. Unavailable when it went away."""
        view = memoryview(data)
        while view:
            while self._window <= 0:
                message = await self._stream.receive()
                if message is None:
                    raise Unavailable("the receiver of the stream went away", kind="stream")
                if type_name(message) == transfer.WindowUpdate.DESCRIPTOR.full_name:
                    self._window += transfer.WindowUpdate.FromString(message.value).update
            piece = view[:min(_PIECE, self._window)]
            await self._stream.send(transfer.Data(data=bytes(piece)))
            self._window -= len(piece)
            view = view[len(piece):]

    def close(self) -> None:
        """End the stream: the client sees its end of file."""
        self._stream.close()


class ProgressSender:
    """Sends progress without ever delaying who makes it, `pace` seconds apart.

    Of one blob only the newest event waits, in the place of the oldest: what is below others in the tree
    stays behind them, and a client's display is not faster than that anyway. A status (it has no
    name) at the very end is sent twice, a named event between: `ctr` shows a status when the next named one comes.
    """

    def __init__(self, stream: Stream, limit: int = 1024, pace: float = 0.1) -> None:
        self._stream = stream
        self._limit = limit
        self._pace = pace
        self._queue: dict[str, Progress] = {}
        self._ready = asyncio.Event()
        self._over = asyncio.Event()

    def offer(self, event: Progress) -> None:
        """Queue one event; beyond the limit the oldest goes."""
        key = event.name if event.total else f"{event.name} {event.event}"
        if key not in self._queue and len(self._queue) >= self._limit:
            del self._queue[next(iter(self._queue))]
        self._queue[key] = event
        self._ready.set()

    def end(self) -> None:
        """No more events: `run` returns when all are sent."""
        self._over.set()
        self._ready.set()

    async def run(self) -> None:
        """Send until `end`."""
        named = last = None
        with contextlib.suppress(Unavailable):
            while True:
                await self._ready.wait()
                self._ready.clear()
                waiting, self._queue = self._queue, {}
                for last in waiting.values():
                    await self._stream.send(_progress_message(last))
                    if last.name:
                        named = last
                if self._over.is_set() and not self._queue:
                    if last is not None and named is not None and not last.name:
                        for again in (named, last):
                            await self._stream.send(_progress_message(again))
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._over.wait(), self._pace)


def _progress_message(progress: Progress) -> transfer.Progress:
    descriptor = progress.descriptor
    return transfer.Progress(
        event=progress.event, name=progress.name, parents=progress.parents, progress=progress.progress,
        total=progress.total, desc=descriptor_to_message(descriptor) if descriptor is not None else None,
    )
