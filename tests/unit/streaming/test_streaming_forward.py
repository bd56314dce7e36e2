"""Port-forward over SPDY: each connection for itself, whatever the others do."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket

import pytest

from supervisord_ctr.aio import wait_until
from supervisord_ctr.settings import StreamingSettings
from supervisord_ctr.streaming import client, spdy_session, wire
from supervisord_ctr.streaming.server import StreamingServer
from tests.support.streaming import PATIENCE, ScriptedBackend, read_all
from tests.support.streaming_calls import forward_session, quiet

pytestmark = pytest.mark.slow


async def test_p8_each_direction_closes_by_itself(server: StreamingServer, echo_port: int) -> None:
    session = await forward_session(server)
    data, error = await client.open_forward(session, echo_port, 0)
    await data.write(b"ping")
    assert await data.read() == b"ping"
    await data.close()
    assert await read_all(data) == b"-end"
    assert await read_all(error) == b""
    await session.finish()


async def test_p8_many_connections_and_random_resets_lose_nothing_on_the_others(
    server: StreamingServer, backend: ScriptedBackend, echo_port: int
) -> None:
    session = await forward_session(server)
    rng = random.Random(3)

    async def one(number: int) -> bool:
        data, _ = await client.open_forward(session, echo_port, number)
        payload = random.Random(number).randbytes(rng.randrange(1, 200_000))
        if number % 4 == 0:
            await data.write(payload[:1000])
            data.reset()
            return True
        if number % 4 == 1:
            await data.write(b"RESET")
            with contextlib.suppress(ConnectionResetError):
                assert await read_all(data) == b""
            return True
        await data.write(payload)
        await data.close()
        return await read_all(data) == payload + b"-end"

    async with asyncio.timeout(PATIENCE):
        assert all(await asyncio.gather(*(one(number) for number in range(200))))
    await session.finish()
    await quiet(server, backend)


async def test_p8_a_refused_port_says_why_and_spares_running_connections(
    server: StreamingServer, echo_port: int
) -> None:
    session = await forward_session(server)
    _, error = await client.open_forward(session, 81, 1)
    assert await read_all(error) == (
        b'error forwarding port 81 to pod p1, uid : failed to connect to localhost:81 inside namespace "p1"'
    )
    data, _ = await client.open_forward(session, echo_port, 2)
    refused, error = await client.open_forward(session, 81, 3)
    assert await read_all(error) == b""
    with pytest.raises(ConnectionResetError):
        await refused.read()
    await data.write(b"x")
    assert await data.read() == b"x"
    await session.finish()


async def test_bad_forward_streams_are_refused(server: StreamingServer, echo_port: int) -> None:
    session = await forward_session(server)
    for headers in (
        {"streamtype": "data"}, {"streamtype": "data", "port": "0"}, {"streamtype": "data", "port": "70000"},
        {"streamtype": "data", "port": "x"}, {"streamtype": "stdin", "port": "80"}, {"port": "80"},
    ):
        with pytest.raises(ConnectionRefusedError):
            await session.open(headers)
    error = await session.open({"streamtype": "error", "port": str(echo_port)})
    data = await session.open({"streamtype": "data", "port": str(echo_port)})
    await data.write(b"without request numbers")
    assert await data.read() == b"without request numbers"
    await error.close()
    await session.finish()


async def test_half_a_pair_is_given_up(backend: ScriptedBackend) -> None:
    made = StreamingServer(backend, StreamingSettings(creation_timeout=0.1))
    await made.start()
    session = await forward_session(made)
    error = await session.open({"streamtype": "error", "port": "80", "requestid": "1"})
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(error.read(), PATIENCE)
    await session.finish()
    await quiet(made, backend)
    await made.close()


async def test_p9_a_connection_that_is_not_read_does_not_stop_the_others(
    server: StreamingServer, backend: ScriptedBackend, echo_port: int
) -> None:
    """With windows on both sides, the stuck stream waits alone."""
    stuck = socket.create_server(("127.0.0.1", 0))
    backend.ports[90] = stuck.getsockname()[1]
    session = await forward_session(server)
    blocked, _ = await client.open_forward(session, 90, 1)
    filling = asyncio.get_running_loop().create_task(blocked.write(b"x" * (64 << 20)))
    data, _ = await client.open_forward(session, echo_port, 2)
    await data.write(b"y" * 100_000)
    await data.close()
    assert await read_all(data) == b"y" * 100_000 + b"-end"
    blocked.reset()
    with pytest.raises(BrokenPipeError):
        await filling
    await session.finish()
    await quiet(server, backend)
    stuck.close()


async def test_p9_streams_that_nobody_reads_are_reset_when_they_are_in_the_way(
    server: StreamingServer, backend: ScriptedBackend, echo_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer without windows fills one stream, which stops the connection, until that stream is given up."""
    monkeypatch.setattr(spdy_session, "STALL_TIMEOUT", 0.2)
    stuck = socket.create_server(("127.0.0.1", 0))
    backend.ports[90] = stuck.getsockname()[1]
    session = await forward_session(server)
    session.machine._peer_keeps_windows = session.machine._peer_keeps_session_window = False
    blocked, _ = await client.open_forward(session, 90, 1)
    data, _ = await client.open_forward(session, echo_port, 2)
    filling = asyncio.get_running_loop().create_task(blocked.write(b"x" * (16 << 20)))
    with contextlib.suppress(BrokenPipeError):
        await asyncio.wait_for(filling, PATIENCE)
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(blocked.read(), PATIENCE)
    await data.write(b"y")
    assert await asyncio.wait_for(data.read(), PATIENCE) == b"y"
    await session.finish()
    await quiet(server, backend)
    stuck.close()


async def test_p9_a_session_is_bounded_whatever_the_number_of_its_streams(
    server: StreamingServer, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spdy_session, "SESSION_WINDOW", 256 << 10)
    stuck = socket.create_server(("127.0.0.1", 0), backlog=100)
    backend.ports[90] = stuck.getsockname()[1]
    held: list[object] = []
    hold = wire.Wire.hold
    monkeypatch.setattr(wire.Wire, "hold", lambda self, reason: (held.append(reason), hold(self, reason))[1])
    session = await forward_session(server)
    session.machine._peer_keeps_windows = session.machine._peer_keeps_session_window = False
    streams = [(await client.open_forward(session, 90, number))[0] for number in range(20)]
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(stream.write(b"x" * (8 << 20))) for stream in streams]
    await wait_until(lambda: "session" in held, PATIENCE, "connection to be held")
    session.carrier.abort()
    await asyncio.gather(*tasks, return_exceptions=True)
    await quiet(server, backend)
    stuck.close()
