"""Streaming: exec, attach and port-forward for CRI clients, over HTTP.

This module owns what the streaming server and the CRI room agree on: the parameters of a session
and the `Backend` that carries it out. `server.StreamingServer` hands out URLs and speaks HTTP,
SPDY/3.1 and WebSocket; it knows no container. The CRI room knows containers and no HTTP.

Light on purpose: a client that only needs the state machines of this package imports nothing else.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from supervisord_ctr.errors import InvalidArgument

#: What one read should ask for at most: large enough that the interpreter's cost per chunk vanishes.
CHUNK = 256 << 10


class ByteReader(Protocol):
    """Bytes that come from the client."""

    async def read(self, limit: int = CHUNK) -> bytes:
        """Some bytes, `limit` at most; `b""` once the client closed its half or is gone."""
        ...


class ByteWriter(Protocol):
    """Bytes that go to the client, one writer task at a time."""

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`; returns when there is room for more (backpressure).

        `data` may be reused as soon as this returns. Raises `BrokenPipeError` when the client closed
        or reset this stream or is gone.
        """
        ...

    async def close(self) -> None:
        """End this stream only; harmless when repeated. The server closes what the backend left open."""
        ...


@dataclass(frozen=True, slots=True)
class ExecParams:
    """CRI's ExecRequest: a command in a running container."""

    container_id: str
    argv: tuple[str, ...]
    tty: bool = False
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False

    def validate(self) -> None:
        """Raise `InvalidArgument` for what CRI forbids."""
        _check_streams(self.container_id, self.tty, self.stdin, self.stdout, self.stderr)


@dataclass(frozen=True, slots=True)
class AttachParams:
    """CRI's AttachRequest: the standard streams of a running container."""

    container_id: str
    tty: bool = False
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False

    def validate(self) -> None:
        """Raise `InvalidArgument` for what CRI forbids."""
        _check_streams(self.container_id, self.tty, self.stdin, self.stdout, self.stderr)


@dataclass(frozen=True, slots=True)
class PortForwardParams:
    """CRI's PortForwardRequest; `ports` matters to clients of the WebSocket channel form only."""

    sandbox_id: str
    ports: tuple[int, ...] = ()

    def validate(self) -> None:
        """Raise `InvalidArgument` for what CRI forbids."""
        if not self.sandbox_id:
            raise InvalidArgument("missing required pod_sandbox_id")
        for port in self.ports:
            if not 0 < port < 65536:
                raise InvalidArgument(f"invalid port {port}", kind="sandbox", key=self.sandbox_id)


Params = ExecParams | AttachParams | PortForwardParams


def _check_streams(container_id: str, tty: bool, stdin: bool, stdout: bool, stderr: bool) -> None:
    if not container_id:
        raise InvalidArgument("missing required container_id")
    if tty and stderr:
        raise InvalidArgument("tty and stderr cannot both be true", kind="container", key=container_id)
    if not (stdin or stdout or stderr):
        raise InvalidArgument("one of stdin, stdout, or stderr must be set", kind="container", key=container_id)


class Backend(Protocol):
    """What carries a session out.

    Each call runs in a task that the server owns. The server cancels it when the client is gone, when
    the session was idle too long or when the daemon stops; the backend then ends what it started (P7)
    before it lets the cancellation through. Errors are raised as `supervisord_ctr.errors`; their
    message reaches the client.
    """

    async def exec(
        self,
        container_id: str,
        argv: Sequence[str],
        *,
        tty: bool,
        stdin: ByteReader | None,
        stdout: ByteWriter | None,
        stderr: ByteWriter | None,
        resize: AsyncIterator[tuple[int, int]],
    ) -> int:
        """Run a command and return its exit code (128 + signal after a signal).

        Returns when the process has ended and its output was written, or the drain time is over.
        `resize` yields (width, height) and ends with the session; without a terminal it is not read.
        """
        ...

    async def attach(
        self,
        container_id: str,
        *,
        tty: bool,
        stdin: ByteReader | None,
        stdout: ByteWriter | None,
        stderr: ByteWriter | None,
        resize: AsyncIterator[tuple[int, int]],
    ) -> None:
        """Join a running container's streams; returns when its process has ended."""
        ...

    async def port_forward(self, sandbox_id: str, port: int) -> socket.socket:
        """A connected, non-blocking stream socket to `port` on the sandbox's loopback. The caller owns it."""
        ...


class Urls(Protocol):
    """What the CRI room needs of the streaming server.

    Each method checks the parameters (`InvalidArgument`) and returns a URL that is good for one
    connection within a minute (S14); `ResourceExhausted` when too many are outstanding.
    """

    def exec_url(self, params: ExecParams) -> str:
        """A URL for this exec."""
        ...

    def attach_url(self, params: AttachParams) -> str:
        """A URL for this attach."""
        ...

    def port_forward_url(self, params: PortForwardParams) -> str:
        """A URL for this port-forward."""
        ...
