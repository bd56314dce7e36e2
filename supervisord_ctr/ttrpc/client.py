"""A ttrpc client on asyncio: calls and streams side by side on one connection.

Owns the calls that wait for an answer. When the connection ends, every call that waits fails with
`Unavailable` and `wait_closed` returns: that is how a daemon learns that a shim died.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from supervisord_ctr import errors
from supervisord_ctr.api.shim.v1 import shim_pb2
from supervisord_ctr.ttrpc import wire
from supervisord_ctr.ttrpc.framed import Framed

M = TypeVar("M", bound=Message)

Metadata = Mapping[str, list[str]]


class Stream:
    """A call in which both sides may send several messages.

    `send` and `close_send` go to the server; `receive` gives the next message or None at the end;
    an error status of the server is raised by `receive`.
    """

    def __init__(self, client: Client, number: int, response_type: type[Message]) -> None:
        self._client = client
        self._number = number
        self._type = response_type
        self._frames: asyncio.Queue[wire.Frame | None] = asyncio.Queue()
        self._ended = False

    def _put(self, frame: wire.Frame | None) -> None:
        self._frames.put_nowait(frame)

    async def send(self, message: Message) -> None:
        """Send one message to the server."""
        await self._client._write(wire.pack(self._number, wire.DATA, 0, message.SerializeToString()))

    async def close_send(self) -> None:
        """Tell the server that no more messages come."""
        await self._client._write(wire.pack(self._number, wire.DATA, wire.REMOTE_CLOSED | wire.NO_DATA, b""))

    async def receive(self) -> Any:
        """The next message of the server, or None when it has ended the stream well."""
        if self._ended:
            return None
        frame = await self._frames.get()
        if frame is None:
            self._ended = True
            raise errors.Unavailable("ttrpc connection closed")
        if frame.error is not None:
            self.close()
            raise frame.error
        if frame.kind == wire.RESPONSE:
            self.close()
            payload = _payload(frame.data)
            return _decode(self._type, payload) if payload else None
        if frame.flags & wire.REMOTE_CLOSED:
            self.close()
        if frame.flags & wire.NO_DATA:
            return None if self._ended else await self.receive()
        return _decode(self._type, frame.data)

    def close(self) -> None:
        """Forget the stream; what still comes for it is dropped."""
        self._ended = True
        self._client._streams.pop(self._number, None)


class Client(Framed):
    """One connection. Make it with `connect`; `close` it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._next = 1
        self._calls: dict[int, asyncio.Future[wire.Frame]] = {}
        self._streams: dict[int, Stream] = {}
        self._closed = asyncio.Event()

    @classmethod
    async def connect(cls, target: str | socket.socket) -> Client:
        """Connect to a path or "unix://" address, or take over a connected socket.

        `Unavailable` when nobody listens there.
        """
        loop = asyncio.get_running_loop()
        try:
            if isinstance(target, socket.socket):
                target.setblocking(False)
                return (await loop.create_unix_connection(lambda: cls("socket"), sock=target))[1]
            path = wire.socket_path(target)
            return (await loop.create_unix_connection(lambda: cls(path), path))[1]
        except OSError as error:
            raise errors.Unavailable(f"ttrpc socket {target}: {(error.strerror or str(error)).lower()}") from error

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self._closed.is_set()

    async def wait_closed(self) -> None:
        """Return when the connection has ended, from whichever side."""
        await self._closed.wait()

    async def call(
        self, service: str, method: str, request: Message, response_type: type[M], *,
        timeout: float | None = None, metadata: Metadata | None = None,
    ) -> M:
        """The response to one request.

        Raises the error of `supervisord_ctr.errors` for the server's status, `DeadlineExceeded`
        after `timeout` seconds (which the server is told), `Unavailable` when the connection ends.
        """
        number = self._number()
        future: asyncio.Future[wire.Frame] = asyncio.get_running_loop().create_future()
        frame = wire.pack(number, wire.REQUEST, 0, _request(service, method, request, timeout, metadata))
        self._calls[number] = future
        try:
            if timeout is None:
                await self._write(frame)
                answer = await future
            else:
                async with asyncio.timeout(timeout):
                    await self._write(frame)
                    answer = await future
        except TimeoutError:
            raise errors.DeadlineExceeded(f"{service}/{method}: no answer within {timeout:g} s") from None
        finally:
            self._calls.pop(number, None)
        if answer.error is not None:
            raise answer.error
        return _decode(response_type, _payload(answer.data))

    async def stream(
        self, service: str, method: str, response_type: type[Message], *, request: Message | None = None,
        timeout: float | None = None, metadata: Metadata | None = None,
    ) -> Stream:
        """Open a stream. With `request` the server expects no further message from us."""
        number = self._number()
        stream = Stream(self, number, response_type)
        self._streams[number] = stream
        flags = wire.REMOTE_OPEN if request is None else wire.REMOTE_CLOSED
        await self._write(wire.pack(number, wire.REQUEST, flags, _request(service, method, request, timeout, metadata)))
        return stream

    def _number(self) -> int:
        if self._closed.is_set():
            raise errors.Unavailable(f"ttrpc connection to {self._name} is closed")
        number = self._next
        self._next = number + 2 if number < 0x7FFFFFFD else 1
        return number

    async def _write(self, data: bytes) -> None:
        if not await self._send(data):
            raise errors.Unavailable(f"ttrpc connection to {self._name} is closed")

    def _take(self, frame: wire.Frame) -> None:
        stream = self._streams.get(frame.stream)
        if stream is not None:
            stream._put(frame)
            return
        future = self._calls.get(frame.stream)
        if future is not None and not future.done() and frame.kind == wire.RESPONSE:
            future.set_result(frame)

    def _lost(self, reason: str) -> None:
        self._closed.set()
        error = errors.Unavailable(f"ttrpc connection to {self._name}" + (f": {reason}" if reason else " is closed"))
        for future in self._calls.values():
            if not future.done():
                future.set_exception(error)
        self._calls.clear()
        for stream in list(self._streams.values()):
            stream._put(None)
        self._streams.clear()

    async def close(self) -> None:
        """End the connection; calls that wait fail with `Unavailable`."""
        self._finish("")
        self.hang_up()
        await asyncio.sleep(0)  # the transport lets go of its socket in the loop's next round

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _request(
    service: str, method: str, message: Message | None, timeout: float | None, metadata: Metadata | None
) -> bytes:
    request = shim_pb2.Request(service=service, method=method)
    if message is not None:
        request.payload = message.SerializeToString()
    if timeout is not None:
        request.timeout_nano = max(1, int(timeout * 1e9))
    for key, values in (metadata or {}).items():
        for value in values:
            request.metadata.add(key=key, value=value)
    return request.SerializeToString()


def _payload(data: bytes) -> bytes:
    try:
        response = shim_pb2.Response.FromString(data)
    except DecodeError as error:
        raise errors.Internal(f"ttrpc response cannot be decoded: {error}") from error
    if response.status.code:
        raise errors.from_code(response.status.code, response.status.message)
    return response.payload


def _decode(kind: type[M], data: bytes) -> M:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise errors.Internal(f"{kind.DESCRIPTOR.full_name} cannot be decoded: {error}") from error


async def connect_until(target: str, timeout: float) -> Client:
    """Connect, trying again for `timeout` seconds: for a server that is about to listen."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return await Client.connect(target)
        except errors.Unavailable:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.01)
