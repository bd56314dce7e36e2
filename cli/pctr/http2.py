"""HTTP/2 over one socket, as a gRPC client sees it (RFC 9113).

Owns frames, flow control and the life of streams; knows nothing of gRPC. Everything runs in the
caller's thread: nothing moves unless somebody calls `Connection.pump`, so one loop can watch the
connection beside other descriptors and hold several streams open at once.
"""

from __future__ import annotations

import select
import struct

# The modules proper, collections and socket, are wrappers that take as long to import as a call takes.
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM
from _socket import socket as Socket

from pctr.hpack import Decoder, HpackError, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Sequence
else:
    from _collections import deque

__all__ = ["AF_UNIX", "SOCK_CLOEXEC", "SOCK_STREAM", "Connection", "ConnectionLost", "Socket", "Stream"]

DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    0, 1, 3, 4, 5, 6, 7, 8, 9,
)
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITY = 0x20

NO_ERROR, PROTOCOL_ERROR, CANCEL = 0, 1, 8

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
#: What the peer may send on one stream before we grant more, and on all of them together.
STREAM_WINDOW = 1 << 20
CONNECTION_WINDOW = 1 << 26
_FRAME_LIMIT = 1 << 20
_HEADER_LIMIT = 1 << 20
_DEFAULT_WINDOW = 65535
_DEFAULT_FRAME = 16384
_READ_SIZE = 1 << 18


class ConnectionLost(Exception):
    """The connection ended; streams that had not ended with it failed."""


class Stream:
    """One request and its answer. Fields are filled by the connection, read by its user.

    `headers` and `trailers` are None until they arrived; `received` holds body bytes that nobody
    took yet; `ended` says that nothing more will come; `reset` is the peer's error code then.
    """

    def __init__(self, number: int, send_window: int) -> None:
        self.number = number
        self.headers: list[tuple[str, str]] | None = None
        self.trailers: list[tuple[str, str]] | None = None
        self.received = bytearray()
        self.ended = False
        self.reset: int | None = None
        self.send_window = send_window
        self.outgoing: deque[bytes] = deque()
        self.finish_sending = False
        self.sent_all = False
        self.ungranted = 0


class Connection:
    """The client's end of one connection. Not for use by several threads at once."""

    def __init__(self, sock: Socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder = Decoder()
        self._streams: dict[int, Stream] = {}
        self._next = 1
        self._in = bytearray()
        self._block: tuple[int, int, bytearray] | None = None
        self._window = _DEFAULT_WINDOW
        self._initial_window = _DEFAULT_WINDOW
        self._frame_size = _DEFAULT_FRAME
        self._ungranted = 0
        self._last_stream: int | None = None
        self.failure: str | None = None
        self._out = bytearray(PREFACE)
        self._frame(SETTINGS, 0, 0, struct.pack("!HIHIHI", 2, 0, 4, STREAM_WINDOW, 5, _FRAME_LIMIT))
        self._frame(WINDOW_UPDATE, 0, 0, struct.pack("!I", CONNECTION_WINDOW - _DEFAULT_WINDOW))

    # -- what the user calls ---------------------------------------------------------------------

    def fileno(self) -> int:
        """The socket, to watch for reading (and for writing while `wants_write`)."""
        return self._sock.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether bytes wait for the socket to take them."""
        return bool(self._out)

    def close(self) -> None:
        """Close the socket; open streams fail."""
        self._sock.close()
        self._lose("closed")

    def open(self, headers: Sequence[tuple[str, str]]) -> Stream:
        """Start a stream; its headers go out with whatever is sent next. Raises `ConnectionLost`."""
        if self.failure is not None:
            raise ConnectionLost(self.failure)
        stream = Stream(self._next, self._initial_window)
        self._next += 2
        self._streams[stream.number] = stream
        block = encode(headers)
        for at in range(0, len(block), _DEFAULT_FRAME):
            last = at + _DEFAULT_FRAME >= len(block)
            kind = CONTINUATION if at else HEADERS
            self._frame(kind, END_HEADERS if last else 0, stream.number, block[at:at + _DEFAULT_FRAME])
        return stream

    def send(self, stream: Stream, data: bytes, *, end: bool = False) -> None:
        """Queue body bytes; they leave as flow control allows while somebody pumps."""
        if data:
            stream.outgoing.append(data)
        stream.finish_sending = stream.finish_sending or end
        self.flush()

    def cancel(self, stream: Stream) -> None:
        """Give a stream up: the peer is told, nothing more of it is kept."""
        if self._streams.pop(stream.number, None) is not None and not (stream.ended and stream.sent_all):
            self._frame(RST_STREAM, 0, stream.number, struct.pack("!I", CANCEL))
        stream.ended = True
        stream.outgoing.clear()
        self.flush()

    def grant(self, stream: Stream) -> None:
        """Let the peer send more on this stream: its user has taken, or wants, what came so far."""
        if stream.ungranted >= STREAM_WINDOW // 4 and not stream.ended:
            self._frame(WINDOW_UPDATE, 0, stream.number, struct.pack("!I", stream.ungranted))
            stream.ungranted = 0

    def flush(self) -> None:
        """Hand the socket what it takes without waiting."""
        self._fill()
        while self._out:
            try:
                del self._out[:self._sock.send(self._out)]
            except BlockingIOError:
                return
            except OSError as error:
                self._lose(f"connection lost: {error.strerror or error}")
                return
            if not self._out:
                self._fill()

    def pump(self, timeout: float | None = 0.0) -> bool:
        """Send and receive what is possible, waiting up to `timeout` seconds (None: for ever) for something.

        Returns whether anything arrived. A lost connection ends every stream and sets `failure`.
        """
        self.flush()
        if self.failure is not None:
            return False
        if timeout != 0.0:
            poll = select.poll()
            poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._out else 0))
            poll.poll(None if timeout is None else max(0.0, timeout) * 1000)
            self.flush()
        try:
            data = self._sock.recv(_READ_SIZE)
        except BlockingIOError:
            return False
        except OSError as error:
            self._lose(f"connection lost: {error.strerror or error}")
            return True
        if not data:
            self._lose("connection closed by the daemon")
            return True
        self._in += data
        try:
            self._parse()
        except (HpackError, struct.error) as error:
            self._lose(f"the daemon broke the protocol: {error}")
        self.flush()
        return True

    # -- sending ---------------------------------------------------------------------------------

    def _frame(self, kind: int, flags: int, number: int, payload: bytes | memoryview = b"") -> None:
        self._out += struct.pack("!IBI", len(payload) << 8 | kind, flags, number)
        self._out += payload

    def _fill(self) -> None:
        """Turn queued body bytes into frames as far as both windows reach."""
        for stream in list(self._streams.values()):
            if stream.sent_all:
                continue
            while stream.outgoing and self._window > 0 and stream.send_window > 0 and len(self._out) < _FRAME_LIMIT:
                chunk = stream.outgoing[0]
                size = min(len(chunk), self._window, stream.send_window, self._frame_size)
                if size == len(chunk):
                    stream.outgoing.popleft()
                else:
                    stream.outgoing[0] = chunk[size:]
                last = stream.finish_sending and not stream.outgoing
                self._frame(DATA, END_STREAM if last else 0, stream.number, memoryview(chunk)[:size])
                self._window -= size
                stream.send_window -= size
                stream.sent_all = last
            if stream.finish_sending and not stream.outgoing and not stream.sent_all:
                self._frame(DATA, END_STREAM, stream.number)
                stream.sent_all = True

    # -- receiving -------------------------------------------------------------------------------

    def _lose(self, why: str) -> None:
        if self.failure is None:
            self.failure = why
        for stream in self._streams.values():
            stream.ended = True
        self._streams.clear()
        self._out.clear()

    def _parse(self) -> None:
        at = 0
        while len(self._in) - at >= 9:
            head, flags, number = struct.unpack_from("!IBI", self._in, at)
            length, kind = head >> 8, head & 0xFF
            if length > _FRAME_LIMIT:
                raise HpackError(f"frame of {length} bytes")
            if len(self._in) - at < 9 + length:
                break
            payload = bytes(memoryview(self._in)[at + 9:at + 9 + length])
            at += 9 + length
            self._handle(kind, flags, number & 0x7FFFFFFF, payload)
        del self._in[:at]

    def _handle(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._block is not None and (kind != CONTINUATION or number != self._block[0]):
            raise HpackError("a header block was interrupted")
        if kind == DATA:
            self._on_data(flags, number, payload)
        elif kind == HEADERS:
            payload = _unpad(flags, payload)
            if flags & PRIORITY:
                payload = payload[5:]
            self._on_block(number, flags, bytearray(payload), flags)
        elif kind == CONTINUATION:
            if self._block is None:
                raise HpackError("continuation of nothing")
            _, first_flags, block = self._block
            if len(block) + len(payload) > _HEADER_LIMIT:
                raise HpackError("endless header block")
            self._on_block(number, first_flags, block + payload, flags)
        elif kind == RST_STREAM:
            stream = self._streams.pop(number, None)
            if stream is not None:
                stream.reset, stream.ended = struct.unpack("!I", payload)[0], True
        elif kind == SETTINGS and not flags & ACK:
            self._on_settings(payload)
        elif kind == PING and not flags & ACK:
            self._frame(PING, ACK, 0, payload)
        elif kind == GOAWAY:
            self._on_goaway(payload)
        elif kind == WINDOW_UPDATE:
            (more,) = struct.unpack("!I", payload)
            if number == 0:
                self._window += more
            elif (stream := self._streams.get(number)) is not None:
                stream.send_window += more
        elif kind == PUSH_PROMISE:
            raise HpackError("push although it is switched off")

    def _on_data(self, flags: int, number: int, payload: bytes) -> None:
        self._ungranted += len(payload)
        if self._ungranted >= CONNECTION_WINDOW // 2:
            self._frame(WINDOW_UPDATE, 0, 0, struct.pack("!I", self._ungranted))
            self._ungranted = 0
        stream = self._streams.get(number)
        if stream is None:
            return
        stream.ungranted += len(payload)
        stream.received += _unpad(flags, payload)
        if flags & END_STREAM:
            self._end(stream)

    def _on_block(self, number: int, first_flags: int, block: bytearray, flags: int) -> None:
        if not flags & END_HEADERS:
            self._block = (number, first_flags, block)
            return
        self._block = None
        fields = self._decoder.decode(bytes(block))
        stream = self._streams.get(number)
        if stream is None:
            return
        if stream.headers is None:
            if dict(fields).get(":status", "").startswith("1"):
                return
            stream.headers = fields
        else:
            stream.trailers = fields
        if first_flags & END_STREAM:
            self._end(stream)

    def _end(self, stream: Stream) -> None:
        stream.ended = True
        self._streams.pop(stream.number, None)
        if not stream.sent_all:
            self._frame(RST_STREAM, 0, stream.number, struct.pack("!I", NO_ERROR))

    def _on_settings(self, payload: bytes) -> None:
        for key, value in struct.iter_unpack("!HI", payload):
            if key == 4:
                for stream in self._streams.values():
                    stream.send_window += value - self._initial_window
                self._initial_window = value
            elif key == 5:
                self._frame_size = min(value, _FRAME_LIMIT)
        self._frame(SETTINGS, ACK, 0)

    def _on_goaway(self, payload: bytes) -> None:
        last, code = struct.unpack_from("!II", payload)
        self.failure = f"the daemon is closing the connection (code {code})"
        for number in [number for number in self._streams if number > last]:
            self._streams.pop(number).ended = True
        if not self._streams:
            self._lose(self.failure)


def _unpad(flags: int, payload: bytes) -> bytes:
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise HpackError("padding longer than the frame")
    return payload[1:len(payload) - payload[0]]
