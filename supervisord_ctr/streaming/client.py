"""The other end: opens SPDY sessions to a streaming server, ours or another runtime's.

Owns the HTTP request, the streams of an exec or attach as a client sees them, and the decoding of the
status. Used by `pctr` and by tests. Knows no terminal and no files.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11

from supervisord_ctr.errors import InvalidArgument, Unavailable, Unknown
from supervisord_ctr.streaming import status
from supervisord_ctr.streaming.spdy_session import SpdySession, SpdyStream
from supervisord_ctr.streaming.wire import Wire

#: Command protocols that a client offers, best first.
COMMAND_PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io")
PORT_FORWARD_PROTOCOL = "portforward.k8s.io"
_MAX_ANSWER = 64 << 10
_MAX_STATUS = 1 << 20


class _Upgrade(asyncio.Protocol):
    """Sends a request and waits for 101 or something else."""

    def __init__(self, request: h11.Request) -> None:
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_ANSWER)
        self._request = request
        self._transport: asyncio.Transport | None = None
        self._body = bytearray()
        self._status = 0
        self.answered: asyncio.Future[tuple[dict[str, str], bytes]] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        head = self._http.send(self._request) or b""
        transport.write(head + (self._http.send(h11.EndOfMessage()) or b""))

    def data_received(self, data: bytes) -> None:
        if self.answered.done():
            return
        try:
            self._http.receive_data(data)
            self._read()
        except h11.RemoteProtocolError as error:
            self._fail(f"bad answer: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"connection closed before the upgrade{f': {exc}' if exc else ''}")

    def _read(self) -> None:
        while not self.answered.done():
            event = self._http.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return
            if isinstance(event, h11.InformationalResponse) and event.status_code == 101:
                assert self._transport is not None
                self._transport.pause_reading()
                headers = {name.decode("ascii"): value.decode("latin-1") for name, value in event.headers}
                self.answered.set_result((headers, self._http.trailing_data[0]))
            elif isinstance(event, h11.Response):
                self._status = event.status_code
            elif isinstance(event, h11.Data):
                if len(self._body) < _MAX_ANSWER:
                    self._body += event.data
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                self._fail(f"unable to upgrade: {self._status} {self._body.decode('utf-8', 'replace').strip()}")

    def _fail(self, message: str) -> None:
        if not self.answered.done():
            self.answered.set_exception(Unavailable(message))


async def connect(
    url: str,
    protocols: Sequence[str],
    *,
    timeout: float = 15.0,
    context: ssl.SSLContext | None = None,
    idle_timeout: float = 24 * 3600.0,
) -> tuple[SpdySession, str]:
    """A session at `url` and the protocol that the server chose.

    Raises `InvalidArgument` for a URL of another kind, `Unavailable` when the server does not upgrade.
    The caller ends the session with `finish`.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidArgument(f"streaming url {parts.scheme}://{parts.netloc} is not http or https")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    request = h11.Request(method="POST", target=target, headers=[
        ("Host", parts.netloc), ("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), ("Content-Length", "0"),
        ("X-Stream-Protocol-Version", ", ".join(protocols)),
    ])
    if parts.scheme == "https" and context is None:
        context = _insecure_context()
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout):
            transport, upgrade = await loop.create_connection(
                lambda: _Upgrade(request), parts.hostname, port, ssl=context if parts.scheme == "https" else None
            )
            try:
                headers, trailing = await upgrade.answered
            except BaseException:
                transport.abort()
                raise
    except TimeoutError:
        raise Unavailable(f"streaming server {parts.netloc} did not answer within {timeout:g} s") from None
    except OSError as error:
        raise Unavailable(f"streaming server {parts.netloc}: {error}") from error
    assert isinstance(transport, asyncio.Transport)
    wire = Wire(transport, idle_timeout=idle_timeout)
    session = SpdySession(wire, client=True)
    wire.attach(session.received, session.connection_lost)
    if trailing:
        wire.data_received(trailing)
    transport.resume_reading()
    return session, headers.get("x-stream-protocol-version", "")


def _insecure_context() -> ssl.SSLContext:
    """TLS without verification: the address came from the runtime itself, over its own socket."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@dataclass(slots=True)
class Command:
    """The client's side of an exec or attach."""

    session: SpdySession
    protocol: str
    error: SpdyStream
    stdin: SpdyStream | None
    stdout: SpdyStream | None
    stderr: SpdyStream | None
    resize: SpdyStream | None

    async def send_resize(self, width: int, height: int) -> None:
        """Tell the size of the terminal."""
        if self.resize is not None:
            with contextlib.suppress(BrokenPipeError):
                await self.resize.write(json.dumps({"Width": width, "Height": height}).encode() + b"\n")

    async def wait_status(self) -> int:
        """The exit code; raises `Unknown` with the server's message when the command did not run.

        `Unavailable` when the connection was lost before the server told.
        """
        text = bytearray()
        try:
            while data := await self.error.read():
                text += data
                if len(text) > _MAX_STATUS:
                    raise Unknown("the status of the command is too long")
        except ConnectionResetError:
            if not text:
                raise Unavailable("the connection was lost before the command's status was known") from None
        if not text and not self.protocol.startswith(("v4.", "v5.")):
            return 0
        try:
            value = json.loads(text)
        except ValueError:
            raise Unknown(text.decode("utf-8", "replace") or "the server told no status") from None
        code = status.exit_code(value)
        if code is None:
            raise Unknown(str(value.get("message", "the server told no reason")))
        return code


async def open_command(
    url: str, *, stdin: bool, stdout: bool, stderr: bool, tty: bool, context: ssl.SSLContext | None = None
) -> Command:
    """Open the streams of an exec or attach at `url`. The caller ends `session` with `finish`."""
    session, protocol = await connect(url, COMMAND_PROTOCOLS, context=context)
    try:
        streams: dict[str, SpdyStream] = {}
        wanted = (("error", True), ("stdin", stdin), ("stdout", stdout), ("stderr", stderr and not tty),
                  ("resize", tty and not protocol.startswith("v2")))
        for kind, is_wanted in wanted:
            if is_wanted:
                streams[kind] = await session.open({"streamtype": kind})
        await streams["error"].close()
    except BaseException:
        session.carrier.abort()
        raise
    return Command(
        session, protocol, streams["error"], streams.get("stdin"), streams.get("stdout"), streams.get("stderr"),
        streams.get("resize"),
    )


async def open_forward(session: SpdySession, port: int, request: int) -> tuple[SpdyStream, SpdyStream]:
    """The data and the error stream of one forwarded connection."""
    headers = {"port": str(port), "requestid": str(request)}
    error = await session.open({"streamtype": "error", **headers})
    await error.close()
    data = await session.open({"streamtype": "data", **headers})
    return data, error
