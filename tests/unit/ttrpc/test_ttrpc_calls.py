"""ttrpc: calls, errors, limits, streams, and peers that send garbage."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import StringValue
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisord_ctr import errors
from supervisord_ctr.api.shim.v1 import shim_pb2
from supervisord_ctr.ttrpc import wire
from supervisord_ctr.ttrpc.client import Client
from supervisord_ctr.ttrpc.server import Context, Method, Server, StreamMethod, listen

SERVICE = "test.Echo"


class Echo:
    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.finished = asyncio.Event()

    async def say(self, request: StringValue, context: Context) -> StringValue:
        suffix = ",".join(context.metadata.get("suffix", []))
        return StringValue(value=request.value + suffix)

    async def fail(self, request: StringValue, context: Context) -> StringValue:
        if request.value == "oserror":
            raise FileNotFoundError(2, "No such file or directory", "/nowhere")
        if request.value == "bug":
            raise ZeroDivisionError("bug")
        raise errors.FailedPrecondition(f"not now: {request.value}")

    async def hang(self, request: StringValue, context: Context) -> StringValue:
        await self.release.wait()
        self.finished.set()
        return request

    async def big(self, request: StringValue, context: Context) -> StringValue:
        return StringValue(value="x" * (wire.MAX_MESSAGE + 1))

    async def double(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[StringValue]:
        async for request in requests:
            if request.value == "fail":
                raise errors.Aborted("stream failed")
            yield StringValue(value=request.value * 2)


async def read_frame(reader: asyncio.StreamReader) -> wire.Frame | None:
    """What a client that shares no code with ours would read; None at the end."""
    try:
        length, stream, kind, flags = struct.unpack(">IIBB", await reader.readexactly(10))
        return wire.Frame(stream, kind, flags, await reader.readexactly(length))
    except asyncio.IncompleteReadError:
        return None


@contextlib.asynccontextmanager
async def running(path: Path) -> AsyncIterator[tuple[Echo, Client]]:
    echo = Echo()
    server = Server({SERVICE: {
        "Say": Method(StringValue, echo.say), "Fail": Method(StringValue, echo.fail),
        "Hang": Method(StringValue, echo.hang), "Big": Method(StringValue, echo.big),
        "Double": StreamMethod(StringValue, echo.double),
    }})
    await server.serve(listen(str(path / "s")))
    try:
        async with await Client.connect(str(path / "s")) as client:
            yield echo, client
    finally:
        await server.close()


async def test_a_call_carries_message_and_metadata(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, client):
        answer = await client.call(
            SERVICE, "Say", StringValue(value="hello"), StringValue, metadata={"suffix": ["1", "2"]}
        )
        assert answer.value == "hello1,2"


async def test_calls_run_side_by_side(tmp_path: Path) -> None:
    async with running(tmp_path) as (echo, client):
        hanging = asyncio.get_running_loop().create_task(
            client.call(SERVICE, "Hang", StringValue(value="h"), StringValue)
        )
        answers = await asyncio.gather(*[
            client.call(SERVICE, "Say", StringValue(value=str(number)), StringValue) for number in range(50)
        ])
        assert [answer.value for answer in answers] == [str(number) for number in range(50)]
        echo.release.set()
        assert (await hanging).value == "h"


async def test_errors_keep_their_status(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, client):
        with pytest.raises(errors.FailedPrecondition, match="not now: x"):
            await client.call(SERVICE, "Fail", StringValue(value="x"), StringValue)
        with pytest.raises(errors.NotFound, match="/nowhere"):
            await client.call(SERVICE, "Fail", StringValue(value="oserror"), StringValue)
        with pytest.raises(errors.Unknown, match="ZeroDivisionError"):
            await client.call(SERVICE, "Fail", StringValue(value="bug"), StringValue)
        with pytest.raises(errors.Unimplemented):
            await client.call(SERVICE, "Nothing", StringValue(), StringValue)
        with pytest.raises(errors.Unimplemented):
            await client.call("no.Service", "Say", StringValue(), StringValue)


async def test_both_sides_keep_the_deadline(tmp_path: Path) -> None:
    async with running(tmp_path) as (echo, client):
        with pytest.raises(errors.DeadlineExceeded):
            await client.call(SERVICE, "Hang", StringValue(), StringValue, timeout=0.05)
        raw = shim_pb2.Request(service=SERVICE, method="Hang", timeout_nano=1)
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        writer.write(wire.pack(1, wire.REQUEST, 0, raw.SerializeToString()))
        frame = await read_frame(reader)
        assert frame is not None
        assert shim_pb2.Response.FromString(frame.data).status.code == errors.Code.DEADLINE_EXCEEDED
        writer.close()
        assert not echo.finished.is_set()


async def test_a_message_beyond_4_mib_fails_alone(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, client):
        with pytest.raises(errors.ResourceExhausted):
            await client.call(SERVICE, "Say", StringValue(value="x" * (wire.MAX_MESSAGE + 1)), StringValue)
        with pytest.raises(errors.ResourceExhausted):
            await client.call(SERVICE, "Big", StringValue(), StringValue)
        size = wire.MAX_MESSAGE - 1024
        answer = await client.call(SERVICE, "Say", StringValue(value="x" * size), StringValue)
        assert len(answer.value) == size


async def test_an_oversized_request_is_skipped_and_answered(tmp_path: Path) -> None:
    async with running(tmp_path):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        writer.write(wire.HEADER.pack(wire.MAX_MESSAGE + 10, 1, wire.REQUEST, 0) + bytes(wire.MAX_MESSAGE + 10))
        frame = await read_frame(reader)
        assert frame is not None
        assert shim_pb2.Response.FromString(frame.data).status.code == errors.Code.RESOURCE_EXHAUSTED
        request = shim_pb2.Request(service=SERVICE, method="Say", payload=StringValue(value="after").SerializeToString())
        writer.write(wire.pack(3, wire.REQUEST, 0, request.SerializeToString()))
        frame = await read_frame(reader)
        assert frame is not None
        assert frame.stream == 3
        assert StringValue.FromString(shim_pb2.Response.FromString(frame.data).payload).value == "after"
        writer.close()


async def test_a_stream_both_ways(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, client):
        stream = await client.stream(SERVICE, "Double", StringValue)
        for word in ("a", "b"):
            await stream.send(StringValue(value=word))
            assert (await stream.receive()).value == word * 2
        await stream.close_send()
        assert await stream.receive() is None
        failing = await client.stream(SERVICE, "Double", StringValue)
        await failing.send(StringValue(value="fail"))
        with pytest.raises(errors.Aborted, match="stream failed"):
            await failing.receive()
        once = await client.stream(SERVICE, "Double", StringValue, request=StringValue(value="c"))
        assert (await once.receive()).value == "cc"
        assert await once.receive() is None


async def test_a_slow_stream_holds_its_sender_and_loses_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, client):
        stream = await client.stream(SERVICE, "Double", StringValue)
        count, word = 2000, "x" * 1000
        for number in range(count):
            await stream.send(StringValue(value=f"{number}{word}"))
        await stream.close_send()
        for number in range(count):
            assert (await stream.receive()).value == f"{number}{word}" * 2
        assert await stream.receive() is None


async def test_a_peer_that_reads_no_answers_is_not_read_from(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, client):
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.connect(str(tmp_path / "s"))
            deaf.setblocking(False)
            wrong = wire.pack(2, wire.REQUEST, 0, b"") * 1000
            loop = asyncio.get_running_loop()
            with pytest.raises(TimeoutError):
                for _ in range(10_000):
                    await asyncio.wait_for(loop.sock_sendall(deaf, wrong), 1)
        assert (await client.call(SERVICE, "Say", StringValue(value="alive"), StringValue)).value == "alive"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(0, 7), st.binary(max_size=300)),
             max_size=8),
    st.data(),
)
def test_frames_come_out_however_their_bytes_come_in(
    frames: list[tuple[int, int, int, bytes]], data: st.DataObject,
) -> None:
    rest = b"".join(wire.pack(*frame) for frame in frames)
    parser, found = wire.Parser(), []
    while rest:
        count = data.draw(st.integers(1, len(rest)))
        parser.feed(rest[:count])
        rest = rest[count:]
        while (frame := parser.next()) is not None:
            found.append(frame[:4])
    assert found == frames
    assert not parser.inside


async def test_the_end_of_the_connection_fails_what_waits(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    client = await Client.connect(ours)
    waiting = asyncio.get_running_loop().create_task(client.call("s", "m", StringValue(), StringValue))
    await asyncio.get_running_loop().run_in_executor(None, theirs.recv, 64)
    theirs.close()
    with pytest.raises(errors.Unavailable):
        await waiting
    await client.wait_closed()
    with pytest.raises(errors.Unavailable):
        await client.call("s", "m", StringValue(), StringValue)
    await client.close()


async def test_a_hung_up_client_does_not_stop_its_call(tmp_path: Path) -> None:
    async with running(tmp_path) as (echo, _):
        other = await Client.connect(str(tmp_path / "s"))
        task = asyncio.get_running_loop().create_task(other.call(SERVICE, "Hang", StringValue(), StringValue))
        assert (await other.call(SERVICE, "Say", StringValue(value="x"), StringValue)).value == "x"
        await other.close()
        with pytest.raises(errors.Unavailable):
            await task
        echo.release.set()
        await asyncio.wait_for(echo.finished.wait(), 30)


@pytest.mark.parametrize("rounds", range(6))
async def test_a_server_that_ends_while_it_accepts_leaves_nothing_open(tmp_path: Path, rounds: int) -> None:
    before = os.listdir("/proc/self/fd")
    server = Server({})
    await server.serve(listen(str(tmp_path / "s")))
    with contextlib.ExitStack() as clients:
        for _ in range(5):
            client = clients.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            client.connect(str(tmp_path / "s"))
        for _ in range(rounds):
            await asyncio.sleep(0)
        await server.close()
        await asyncio.sleep(0)
        assert len(os.listdir("/proc/self/fd")) - 5 <= len(before)


async def test_s13_sockets_are_private_and_stale_ones_are_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    first = listen(path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        listen(path)
    first.close()
    listen(path).close()
    with pytest.raises(errors.InvalidArgument):
        await Client.connect("abstract")


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(
    st.binary(max_size=60),
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 255), st.integers(0, 255), st.binary(max_size=40)).map(
        lambda parts: struct.pack(">IIBB", len(parts[3]), *parts[:3]) + parts[3]
    ),
), max_size=6))
def test_garbage_ends_at_most_its_own_connection(tmp_path: Path, pieces: list[bytes]) -> None:
    async def run() -> None:
        async with running(tmp_path) as (_, client):
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
            writer.write(b"".join(pieces))
            writer.write_eof()
            while await reader.read(65536):
                pass
            writer.close()
            assert (await client.call(SERVICE, "Say", StringValue(value="alive"), StringValue)).value == "alive"

    asyncio.run(run())
