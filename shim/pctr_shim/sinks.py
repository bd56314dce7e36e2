"""Where a process's output may go besides a CRI log: nothing, a fifo or pipe, a file."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Callable, Mapping
from typing import Any

from pctr_shim.belongings import Belongings, Busy
from pctr_shim.fdio import FdWriter, splice
from supervisord_ctr import errors

log = logging.getLogger(__name__)


class NullSink:
    """Drops everything: for output that only attached clients see."""

    def __init__(self) -> None:
        self.on_room: Callable[[], None] | None = None

    def leave(self, belongings: Belongings) -> dict[str, Any]:
        """For the next worker."""
        return {"kind": "null"}

    def write(self, data: bytes) -> bool:
        """Drop."""
        return True

    def splice(self, fd: int) -> int | None:
        """Let the pump read."""
        return None

    def flush(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is held."""


class PipeSink:
    """A fifo or pipe (owned, non-blocking). When it is full the pump waits, as with any pipe."""

    def __init__(self, fd: int) -> None:
        self.on_room: Callable[[], None] | None = None
        self._writer = FdWriter(fd)
        self._writer.on_flushed = self._flushed

    def _flushed(self) -> None:
        if self.on_room is not None:
            self.on_room()

    @property
    def closed(self) -> bool:
        """Whether nothing can be written any more."""
        return self._writer.fd < 0

    def leave(self, belongings: Belongings) -> dict[str, Any]:
        """For the next worker; `Busy` while something waits for the reader."""
        if self._writer.pending_bytes or self._writer.broken:
            raise Busy("a pipe is full")
        return {"kind": "pipe", "fd": belongings.leave(self._writer.fd)}

    def write(self, data: bytes) -> bool:
        """Write or keep."""
        return self._writer.write(data)

    def splice(self, fd: int) -> int | None:
        """Move pipe to pipe without copying."""
        if self._writer.pending_bytes or self._writer.broken:
            return None
        count = splice(fd, self._writer.fd)
        if count == -1:
            self._writer.wait_writable()
        return count

    def flush(self) -> None:
        """Close as soon as the reader has taken everything: it then sees the end."""
        self._writer.close_when_flushed()

    def close(self) -> None:
        """Close now."""
        self._writer.close()


class TerminalSink(PipeSink):
    """A terminal's input. Its end is told the way a terminal tells it, since nothing can be closed."""

    def flush(self) -> None:
        """Type the end-of-transmission character."""
        self.write(b"\x04")


class FileSink:
    """A file that is appended to; a full disk drops bytes and never holds up the container."""

    def __init__(self, path: str, fd: int = -1) -> None:
        """`fd`: the file, open for appending already."""
        self.on_room: Callable[[], None] | None = None
        self.dropped = 0
        self._path = path
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._fd = fd if fd >= 0 else os.open(path, flags, 0o644)

    def leave(self, belongings: Belongings) -> dict[str, Any]:
        """For the next worker."""
        return {"kind": "file", "path": self._path, "fd": belongings.leave(self._fd), "dropped": self.dropped}

    def write(self, data: bytes) -> bool:
        """Append, or drop what the disk refuses."""
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view):]
        except OSError as error:
            if not self.dropped:
                log.error("output file %s: %s", self._path, error)
            self.dropped += len(data)
        return True

    def splice(self, fd: int) -> int | None:
        """splice(2) refuses files opened for appending."""
        return None

    def flush(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def resume(left: Mapping[str, Any], belongings: Belongings) -> NullSink | PipeSink | FileSink:
    """The sink that `leave` described, a CRI log's excepted."""
    if left["kind"] == "null":
        return NullSink()
    fd = belongings.take(left["fd"])
    if left["kind"] == "pipe":
        return PipeSink(fd)
    sink = FileSink(left["path"], fd)
    sink.dropped = left["dropped"]
    return sink


def open_fifo_for_output(path: str) -> int:
    """A fifo that a client made, opened so that neither its absence nor its end blocks or kills us.

    Reading and writing at once never waits for a reader and never gets EPIPE (fifo(7)).
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise errors.from_os_error(error, "open fifo") from error
    with contextlib.suppress(OSError):
        if not stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.close(fd)
            raise errors.InvalidArgument(f"{path} is not a fifo", key=path)
    return fd


def is_fifo(path: str) -> bool:
    """Whether `path` is a fifo; a path that is not there counts as one, as clients make theirs."""
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except FileNotFoundError:
        return True
