"""The SPDY/3.1 state machine: frames, states, windows, and what a peer can send at its worst."""

from __future__ import annotations

import random
import struct
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisord_ctr.streaming import spdy
from supervisord_ctr.streaming.spdy_wire import (
    DICTIONARY,
    MAX_CONTROL,
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

#: Tests that try many inputs take longer than a unit test may.
thorough = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def output(session: spdy.Session) -> bytes:
    return b"".join(session.take_output())


def pair(**options: object) -> tuple[spdy.Session, spdy.Session]:
    """A client and a server that have exchanged their settings."""
    client, server = spdy.Session(client=True, **options), spdy.Session(client=False, **options)  # type: ignore[arg-type]
    server.receive(output(client))
    client.receive(output(server))
    return client, server


def mute_peer() -> tuple[spdy.Session, HeaderWriter]:
    """A server, and what a client that never speaks of windows writes its headers with."""
    server = spdy.Session(client=False)
    server.take_output()
    return server, HeaderWriter()


def syn(writer: HeaderWriter, stream_id: int, headers: dict[str, str], flags: int = 0) -> bytes:
    return control_frame(Kind.SYN_STREAM, flags, struct.pack(">IIBB", stream_id, 0, 0, 0) + writer.pack(headers))


def normal(events: list[spdy.Event]) -> list[spdy.Event]:
    """Events with neighbouring pieces of one stream's data joined."""
    result: list[spdy.Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, spdy.DataReceived):
            data = bytes(event.data)
            if isinstance(last, spdy.DataReceived) and last.stream_id == event.stream_id:
                last.data = bytes(last.data) + data
            else:
                result.append(spdy.DataReceived(event.stream_id, data))
        else:
            result.append(event)
    return result


def resets(data: bytes) -> list[tuple[int, int]]:
    """(stream, status) of every RST_STREAM in `data`, which holds control frames only."""
    found, at = [], 0
    while at < len(data):
        word, length = struct.unpack_from(">II", data, at)
        length &= 0xFFFFFF
        if word & 0xFFFF == Kind.RST_STREAM:
            found.append(struct.unpack_from(">II", data, at + 8))
        at += 8 + length
    return found


# -- header blocks -------------------------------------------------------------------------------


def test_dictionary_is_the_published_one() -> None:
    assert len(DICTIONARY) == 1423
    assert zlib.adler32(DICTIONARY) == 0xE3C6A7C2


def test_headers_travel_through_one_compression_stream() -> None:
    writer, reader = HeaderWriter(), HeaderReader()
    for number in range(50):
        headers = {"streamtype": "data", "port": "8080", "requestid": str(number)}
        assert reader.unpack(writer.pack(headers)) == headers


def test_reads_what_another_zlib_with_a_full_window_wrote() -> None:
    deflate = zlib.compressobj(9, zlib.DEFLATED, 15, 8, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
    plain = struct.pack(">I", 1) + struct.pack(">I", 10) + b"Streamtype" + struct.pack(">I", 5) + b"error"
    assert HeaderReader().unpack(deflate.compress(plain) + deflate.flush(zlib.Z_SYNC_FLUSH)) == {"streamtype": "error"}


def test_s8_header_bomb_is_refused() -> None:
    deflate = zlib.compressobj(9, zlib.DEFLATED, 15, 8, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
    plain = struct.pack(">III", 1, 1, 0) + b"\0" * (1 << 20)
    block = deflate.compress(plain) + deflate.flush(zlib.Z_SYNC_FLUSH)
    with pytest.raises(ProtocolError, match="larger than"):
        HeaderReader().unpack(block[:MAX_CONTROL])


@pytest.mark.parametrize(
    "plain",
    [
        b"", b"\0\0", struct.pack(">I", 1), struct.pack(">II", 1, 5) + b"ab", struct.pack(">I", 0) + b"x",
        struct.pack(">I", 0xFFFFFFFF), struct.pack(">III", 1, 0, 0),
        struct.pack(">I", 2) + 2 * (struct.pack(">I", 1) + b"a" + struct.pack(">I", 0)),
    ],
)
def test_bad_header_lists_are_refused(plain: bytes) -> None:
    deflate = zlib.compressobj(9, zlib.DEFLATED, 15, 8, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
    with pytest.raises(ProtocolError):
        HeaderReader().unpack(deflate.compress(plain) + deflate.flush(zlib.Z_SYNC_FLUSH))


# -- streams -------------------------------------------------------------------------------------


def test_a_stream_from_opening_to_end() -> None:
    client, server = pair()
    stream_id = client.open_stream({"streamType": "stdin"})
    assert server.receive(output(client)) == [spdy.StreamOpened(1, {"streamtype": "stdin"})]
    server.reply(stream_id)
    assert client.receive(output(server)) == [spdy.StreamReplied(1, {})]
    client.send_data(stream_id, b"hello")
    client.send_data(stream_id, b"", fin=True)
    assert server.receive(output(client)) == [spdy.DataReceived(1, b"hello"), spdy.StreamEnded(1)]
    assert server.is_open(1)
    server.send_data(stream_id, b"bye", fin=True)
    assert client.receive(output(server)) == [spdy.DataReceived(1, b"bye"), spdy.StreamEnded(1)]
    assert not client.stream_ids()
    assert not server.stream_ids()


def test_p8_a_reset_ends_one_stream_only() -> None:
    client, server = pair()
    first, second = client.open_stream({"a": "1"}), client.open_stream({"a": "2"})
    server.receive(output(client))
    client.reset(first)
    client.send_data(second, b"still here")
    assert server.receive(output(client)) == [
        spdy.StreamReset(first, ResetStatus.CANCEL), spdy.DataReceived(second, b"still here"),
    ]
    assert server.stream_ids() == [second]


def test_data_under_way_to_a_reset_stream_is_dropped_in_silence() -> None:
    client, server = pair()
    stream_id = client.open_stream({})
    server.receive(output(client))
    server.reset(stream_id)
    client.send_data(stream_id, b"late")
    server.take_output()
    assert server.receive(output(client)) == []
    assert output(server) == b""


def test_data_on_a_stream_that_never_was_is_answered_by_a_reset() -> None:
    server, _ = mute_peer()
    assert server.receive(data_header(7, 3, False) + b"abc") == []
    assert resets(output(server)) == [(7, ResetStatus.INVALID_STREAM)]
    assert not server.failed


def test_data_after_the_end_is_answered_by_a_reset() -> None:
    server, writer = mute_peer()
    server.receive(syn(writer, 1, {}) + data_header(1, 1, True) + b"a")
    assert server.receive(data_header(1, 1, False) + b"b") == [spdy.StreamReset(1, ResetStatus.STREAM_ALREADY_CLOSED)]
    assert resets(output(server)) == [(1, ResetStatus.STREAM_ALREADY_CLOSED)]


def test_data_before_the_reply_is_answered_by_a_reset() -> None:
    client, _ = pair()
    client.open_stream({})
    client.take_output()
    assert client.receive(data_header(1, 1, False) + b"x") == [spdy.StreamReset(1, ResetStatus.PROTOCOL_ERROR)]


def test_second_reply_is_answered_by_a_reset() -> None:
    client, server = pair()
    client.open_stream({})
    server.receive(output(client))
    server.reply(1)
    client.receive(output(server))
    events = client.receive(control_frame(Kind.SYN_REPLY, 0, struct.pack(">I", 1) + server._writer.pack({})))
    assert events == [spdy.StreamReset(1, ResetStatus.STREAM_IN_USE)]


def test_unidirectional_stream_takes_no_answer() -> None:
    server, writer = mute_peer()
    server.receive(syn(writer, 1, {}, flags=2))
    assert server.sendable(1) == 0
    assert server.receive(data_header(1, 0, True)) == [spdy.StreamEnded(1)]
    assert not server.is_open(1)


def test_streams_beyond_the_limit_are_refused() -> None:
    server = spdy.Session(client=False, max_streams=2)
    server.take_output()
    writer = HeaderWriter()
    server.receive(b"".join(syn(writer, number, {}) for number in (1, 3, 5)))
    assert server.stream_ids() == [1, 3]
    assert resets(output(server)) == [(5, ResetStatus.REFUSED_STREAM)]


def test_client_keeps_the_peers_stream_limit() -> None:
    client, _ = pair(max_streams=1)
    client.open_stream({})
    with pytest.raises(ValueError, match="at most 1"):
        client.open_stream({})


def test_own_mistakes_raise() -> None:
    client, server = pair()
    stream_id = client.open_stream({}, fin=True)
    server.receive(output(client))
    with pytest.raises(ValueError, match="closed"):
        client.send_data(stream_id, b"x")
    with pytest.raises(ValueError, match="reply"):
        client.reply(stream_id)
    with pytest.raises(KeyError):
        server.send_data(99, b"x")
    server.reply(stream_id)
    with pytest.raises(ValueError, match="reply"):
        server.reply(stream_id)


# -- session -------------------------------------------------------------------------------------


def test_pings_of_the_peer_are_answered_and_own_ones_are_told() -> None:
    client, server = pair()
    number = client.ping()
    assert server.receive(output(client)) == []
    assert client.receive(output(server)) == [spdy.PingAnswered(number)]
    assert server.ping() % 2 == 0


def test_no_new_streams_after_goaway() -> None:
    client, server = pair()
    server.go_away()
    assert client.receive(output(server)) == [spdy.GoAwayReceived(0, GoAwayStatus.OK)]
    with pytest.raises(ValueError, match="no new streams"):
        client.open_stream({})
    writer = HeaderWriter()
    assert server.receive(syn(writer, 1, {})) == []
    assert resets(output(server)) == [(1, ResetStatus.REFUSED_STREAM)]


def test_unknown_control_frames_are_passed_over() -> None:
    server, writer = mute_peer()
    strange = struct.pack(">HHI", 0x8003, 10, 5) + b"12345"
    assert server.receive(strange + syn(writer, 1, {})) == [spdy.StreamOpened(1, {})]


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack(">HHI", 0x8002, Kind.PING, 4) + b"\0\0\0\1",
        control_frame(Kind.PING, 0, b"\0"),
        control_frame(Kind.RST_STREAM, 0, b"\0" * 4),
        control_frame(Kind.GOAWAY, 0, b"\0" * 12),
        control_frame(Kind.WINDOW_UPDATE, 0, b"\0" * 3),
        control_frame(Kind.WINDOW_UPDATE, 0, struct.pack(">II", 0, 0)),
        control_frame(Kind.WINDOW_UPDATE, 0, struct.pack(">II", 0, 0x7FFFFFFF)),
        control_frame(Kind.SETTINGS, 0, struct.pack(">III", 2, 7, 1)),
        control_frame(Kind.SETTINGS, 0, struct.pack(">III", 1, 7, 0xFFFFFFFF)),
        control_frame(Kind.SETTINGS, 0, b""),
        control_frame(Kind.SYN_STREAM, 0, b"short"),
        control_frame(Kind.SYN_STREAM, 0, b"\0\0\0\1" + b"\0" * 6 + b"no zlib"),
        control_frame(Kind.SYN_REPLY, 0, b"\0"),
        control_frame(Kind.HEADERS, 0, b"\0\0"),
        struct.pack(">HHI", 0x8003, Kind.SYN_STREAM, 0xFFFFFF),
        data_header(0, 1, False) + b"x",
        syn(HeaderWriter(), 2, {}),
        syn(HeaderWriter(), 0, {}),
        syn(HeaderWriter(), 1, {}, flags=0x40),
    ],
)
def test_broken_frames_fail_the_session(frame: bytes) -> None:
    server, _ = mute_peer()
    events = server.receive(frame)
    assert isinstance(events[-1], spdy.SessionFailed)
    assert server.failed
    assert output(server).endswith(struct.pack(">I", GoAwayStatus.PROTOCOL_ERROR))
    assert server.receive(b"anything") == []
    assert server.sendable(1) == 0


def test_stream_numbers_must_grow() -> None:
    server, writer = mute_peer()
    server.receive(syn(writer, 3, {}))
    assert isinstance(server.receive(syn(writer, 1, {}))[-1], spdy.SessionFailed)


# -- windows -------------------------------------------------------------------------------------


def test_a_peer_that_never_speaks_of_windows_is_not_limited_by_them() -> None:
    server, writer = mute_peer()
    server.receive(syn(writer, 1, {}))
    server.reply(1)
    for _ in range(10):
        server.send_data(1, b"x" * (64 << 10))
    assert server.sendable(1) > 0


def test_windows_limit_sending_once_the_peer_keeps_them() -> None:
    client, server = pair(window=1000, session_window=1 << 20)
    client.open_stream({})
    server.receive(output(client))
    server.reply(1)
    server.send_data(1, b"x" * 1000)
    assert server.sendable(1) == 0
    with pytest.raises(ValueError, match="more than"):
        server.send_data(1, b"x")
    client.receive(output(server))
    client.consumed(1, 499)
    assert server.receive(output(client)) == []
    client.consumed(1, 101)
    assert server.receive(output(client)) == [spdy.WindowOpened(1)]
    assert server.sendable(1) == 600


def test_session_window_is_shared_by_all_streams() -> None:
    client, server = pair(window=1 << 20, session_window=100 << 10)
    first, second = client.open_stream({}), client.open_stream({})
    server.receive(output(client))
    server.reply(first)
    server.send_data(first, b"x" * (100 << 10))
    assert server.sendable(second) == 0
    client.receive(output(server))
    client.consumed(first, 60 << 10)
    assert spdy.WindowOpened(0) in server.receive(output(client))
    assert server.sendable(second) == 60 << 10


def test_settings_move_the_windows_of_open_streams_even_below_zero() -> None:
    client, server = pair(window=1000)
    client.open_stream({})
    server.receive(output(client))
    server.send_data(1, b"x" * 800)
    settings_frame = control_frame(Kind.SETTINGS, 0, struct.pack(">III", 1, Setting.INITIAL_WINDOW_SIZE, 500))
    assert server.receive(settings_frame) == [spdy.SettingsReceived({7: 500}), spdy.WindowOpened(0)]
    assert server.sendable(1) == 0
    server.receive(control_frame(Kind.WINDOW_UPDATE, 0, struct.pack(">II", 1, 400)))
    assert server.sendable(1) == 100


def test_window_overflow_resets_the_stream() -> None:
    server, writer = mute_peer()
    server.receive(syn(writer, 1, {}))
    events = server.receive(control_frame(Kind.WINDOW_UPDATE, 0, struct.pack(">II", 1, 0x7FFFFFFF)))
    assert events == [spdy.StreamReset(1, ResetStatus.FLOW_CONTROL_ERROR)]


@pytest.mark.parametrize("strict", [False, True])
def test_overrun_of_the_own_window_is_a_reset_only_when_strict(strict: bool) -> None:
    server = spdy.Session(client=False, window=100, strict=strict)
    server.take_output()
    server.receive(syn(HeaderWriter(), 1, {}))
    events = normal(server.receive(data_header(1, 200, False) + b"x" * 200))
    if strict:
        assert events == [spdy.StreamReset(1, ResetStatus.FLOW_CONTROL_ERROR)]
    else:
        assert events == [spdy.DataReceived(1, b"x" * 200)]


def test_small_pieces_do_not_pin_the_buffer_they_came_in() -> None:
    server, writer = mute_peer()
    server.receive(syn(writer, 1, {}) + syn(writer, 3, {}))
    events = server.receive(data_header(1, 1, False) + b"a" + data_header(3, 60000, False) + b"b" * 60000)
    assert isinstance(events[0], spdy.DataReceived)
    assert isinstance(events[0].data, bytes)
    assert isinstance(events[1], spdy.DataReceived)
    assert isinstance(events[1].data, memoryview)


# -- any input, any order ------------------------------------------------------------------------


def conversation(seed: int) -> bytes:
    """What a busy client might send: valid frames of every kind."""
    rng = random.Random(seed)
    client = spdy.Session(client=True)
    open_ids: list[int] = []
    for _ in range(rng.randrange(5, 40)):
        action = rng.randrange(7)
        if action == 0 or not open_ids:
            open_ids.append(client.open_stream({"streamtype": rng.choice(["data", "error"]), "n": str(rng.random())}))
        elif action in (1, 2, 3):
            client.send_data(rng.choice(open_ids), rng.randbytes(rng.choice([0, 1, 7, 500, 5000])))
        elif action == 4:
            stream_id = open_ids.pop(rng.randrange(len(open_ids)))
            client.send_data(stream_id, b"end", fin=True)
        elif action == 5:
            stream_id = open_ids.pop(rng.randrange(len(open_ids)))
            client.reset(stream_id)
        else:
            client.ping()
    if rng.random() < 0.3:
        client.go_away()
    return output(client)


@pytest.mark.slow
@thorough
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 1 << 20), max_size=60))
def test_any_fragmentation_gives_the_same_events(seed: int, cuts: list[int]) -> None:
    data = conversation(seed)
    whole = normal(spdy.Session(client=False).receive(data))
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    server = spdy.Session(client=False)
    events: list[spdy.Event] = []
    for start, end in zip(places, places[1:], strict=False):
        events += server.receive(data[start:end])
    assert normal(events) == whole
    assert not server.failed


def test_one_byte_at_a_time_gives_the_same_events() -> None:
    for seed in range(3):
        data = conversation(seed)[:4000]
        server, whole = spdy.Session(client=False), spdy.Session(client=False)
        events: list[spdy.Event] = []
        for number in range(len(data)):
            events += server.receive(data[number : number + 1])
        assert normal(events) == normal(whole.receive(data))


@pytest.mark.slow
@thorough
@given(data=st.binary(max_size=400), client=st.booleans())
def test_garbage_never_raises(data: bytes, client: bool) -> None:
    session = spdy.Session(client=client)
    events = session.receive(data)
    assert session.failed == any(isinstance(event, spdy.SessionFailed) for event in events)


@pytest.mark.slow
@thorough
@given(seed=st.integers(0, 500), places=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8))
def test_damaged_conversations_never_raise(seed: int, places: list[tuple[int, int]]) -> None:
    data = bytearray(conversation(seed))
    for place, value in places:
        data[place % len(data)] = value
    server = spdy.Session(client=False)
    for start in range(0, len(data), 777):
        server.receive(bytes(data[start : start + 777]))
    assert len(server.stream_ids()) <= 1024


@pytest.mark.slow
@thorough
@given(
    kind=st.integers(0, 12), flags=st.integers(0, 255), payload=st.binary(max_size=64), version=st.sampled_from([2, 3, 3, 3])
)
def test_any_single_frame_never_raises(kind: int, flags: int, payload: bytes, version: int) -> None:
    frame = struct.pack(">HHI", 0x8000 | version, kind, flags << 24 | len(payload)) + payload
    for client in (True, False):
        session = spdy.Session(client=client)
        session.receive(frame)
        session.receive(data_header(1, 3, True) + b"abc")


@pytest.mark.slow
@thorough
@given(
    seed=st.integers(0, 1 << 30), window=st.integers(1, 5000), session_window=st.integers(64 << 10, 200 << 10),
)
def test_windows_are_kept_and_everything_arrives(seed: int, window: int, session_window: int) -> None:
    """Two strict sessions, any interleaving: no window is overrun, nothing gets lost, nothing gets stuck."""
    rng = random.Random(seed)
    client = spdy.Session(client=True, window=window, session_window=session_window, strict=True)
    server = spdy.Session(client=False, window=window, session_window=session_window, strict=True)
    client.receive(output(server))
    todo = {client.open_stream({}): rng.randbytes(rng.randrange(0, 4 * window + 10)) for _ in range(rng.randrange(1, 5))}
    sent = dict(todo)
    received = {stream_id: bytearray() for stream_id in todo}
    ended: set[int] = set()
    unread: list[tuple[int, int]] = []
    for _ in range(100_000):
        for stream_id in rng.sample(sorted(todo), len(todo)):
            size = min(client.sendable(stream_id), len(todo[stream_id]), rng.randrange(1, window + 1))
            fin = size == len(todo[stream_id])
            if size or fin:
                client.send_data(stream_id, todo[stream_id][:size], fin=fin)
                todo[stream_id] = todo[stream_id][size:]
            if fin:
                del todo[stream_id]
        for event in server.receive(output(client)):
            assert not isinstance(event, spdy.StreamReset | spdy.SessionFailed)
            if isinstance(event, spdy.DataReceived):
                received[event.stream_id] += event.data
                unread.append((event.stream_id, len(event.data)))
            elif isinstance(event, spdy.StreamEnded):
                ended.add(event.stream_id)
        if unread and rng.random() < 0.7:
            server.consumed(*unread.pop(rng.randrange(len(unread))))
        client.receive(output(server))
        if not todo and not unread and len(ended) == len(sent):
            break
    assert received == {stream_id: bytearray(data) for stream_id, data in sent.items()}
    assert ended == set(sent)
