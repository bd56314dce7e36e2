"""Attaching: a connection to the streams of a running process, as our own shim offers it.

`<bundle>/attach.sock` takes one JSON line, then frames go both ways: one byte channel (0 stdin,
1 stdout, 2 stderr, 3 control as JSON), four bytes length, payload. The shim cuts a reader off that
does not keep up, so nobody who attaches can stall a container (P9).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisord_ctr import errors

STDIN, STDOUT, STDERR, CONTROL = 0, 1, 2, 3
_HEADER = struct.Struct("!BI")
#: Longest frame either side may send.
MAX_FRAME = 1 << 20
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Frame:
    """What came from the shim: output of `channel`, or a control object."""

    channel: int
    data: bytes = b""
    control: dict[str, Any] | None = None


class AttachConnection:
    """One attached client. `read` until it returns None; `close` it whatever happened."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(
        cls, path: Path, container_id: str, exec_id: str = "", *, stdin: bool, stdout: bool, stderr: bool,
    ) -> AttachConnection:
        """Connect and say what is wanted; `FailedPrecondition` when the shim offers no attaching."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            # By descriptor: a bundle's path may be longer than a socket address can hold.
            folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                await asyncio.get_running_loop().sock_connect(sock, f"/proc/self/fd/{folder}/{path.name}")
            finally:
                os.close(folder)
            reader, writer = await asyncio.open_unix_connection(sock=sock, limit=MAX_FRAME)
        except OSError as error:
            sock.close()
            raise errors.FailedPrecondition(
                f"cannot attach to {container_id}: {path}: {(error.strerror or '').lower()}", kind="task",
                key=container_id,
            ) from error
        self = cls(reader, writer)
        hello = {"id": container_id, "exec_id": exec_id, "stdin": stdin, "stdout": stdout, "stderr": stderr}
        writer.write(json.dumps(hello).encode() + b"\n")
        await writer.drain()
        return self

    async def read(self) -> Frame | None:
        """The next frame, None when the shim hung up."""
        try:
            channel, length = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
            if length > MAX_FRAME:
                raise errors.Internal(f"attach frame of {length} bytes is too long", kind="attach")
            data = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        if channel != CONTROL:
            return Frame(channel, data)
        try:
            control = json.loads(data)
        except ValueError as error:
            raise errors.Internal("attach control frame is not JSON", kind="attach") from error
        return Frame(channel, control=control if isinstance(control, dict) else {})

    async def write(self, data: bytes) -> None:
        """Send to the process's standard input; waits while it does not read."""
        for start in range(0, len(data), _CHUNK):
            await self._send(STDIN, data[start:start + _CHUNK])

    async def close_stdin(self) -> None:
        """No more input comes."""
        await self._control({"close_stdin": True})

    async def resize(self, width: int, height: int) -> None:
        """The terminal's size in characters."""
        await self._control({"resize": [width, height]})

    async def _control(self, value: dict[str, Any]) -> None:
        await self._send(CONTROL, json.dumps(value).encode())

    async def _send(self, channel: int, data: bytes) -> None:
        try:
            self._writer.write(_HEADER.pack(channel, len(data)) + data)
            await self._writer.drain()
        except ConnectionError as error:
            raise errors.Unavailable("the attached process is gone", kind="attach") from error

    async def close(self) -> None:
        """Hang up; the process goes on."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
