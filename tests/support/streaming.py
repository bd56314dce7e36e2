"""Helpers for streaming tests: a backend in memory and a WebSocket client over asyncio streams."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from urllib.parse import urlsplit

from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    Pong,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)

from supervisord_ctr.errors import NotFound, Unavailable, Unknown
from supervisord_ctr.streaming import ByteReader, ByteWriter

PATIENCE = 60.0


class ScriptedBackend:
    """A `Backend` whose programs are written here. Counts what runs and what was cancelled."""

    def __init__(self) -> None:
        self.active = 0
        self.started = 0
        self.cancelled = 0
        self.release = asyncio.Event()
        self.sizes: list[tuple[int, int]] = []
        self.listeners: list[ByteWriter] = []
        self.ports: dict[int, int] = {}

    async def exec(
        self, container_id: str, argv: Sequence[str], *, tty: bool, stdin: ByteReader | None,
        stdout: ByteWriter | None, stderr: ByteWriter | None, resize: AsyncIterator[tuple[int, int]],
    ) -> int:
        self.active += 1
        self.started += 1
        try:
            program = getattr(self, f"_run_{argv[0]}", None)
            if program is None:
                raise Unknown(
                    'failed to exec in container: failed to start exec "x": OCI runtime exec failed: exec failed: unable '
                    f'to start container process: exec: "{argv[0]}": executable file not found in $PATH: unknown'
                )
            code: int = await program(argv, stdin, stdout, stderr, resize)
            return code
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.active -= 1

    async def attach(
        self, container_id: str, *, tty: bool, stdin: ByteReader | None, stdout: ByteWriter | None,
        stderr: ByteWriter | None, resize: AsyncIterator[tuple[int, int]],
    ) -> None:
        if container_id == "missing":
            raise NotFound(f"container {container_id} not found")
        self.active += 1
        try:
            if stdout is not None:
                self.listeners.append(stdout)
            while stdin is not None and (data := await stdin.read()):
                for listener in list(self.listeners):
                    await listener.write(data)
            await self.release.wait()
        finally:
            self.active -= 1
            if stdout in self.listeners:
                self.listeners.remove(stdout)

    async def port_forward(self, sandbox_id: str, port: int) -> socket.socket:
        if port not in self.ports:
            raise Unavailable(f"failed to connect to localhost:{port} inside namespace \"{sandbox_id}\"")
        sock = socket.socket()
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.ports[port]))
        except BaseException:
            sock.close()
            raise
        return sock

    async def _run_echo(self, argv, stdin, stdout, stderr, resize) -> int:  # type: ignore[no-untyped-def]
        if stdout is not None:
            await stdout.write(" ".join(argv[1:]).encode() + b"\n")
        return 0

    async def _run_complain(self, argv, stdin, stdout, stderr, resize) -> int:  # type: ignore[no-untyped-def]
        await stderr.write(b"to stderr")
        await stdout.write(b"to stdout")
        return int(argv[1])

    async def _run_cat(self, argv, stdin, stdout, stderr, resize) -> int:  # type: ignore[no-untyped-def]
        while data := await stdin.read():
            await stdout.write(data)
        return 0

    async def _run_count(self, argv, stdin, stdout, stderr, resize) -> int:  # type: ignore[no-untyped-def]
        total = 0
        while data := await stdin.read():
            total += len(data)
        await stdout.write(str(total).encode())
        return 0

    async def _run_flood(self, argv, stdin, stdout, stderr, resize) -> int:  # type: ignore[no-untyped-def]
        left = int(argv[1])
        block = os.urandom(64 << 10)
        while left > 0:
            await stdout.write(block[: min(left, len(block))])
            left -= len(block)
        return 0

    async def _run_sleep(self, argv, stdin, stdout, stderr, resize) -> int:  # type: ignore[no-untyped-def]
        await self.release.wait()
        return 0

    async def _run_size(self, argv, stdin, stdout, stderr, resize) -> int:  # type: ignore[no-untyped-def]
        async for size in resize:
            self.sizes.append(size)
            if len(self.sizes) == int(argv[1]):
                break
        return 0


class WebSocketClient:
    """A client that gathers messages by channel. For tests: unbounded."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, protocol: WSConnection) -> None:
        self._reader = reader
        self._writer = writer
        self._protocol = protocol
        self.subprotocol: str | None = None
        self.rejected: tuple[int, bytes] | None = None
        self.messages: list[bytes | str] = []
        self.close_code: int | None = None
        self.pongs = 0
        self._partial: bytes | str | None = None

    @classmethod
    async def connect(cls, url: str, *subprotocols: str) -> WebSocketClient:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        protocol = WSConnection(ConnectionType.CLIENT)
        client = cls(reader, writer, protocol)
        writer.write(protocol.send(Request(host=parts.netloc, target=parts.path, subprotocols=list(subprotocols))))
        while client.subprotocol is None and client.rejected is None and await client.pump():
            pass
        return client

    async def pump(self) -> bool:
        """Read once; False at the end of the connection."""
        try:
            data = await asyncio.wait_for(self._reader.read(1 << 18), PATIENCE)
        except ConnectionError:
            data = b""
        self._protocol.receive_data(data or None)
        for event in self._protocol.events():
            if isinstance(event, AcceptConnection):
                self.subprotocol = event.subprotocol or ""
            elif isinstance(event, RejectConnection):
                self.rejected = (event.status_code, b"")
            elif isinstance(event, RejectData):
                assert self.rejected is not None
                self.rejected = (self.rejected[0], self.rejected[1] + bytes(event.data))
            elif isinstance(event, BytesMessage | TextMessage):
                piece = event.data if isinstance(event.data, str) else bytes(event.data)
                self._partial = piece if self._partial is None else self._partial + piece  # type: ignore[operator]
                if event.message_finished:
                    self.messages.append(self._partial)
                    self._partial = None
            elif isinstance(event, Ping):
                self._writer.write(self._protocol.send(event.response()))
            elif isinstance(event, Pong):
                self.pongs += 1
            elif isinstance(event, CloseConnection):
                self.close_code = int(event.code)
        return bool(data)

    def send(self, data: bytes | str) -> None:
        event = TextMessage(data=data) if isinstance(data, str) else BytesMessage(data=data)
        self._writer.write(self._protocol.send(event))

    def send_raw(self, data: bytes) -> None:
        self._writer.write(data)

    def ping(self) -> None:
        self._writer.write(self._protocol.send(Ping(b"x")))

    async def drain(self) -> None:
        await self._writer.drain()

    async def read_all(self) -> None:
        """Read until the server closes."""
        while self.close_code is None and await self.pump():
            pass

    async def wait_for(self, condition) -> None:  # type: ignore[no-untyped-def]
        """Read until `condition()` holds."""
        while not condition():
            assert await self.pump(), "the server closed the connection"

    def channel(self, number: int) -> bytes:
        """Everything that came on one binary channel."""
        return b"".join(m[1:] for m in self.messages if isinstance(m, bytes) and m and m[0] == number)

    async def close(self) -> None:
        self._writer.transport.abort()


async def read_all(stream) -> bytes:  # type: ignore[no-untyped-def]
    """Everything of a stream up to its end."""
    parts = []
    while data := await asyncio.wait_for(stream.read(), PATIENCE):
        parts.append(data)
    return b"".join(parts)
