"""A ttrpc server on asyncio, and the one adapter from `errors` to ttrpc statuses.

Owns connections and the tasks that answer on them. What a peer sends can end its own connection,
never the server. Every request runs as a task of its connection: when the connection ends, unary
requests run on (a client that hangs up never leaves half a container), streams are cancelled.
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
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError, Message

from supervisord_ctr import errors
from supervisord_ctr.aio import TaskOwner, wait_until
from supervisord_ctr.api.shim.v1 import shim_pb2
from supervisord_ctr.ttrpc import wire

log = logging.getLogger(__name__)

#: Requests that one connection may have running; the next ones wait in the socket.
MAX_RUNNING = 4096
#: Messages of one stream that may wait for its handler.
_STREAM_BACKLOG = 256


@dataclass(frozen=True, slots=True)
class Context:
    """What a handler may know about its call: metadata in lower case, seconds left or None."""

    metadata: Mapping[str, list[str]]
    timeout: float | None


@dataclass(frozen=True, slots=True)
class Method:
    """A unary method: `handler(request, context)` gives the response message."""

    request: type[Message]
    handler: Callable[[Any, Context], Awaitable[Message]]


@dataclass(frozen=True, slots=True)
class StreamMethod:
    """A streaming method: `handler(requests, context)` yields the response messages."""

    request: type[Message]
    handler: Callable[[AsyncIterator[Any], Context], AsyncIterator[Message]]


Services = Mapping[str, Mapping[str, Method | StreamMethod]]


class Server:
    """Serves `services` ({service: {method: Method}}) on any number of listening sockets."""

    def __init__(self, services: Services, *, check_peer: bool = True) -> None:
        self._services = services
        self._check_peer = check_peer
        self._accepted: set[asyncio.Task[None]] = set()
        self._calls = TaskOwner("ttrpc calls")
        self._servers: list[asyncio.AbstractServer] = []
        self._connections: set[_Connection] = set()

    async def serve(self, listener: socket.socket) -> None:
        """Start to accept on a listening Unix socket; returns at once."""
        listener.setblocking(False)
        self._servers.append(await asyncio.start_unix_server(self._accept, sock=listener, limit=1 << 18))

    async def attend(self, connection: socket.socket) -> None:
        """Serve one connected Unix socket until it ends."""
        connection.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=connection, limit=1 << 18)
        await self._accept(reader, writer)

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._connections)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task: asyncio.Task[None] | None = asyncio.current_task()
        assert task is not None
        self._accepted.add(task)
        try:
            if self._check_peer and not is_trusted_peer(writer.get_extra_info("socket")):
                log.warning("refused a ttrpc connection of another user")
                return
            connection = _Connection(self._services, reader, writer, self._calls)
            self._connections.add(connection)
            try:
                await connection.run()
            finally:
                self._connections.discard(connection)
        except (wire.ProtocolError, OSError) as error:
            log.debug("ttrpc connection ended: %s", error)
        except asyncio.CancelledError:
            log.debug("ttrpc connection cancelled")
        finally:
            self._accepted.discard(task)
            writer.close()

    async def wait_idle(self, timeout: float) -> None:
        """Return when no request runs, or after `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            await wait_until(lambda: len(self._calls) == 0, timeout, "requests")

    async def close(self) -> None:
        """Stop accepting, cancel what runs, end the connections."""
        for server in self._servers:
            server.close()
        await self._calls.close()
        for connection in list(self._connections):
            connection.abort()
        for task in list(self._accepted):
            task.cancel()
        await asyncio.gather(*self._accepted, return_exceptions=True)


class _Connection:
    def __init__(
        self, services: Services, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, calls: TaskOwner
    ) -> None:
        self._services = services
        self._reader = reader
        self._writer = writer
        self._calls = calls
        self._streams: dict[int, asyncio.Queue[wire.Frame | None]] = {}
        self._stream_tasks: dict[int, asyncio.Task[None]] = {}
        self._running = 0
        self._room = asyncio.Event()
        self._room.set()
        self._last = 0

    def abort(self) -> None:
        self._writer.close()

    async def run(self) -> None:
        try:
            while (frame := await wire.read_frame(self._reader)) is not None:
                await self._take(frame)
        finally:
            for task in self._stream_tasks.values():
                task.cancel()

    async def _take(self, frame: wire.Frame) -> None:
        if frame.kind == wire.DATA:
            queue = self._streams.get(frame.stream)
            if queue is not None and (frame.error is None):
                await queue.put(frame)
            elif queue is None and frame.stream > self._last:
                await self._fail(frame.stream, errors.InvalidArgument("stream is not open"))
            return
        if frame.kind != wire.REQUEST:
            return
        if frame.stream % 2 == 0:
            await self._fail(frame.stream, errors.InvalidArgument("stream id must be odd for client initiated streams"))
            return
        if frame.stream in self._streams:
            await self._fail(frame.stream, errors.InvalidArgument("stream id in use"))
            return
        self._last = max(self._last, frame.stream)
        if frame.error is not None:
            await self._fail(frame.stream, frame.error)
            return
        await self._start(frame)

    async def _start(self, frame: wire.Frame) -> None:
        try:
            request = shim_pb2.Request.FromString(frame.data)
        except DecodeError as error:
            await self._fail(frame.stream, errors.InvalidArgument(f"request cannot be decoded: {error}"))
            return
        method = self._services.get(request.service, {}).get(request.method)
        if method is None:
            missing = "service" if request.service not in self._services else "method"
            await self._fail(
                frame.stream, errors.Unimplemented(f"{missing} {request.service}/{request.method} is not offered")
            )
            return
        await self._room.wait()
        self._running += 1
        if self._running >= MAX_RUNNING:
            self._room.clear()
        metadata: dict[str, list[str]] = {}
        for pair in request.metadata:
            metadata.setdefault(pair.key.lower(), []).append(pair.value)
        timeout = request.timeout_nano / 1e9 if request.timeout_nano > 0 else None
        context = Context(metadata, timeout)
        if isinstance(method, Method):
            self._calls.start(self._unary(frame.stream, method, request, context), request.method)
            return
        queue: asyncio.Queue[wire.Frame | None] = asyncio.Queue(_STREAM_BACKLOG)
        self._streams[frame.stream] = queue
        if request.payload or frame.flags & wire.REMOTE_CLOSED:
            queue.put_nowait(wire.Frame(frame.stream, wire.DATA, 0, request.payload))
        if frame.flags & wire.REMOTE_CLOSED:
            queue.put_nowait(None)
        task = self._calls.start(self._stream(frame.stream, method, queue, context), request.method)
        self._stream_tasks[frame.stream] = task

    def _done(self) -> None:
        self._running -= 1
        self._room.set()

    async def _unary(self, stream: int, method: Method, request: shim_pb2.Request, context: Context) -> None:
        response = shim_pb2.Response()
        try:
            message = method.request.FromString(request.payload)
            async with asyncio.timeout(context.timeout):
                answer = await method.handler(message, context)
            response.payload = answer.SerializeToString()
        except Exception as error:  # the one adapter from errors to statuses
            _set_status(response, error, request)
        finally:
            self._done()
        await self._respond(stream, response)

    async def _stream(
        self, stream: int, method: StreamMethod, queue: asyncio.Queue[wire.Frame | None], context: Context
    ) -> None:
        response = shim_pb2.Response()
        try:
            async with asyncio.timeout(context.timeout):
                async for message in method.handler(_messages(queue, method.request), context):
                    await self._write(wire.pack(stream, wire.DATA, 0, message.SerializeToString()))
        except Exception as error:  # the one adapter from errors to statuses
            _set_status(response, error, None)
        finally:
            self._done()
            self._streams.pop(stream, None)
            self._stream_tasks.pop(stream, None)
        if response.HasField("status"):
            await self._respond(stream, response)
        else:
            await self._write(wire.pack(stream, wire.DATA, wire.REMOTE_CLOSED | wire.NO_DATA, b""))

    async def _fail(self, stream: int, error: errors.Error) -> None:
        response = shim_pb2.Response()
        _set_status(response, error, None)
        await self._respond(stream, response)

    async def _respond(self, stream: int, response: shim_pb2.Response) -> None:
        try:
            data = wire.pack(stream, wire.RESPONSE, 0, response.SerializeToString())
        except errors.ResourceExhausted as error:
            replacement = shim_pb2.Response()
            _set_status(replacement, error, None)
            data = wire.pack(stream, wire.RESPONSE, 0, replacement.SerializeToString())
        await self._write(data)

    async def _write(self, data: bytes) -> None:
        if self._writer.is_closing():
            return
        try:
            self._writer.write(data)
            await self._writer.drain()
        except (ConnectionError, RuntimeError) as error:
            log.debug("ttrpc peer is gone: %s", error)


async def _messages(queue: asyncio.Queue[wire.Frame | None], kind: type[Message]) -> AsyncIterator[Message]:
    while (frame := await queue.get()) is not None:
        if not frame.flags & wire.NO_DATA:
            yield kind.FromString(frame.data)
        if frame.flags & wire.REMOTE_CLOSED:
            return


def _set_status(response: shim_pb2.Response, error: Exception, request: shim_pb2.Request | None) -> None:
    """Put the status of `error` into `response`: the table of `errors`, everything else is unknown."""
    if isinstance(error, errors.Error):
        code, message = int(error.code), error.message
    elif isinstance(error, DecodeError):
        code, message = int(errors.Code.INVALID_ARGUMENT), f"request cannot be decoded: {error}"
    elif isinstance(error, TimeoutError):
        code, message = int(errors.Code.DEADLINE_EXCEEDED), "context deadline exceeded"
    elif isinstance(error, OSError):
        translated = errors.from_os_error(error, request.method.lower() if request is not None else "request")
        code, message = int(translated.code), translated.message
    else:
        code, message = int(errors.Code.UNKNOWN), f"{type(error).__name__}: {error}"
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
