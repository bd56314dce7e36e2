"""Exec and attach: from the channels of a session to a `Backend` and back to a status.

Owns which channels a request needs, the resize messages and what the error channel says. Does not
own the connection: a handler runs as one task and is cancelled when the client is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from supervisord_ctr.errors import Error
from supervisord_ctr.streaming import CHUNK, AttachParams, Backend, ExecParams
from supervisord_ctr.streaming.spdy_session import SpdySession, SpdyStream
from supervisord_ctr.streaming.spdy_wire import ResetStatus
from supervisord_ctr.streaming.status import SUCCESS, Status, of_exit, of_failure
from supervisord_ctr.streaming.websocket import ChannelSession
from supervisord_ctr.streaming.wire import Buffer, Carrier

log = logging.getLogger(__name__)

#: Protocols of exec and attach over SPDY, and how their error stream speaks.
COMMAND_PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io",
                     "channel.k8s.io")
_JSON_PROTOCOLS = ("v5.", "v4.")
_NO_RESIZE = ("v2.channel.k8s.io", "channel.k8s.io", "base64.channel.k8s.io", "")
#: How long a client may take to hear that the daemon stops (seconds).
STOP_PATIENCE = 1.0
#: Longest resize message (bytes); the real ones have about thirty.
_MAX_RESIZE = 4096


class Duplex(Protocol):
    """What a handler needs of one channel; `SpdyStream` and `Channel` have it."""

    @property
    def was_reset(self) -> bool:
        """Whether it ended by a reset or with the connection."""
        ...

    async def read(self, limit: int = CHUNK) -> bytes:
        """Some bytes, `b""` at the peer's end; `ConnectionResetError` after a reset."""
        ...

    async def write(self, data: Buffer) -> None:
        """Send all of `data` and wait for room; `BrokenPipeError` when closed or reset."""
        ...

    async def close(self) -> None:
        """Send no more."""
        ...

    def discard_input(self) -> None:
        """Drop what the peer sends."""
        ...


@dataclass(slots=True)
class CommandChannels:
    """The channels of one exec or attach; None where the request has none."""

    error: Duplex
    stdin: Duplex | None = None
    stdout: Duplex | None = None
    stderr: Duplex | None = None
    resize: Duplex | None = None
    json_status: bool = True


class Stdin:
    """A channel as a `ByteReader`: a client that is gone reads as the end."""

    def __init__(self, channel: Duplex) -> None:
        self._channel = channel

    async def read(self, limit: int = CHUNK) -> bytes:
        """See `ByteReader`."""
        try:
            return await self._channel.read(limit)
        except ConnectionResetError:
            return b""


class ResizeEvents:
    """The sizes that a client's terminal takes, as (width, height)."""

    def __init__(self, channel: Duplex | None) -> None:
        self._channel = channel
        self._text = ""
        self._decoder = json.JSONDecoder()

    def __aiter__(self) -> AsyncIterator[tuple[int, int]]:
        return self

    async def __anext__(self) -> tuple[int, int]:
        while True:
            size = self._next_size()
            if size is not None:
                return size
            if self._channel is None:
                raise StopAsyncIteration
            try:
                data = await self._channel.read(_MAX_RESIZE)
            except ConnectionResetError:
                data = b""
            if not data or len(self._text) > _MAX_RESIZE:
                self._channel.discard_input()
                raise StopAsyncIteration
            self._text += data.decode("utf-8", "replace")

    def _next_size(self) -> tuple[int, int] | None:
        """The next whole message; ones that make no sense are passed over."""
        while True:
            self._text = self._text.lstrip()
            if not self._text:
                return None
            try:
                value, end = self._decoder.raw_decode(self._text)
            except ValueError:
                return None
            except RecursionError:
                self._text = ""
                return None
            self._text = self._text[end:]
            if isinstance(value, dict):
                found = {str(name).lower(): number for name, number in value.items()}
                width, height = found.get("width"), found.get("height")
                if isinstance(width, int) and isinstance(height, int) and 0 < width < 65536 and 0 < height < 65536:
                    return width, height


async def run_command(backend: Backend, params: ExecParams | AttachParams, channels: CommandChannels) -> None:
    """Carry the request out, then tell its status.

    When the daemon stops, the client is told so: a stream that just ends would look like success.
    """
    try:
        status = await _run(backend, params, channels)
    except asyncio.CancelledError:
        if not channels.error.was_reset:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_PATIENCE):
                    await _conclude(channels, _failure(params, "the daemon is stopping"))
        raise
    await _conclude(channels, status)


async def _run(backend: Backend, params: ExecParams | AttachParams, channels: CommandChannels) -> Status:
    stdin = Stdin(channels.stdin) if channels.stdin is not None else None
    resize = ResizeEvents(channels.resize if params.tty else None)
    try:
        if isinstance(params, ExecParams):
            code = await backend.exec(
                params.container_id, params.argv, tty=params.tty, stdin=stdin, stdout=channels.stdout,
                stderr=channels.stderr, resize=resize,
            )
            return of_exit(code, params.argv)
        await backend.attach(
            params.container_id, tty=params.tty, stdin=stdin, stdout=channels.stdout, stderr=channels.stderr,
            resize=resize,
        )
        return SUCCESS
    except Error as error:
        return _failure(params, error.message)
    except OSError as error:
        return _failure(params, str(error))
    except Exception:
        log.exception("streaming for container %s failed", params.container_id)
        return _failure(params, "internal error")


async def _conclude(channels: CommandChannels, status: Status) -> None:
    """Close the channels in the order that clients wait for, and tell the status in between."""
    for channel in (channels.stdin, channels.resize):
        if channel is not None:
            channel.discard_input()
    for channel in (channels.stdout, channels.stderr):
        if channel is not None:
            await channel.close()
    try:
        message = status.to_json() if channels.json_status else status.to_text()
        if message:
            await channels.error.write(message)
    except BrokenPipeError:
        log.debug("the client did not wait for the status")
    await channels.error.close()
    for channel in (channels.stdin, channels.resize):
        if channel is not None:
            await channel.close()


def _failure(params: ExecParams | AttachParams, message: str) -> Status:
    doing = "executing command in container" if isinstance(params, ExecParams) else "attaching to container"
    return of_failure(f"error {doing}: {message}")


class StreamGatherer:
    """Waits until a SPDY client has opened every stream that its request needs."""

    def __init__(self, params: ExecParams | AttachParams, protocol: str) -> None:
        self._protocol = protocol
        self._needed = {"error"} | {
            kind for kind, wanted in (
                ("stdin", params.stdin), ("stdout", params.stdout), ("stderr", params.stderr),
                ("resize", params.tty and protocol not in _NO_RESIZE),
            ) if wanted
        }
        self._streams: dict[str, SpdyStream] = {}
        self._complete = asyncio.Event()
        self.session: SpdySession | None = None

    def on_stream(self, stream: SpdyStream) -> None:
        """Take a stream of the client."""
        assert self.session is not None
        kind = stream.headers.get("streamtype", "")
        if kind not in ("error", "stdin", "stdout", "stderr", "resize") or kind in self._streams:
            stream.reset(ResetStatus.REFUSED_STREAM)
            return
        self.session.accept(stream)
        if kind not in ("stdin", "resize") or kind not in self._needed:
            stream.discard_input()
        self._streams[kind] = stream
        if self._needed <= self._streams.keys():
            self._complete.set()

    async def wait_complete(self, timeout: float) -> CommandChannels:
        """The channels; `TimeoutError` when the client does not open them in time."""
        async with asyncio.timeout(timeout):
            await self._complete.wait()
        found = {kind: stream for kind, stream in self._streams.items() if kind in self._needed}
        return CommandChannels(
            error=found["error"], stdin=found.get("stdin"), stdout=found.get("stdout"), stderr=found.get("stderr"),
            resize=found.get("resize"), json_status=self._protocol.startswith(_JSON_PROTOCOLS),
        )


async def serve_spdy(
    carrier: Carrier, gatherer: StreamGatherer, backend: Backend, params: ExecParams | AttachParams, timeout: float
) -> None:
    """Serve a SPDY client until the command has ended."""
    session = gatherer.session
    assert session is not None
    try:
        channels = await gatherer.wait_complete(timeout)
    except TimeoutError:
        log.info("client for container %s did not open its streams within %g s", params.container_id, timeout)
        carrier.abort()
        return
    await run_command(backend, params, channels)
    await session.finish()


def channel_kinds(params: ExecParams | AttachParams) -> list[tuple[bool, bool]]:
    """(readable, writable) of channels 0 to 4: stdin, stdout, stderr, error, resize."""
    return [(params.stdin, False), (False, params.stdout), (False, params.stderr), (False, True), (True, False)]


async def serve_websocket(
    session: ChannelSession, backend: Backend, params: ExecParams | AttachParams, protocol: str
) -> None:
    """Serve a WebSocket client until the command has ended."""
    stdin, stdout, stderr, error, resize = session.channels
    if not params.tty:
        resize.discard_input()
    # An empty message on the first channel to the client tells it that the session stands.
    session.send(1 if params.stdout else 2 if params.stderr else 3, b"")
    channels = CommandChannels(
        error=error, stdin=stdin if params.stdin else None, stdout=stdout if params.stdout else None,
        stderr=stderr if params.stderr else None, resize=resize if params.tty else None,
        json_status=protocol.startswith(_JSON_PROTOCOLS),
    )
    await run_command(backend, params, channels)
    await session.finish()
