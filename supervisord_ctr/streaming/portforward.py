"""Port-forward: pairs of streams joined to connections inside a pod's network.

Owns the pairing of data and error streams, the copying with a half-close in each direction, and what a
failure does: it ends its own pair and nothing else (P8). The sockets come from the `Backend`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from dataclasses import dataclass

from supervisord_ctr.aio import TaskOwner
from supervisord_ctr.errors import Error
from supervisord_ctr.streaming import CHUNK, Backend
from supervisord_ctr.streaming.remotecommand import Duplex
from supervisord_ctr.streaming.spdy_session import SpdySession, SpdyStream
from supervisord_ctr.streaming.spdy_wire import ResetStatus
from supervisord_ctr.streaming.websocket import ChannelSession

log = logging.getLogger(__name__)

PORT_FORWARD_PROTOCOLS = ("portforward.k8s.io",)
#: Pairs that one session may have open.
MAX_PAIRS = 512
#: Seconds without data after which a client is taken to be done whose protocol cannot tell it of the pod's end.
_SILENCE = 1.0


@dataclass(slots=True)
class _Pair:
    request: str
    port: int
    data: SpdyStream | None = None
    error: SpdyStream | None = None
    timer: asyncio.TimerHandle | None = None


class PortForward:
    """A SPDY session of `portforward.k8s.io`: any number of forwarded connections."""

    def __init__(self, backend: Backend, sandbox_id: str, creation_timeout: float) -> None:
        self._backend = backend
        self._sandbox_id = sandbox_id
        self._creation_timeout = creation_timeout
        self._pairs: dict[str, _Pair] = {}
        self._running = 0
        self._owner = TaskOwner(f"port-forward {sandbox_id}")
        self.session: SpdySession | None = None

    def on_stream(self, stream: SpdyStream) -> None:
        """Take a stream of the client: half of a pair, found by its request number."""
        assert self.session is not None
        kind, port = stream.headers.get("streamtype", ""), _port(stream.headers.get("port", ""))
        if kind not in ("data", "error") or port is None or len(self._pairs) + self._running >= MAX_PAIRS:
            stream.reset(ResetStatus.REFUSED_STREAM)
            return
        # Clients without request numbers open the error stream first and the data stream next.
        request = stream.headers.get("requestid") or str(stream.id if kind == "error" else stream.id - 2)
        pair = self._pairs.get(request)
        if pair is None:
            pair = self._pairs[request] = _Pair(request, port)
            pair.timer = asyncio.get_running_loop().call_later(self._creation_timeout, self._give_up, pair)
        if (pair.data if kind == "data" else pair.error) is not None:
            stream.reset(ResetStatus.REFUSED_STREAM)
            return
        if kind == "data":
            pair.data, pair.port = stream, port
        else:
            pair.error = stream
            stream.discard_input()
        self.session.accept(stream)
        if pair.data is not None and pair.error is not None:
            self._forget(pair)
            self._owner.start(self._forward(pair.port, pair.data, pair.error), f"port {pair.port}")

    async def run(self) -> None:
        """Serve until cancelled: the session lasts as long as the client's connection."""
        try:
            await asyncio.Event().wait()
        finally:
            for pair in list(self._pairs.values()):
                self._forget(pair)
            await self._owner.close()

    def _forget(self, pair: _Pair) -> None:
        self._pairs.pop(pair.request, None)
        if pair.timer is not None:
            pair.timer.cancel()

    def _give_up(self, pair: _Pair) -> None:
        self._forget(pair)
        for stream in (pair.data, pair.error):
            if stream is not None:
                stream.reset(ResetStatus.CANCEL)

    async def _forward(self, port: int, data: SpdyStream, error: SpdyStream) -> None:
        self._running += 1
        try:
            message = await forward(self._backend, self._sandbox_id, port, data)
            if message and self._running == 1:
                # A client that reads a message here drops the whole session (client-go does), so it is
                # sent only when no other connection would be lost with it (P8).
                await error.write(message.encode())
        except BrokenPipeError:
            log.debug("client of sandbox %s left before it was told of port %d", self._sandbox_id, port)
        finally:
            self._running -= 1
            data.reset()
            await error.close()


async def forward(
    backend: Backend, sandbox_id: str, port: int, stream: Duplex, *, silence: float | None = None
) -> str:
    """Forward one connection to its end; what to tell the client, empty when all went well. `silence`: see `join`."""
    try:
        sock = await backend.port_forward(sandbox_id, port)
    except (Error, OSError) as error:
        log.info("port-forward to port %d of sandbox %s: %s", port, sandbox_id, error)
        return f"error forwarding port {port} to pod {sandbox_id}, uid : {error}"
    with sock:
        await join(sock, stream, silence=silence)
    return ""


async def join(sock: socket.socket, stream: Duplex, *, silence: float | None = None) -> None:
    """Copy both ways until both ends have ended or one was reset.

    Each direction ends by itself: the end of what the client sends becomes a shutdown of the socket,
    and the socket's end closes the stream for sending. A reset of one side becomes a reset of the other.
    A client that cannot be told of the pod's end waits for ours: after the pod's, `silence` seconds in
    which it sends nothing are its own.
    """
    loop = asyncio.get_running_loop()
    heard = loop.time()

    async def client_to_pod() -> None:
        nonlocal heard
        while data := await stream.read(CHUNK):
            heard = loop.time()
            try:
                await loop.sock_sendall(sock, data)
            except OSError:
                # The pod reads no more; what it still says must reach the client all the same.
                stream.discard_input()
                return
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            return

    async def pod_to_client() -> None:
        while data := await loop.sock_recv(sock, CHUNK):
            await stream.write(data)
        await stream.close()
        if silence is None:
            return
        until = loop.time() + silence
        while (left := until - loop.time()) > 0 and not sending.done():
            await asyncio.wait([sending], timeout=left)
            until = heard + silence
        sending.cancel()

    try:
        try:
            async with asyncio.TaskGroup() as group:
                sending = group.create_task(client_to_pod())
                group.create_task(pod_to_client())
        except* OSError as group_error:
            log.debug("forwarded connection was reset: %s", group_error.exceptions[0])
            _reset_on_close(sock)
    except asyncio.CancelledError:
        _reset_on_close(sock)
        raise


def _reset_on_close(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _port(text: str) -> int | None:
    """A port number, or None."""
    if not text.isascii() or not text.isdigit() or len(text) > 5:
        return None
    port = int(text)
    return port if 0 < port < 65536 else None


async def serve_websocket(session: ChannelSession, backend: Backend, sandbox_id: str, ports: tuple[int, ...]) -> None:
    """The channel form: channels 2n and 2n + 1 carry data and errors of the nth port.

    Each channel begins with its port in two bytes, little-endian.
    """

    async def one(position: int, port: int) -> None:
        data, error = session.channels[2 * position], session.channels[2 * position + 1]
        for channel in (data, error):
            await channel.write(struct.pack("<H", port))
        message = await forward(backend, sandbox_id, port, data, silence=_SILENCE)
        if message:
            await error.write(message.encode())
        data.reset()

    try:
        async with asyncio.TaskGroup() as group:
            for position, port in enumerate(ports):
                group.create_task(one(position, port))
    except* BrokenPipeError:
        log.debug("client of sandbox %s is gone", sandbox_id)
    await session.finish()
