"""SPDY/3.1 as a state machine without input or output: bytes in, events out; calls in, bytes out.

Owns framing, header compression, stream states and both directions of flow control, for either role.
Does not own sockets, time or buffering: the caller hands over what arrived (`receive`), writes what
`take_output` gives, and tells how much of the received data it has used up (`consumed`).

Flow control, as the field requires it: the Go library on the other end of every kubelet, kubectl and
crictl neither honours windows nor ever sends WINDOW_UPDATE. So a window limits our sending only once
the peer has shown that it keeps windows, by a SETTINGS frame that states one or by a WINDOW_UPDATE;
and a peer that overruns ours is held back by the caller, who stops reading, unless `strict` asks for
the reset that the specification prescribes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from supervisord_ctr.streaming.spdy_wire import (
    FLAG_FIN,
    FLAG_UNIDIRECTIONAL,
    INITIAL_WINDOW,
    MAX_CONTROL,
    MAX_STREAM_ID,
    MAX_WINDOW,
    VERSION,
    GoAwayStatus,
    HeaderReader,
    HeaderWriter,
    Kind,
    ProtocolError,
    ResetStatus,
    Setting,
    control_frame,
    data_header,
)

#: Largest DATA payload that we send; the format allows 16 MiB.
MAX_DATA = 1 << 20
#: A piece smaller than this share of the buffer it points into is copied, so that it cannot pin the buffer.
_PIN_SHARE = 4

Buffer = bytes | memoryview


@dataclass(slots=True)
class StreamOpened:
    """The peer opened a stream; answer with `reply` or `reset`."""

    stream_id: int
    headers: dict[str, str]


@dataclass(slots=True)
class StreamReplied:
    """The peer accepted a stream of ours."""

    stream_id: int
    headers: dict[str, str]


@dataclass(slots=True)
class HeadersReceived:
    """More headers on an open stream."""

    stream_id: int
    headers: dict[str, str]


@dataclass(slots=True)
class DataReceived:
    """A piece of a stream; one DATA frame may come as several."""

    stream_id: int
    data: Buffer


@dataclass(slots=True)
class StreamEnded:
    """The peer will send no more on this stream."""

    stream_id: int


@dataclass(slots=True)
class StreamReset:
    """The stream is gone in both directions, by the peer or because the peer broke its rules."""

    stream_id: int
    status: int


@dataclass(slots=True)
class WindowOpened:
    """There is room to send again: on one stream, or for 0 and after SETTINGS on any."""

    stream_id: int


@dataclass(slots=True)
class SettingsReceived:
    """Settings by number."""

    values: dict[int, int]


@dataclass(slots=True)
class PingAnswered:
    """The answer to `ping`."""

    ping_id: int


@dataclass(slots=True)
class GoAwayReceived:
    """The peer takes no new streams; those after `last_stream_id` were not looked at."""

    last_stream_id: int
    status: int


@dataclass(slots=True)
class SessionFailed:
    """The peer broke the protocol; a GOAWAY is in the output and nothing more is read."""

    message: str


Event = (
    StreamOpened | StreamReplied | HeadersReceived | DataReceived | StreamEnded | StreamReset | WindowOpened
    | SettingsReceived | PingAnswered | GoAwayReceived | SessionFailed
)


@dataclass(slots=True)
class _Stream:
    ours: bool
    replied: bool = False
    local_closed: bool = False
    remote_closed: bool = False
    send_window: int = INITIAL_WINDOW
    receive_window: int = INITIAL_WINDOW
    used: int = 0


class Session:
    """One SPDY session in the role of client or server.

    `receive` never raises: what a peer can send becomes events. Calls that the own side may not make
    (data on a closed stream, more than `sendable`) raise `ValueError`; `KeyError` for a stream that is gone.
    """

    def __init__(
        self,
        *,
        client: bool,
        window: int = 1 << 20,
        session_window: int = 8 << 20,
        max_streams: int = 1024,
        strict: bool = False,
    ) -> None:
        self._client = client
        self._window = window
        self._max_streams = max_streams
        self._strict = strict
        self._next_id = 1 if client else 2
        self._next_ping = 1 if client else 2
        self._last_received = 0
        self._streams: dict[int, _Stream] = {}
        self._reader = HeaderReader()
        self._writer = HeaderWriter()
        self._output: list[Buffer] = []
        self._pending = bytearray()
        self._data_left = 0
        self._data_stream = 0
        self._data_fin = False
        self._skip_left = 0
        self._failed = False
        self._peer_initial_window = INITIAL_WINDOW
        self._peer_keeps_windows = False
        self._peer_keeps_session_window = False
        self._peer_max_streams = MAX_STREAM_ID
        self._session_send_window = INITIAL_WINDOW
        self._session_window = session_window
        self._session_used = 0
        self._gone_away = False
        settings = {Setting.MAX_CONCURRENT_STREAMS: max_streams, Setting.INITIAL_WINDOW_SIZE: window}
        self._send(Kind.SETTINGS, 0, struct.pack(">I", len(settings)) + b"".join(
            struct.pack(">II", number, value) for number, value in settings.items()
        ))
        if session_window > INITIAL_WINDOW:
            self._send(Kind.WINDOW_UPDATE, 0, struct.pack(">II", 0, session_window - INITIAL_WINDOW))

    # -- what the caller asks --------------------------------------------------------------------

    @property
    def failed(self) -> bool:
        """Whether the peer broke the protocol."""
        return self._failed

    @property
    def gone_away(self) -> bool:
        """Whether either side has said that no new streams are taken."""
        return self._gone_away

    def stream_ids(self) -> list[int]:
        """Streams that are open in at least one direction."""
        return list(self._streams)

    def is_open(self, stream_id: int) -> bool:
        """Whether the stream is open in at least one direction."""
        return stream_id in self._streams

    def sendable(self, stream_id: int) -> int:
        """Bytes that `send_data` takes now for this stream; 0 when it is closed, gone or its window is used up."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.local_closed or self._failed:
            return 0
        room = MAX_DATA
        if self._peer_keeps_windows:
            room = min(room, stream.send_window)
        if self._peer_keeps_session_window:
            room = min(room, self._session_send_window)
        return max(room, 0)

    # -- what the caller does --------------------------------------------------------------------

    def take_output(self) -> list[Buffer]:
        """What is to be written to the peer, in order; the caller has it from now on."""
        output, self._output = self._output, []
        return output

    def open_stream(self, headers: Mapping[str, str], *, fin: bool = False) -> int:
        """Open a stream; `ValueError` when the peer takes no more."""
        if self._gone_away or self._failed:
            raise ValueError("the session takes no new streams")
        if sum(stream.ours for stream in self._streams.values()) >= self._peer_max_streams:
            raise ValueError(f"the peer takes at most {self._peer_max_streams} streams")
        stream_id = self._next_id
        if stream_id > MAX_STREAM_ID:
            raise ValueError("stream numbers are used up")
        self._next_id += 2
        self._streams[stream_id] = self._new_stream(ours=True, local_closed=fin)
        payload = struct.pack(">IIBB", stream_id, 0, 0, 0) + self._writer.pack(headers)
        self._send(Kind.SYN_STREAM, FLAG_FIN if fin else 0, payload)
        return stream_id

    def reply(self, stream_id: int, headers: Mapping[str, str] | None = None, *, fin: bool = False) -> None:
        """Accept a stream of the peer."""
        stream = self._streams[stream_id]
        if stream.ours or stream.replied:
            raise ValueError(f"stream {stream_id} takes no reply")
        stream.replied = True
        payload = struct.pack(">I", stream_id) + self._writer.pack(headers or {})
        self._send(Kind.SYN_REPLY, FLAG_FIN if fin else 0, payload)
        if fin:
            self._close_local(stream_id, stream)

    def send_data(self, stream_id: int, data: Buffer, *, fin: bool = False) -> None:
        """Queue one DATA frame; `data` is not copied and must stay as it is until it is written."""
        stream = self._streams[stream_id]
        if stream.local_closed:
            raise ValueError(f"stream {stream_id} is closed for sending")
        size = len(data)
        if size > self.sendable(stream_id):
            raise ValueError(f"{size} bytes are more than stream {stream_id} takes now")
        stream.send_window -= size
        self._session_send_window -= size
        self._output.append(data_header(stream_id, size, fin))
        if size:
            self._output.append(data)
        if fin:
            self._close_local(stream_id, stream)

    def reset(self, stream_id: int, status: int = ResetStatus.CANCEL) -> None:
        """End a stream in both directions; harmless when it is gone."""
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            self._send(Kind.RST_STREAM, 0, struct.pack(">II", stream_id, status))

    def consumed(self, stream_id: int, size: int) -> None:
        """`size` received bytes of this stream were used up: lets the peer send more."""
        self._session_used += size
        if self._session_used * 2 >= self._session_window:
            self._send(Kind.WINDOW_UPDATE, 0, struct.pack(">II", 0, self._session_used))
            self._session_used = 0
        stream = self._streams.get(stream_id)
        if stream is None or stream.remote_closed:
            return
        stream.used += size
        if stream.used * 2 >= self._window:
            self._send(Kind.WINDOW_UPDATE, 0, struct.pack(">II", stream_id, stream.used))
            stream.receive_window += stream.used
            stream.used = 0

    def ping(self) -> int:
        """Ask for a sign of life; the answer is `PingAnswered` with the returned number."""
        ping_id = self._next_ping
        self._next_ping = ping_id + 2 if ping_id + 2 <= MAX_STREAM_ID else 2 - ping_id % 2
        self._send(Kind.PING, 0, struct.pack(">I", ping_id))
        return ping_id

    def go_away(self, status: int = GoAwayStatus.OK) -> None:
        """Say that no new streams are taken."""
        self._gone_away = True
        self._send(Kind.GOAWAY, 0, struct.pack(">II", self._last_received, status))

    # -- what the peer sends ---------------------------------------------------------------------

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes as they arrived. Data events may point into `data`, which must not change."""
        events: list[Event] = []
        if self._failed:
            return events
        at, end = 0, len(data)
        view = memoryview(data)
        try:
            while at < end:
                if self._data_left:
                    at += self._receive_data(view[at : at + self._data_left], end, events)
                elif self._skip_left:
                    step = min(self._skip_left, end - at)
                    self._skip_left -= step
                    at += step
                else:
                    at = self._receive_frame(view, at, end, events)
        except ProtocolError as error:
            self._failed = True
            self._pending.clear()
            self.go_away(GoAwayStatus.PROTOCOL_ERROR)
            events.append(SessionFailed(str(error)))
        return events

    def _receive_frame(self, view: memoryview, at: int, end: int, events: list[Event]) -> int:
        """Take a frame's header, and its payload unless it is DATA; the place after what was taken."""
        pending = self._pending
        if not pending and end - at >= 8:
            word, length = struct.unpack_from(">II", view, at)
            if not word & 0x8000_0000:
                self._begin_data(word, length, events)
                return at + 8
        need = 8
        if len(pending) < 8:
            step = min(8 - len(pending), end - at)
            pending += view[at : at + step]
            at += step
            if len(pending) < 8:
                return at
        word, length = struct.unpack_from(">II", pending)
        if not word & 0x8000_0000:
            pending.clear()
            self._begin_data(word, length, events)
            return at
        flags, length = length >> 24, length & 0xFF_FFFF
        kind = word & 0xFFFF
        if (word >> 16) & 0x7FFF != VERSION:
            raise ProtocolError(f"version {(word >> 16) & 0x7FFF} is not supported")
        if kind not in _HANDLERS:
            pending.clear()
            self._skip_left = length
            return at
        if length > MAX_CONTROL:
            raise ProtocolError(f"control frame of {length} bytes")
        need += length
        step = min(need - len(pending), end - at)
        pending += view[at : at + step]
        at += step
        if len(pending) == need:
            payload = bytes(pending[8:])
            pending.clear()
            _HANDLERS[kind](self, flags, payload, events)
        return at

    def _begin_data(self, stream_id: int, length: int, events: list[Event]) -> None:
        flags, length = length >> 24, length & 0xFF_FFFF
        if not stream_id:
            raise ProtocolError("data on stream 0")
        stream = self._streams.get(stream_id)
        if stream is None:
            if not self._was_open(stream_id):
                self._send(Kind.RST_STREAM, 0, struct.pack(">II", stream_id, ResetStatus.INVALID_STREAM))
        elif stream.remote_closed:
            self._refuse(stream_id, ResetStatus.STREAM_ALREADY_CLOSED, events)
        elif stream.ours and not stream.replied:
            self._refuse(stream_id, ResetStatus.PROTOCOL_ERROR, events)
        else:
            stream.receive_window -= length
            if self._strict and stream.receive_window < 0:
                self._refuse(stream_id, ResetStatus.FLOW_CONTROL_ERROR, events)
        self._data_stream = stream_id
        self._data_fin = bool(flags & FLAG_FIN)
        self._data_left = length
        if not length:
            self._end_data(events)

    def _receive_data(self, piece: memoryview, total: int, events: list[Event]) -> int:
        size = len(piece)
        self._data_left -= size
        if self._data_stream in self._streams:
            events.append(DataReceived(self._data_stream, bytes(piece) if size * _PIN_SHARE < total else piece))
        else:
            self.consumed(self._data_stream, size)
        if not self._data_left:
            self._end_data(events)
        return size

    def _end_data(self, events: list[Event]) -> None:
        if self._data_fin:
            self._close_remote(self._data_stream, events)

    def _on_syn_stream(self, flags: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) < 10:
            raise ProtocolError("SYN_STREAM is cut short")
        stream_id = struct.unpack_from(">I", payload)[0] & MAX_STREAM_ID
        headers = self._reader.unpack(payload[10:])
        if stream_id % 2 == (1 if self._client else 0) or stream_id <= self._last_received:
            raise ProtocolError(f"stream {stream_id} after stream {self._last_received}")
        if flags & ~(FLAG_FIN | FLAG_UNIDIRECTIONAL):
            raise ProtocolError(f"SYN_STREAM with flags {flags:#x}")
        self._last_received = stream_id
        if self._gone_away or len(self._streams) >= self._max_streams:
            self._send(Kind.RST_STREAM, 0, struct.pack(">II", stream_id, ResetStatus.REFUSED_STREAM))
            return
        unidirectional = bool(flags & FLAG_UNIDIRECTIONAL)
        self._streams[stream_id] = self._new_stream(ours=False, local_closed=unidirectional)
        events.append(StreamOpened(stream_id, headers))
        if flags & FLAG_FIN:
            self._close_remote(stream_id, events)

    def _on_syn_reply(self, flags: int, payload: bytes, events: list[Event]) -> None:
        stream_id, headers = self._headers_of("SYN_REPLY", payload)
        stream = self._streams.get(stream_id)
        if stream is None:
            self._unknown(stream_id)
        elif not stream.ours or stream.replied:
            self._refuse(stream_id, ResetStatus.STREAM_IN_USE, events)
        else:
            stream.replied = True
            events.append(StreamReplied(stream_id, headers))
            if flags & FLAG_FIN:
                self._close_remote(stream_id, events)

    def _on_headers(self, flags: int, payload: bytes, events: list[Event]) -> None:
        stream_id, headers = self._headers_of("HEADERS", payload)
        stream = self._streams.get(stream_id)
        if stream is None:
            self._unknown(stream_id)
        elif stream.remote_closed:
            self._refuse(stream_id, ResetStatus.STREAM_ALREADY_CLOSED, events)
        else:
            events.append(HeadersReceived(stream_id, headers))
            if flags & FLAG_FIN:
                self._close_remote(stream_id, events)

    def _on_rst_stream(self, _flags: int, payload: bytes, events: list[Event]) -> None:
        stream_id, status = _two_words("RST_STREAM", payload)
        if self._streams.pop(stream_id & MAX_STREAM_ID, None) is not None:
            events.append(StreamReset(stream_id & MAX_STREAM_ID, status))

    def _on_settings(self, _flags: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) < 4 or len(payload) != 4 + 8 * struct.unpack_from(">I", payload)[0]:
            raise ProtocolError("SETTINGS of the wrong length")
        values: dict[int, int] = {}
        for at in range(4, len(payload), 8):
            number, value = struct.unpack_from(">II", payload, at)
            values[number & 0xFF_FFFF] = value
        if Setting.MAX_CONCURRENT_STREAMS in values:
            self._peer_max_streams = values[Setting.MAX_CONCURRENT_STREAMS]
        events.append(SettingsReceived(values))
        if Setting.INITIAL_WINDOW_SIZE in values:
            window = values[Setting.INITIAL_WINDOW_SIZE]
            if window > MAX_WINDOW:
                raise ProtocolError(f"initial window of {window} bytes")
            change, self._peer_initial_window = window - self._peer_initial_window, window
            self._peer_keeps_windows = True
            for stream in self._streams.values():
                stream.send_window += change
            events.append(WindowOpened(0))

    def _on_ping(self, _flags: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != 4:
            raise ProtocolError("PING of the wrong length")
        (ping_id,) = struct.unpack(">I", payload)
        if ping_id % 2 == (1 if self._client else 0):
            events.append(PingAnswered(ping_id))
        else:
            self._send(Kind.PING, 0, payload)

    def _on_goaway(self, _flags: int, payload: bytes, events: list[Event]) -> None:
        last_stream_id, status = _two_words("GOAWAY", payload)
        self._gone_away = True
        events.append(GoAwayReceived(last_stream_id & MAX_STREAM_ID, status))

    def _on_window_update(self, _flags: int, payload: bytes, events: list[Event]) -> None:
        stream_id, delta = _two_words("WINDOW_UPDATE", payload)
        delta &= MAX_WINDOW
        stream = self._streams.get(stream_id & MAX_STREAM_ID)
        if not stream_id & MAX_STREAM_ID:
            self._peer_keeps_session_window = True
            self._session_send_window += delta
            if not delta or self._session_send_window > MAX_WINDOW:
                raise ProtocolError("session window out of range")
        elif stream is None:
            return
        else:
            self._peer_keeps_windows = True
            stream.send_window += delta
            if not delta or stream.send_window > MAX_WINDOW:
                self._refuse(stream_id & MAX_STREAM_ID, ResetStatus.FLOW_CONTROL_ERROR, events)
                return
        events.append(WindowOpened(stream_id & MAX_STREAM_ID))

    # -- small parts -----------------------------------------------------------------------------

    def _send(self, kind: Kind, flags: int, payload: bytes) -> None:
        self._output.append(control_frame(kind, flags, payload))

    def _new_stream(self, *, ours: bool, local_closed: bool) -> _Stream:
        return _Stream(
            ours, local_closed=local_closed, send_window=self._peer_initial_window, receive_window=self._window
        )

    def _headers_of(self, name: str, payload: bytes) -> tuple[int, dict[str, str]]:
        if len(payload) < 4:
            raise ProtocolError(f"{name} is cut short")
        return struct.unpack_from(">I", payload)[0] & MAX_STREAM_ID, self._reader.unpack(payload[4:])

    def _was_open(self, stream_id: int) -> bool:
        """Whether frames for a stream that is gone may still be under way."""
        ours = stream_id % 2 == (1 if self._client else 0)
        return stream_id < self._next_id if ours else stream_id <= self._last_received

    def _unknown(self, stream_id: int) -> None:
        if not self._was_open(stream_id):
            self._send(Kind.RST_STREAM, 0, struct.pack(">II", stream_id, ResetStatus.INVALID_STREAM))

    def _refuse(self, stream_id: int, status: ResetStatus, events: list[Event]) -> None:
        self.reset(stream_id, status)
        events.append(StreamReset(stream_id, status))

    def _close_local(self, stream_id: int, stream: _Stream) -> None:
        stream.local_closed = True
        if stream.remote_closed:
            del self._streams[stream_id]

    def _close_remote(self, stream_id: int, events: list[Event]) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        stream.remote_closed = True
        events.append(StreamEnded(stream_id))
        if stream.local_closed:
            del self._streams[stream_id]


def _two_words(name: str, payload: bytes) -> tuple[int, int]:
    if len(payload) != 8:
        raise ProtocolError(f"{name} of the wrong length")
    first, second = struct.unpack(">II", payload)
    return first, second


_HANDLERS = {
    Kind.SYN_STREAM: Session._on_syn_stream,
    Kind.SYN_REPLY: Session._on_syn_reply,
    Kind.RST_STREAM: Session._on_rst_stream,
    Kind.SETTINGS: Session._on_settings,
    Kind.PING: Session._on_ping,
    Kind.GOAWAY: Session._on_goaway,
    Kind.HEADERS: Session._on_headers,
    Kind.WINDOW_UPDATE: Session._on_window_update,
}
