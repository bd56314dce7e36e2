"""Attached clients: live output, and input, of a process over the bundle's `attach.sock`.

Owns the socket (mode 0600, peers checked) and the clients. A client connects and sends one line of JSON,

    {"id": "c1", "exec_id": "", "stdin": true, "stdout": true, "stderr": true}

and from then on both sides send frames: one byte of channel, four bytes of length (big-endian),
the payload. Channels: 0 stdin (to us), 1 stdout, 2 stderr (from us), 3 control, whose payload is one
JSON object.

    to us      {"resize": [WIDTH, HEIGHT]}    {"close_stdin": true}
    from us    {"attached": true}  once, first    {"error": "…"}    {"exit": {"status": 0, "at": 1.5, "pid": 12}}

After "exit" or "error" the connection ends. A client that reads too slowly is cut off when 1 MiB
waits for it: it never holds up the container or another client. The path may be longer than
a socket address allows; connect through `/proc/self/fd/N/attach.sock` with N open on the bundle.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Protocol

from pctr_shim.fdio import FdWriter
from supervisord_ctr import errors
from supervisord_ctr.model import Exit
from supervisord_ctr.ttrpc.server import is_trusted_peer

log = logging.getLogger(__name__)

STDIN, STDOUT, STDERR, CONTROL = 0, 1, 2, 3
NAME = "attach.sock"
_HEADER = struct.Struct(">BI")
_MAX_FRAME = 1 << 20
_MAX_WAITING = 1 << 20
_MAX_HELLO = 64 * 1024


class Attachable(Protocol):
    """A process that clients attach to."""

    def attach(self, client: Client) -> None:
        """Take the client in."""
        ...

    def detach(self, client: Client) -> None:
        """The client is gone."""
        ...

    def feed(self, client: Client, data: bytes) -> bool:
        """Give input to the process; False when it takes no more now."""
        ...

    def close_stdin(self) -> None:
        """End the process's input."""
        ...

    def resize(self, width: int, height: int) -> None:
        """Set the size of the process's terminal."""
        ...


class Client:
    """One attached connection (owned)."""

    def __init__(self, connection: socket.socket, find: Callable[[str, str], Attachable]) -> None:
        connection.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._fd = connection.detach()
        self._find = find
        self._writer = FdWriter(os.dup(self._fd))
        self._buffer = b""
        self._process: Attachable | None = None
        self._channels: set[int] = set()
        self._paused = False
        self.closed = False
        self._loop.add_reader(self._fd, self._readable)

    @property
    def feeds(self) -> bool:
        """Whether the client said that it gives input."""
        return STDIN in self._channels

    def output(self, channel: int, data: bytes) -> None:
        """Send output if the client asked for that channel; cut it off when too much waits."""
        if channel in self._channels and not self.closed:
            self._send(channel, data)

    def _send(self, channel: int, data: bytes) -> None:
        self._writer.write(_HEADER.pack(channel, len(data)) + data)
        if self._writer.pending_bytes > _MAX_WAITING:
            log.warning("an attached client reads too slowly and is cut off")
            self.close()
        elif self._writer.broken:
            self.close()

    def control(self, message: dict[str, object]) -> None:
        """Send one control object."""
        if not self.closed:
            self._send(CONTROL, json.dumps(message).encode())

    def finish(self, ended: Exit) -> None:
        """Tell how the process ended, then end."""
        self.control({"exit": {"status": ended.status, "at": ended.at, "pid": ended.pid}})
        self._end()

    def resume(self) -> None:
        """The process takes input again."""
        if self._paused and not self.closed:
            self._paused = False
            self._loop.add_reader(self._fd, self._readable)
            self._parse()

    def _pause(self) -> None:
        if not self._paused and not self.closed:
            self._paused = True
            self._loop.remove_reader(self._fd)

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._buffer += data
        self._parse()

    def _parse(self) -> None:
        try:
            if self._process is None and not self._hello():
                return
            while not self.closed and not self._paused and len(self._buffer) >= _HEADER.size:
                channel, length = _HEADER.unpack_from(self._buffer)
                if length > _MAX_FRAME:
                    raise errors.InvalidArgument(f"frame of {length} bytes")
                if len(self._buffer) < _HEADER.size + length:
                    return
                payload = self._buffer[_HEADER.size:_HEADER.size + length]
                self._buffer = self._buffer[_HEADER.size + length:]
                self._frame(channel, payload)
        except (errors.Error, ValueError, TypeError, KeyError, AttributeError) as error:
            self.control({"error": error.message if isinstance(error, errors.Error) else str(error)})
            self._end()

    def _hello(self) -> bool:
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline:
            if len(self._buffer) > _MAX_HELLO:
                raise errors.InvalidArgument("first line is too long")
            return False
        self._buffer = rest
        wanted = json.loads(line)
        process = self._find(str(wanted["id"]), str(wanted.get("exec_id", "")))
        names = ((STDIN, "stdin"), (STDOUT, "stdout"), (STDERR, "stderr"))
        self._channels = {number for number, name in names if wanted.get(name)}
        self._process = process
        self.control({"attached": True})
        process.attach(self)
        return True

    def _frame(self, channel: int, payload: bytes) -> None:
        assert self._process is not None
        if channel == STDIN and STDIN in self._channels:
            if not self._process.feed(self, payload):
                self._pause()
        elif channel == CONTROL:
            message = json.loads(payload)
            if "resize" in message:
                width, height = message["resize"]
                self._process.resize(int(width), int(height))
            if message.get("close_stdin") and STDIN in self._channels:
                self._process.close_stdin()

    def _end(self) -> None:
        """Let what is queued go out, then close."""
        self._leave()
        self._writer.close_when_flushed()

    def _leave(self) -> None:
        if self.closed:
            return
        self.closed = True
        if not self._paused:
            self._loop.remove_reader(self._fd)
        os.close(self._fd)
        if self._process is not None:
            self._process.detach(self)

    def close(self) -> None:
        """Close now."""
        self._leave()
        self._writer.close()


class AttachSocket:
    """The listening socket of one bundle."""

    def __init__(self, bundle: str, find: Callable[[str, str], Attachable], fd: int = -1) -> None:
        """`fd`: the socket, listening already."""
        self._loop = asyncio.get_running_loop()
        self._path = os.path.join(bundle, NAME)
        self._find = find
        self._listener = socket.socket(fileno=fd) if fd >= 0 else listen_below(bundle, NAME)
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener.fileno(), self._accept)

    @property
    def descriptor(self) -> int:
        """The listening socket's; -1 when it is closed."""
        return self._listener.fileno()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if not is_trusted_peer(connection):
            log.warning("refused an attach connection of another user")
            connection.close()
            return
        Client(connection, self._find)

    def close(self) -> None:
        """Stop to listen and remove the path."""
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            return


def listen_below(folder: str, name: str, backlog: int = 32) -> socket.socket:
    """A listening socket `folder`/`name`, mode 0600, however long the folder's path is."""
    folder_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        path = f"/proc/self/fd/{folder_fd}/{name}"
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            before = os.umask(0o177)
            try:
                listener.bind(path)
            finally:
                os.umask(before)
            listener.listen(backlog)
        except BaseException:
            listener.close()
            raise
        return listener
    finally:
        os.close(folder_fd)
