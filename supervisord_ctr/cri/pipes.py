"""Named pipes between the daemon and a shim, for the streams of one exec.

Owns a folder with the pipes, the daemon's ends of them, and waiting for them on the event loop.
Everything is closed and removed with the block.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

#: Bytes asked of the kernel for a pipe: few, large turns of the loop.
_PIPE_SIZE = 1 << 20
CHUNK = 256 << 10


async def wait_readable(fd: int) -> None:
    """Return when `fd` has data or its writers are gone."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(fd, _wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def wait_writable(fd: int) -> None:
    """Return when `fd` takes data or its reader is gone."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_writer(fd, _wake, ready)
    try:
        await ready
    finally:
        loop.remove_writer(fd)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class Pipes:
    """The pipes of one exec: paths for the shim ("" for a stream that is not wanted) and our ends."""

    def __init__(self, folder: Path, *, stdin: bool, stdout: bool, stderr: bool) -> None:
        self._folder = folder
        self.stdin = str(folder / "stdin") if stdin else ""
        self.stdout = str(folder / "stdout") if stdout else ""
        self.stderr = str(folder / "stderr") if stderr else ""
        self._fds: dict[str, int] = {}

    def open(self) -> None:
        """Make the pipes and open the ends that we read from."""
        self._folder.mkdir(mode=0o700, parents=True)
        for path in filter(None, (self.stdin, self.stdout, self.stderr)):
            os.mkfifo(path, 0o600)
        for path in filter(None, (self.stdout, self.stderr)):
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
            self._fds[path] = fd

    async def read(self, path: str, limit: int = CHUNK) -> bytes:
        """Some bytes from a pipe that we read, b"" at its end.

        The writer must have opened the pipe already: before that, an empty pipe looks ended.
        """
        fd = self._fds[path]
        while True:
            try:
                return os.read(fd, limit)
            except BlockingIOError:
                await wait_readable(fd)

    async def write_stdin(self, data: bytes) -> None:
        """Write all of `data`; raises `BrokenPipeError` when the reader is gone."""
        fd = self._fds.get(self.stdin)
        if fd is None:
            fd = self._fds[self.stdin] = self._open_stdin()
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(fd, view):]
            except BlockingIOError:
                await wait_writable(fd)

    def _open_stdin(self) -> int:
        try:
            return os.open(self.stdin, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise BrokenPipeError(errno.EPIPE, "nobody reads standard input", self.stdin) from error
            raise

    def close_stdin(self) -> None:
        """No more input."""
        fd = self._fds.pop(self.stdin, None)
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        """Close everything and remove the folder."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def opened(folder: Path, *, stdin: bool, stdout: bool, stderr: bool) -> AsyncIterator[Pipes]:
    """Pipes for the length of a block."""
    pipes = Pipes(folder, stdin=stdin, stdout=stdout, stderr=stderr)
    try:
        pipes.open()
        yield pipes
    finally:
        pipes.close()
