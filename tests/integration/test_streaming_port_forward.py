"""Port-forward through CRI into a pod's own network namespace, without helper programs (P8)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from supervisord_ctr.aio import wait_until
from supervisord_ctr.streaming import client, spdy, spdy_session
from tests.support.streaming import PATIENCE, WebSocketClient, read_all
from tests.support.streaming_pod import Pod, running_pod

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pod() -> Iterator[Pod]:
    with running_pod() as made:
        yield made


@pytest.fixture(scope="module")
def container(pod: Pod) -> str:
    return pod.run("sleep", "100000")


class Server:
    """A thread for each connection to a port inside the pod."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.port: int = listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    @staticmethod
    def _serve(connection: socket.socket) -> None:
        """A tiny protocol: GET asks for a page of N bytes; RESET is answered so; all else is echoed to its end."""
        with connection, contextlib.suppress(OSError):
            data = connection.recv(1 << 16)
            if data.startswith(b"GET /"):
                size = int(data.split(b"/")[1].split()[0])
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + bytes(size % 251 for _ in range(size)))
            elif data.startswith(b"RESET"):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                while data:
                    connection.sendall(data)
                    data = connection.recv(1 << 16)
                connection.sendall(b"-end")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


@pytest.fixture
def server(pod: Pod, container: str) -> Iterator[Server]:
    made = Server(pod.listen(container))
    yield made
    made.close()


async def open_session(pod: Pod) -> spdy_session.SpdySession:
    session, chosen = await client.connect(pod.forward_url(), [client.PORT_FORWARD_PROTOCOL])
    assert chosen == client.PORT_FORWARD_PROTOCOL
    return session


async def test_reaches_a_port_that_only_the_pod_has(pod: Pod, server: Server) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)
    session = await open_session(pod)
    data, error = await client.open_forward(session, server.port, 1)
    await data.write(b"GET /5000 HTTP/1.0\r\n\r\n")
    page = await read_all(data)
    assert page == b"HTTP/1.0 200 OK\r\n\r\n" + bytes(5000 % 251 for _ in range(5000))
    await data.close()
    assert await read_all(error) == b""
    await session.finish()


async def test_ipv6_is_tried_when_ipv4_is_refused(pod: Pod, container: str) -> None:
    pod.exec_sync(container, "true")
    listener = pod.listen(container, socket.AF_INET6)
    server = Server(listener)
    session = await open_session(pod)
    data, _ = await client.open_forward(session, server.port, 1)
    await data.write(b"over six")
    assert await asyncio.wait_for(data.read(), PATIENCE) == b"over six"
    await session.finish()
    server.close()


async def test_p8_half_close_in_each_direction(pod: Pod, server: Server) -> None:
    session = await open_session(pod)
    data, _ = await client.open_forward(session, server.port, 1)
    payload = random.Random(1).randbytes(2 << 20)

    async def send() -> None:
        await data.write(payload)
        await data.close()

    async with asyncio.TaskGroup() as group:
        group.create_task(send())
        received = group.create_task(read_all(data))
    assert received.result() == payload + b"-end"
    await session.finish()


async def test_p8_two_hundred_requests_with_random_resets_lose_nothing_else(pod: Pod, server: Server) -> None:
    session = await open_session(pod)
    rng = random.Random(2)

    async def one(number: int, fate: int, size: int) -> bool:
        data, _ = await client.open_forward(session, server.port, number)
        if fate == 0:
            await data.write(b"GET /%d HTTP/1.0\r\n\r\n" % size)
            data.reset()
            return True
        if fate == 1:
            await data.write(b"RESET")
            with contextlib.suppress(ConnectionResetError):
                assert await read_all(data) == b""
            return True
        await data.write(b"GET /%d HTTP/1.0\r\n\r\n" % size)
        page = await read_all(data)
        await data.close()
        return len(page) == size + len(b"HTTP/1.0 200 OK\r\n\r\n")

    async with asyncio.timeout(PATIENCE * 2):
        results = await asyncio.gather(*(one(n, rng.randrange(6), rng.randrange(1, 50_000)) for n in range(200)))
    assert all(results)
    await session.finish()


async def test_refused_port_says_why(pod: Pod, container: str) -> None:
    session = await open_session(pod)
    data, error = await client.open_forward(session, 9, 1)
    message = (await read_all(error)).decode()
    assert message.startswith(f"error forwarding port 9 to pod {pod.id}, uid : ")
    assert "IPv4: connection refused, IPv6: " in message
    with pytest.raises(ConnectionResetError):
        await data.read()
    await session.finish()


async def test_spdy_through_websocket_reaches_the_pod(pod: Pod, server: Server) -> None:
    connection = await WebSocketClient.connect(pod.forward_url(), "SPDY/3.1+portforward.k8s.io")
    machine = spdy.Session(client=True)
    headers = {"port": str(server.port), "requestid": "0"}
    machine.open_stream({"streamtype": "error", **headers}, fin=True)
    data = machine.open_stream({"streamtype": "data", **headers})
    machine.send_data(data, b"tunnelled", fin=True)
    connection.send(b"".join(machine.take_output()))
    received = bytearray()

    def arrived() -> bool:
        for message in connection.messages:
            assert isinstance(message, bytes)
            for event in machine.receive(message):
                if isinstance(event, spdy.DataReceived):
                    received.extend(event.data)
        connection.messages.clear()
        return received == b"tunnelled-end"

    await connection.wait_for(arrived)
    await connection.close()


async def test_sessions_end_with_their_clients(pod: Pod, server: Server) -> None:
    assert pod.daemon.process is not None
    fds = f"/proc/{pod.daemon.process.pid}/fd"
    before = len(os.listdir(fds))
    for _ in range(5):
        session = await open_session(pod)
        for number in range(10):
            await client.open_forward(session, server.port, number)
        session.carrier.abort()
    await wait_until(lambda: len(os.listdir(fds)) < before + 24, PATIENCE, "descriptors to be closed")
