"""A streaming server over a scripted backend, for the tests of this folder."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator

import pytest

from supervisord_ctr.settings import StreamingSettings
from supervisord_ctr.streaming.server import StreamingServer
from tests.support.streaming import ScriptedBackend


@pytest.fixture
async def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
async def server(backend: ScriptedBackend) -> AsyncIterator[StreamingServer]:
    made = StreamingServer(backend, StreamingSettings())
    await made.start()
    yield made
    await made.close()
    assert backend.active == 0
    assert made.sessions == 0


@pytest.fixture
async def echo_port(backend: ScriptedBackend) -> AsyncIterator[int]:
    """A pod's port 80 that sends back what it gets and closes after the client's end, or after a last word at "BYE"."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                if data.startswith(b"RESET"):
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
                    return
                if data.startswith(b"BYE"):
                    break
                writer.write(data)
                await writer.drain()
            writer.write(b"-end")
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    backend.ports[80] = listener.sockets[0].getsockname()[1]
    yield 80
    listener.close()
    await listener.wait_closed()
