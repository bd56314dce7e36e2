"""The connection under a session once HTTP is over: ordered, bounded, timed, ended.

Owns the transport, whose turn it is to write, why reading is held, the idle clock and the careful
close. Knows no protocol: bytes that arrive go to a receiver, and what is sent was framed by others.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import select
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Protocol

Buffer = bytes | bytearray | memoryview

#: Writers wait while more than this is unsent, and go on below the second (bytes).
HIGH_WATER = 512 << 10
LOW_WATER = 128 << 10
#: What writers cannot cause: a peer that asks for answers and never reads them is cut off here (P9).
FLOOD = 32 << 20
#: How often a connection that is not read is looked at for a peer that went away (seconds).
PROBE_INTERVAL = 1.0
#: How long the peer may take to close after everything reached it (seconds).
LINGER = 5.0


class Carrier(Protocol):
    """What a session needs of the connection below it."""

    @property
    def lost(self) -> asyncio.Event:
        """Set when nothing can be sent or received any more."""
        ...

    def send(self, buffers: Iterable[Buffer]) -> None:
        """Send at once, in order; the buffers may be reused on return."""
        ...

    async def wait_room(self) -> None:
        """Wait for one's turn to send bulk data. Writers are served in order, one at a time."""
        ...

    def hold(self, reason: Hashable) -> None:
        """Stop reading until every reason is released."""
        ...

    def release(self, reason: Hashable) -> None:
        """Take one reason back; harmless when it was not given."""
        ...

    async def finish(self) -> None:
        """End well: what was sent reaches the peer, then the connection is closed."""
        ...

    def close_soon(self) -> None:
        """End without waiting for the peer: what was sent goes out if the kernel takes it."""
        ...

    def abort(self) -> None:
        """End at once."""
        ...


class Wire(asyncio.Protocol):
    """A `Carrier` on an asyncio transport (TCP or TLS)."""

    def __init__(self, transport: asyncio.Transport, *, idle_timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._idle_timeout = idle_timeout
        self._receiver: Callable[[bytes], None] = _discard
        self._on_lost: Callable[[], None] = _nothing
        self._lost = asyncio.Event()
        self._congested = False
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._holds: set[Hashable] = set()
        self._last_active = self._loop.time()
        self._idle_timer = self._loop.call_later(idle_timeout, self._check_idle)
        self._probe_timer: asyncio.TimerHandle | None = None
        transport.set_write_buffer_limits(HIGH_WATER, LOW_WATER)
        transport.set_protocol(self)
        sock: socket.socket | None = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            keep_alive(sock)

    # -- Carrier ---------------------------------------------------------------------------------

    @property
    def lost(self) -> asyncio.Event:
        """Set when the connection is gone."""
        return self._lost

    def attach(self, receiver: Callable[[bytes], None], on_lost: Callable[[], None]) -> None:
        """Say who gets the bytes and who is told of the end (once)."""
        self._receiver = receiver
        self._on_lost = on_lost

    def send(self, buffers: Iterable[Buffer]) -> None:
        """See `Carrier`; sending on a lost connection does nothing."""
        if self._lost.is_set() or self._transport.is_closing():
            return
        data = b"".join(buffers)
        if not data:
            return
        self._last_active = self._loop.time()
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > FLOOD:
            self.abort()

    async def wait_room(self) -> None:
        """See `Carrier`."""
        if not self._congested and not self._waiters:
            return
        if self._lost.is_set():
            return
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._wake_next()
            else:
                self._waiters.remove(waiter)
            raise
        # The next one comes when this one has had its turn, unless that filled the buffer again.
        self._loop.call_soon(self._wake_next)

    def hold(self, reason: Hashable) -> None:
        """See `Carrier`."""
        if not self._holds and not self._transport.is_closing():
            self._transport.pause_reading()
            self._probe_timer = self._loop.call_later(PROBE_INTERVAL, self._probe)
        self._holds.add(reason)

    def release(self, reason: Hashable) -> None:
        """See `Carrier`."""
        if reason not in self._holds:
            return
        self._holds.discard(reason)
        if not self._holds:
            self._stop_probe()
            if not self._transport.is_closing():
                self._transport.resume_reading()

    async def finish(self) -> None:
        """See `Carrier`. Waits as long as the peer takes to read what was sent, at most the idle time."""
        self._receiver = _discard
        for reason in list(self._holds):
            self.release(reason)
        if self._lost.is_set():
            return
        try:
            if self._transport.can_write_eof():
                with contextlib.suppress(OSError):  # the peer may have gone just now
                    self._transport.write_eof()
            elif not self._transport.is_closing():  # a second one leaves nothing of a TLS transport, not even `abort`
                self._transport.close()
            quiet_since = self._loop.time()
            while not self._lost.is_set():
                if self._unsent():
                    quiet_since = self._loop.time()
                elif self._loop.time() - quiet_since > LINGER:
                    break
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._lost.wait(), 0.25)
        finally:
            self.abort()

    def abort(self) -> None:
        """See `Carrier`."""
        self._transport.abort()
        self._lose()

    def close_soon(self) -> None:
        """See `Carrier`."""
        self._receiver = _discard
        if not self._lost.is_set() and not self._transport.is_closing():
            self._transport.close()
            self._loop.call_later(LINGER, self._transport.abort)

    # -- asyncio.Protocol ------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Hand on what arrived."""
        self._last_active = self._loop.time()
        self._receiver(data)

    def eof_received(self) -> bool:
        """The peer closed its half: none of the protocols here uses that to go on, so it is gone."""
        return False

    def connection_lost(self, _exc: Exception | None) -> None:
        """The transport is closed."""
        self._lose()

    def pause_writing(self) -> None:
        """Too much is unsent."""
        self._congested = True

    def resume_writing(self) -> None:
        """There is room again."""
        self._congested = False
        self._wake_next()

    # -- own parts -------------------------------------------------------------------------------

    def _wake_next(self) -> None:
        if self._congested and not self._lost.is_set():
            return
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _lose(self) -> None:
        if self._lost.is_set():
            return
        self._lost.set()
        self._idle_timer.cancel()
        self._stop_probe()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()
        on_lost, self._on_lost, self._receiver = self._on_lost, _nothing, _discard
        on_lost()

    def _check_idle(self) -> None:
        left = self._last_active + self._idle_timeout - self._loop.time()
        if left <= 0:
            self.abort()
        else:
            self._idle_timer = self._loop.call_later(left, self._check_idle)

    def _stop_probe(self) -> None:
        if self._probe_timer is not None:
            self._probe_timer.cancel()
            self._probe_timer = None

    def _probe(self) -> None:
        """See whether the peer of a connection that is not read has gone: no event would tell."""
        sock = self._transport.get_extra_info("socket")
        if sock is None or sock.fileno() < 0:
            return
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLRDHUP)
        if poll.poll(0):
            self.abort()
        else:
            self._probe_timer = self._loop.call_later(PROBE_INTERVAL, self._probe)

    def _unsent(self) -> int:
        """Bytes that have not reached the peer's kernel: ours and those in the socket."""
        size = self._transport.get_write_buffer_size()
        sock = self._transport.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            with contextlib.suppress(OSError):
                size += struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0]
        return size


def keep_alive(sock: socket.socket) -> None:
    """Find out within about two minutes that a peer vanished without a word, and send small pieces at once."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _discard(_data: bytes) -> None:
    return


def _nothing() -> None:
    return
