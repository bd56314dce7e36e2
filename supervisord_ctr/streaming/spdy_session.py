"""A running SPDY session: the state machine of `spdy` joined to a connection, with streams to await.

Owns each stream's inbox and its waiting writers. Serves both roles: the daemon and `pctr`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from supervisord_ctr.streaming import CHUNK, spdy
from supervisord_ctr.streaming.inbox import Inbox
from supervisord_ctr.streaming.spdy_wire import ResetStatus
from supervisord_ctr.streaming.wire import Buffer, Carrier

#: What a stream may hold unread: the window that we state, and where peers without windows are held back.
WINDOW = 1 << 20
#: What all streams of a session may hold unread together: the session's window.
SESSION_WINDOW = 8 << 20
#: Streams that nobody reads can stop all others: without windows one that is full does, with windows
#: several that use up the session's. A stream that is not read for so long (seconds) while it is in the
#: way of others is reset (P8, P9).
STALL_TIMEOUT = 30.0


class SpdyStream:
    """One stream, both directions. Ends by `close` and the peer's end, or by a reset of either side."""

    def __init__(self, session: SpdySession, stream_id: int, headers: Mapping[str, str]) -> None:
        self._session = session
        self.id = stream_id
        #: Headers by lower-case name.
        self.headers = headers
        self.accepted = False
        self._answered = asyncio.Event()
        self._window = asyncio.Event()
        self._closed = False
        self._reset: int | None = None
        self.inbox = Inbox(
            WINDOW,
            on_full=lambda: session.hold(stream_id),
            on_room=lambda: session.release(stream_id),
            on_read=lambda size: session.consumed(self, size),
        )
        #: Time of the reader's last sign of life, on the loop's clock.
        self.last_read = session.now()

    @property
    def was_reset(self) -> bool:
        """Whether the stream ended by a reset, or with the connection."""
        return self._reset is not None

    async def wait_accepted(self) -> None:
        """Wait for the peer's word on a stream of ours; `ConnectionRefusedError` when it is no."""
        await self._answered.wait()
        if not self.accepted:
            raise ConnectionRefusedError(f"the peer refused stream {self.id}")

    def accept(self) -> None:
        """The peer accepted the stream (session use)."""
        self.accepted = True
        self._answered.set()

    async def read(self, limit: int = CHUNK) -> bytes:
        """Some bytes, `b""` at the peer's end; `ConnectionResetError` after a reset or a lost connection."""
        return await self.inbox.read(limit)

    async def write(self, data: Buffer) -> None:
        """Send all of `data` and wait until there is room for more; `BrokenPipeError` when closed or reset."""
        view = memoryview(data)
        while view:
            await self._session.carrier.wait_room()
            if self._closed or self._reset is not None:
                raise BrokenPipeError(f"stream {self.id} is closed")
            size = min(len(view), self._session.machine.sendable(self.id))
            if size == 0:
                self._window.clear()
                await self._window.wait()
                continue
            self._session.machine.send_data(self.id, view[:size])
            self._session.flush()
            view = view[size:]

    async def close(self) -> None:
        """Send no more; the peer may go on. Harmless when repeated."""
        if self._closed or self._reset is not None:
            return
        self._closed = True
        self._window.set()
        if self._session.machine.is_open(self.id):
            self._session.machine.send_data(self.id, b"", fin=True)
            self._session.flush()
            self._session.forget_closed(self.id)

    def reset(self, status: int = ResetStatus.CANCEL) -> None:
        """End both directions at once; harmless when the stream is gone."""
        if self._reset is None:
            self._session.machine.reset(self.id, status)
            self._session.flush()
            self.drop(status)

    def leave(self) -> None:
        """The session ends: reset the stream, unless its end was said already."""
        if self._closed:
            self.discard_input()
            self.drop(ResetStatus.CANCEL)
        else:
            self.reset()

    def discard_input(self) -> None:
        """Nobody will read: drop what is there and what comes."""
        self.inbox.close()

    def drop(self, status: int) -> None:
        """The stream is gone in both directions (session use)."""
        self._reset = status
        self._window.set()
        self._answered.set()
        self.inbox.fail(ConnectionResetError(f"stream {self.id} was reset"))
        self._session.forget(self.id)

    def window_opened(self) -> None:
        """There may be room to send (session use)."""
        self._window.set()


class SpdySession:
    """A session and its streams. `on_stream` is called for each stream that the peer opens."""

    def __init__(
        self, carrier: Carrier, *, client: bool, on_stream: Callable[[SpdyStream], None] | None = None
    ) -> None:
        self.carrier = carrier
        self.machine = spdy.Session(client=client, window=WINDOW, session_window=SESSION_WINDOW)
        self._on_stream = on_stream
        self._loop = asyncio.get_running_loop()
        self._streams: dict[int, SpdyStream] = {}
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._unread = 0
        self._stall_timer: asyncio.TimerHandle | None = None
        self.flush()

    @property
    def streams(self) -> int:
        """How many streams are open."""
        return len(self._streams)

    async def open(self, headers: Mapping[str, str], *, timeout: float = 30.0) -> SpdyStream:
        """Open a stream and wait until the peer accepts it; `ConnectionRefusedError` when it does not."""
        stream = self.begin(headers)
        async with asyncio.timeout(timeout):
            await stream.wait_accepted()
        return stream

    def begin(self, headers: Mapping[str, str]) -> SpdyStream:
        """Open a stream without waiting for the peer's word; what is written meanwhile goes out in order."""
        if self.carrier.lost.is_set():
            raise ConnectionResetError("the connection is gone")
        stream = SpdyStream(self, self.machine.open_stream(headers), headers)
        self._streams[stream.id] = stream
        self.flush()
        return stream

    def accept(self, stream: SpdyStream) -> None:
        """Accept a stream of the peer."""
        if self.machine.is_open(stream.id):
            self.machine.reply(stream.id)
            self.flush()

    async def ping(self) -> None:
        """Wait for a sign of life; `ConnectionResetError` when the connection ends first."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        number = self.machine.ping()
        self._pings[number] = waiter
        self.flush()
        try:
            await waiter
        finally:
            self._pings.pop(number, None)

    def close_soon(self) -> None:
        """Say that this side goes away and end without waiting for the peer."""
        if not self.carrier.lost.is_set() and not self.machine.failed:
            self.machine.go_away()
            self.flush()
        self.carrier.close_soon()

    async def finish(self) -> None:
        """Take no more, reset what this side has not closed, let everything sent arrive, close."""
        for stream in list(self._streams.values()):
            stream.leave()
        self.machine.go_away()
        self.flush()
        await self.carrier.finish()

    # -- for the connection ----------------------------------------------------------------------

    def received(self, data: bytes) -> None:
        """Bytes arrived."""
        for event in self.machine.receive(data):
            self._handle(event)
        self.flush()

    def connection_lost(self) -> None:
        """The connection is gone: so is every stream."""
        for stream in list(self._streams.values()):
            stream.drop(ResetStatus.CANCEL)
        for waiter in self._pings.values():
            if not waiter.done():
                waiter.set_exception(ConnectionResetError("the connection is gone"))
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def _handle(self, event: spdy.Event) -> None:
        match event:
            case spdy.DataReceived(stream_id, data):
                stream = self._streams.get(stream_id)
                if stream is None or not stream.inbox.feed(data):
                    self.machine.consumed(stream_id, len(data))
                else:
                    self._fed(len(data))
            case spdy.StreamEnded(stream_id):
                if (stream := self._streams.get(stream_id)) is not None:
                    stream.inbox.end()
                    self.forget_closed(stream_id)
            case spdy.StreamOpened(stream_id, headers):
                self._opened(stream_id, headers)
            case spdy.StreamReplied(stream_id, _):
                if (stream := self._streams.get(stream_id)) is not None:
                    stream.accept()
            case spdy.StreamReset(stream_id, status):
                if (stream := self._streams.get(stream_id)) is not None:
                    stream.drop(status)
            case spdy.WindowOpened(stream_id):
                for stream in [self._streams[stream_id]] if stream_id in self._streams else self._streams.values():
                    stream.window_opened()
            case spdy.PingAnswered(number):
                waiter = self._pings.get(number)
                if waiter is not None and not waiter.done():
                    waiter.set_result(None)
            case spdy.SessionFailed():
                self.flush()
                self.carrier.abort()

    def _opened(self, stream_id: int, headers: dict[str, str]) -> None:
        stream = SpdyStream(self, stream_id, headers)
        self._streams[stream_id] = stream
        if self._on_stream is None:
            stream.reset(ResetStatus.REFUSED_STREAM)
        else:
            self._on_stream(stream)

    # -- for the streams -------------------------------------------------------------------------

    def now(self) -> float:
        """The loop's clock."""
        return self._loop.time()

    def flush(self) -> None:
        """Send what the machine has to say."""
        output = self.machine.take_output()
        if output:
            self.carrier.send(output)

    def _fed(self, size: int) -> None:
        """More is unread: hold the connection when it is too much, and look for streams in the way."""
        self._unread += size
        if self._unread > SESSION_WINDOW:
            self.carrier.hold("session")
        if self._unread * 2 > SESSION_WINDOW:
            self._watch_for_stalls()

    def consumed(self, stream: SpdyStream, size: int) -> None:
        """A stream's reader took bytes, or they were dropped."""
        stream.last_read = self._loop.time()
        self._unread -= size
        if self._unread * 2 <= SESSION_WINDOW:
            self.carrier.release("session")
        self.machine.consumed(stream.id, size)
        self.flush()

    def hold(self, stream_id: int) -> None:
        """A stream has too much unread: read no more of the connection."""
        self.carrier.hold(stream_id)
        self._watch_for_stalls()

    def _watch_for_stalls(self) -> None:
        if self._stall_timer is None:
            self._stall_timer = self._loop.call_later(STALL_TIMEOUT / 4, self._check_stalls)

    def _check_stalls(self) -> None:
        """Reset the streams that are in the way of others and were not read for long."""
        self._stall_timer = None
        crowded = self._unread * 2 > SESSION_WINDOW
        waiting = [stream for stream in self._streams.values() if stream.inbox.full or (crowded and stream.inbox)]
        if not waiting:
            return
        oldest = self._loop.time() - STALL_TIMEOUT
        if self._bulk_streams() > 1:
            for stream in waiting:
                if stream.last_read <= oldest:
                    stream.reset(ResetStatus.FLOW_CONTROL_ERROR)
        self._watch_for_stalls()

    def _bulk_streams(self) -> int:
        return sum(stream.headers.get("streamtype") == "data" for stream in self._streams.values())

    def release(self, stream_id: int) -> None:
        """There is room again."""
        self.carrier.release(stream_id)

    def forget(self, stream_id: int) -> None:
        """The stream is gone."""
        self._streams.pop(stream_id, None)
        self.carrier.release(stream_id)

    def forget_closed(self, stream_id: int) -> None:
        """Drop the stream from the table if both directions are closed; what is unread stays readable."""
        if not self.machine.is_open(stream_id):
            self._streams.pop(stream_id, None)
