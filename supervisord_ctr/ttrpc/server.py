"""A ttrpc server on asyncio, and the one adapter from `errors` to ttrpc statuses.

Owns connections and the tasks that answer on them; `framed` moves the bytes. What a peer sends can
end its own connection, never the server. Every request runs as a task of its connection: when the
connection ends, unary requests run on (a client that hangs up never leaves half a container),
streams are cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError, Message

from supervisord_ctr import errors
from supervisord_ctr.aio import TaskOwner, wait_until
from supervisord_ctr.api.shim.v1 import shim_pb2
from supervisord_ctr.ttrpc import wire
from supervisord_ctr.ttrpc.framed import Framed

log = logging.getLogger(__name__)

#: Requests that one connection may have running; the next ones wait in the socket.
MAX_RUNNING = 4096
#: Messages of one stream that may wait for its handler.
_STREAM_BACKLOG = 256
#: Rounds of the loop that asyncio takes from accepting a connection to telling its protocol.
_ACCEPTING = 4


@dataclass(frozen=True, slots=True)
class Context:
    """What a handler may know about its call: metadata in lower case, seconds left or None."""

    metadata: Mapping[str, list[str]]
    timeout: float | None


@dataclass(frozen=True, slots=True)
class Method:
    """A unary method: `handler(request, context)` gives the response message.

    `lasting`: it only waits for something, so that it may be cancelled and the request given to another process.
    """

    request: type[Message]
    handler: Callable[[Any, Context], Awaitable[Message]]
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class StreamMethod:
    """A streaming method: `handler(requests, context)` yields the response messages."""

    request: type[Message]
    handler: Callable[[AsyncIterator[Any], Context], AsyncIterator[Message]]


class Standing(NamedTuple):
    """A connection on which nothing happens: its descriptor, and the lasting requests that have no answer yet."""

    descriptor: int
    requests: Sequence[tuple[int, bytes]]


Services = Mapping[str, Mapping[str, Method | StreamMethod]]


class Server:
    """Serves `services` ({service: {method: Method}}) on any number of listening sockets."""

    def __init__(self, services: Services, *, check_peer: bool = True) -> None:
        self._services = services
        self._check_peer = check_peer
        self._calls = TaskOwner("ttrpc calls")
        self._servers: list[asyncio.Server] = []
        self._connections: set[_Connection] = set()

    async def serve(self, listener: socket.socket) -> None:
        """Start to accept on a listening Unix socket; returns at once."""
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        self._servers.append(await loop.create_unix_server(self._connection, sock=listener))

    async def attend(self, connection: socket.socket) -> None:
        """Serve one connected Unix socket until it ends."""
        connection.setblocking(False)
        made = (await asyncio.get_running_loop().create_unix_connection(self._connection, sock=connection))[1]
        try:
            await made.ended()
        finally:
            made.hang_up()

    async def take_over(self, connection: socket.socket, requests: Sequence[tuple[int, bytes]]) -> None:
        """Serve a connection that stood still in another process, with its `Standing.requests`."""
        connection.setblocking(False)
        made = (await asyncio.get_running_loop().create_unix_connection(self._connection, sock=connection))[1]
        made.renew(requests)

    def standing(self) -> list[Standing] | None:
        """Every connection, when nothing goes on but lasting requests; else None. The descriptors stay the server's."""
        found = [connection.standing() for connection in self._connections]
        standing = [one for one in found if one is not None]
        if len(standing) < len(found) or len(self._calls) != sum(len(one.requests) for one in standing):
            return None
        return standing

    @property
    def listeners(self) -> list[int]:
        """Descriptors of the listening sockets."""
        return [listener.fileno() for server in self._servers for listener in server.sockets]

    @property
    def descriptors(self) -> set[int]:
        """Descriptors of the connections."""
        return {connection.descriptor for connection in self._connections}

    @property
    def calls(self) -> int:
        """Requests that run."""
        return len(self._calls)

    def _connection(self) -> _Connection:
        return _Connection(self._services, self._calls, self._connections, check_peer=self._check_peer)

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._connections)

    async def wait_idle(self, timeout: float) -> None:
        """Return when no request runs, or after `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            await wait_until(lambda: len(self._calls) == 0, timeout, "requests")

    async def close(self) -> None:
        """Stop accepting, cancel what runs, end the connections."""
        for fd in self.listeners:
            asyncio.get_running_loop().remove_reader(fd)
        for _ in range(_ACCEPTING):  # asyncio forgets to close what a server had accepted only just before its end
            await asyncio.sleep(0)
        for server in self._servers:
            server.close()
        await self._calls.close()
        for hang_up in (_Connection.hang_up, _Connection.abort):
            for connection in list(self._connections):
                hang_up(connection)
            await asyncio.sleep(0)  # transports let go of their sockets in the loop's next round


class _Connection(Framed):
    def __init__(
        self, services: Services, calls: TaskOwner, connections: set[_Connection], *, check_peer: bool
    ) -> None:
        super().__init__()
        self._services = services
        self._calls = calls
        self._connections = connections
        self._check_peer = check_peer
        self._streams: dict[int, asyncio.Queue[wire.Frame | None]] = {}
        self._stream_tasks: dict[int, asyncio.Task[None]] = {}
        #: Lasting requests under way, as they came.
        self._lasting: dict[int, bytes] = {}
        self._running = 0
        self._last = 0
        self._end: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self._check_peer and not is_trusted_peer(transport.get_extra_info("socket")):
            log.warning("refused a ttrpc connection of another user")
            self._finish("refused")
            self.abort()
            return
        self._connections.add(self)

    def standing(self) -> Standing | None:
        """Itself, when nothing but lasting requests is under way."""
        if not self._still or self._streams or self._running != len(self._lasting):
            return None
        return Standing(self.descriptor, tuple(self._lasting.items()))

    def renew(self, requests: Sequence[tuple[int, bytes]]) -> None:
        """Take lasting requests that another process was given."""
        for stream, data in requests:
            self._take(wire.Frame(stream, wire.REQUEST, 0, data))

    async def ended(self) -> None:
        """Return when the connection is over."""
        if not self._over:
            self._end = asyncio.get_running_loop().create_future()
            await self._end

    def _lost(self, reason: str) -> None:
        if reason:
            log.debug("ttrpc connection ended: %s", reason)
        for task in self._stream_tasks.values():
            task.cancel()
        if self._end is not None and not self._end.done():
            self._end.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connections.discard(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._relieve()

    def _relieve(self) -> None:
        """Read on when there is room again for what may come."""
        if self._held and not self._over and not self._clogged and self._running < MAX_RUNNING and all(
            queue.qsize() < _STREAM_BACKLOG for queue in self._streams.values()
        ):
            self._release()

    def _take(self, frame: wire.Frame) -> None:
        if frame.kind == wire.DATA:
            queue = self._streams.get(frame.stream)
            if queue is not None and frame.error is None:
                queue.put_nowait(frame)
                if queue.qsize() >= _STREAM_BACKLOG:
                    self._hold()
            elif queue is None and frame.stream > self._last:
                self._fail(frame.stream, errors.InvalidArgument("stream is not open"))
            return
        if frame.kind != wire.REQUEST:
            return
        if frame.stream % 2 == 0:
            self._fail(frame.stream, errors.InvalidArgument("stream id must be odd for client initiated streams"))
            return
        if frame.stream in self._streams:
            self._fail(frame.stream, errors.InvalidArgument("stream id in use"))
            return
        self._last = max(self._last, frame.stream)
        if frame.error is not None:
            self._fail(frame.stream, frame.error)
            return
        self._start(frame)

    def _start(self, frame: wire.Frame) -> None:
        try:
            request = shim_pb2.Request.FromString(frame.data)
        except DecodeError as error:
            self._fail(frame.stream, errors.InvalidArgument(f"request cannot be decoded: {error}"))
            return
        method = self._services.get(request.service, {}).get(request.method)
        if method is None:
            missing = "service" if request.service not in self._services else "method"
            self._fail(
                frame.stream, errors.Unimplemented(f"{missing} {request.service}/{request.method} is not offered")
            )
            return
        self._running += 1
        if self._running >= MAX_RUNNING:
            self._hold()
        metadata: dict[str, list[str]] = {}
        for pair in request.metadata:
            metadata.setdefault(pair.key.lower(), []).append(pair.value)
        timeout = request.timeout_nano / 1e9 if request.timeout_nano > 0 else None
        context = Context(metadata, timeout)
        if isinstance(method, Method):
            if method.lasting and timeout is None:
                self._lasting[frame.stream] = frame.data
            self._calls.start(self._unary(frame.stream, method, request, context), request.method)
            return
        queue: asyncio.Queue[wire.Frame | None] = asyncio.Queue()
        self._streams[frame.stream] = queue
        if request.payload or frame.flags & wire.REMOTE_CLOSED:
            queue.put_nowait(wire.Frame(frame.stream, wire.DATA, 0, request.payload))
        if frame.flags & wire.REMOTE_CLOSED:
            queue.put_nowait(None)
        task = self._calls.start(self._stream(frame.stream, method, queue, context), request.method)
        self._stream_tasks[frame.stream] = task

    def _done(self) -> None:
        self._running -= 1
        self._relieve()

    async def _unary(self, stream: int, method: Method, request: shim_pb2.Request, context: Context) -> None:
        response = shim_pb2.Response()
        try:
            message = method.request.FromString(request.payload)
            if context.timeout is None:
                answer = await method.handler(message, context)
            else:
                async with asyncio.timeout(context.timeout):
                    answer = await method.handler(message, context)
            response.payload = answer.SerializeToString()
        except Exception as error:  # the one adapter from errors to statuses
            _set_status(response, error, request)
        finally:
            self._lasting.pop(stream, None)
            self._done()
        await self._send(_packed(stream, response))

    async def _stream(
        self, stream: int, method: StreamMethod, queue: asyncio.Queue[wire.Frame | None], context: Context
    ) -> None:
        response = shim_pb2.Response()
        try:
            async with asyncio.timeout(context.timeout):
                async for message in method.handler(self._messages(queue, method.request), context):
                    await self._send(wire.pack(stream, wire.DATA, 0, message.SerializeToString()))
        except Exception as error:  # the one adapter from errors to statuses
            _set_status(response, error, None)
        finally:
            self._streams.pop(stream, None)
            self._stream_tasks.pop(stream, None)
            self._done()
        if response.HasField("status"):
            await self._send(_packed(stream, response))
        else:
            await self._send(wire.pack(stream, wire.DATA, wire.REMOTE_CLOSED | wire.NO_DATA, b""))

    async def _messages(
        self, queue: asyncio.Queue[wire.Frame | None], kind: type[Message]
    ) -> AsyncIterator[Message]:
        while (frame := await queue.get()) is not None:
            self._relieve()
            if not frame.flags & wire.NO_DATA:
                yield kind.FromString(frame.data)
            if frame.flags & wire.REMOTE_CLOSED:
                return

    def _fail(self, stream: int, error: errors.Error) -> None:
        """Answer without a task; a peer that does not read such answers is not read from either."""
        response = shim_pb2.Response()
        _set_status(response, error, None)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(_packed(stream, response))
        if self._clogged:
            self._hold()


def _packed(stream: int, response: shim_pb2.Response) -> bytes:
    try:
        return wire.pack(stream, wire.RESPONSE, 0, response.SerializeToString())
    except errors.ResourceExhausted as error:
        replacement = shim_pb2.Response()
        _set_status(replacement, error, None)
        return wire.pack(stream, wire.RESPONSE, 0, replacement.SerializeToString())


def _set_status(response: shim_pb2.Response, error: Exception, request: shim_pb2.Request | None) -> None:
    """Put the status of `error` into `response`: the table of `errors`, everything else is unknown."""
    if isinstance(error, errors.Error):
        code, message = error.code, error.message
    elif isinstance(error, DecodeError):
        code, message = errors.Code.INVALID_ARGUMENT, f"request cannot be decoded: {error}"
    elif isinstance(error, TimeoutError):
        code, message = errors.Code.DEADLINE_EXCEEDED, "context deadline exceeded"
    elif isinstance(error, OSError):
        translated = errors.from_os_error(error, request.method.lower() if request is not None else "request")
        code, message = int(translated.code), translated.message
    else:
        code, message = errors.Code.UNKNOWN, f"{type(error).__name__}: {error}"
        log.error("a handler failed", exc_info=error)
    response.status.code = code
    response.status.message = message


def is_trusted_peer(connection: socket.socket) -> bool:
    """Whether root or our own user connected (unix(7), SO_PEERCRED)."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", data)[1]
    return uid in (0, os.geteuid())


def listen(path: str, backlog: int = 128) -> socket.socket:
    """A listening socket at `path`, mode 0600 from its first moment; a dead socket file is replaced.

    `FileExistsError` when somebody listens there.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
                    if probe.connect_ex(path) == 0:
                        raise FileExistsError(errno.EEXIST, "somebody listens there", path)
                os.unlink(path)
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener
