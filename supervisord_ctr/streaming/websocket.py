"""WebSocket sessions: numbered channels in messages, and SPDY tunnelled through messages.

Owns what Kubernetes puts into WebSocket messages (`*.channel.k8s.io`, `*.base64.channel.k8s.io`,
`SPDY/3.1+…`). The framing itself is wsproto's (RFC 6455).

A message of the channel protocols begins with its channel: a byte, or a digit in the base64 forms,
whose remainder is base64. v5 adds a message of two bytes, 255 and a channel, that closes that channel.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Hashable, Iterable

from wsproto import WSConnection
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from supervisord_ctr.streaming import CHUNK
from supervisord_ctr.streaming.inbox import Inbox
from supervisord_ctr.streaming.wire import Buffer, Wire

#: What one channel may hold unread before the connection is held (bytes).
CHANNEL_LIMIT = 1 << 20
#: Longest message that must be kept whole: base64 text and the v5 close signal (bytes).
MAX_WHOLE = 2 << 20
CLOSE_SIGNAL = 255


class WebSocket:
    """One upgraded connection: messages in pieces to a receiver, messages out.

    `receiver(data, last)` gets each piece of a message; `last` marks the message's end.
    """

    def __init__(self, wire: Wire, handshaken: WSConnection) -> None:
        self.wire = wire
        self._protocol = handshaken
        self._receiver: Callable[[Buffer, bool], None] = _discard
        self._closing = False

    def attach(self, receiver: Callable[[Buffer, bool], None], on_lost: Callable[[], None]) -> None:
        """Say who gets the messages and who is told of the end (once)."""
        self._receiver = receiver
        self.wire.attach(self.received, on_lost)

    def received(self, data: bytes) -> None:
        """Bytes arrived."""
        try:
            self._protocol.receive_data(data)
            for event in self._protocol.events():
                self._handle(event)
        except RemoteProtocolError as error:
            self.fail(CloseReason.PROTOCOL_ERROR, str(error))

    def send(self, message: BytesMessage | TextMessage) -> None:
        """Send a message; on a closing connection it is dropped."""
        if not self._closing:
            self.wire.send((self._protocol.send(message),))

    def fail(self, code: CloseReason, reason: str) -> None:
        """The peer broke the protocol: say so and end."""
        self._send_close(code, reason)
        self.wire.close_soon()

    async def finish(self) -> None:
        """Close normally: everything sent reaches the peer."""
        self._receiver = _discard
        self._send_close(CloseReason.NORMAL_CLOSURE, "")
        await self.wire.finish()

    def close_soon(self) -> None:
        """End without waiting for the peer; it is told that this side goes away."""
        self._send_close(CloseReason.GOING_AWAY, "")
        self.wire.close_soon()

    def _handle(self, event: object) -> None:
        if isinstance(event, BytesMessage | TextMessage):
            data = event.data.encode() if isinstance(event.data, str) else event.data
            self._receiver(data, event.message_finished)
        elif isinstance(event, Ping):
            if not self._closing:
                self.wire.send((self._protocol.send(event.response()),))
        elif isinstance(event, CloseConnection):
            if not self._closing:
                self._closing = True
                self.wire.send((self._protocol.send(event.response()),))
            self.wire.close_soon()

    def _send_close(self, code: CloseReason, reason: str) -> None:
        if self._closing:
            return
        self._closing = True
        try:
            self.wire.send((self._protocol.send(CloseConnection(code=code, reason=reason[:100])),))
        except LocalProtocolError:
            self.wire.abort()


class Tunnel:
    """A `Carrier` for SPDY inside binary messages; message borders mean nothing."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._wire = websocket.wire

    @property
    def lost(self) -> asyncio.Event:
        """Set when the connection is gone."""
        return self._wire.lost

    def attach(self, receiver: Callable[[bytes], None], on_lost: Callable[[], None]) -> None:
        """Say who gets the bytes and who is told of the end (once)."""
        self._websocket.attach(lambda data, _last: receiver(bytes(data)), on_lost)

    def send(self, buffers: Iterable[Buffer]) -> None:
        """See `Carrier`."""
        self._websocket.send(BytesMessage(data=b"".join(buffers)))

    async def wait_room(self) -> None:
        """See `Carrier`."""
        await self._wire.wait_room()

    def hold(self, reason: Hashable) -> None:
        """See `Carrier`."""
        self._wire.hold(reason)

    def release(self, reason: Hashable) -> None:
        """See `Carrier`."""
        self._wire.release(reason)

    async def finish(self) -> None:
        """See `Carrier`."""
        await self._websocket.finish()

    def close_soon(self) -> None:
        """See `Carrier`."""
        self._websocket.close_soon()

    def abort(self) -> None:
        """See `Carrier`."""
        self._wire.abort()


class Channel:
    """One numbered channel. It has no reset of its own: it ends with its half or with the connection."""

    def __init__(self, session: ChannelSession, number: int, *, readable: bool, writable: bool) -> None:
        self._session = session
        self.number = number
        self.writable = writable
        self._closed = False
        self.inbox = Inbox(
            CHANNEL_LIMIT,
            on_full=lambda: session.websocket.wire.hold(number),
            on_room=lambda: session.websocket.wire.release(number),
            on_read=lambda _size: None,
        )
        if not readable:
            self.inbox.close()

    @property
    def was_reset(self) -> bool:
        """Whether the channel ended with the connection."""
        return self._session.websocket.wire.lost.is_set()

    async def read(self, limit: int = CHUNK) -> bytes:
        """Some bytes, `b""` at the peer's end; `ConnectionResetError` when the connection is lost."""
        return await self.inbox.read(limit)

    async def write(self, data: Buffer) -> None:
        """Send one message and wait for room; `BrokenPipeError` when closed or lost."""
        await self._session.websocket.wire.wait_room()
        if self._closed or self.was_reset:
            raise BrokenPipeError(f"channel {self.number} is closed")
        if self.writable:
            self._session.send(self.number, data)

    async def close(self) -> None:
        """Send no more. The protocol has no message for that from a server; clients wait for the end."""
        self._closed = True

    def reset(self) -> None:
        """End both directions; the peer is not told."""
        self._closed = True
        self.inbox.close()

    def discard_input(self) -> None:
        """Nobody will read: drop what is there and what comes."""
        self.inbox.close()


class ChannelSession:
    """A connection whose messages belong to numbered channels."""

    def __init__(
        self, websocket: WebSocket, kinds: Iterable[tuple[bool, bool]], *, encoded: bool, close_signal: bool
    ) -> None:
        """`kinds` gives (readable, writable) for channel 0, 1, …; `encoded` is base64."""
        self.websocket = websocket
        self._encoded = encoded
        self._close_signal = close_signal
        self.channels = [
            Channel(self, number, readable=readable, writable=writable)
            for number, (readable, writable) in enumerate(kinds)
        ]
        self._current = -1
        self._whole = bytearray()

    def attach(self, on_lost: Callable[[], None]) -> None:
        """Begin to take messages."""

        def lost() -> None:
            for channel in self.channels:
                channel.inbox.fail(ConnectionResetError("the connection is gone"))
            on_lost()

        self.websocket.attach(self._received, lost)

    def send(self, number: int, data: Buffer) -> None:
        """Send one message on a channel."""
        if self._encoded:
            self.websocket.send(TextMessage(data=str(number) + base64.b64encode(data).decode("ascii")))
        else:
            self.websocket.send(BytesMessage(data=b"".join((bytes((number,)), data))))

    async def finish(self) -> None:
        """Close normally: everything sent reaches the peer."""
        await self.websocket.finish()

    def _received(self, data: Buffer, last: bool) -> None:
        if self._encoded:
            self._gather(data, last, self._decode)
            return
        if self._current < 0 and data:
            self._current = data[0]
            if not (self._close_signal and self._current == CLOSE_SIGNAL):
                data = memoryview(data)[1:]
        if self._close_signal and self._current == CLOSE_SIGNAL:
            self._gather(data, last, self._close_channel)
        elif data:
            self._feed(self._current, data)
        if last:
            self._current = -1

    def _gather(self, data: Buffer, last: bool, use: Callable[[bytes], None]) -> None:
        self._whole += data
        if len(self._whole) > MAX_WHOLE:
            self.websocket.fail(CloseReason.MESSAGE_TOO_BIG, "message too big")
        elif last:
            whole = bytes(self._whole)
            self._whole.clear()
            use(whole)

    def _close_channel(self, message: bytes) -> None:
        if len(message) != 2 or message[1] >= len(self.channels):
            self.websocket.fail(CloseReason.PROTOCOL_ERROR, "bad close signal")
        else:
            self.channels[message[1]].inbox.end()

    def _decode(self, message: bytes) -> None:
        if not message:
            return
        try:
            data = base64.b64decode(message[1:], validate=True)
        except binascii.Error as error:
            self.websocket.fail(CloseReason.INVALID_FRAME_PAYLOAD_DATA, str(error))
        else:
            self._feed(message[0] - ord("0"), data)

    def _feed(self, number: int, data: Buffer) -> None:
        """Bytes for a channel that does not exist are dropped, as the reference does."""
        if 0 <= number < len(self.channels):
            self.channels[number].inbox.feed(bytes(data))


def _discard(_data: Buffer, _last: bool) -> None:
    return
