"""Exec and port-forward over WebSocket, in every form that clients speak."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import struct

import pytest

from supervisord_ctr.aio import wait_until
from supervisord_ctr.streaming import PortForwardParams
from supervisord_ctr.streaming.server import StreamingServer
from tests.support.streaming import PATIENCE, ScriptedBackend, WebSocketClient
from tests.support.streaming_calls import exec_params, quiet

pytestmark = pytest.mark.slow


async def websocket_exec(server: StreamingServer, protocol: str, *argv: str, stdin: bool = False) -> WebSocketClient:
    url = server.exec_url(exec_params(*argv, stdin=stdin))
    return await WebSocketClient.connect(url, *([protocol] if protocol else []))


@pytest.mark.parametrize(
    "protocol", ["v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io", ""]
)
async def test_websocket_exec(server: StreamingServer, protocol: str) -> None:
    connection = await websocket_exec(server, protocol, "complain", "7")
    assert connection.subprotocol == protocol
    await connection.read_all()
    assert connection.messages[0] == b"\x01"
    assert connection.channel(1) == b"to stdout"
    assert connection.channel(2) == b"to stderr"
    if protocol[:3] in ("v5.", "v4."):
        assert json.loads(connection.channel(3))["details"]["causes"][0] == {"reason": "ExitCode", "message": "7"}
    else:
        assert connection.channel(3).startswith(b"command terminated")
    assert connection.close_code == 1000
    await connection.close()


@pytest.mark.parametrize("protocol", ["v4.base64.channel.k8s.io", "base64.channel.k8s.io"])
async def test_websocket_base64(server: StreamingServer, protocol: str) -> None:
    connection = await websocket_exec(server, protocol, "cat", stdin=True)
    connection.send("0" + base64.b64encode(b"hello \xff\x00").decode())
    await connection.wait_for(lambda: len(connection.messages) >= 2)
    assert connection.messages[0] == "1"
    assert connection.messages[1] == "1" + base64.b64encode(b"hello \xff\x00").decode()
    connection.send("0!!!")
    await connection.read_all()
    assert connection.close_code == 1007
    await connection.close()


async def test_websocket_v5_closes_stdin_by_signal(server: StreamingServer) -> None:
    connection = await websocket_exec(server, "v5.channel.k8s.io", "count", stdin=True)
    payload = b"\x00" + os.urandom(300_000)
    connection.send(payload)
    connection.send(b"\xff\x00")
    await connection.read_all()
    assert connection.channel(1) == b"300000"
    assert connection.close_code == 1000
    await connection.close()


async def test_websocket_v4_has_no_close_signal(server: StreamingServer) -> None:
    connection = await websocket_exec(server, "v4.channel.k8s.io", "cat", stdin=True)
    connection.send(b"\xff\x00")
    connection.send(b"\x00on")
    await connection.wait_for(lambda: connection.channel(1) == b"on")
    await connection.close()


@pytest.mark.parametrize("signal", [b"\xff", b"\xff\x09", b"\xff\x00\x00"])
async def test_websocket_bad_close_signal_ends_the_session(server: StreamingServer, signal: bytes) -> None:
    connection = await websocket_exec(server, "v5.channel.k8s.io", "cat", stdin=True)
    connection.send(signal)
    await connection.read_all()
    assert connection.close_code == 1002
    await connection.close()


async def test_websocket_resize_ping_and_unknown_channels(server: StreamingServer, backend: ScriptedBackend) -> None:
    url = server.exec_url(exec_params("size", "1", tty=True, stdin=True))
    connection = await WebSocketClient.connect(url, "v5.channel.k8s.io")
    connection.ping()
    connection.send(b"\x09dropped")
    connection.send(b"")
    connection.send(b'\x04{"Width":132,"Height":43}')
    await connection.read_all()
    assert backend.sizes == [(132, 43)]
    assert connection.pongs == 1
    await connection.close()


async def test_websocket_unknown_protocol_is_refused(server: StreamingServer) -> None:
    connection = await WebSocketClient.connect(server.exec_url(exec_params("echo")), "v9.channel.k8s.io")
    assert connection.rejected is not None
    assert connection.rejected[0] == 403
    await connection.close()


async def test_websocket_garbage_ends_the_session(server: StreamingServer, backend: ScriptedBackend) -> None:
    rng = random.Random(4)
    for _ in range(20):
        connection = await websocket_exec(server, "v5.channel.k8s.io", "sleep")
        connection.send_raw(b"\xf3" + rng.randbytes(50))
        await connection.read_all()
        assert connection.close_code == 1002
        await connection.close()
    await quiet(server, backend)


async def test_s9_websocket_client_that_leaves_ends_its_exec(server: StreamingServer, backend: ScriptedBackend) -> None:
    connection = await websocket_exec(server, "v5.channel.k8s.io", "sleep")
    await wait_until(lambda: backend.active == 1, PATIENCE, "exec to start")
    await connection.close()
    await quiet(server, backend)


async def test_websocket_port_forward_channels(server: StreamingServer, echo_port: int) -> None:
    url = server.port_forward_url(PortForwardParams("p1", (echo_port, 81)))
    connection = await WebSocketClient.connect(url, "v4.channel.k8s.io")
    await connection.wait_for(lambda: len(connection.channel(3)) > 2)
    assert connection.channel(0) == struct.pack("<H", echo_port)
    assert connection.channel(1) == struct.pack("<H", echo_port)
    assert connection.channel(2) == struct.pack("<H", 81)
    assert connection.channel(3).startswith(struct.pack("<H", 81) + b"error forwarding port 81 to pod p1")
    connection.send(b"\x00hello")
    await connection.wait_for(lambda: connection.channel(0)[2:] == b"hello")
    await connection.close()


async def test_websocket_port_forward_ends_with_the_pod_s_connection_which_the_channels_cannot_tell(
    server: StreamingServer, backend: ScriptedBackend, echo_port: int
) -> None:
    connection = await WebSocketClient.connect(
        server.port_forward_url(PortForwardParams("p1", (echo_port,))), "v4.channel.k8s.io"
    )
    connection.send(b"\x00hello")
    await connection.wait_for(lambda: connection.channel(0)[2:] == b"hello")
    connection.send(b"\x00BYE")
    await asyncio.wait_for(connection.read_all(), PATIENCE)
    assert connection.close_code == 1000
    assert connection.channel(0)[2:] == b"hello-end"
    assert connection.channel(1)[2:] == b""
    await connection.close()
    await quiet(server, backend)


async def test_spdy_tunnelled_through_websocket(server: StreamingServer, echo_port: int) -> None:
    url = server.port_forward_url(PortForwardParams("p1"))
    connection = await WebSocketClient.connect(url, "SPDY/3.1+portforward.k8s.io")
    assert connection.subprotocol == "SPDY/3.1+portforward.k8s.io"
    from supervisord_ctr.streaming import spdy

    machine = spdy.Session(client=True)
    error = machine.open_stream({"streamtype": "error", "port": "80", "requestid": "0"}, fin=True)
    data = machine.open_stream({"streamtype": "data", "port": "80", "requestid": "0"})
    machine.send_data(data, b"through the tunnel", fin=True)
    rng = random.Random(6)
    stream = b"".join(machine.take_output())
    while stream:
        size = rng.randrange(1, 20)
        connection.send(stream[:size])
        stream = stream[size:]
    seen: list[spdy.Event] = []

    def ended() -> bool:
        for message in connection.messages:
            assert isinstance(message, bytes)
            seen.extend(machine.receive(message))
        connection.messages.clear()
        return {event.stream_id for event in seen if isinstance(event, spdy.StreamEnded)} == {error, data}

    await connection.wait_for(ended)
    received = b"".join(bytes(event.data) for event in seen if isinstance(event, spdy.DataReceived))
    assert received == b"through the tunnel-end"
    await connection.close()
