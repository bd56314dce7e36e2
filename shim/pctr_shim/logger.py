"""Logging programs: `binary:///program?key=value` reads a container's output by itself.

The convention is containerd's: the program gets stdout on descriptor 3, stderr on 4, and closes (or, for
`binary-v2`, writes a byte to) descriptor 5 when it is ready; CONTAINER_ID and CONTAINER_NAMESPACE
are in its environment; the query becomes arguments, key then value.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import urllib.parse

from pctr_shim.reaper import Reaper
from supervisord_ctr import errors

_READY = 30.0
_AFTER_END = 2.0
_AFTER_TERM = 10.0


class BinaryLogger:
    """A running logger; `writers` are the two ends for the container's output."""

    def __init__(self, pid: int, exited: asyncio.Future[int], writers: tuple[int, int]) -> None:
        self._pid = pid
        self._exited = exited
        self.writers = writers

    @classmethod
    async def start(cls, address: str, namespace: str, container_id: str, reaper: Reaper) -> BinaryLogger:
        """Start the program and wait until it is ready; `FailedPrecondition` when it does not get so far."""
        parts = urllib.parse.urlsplit(address)
        program = urllib.parse.unquote(parts.path)
        if not os.access(program, os.X_OK):
            raise errors.NotFound(f"logging program {program} cannot be executed", key=program)
        arguments = [program]
        for key, value in urllib.parse.parse_qsl(parts.query, keep_blank_values=True):
            arguments += [key, value] if value else [key]
        environment = {**os.environ, "CONTAINER_ID": container_id, "CONTAINER_NAMESPACE": namespace}
        with contextlib.ExitStack() as opened, contextlib.ExitStack() as writers:
            out = _pipe(opened, writers)
            err = _pipe(opened, writers)
            ready = os.pipe2(os.O_CLOEXEC)
            opened.callback(os.close, ready[0])
            try:
                pid, exited = reaper.spawn(arguments, environment, {3: out[0], 4: err[0], 5: ready[1]})
            except OSError as error:
                raise errors.from_os_error(error, f"start logging program {program}") from error
            finally:
                os.close(ready[1])
            said = await _wait_ready(ready[0])
            if parts.scheme == "binary-v2" and not said:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                raise errors.FailedPrecondition(f"logging program {program} ended before it was ready", key=program)
            writers.pop_all()
            return cls(pid, exited, (out[1], err[1]))

    async def close(self) -> None:
        """End its input; wait for it, ask it to end, then make it."""
        for fd in self.writers:
            os.close(fd)
        for wait, number in ((_AFTER_END, signal.SIGTERM), (_AFTER_TERM, signal.SIGKILL)):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._exited), wait)
            if self._exited.done():
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)
        await self._exited


def _pipe(readers: contextlib.ExitStack, writers: contextlib.ExitStack) -> tuple[int, int]:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    readers.callback(os.close, reader)
    writers.callback(os.close, writer)
    return reader, writer


async def _wait_ready(fd: int) -> bytes:
    loop = asyncio.get_running_loop()
    os.set_blocking(fd, False)
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        await asyncio.wait_for(readable.wait(), _READY)
    except TimeoutError:
        raise errors.DeadlineExceeded("logging program was not ready within 30 s") from None
    finally:
        loop.remove_reader(fd)
    try:
        return os.read(fd, 1)
    except BlockingIOError:
        return b""
