"""Signals of this process as calls on its loop.

Owns the handlers, the pipe that the interpreter writes signal numbers to, and the reading of it. Handlers
can be installed before the process is forked: a fork calls `renew`, and is told of its own signals only.

The loop's own `add_signal_handler` first turns every signal number there is into an enum member, twice:
2 ms and dozens of pages in a process that lives for one container.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterable

_PIPE = os.O_CLOEXEC | os.O_NONBLOCK


class Signals:
    """Use: `install` once, `calls[number] = call`, `watch` on the running loop."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe2(_PIPE)
        self.calls: dict[int, Callable[[], None]] = {}

    def install(self, numbers: Iterable[int]) -> None:
        """Take these signals from their default. A process has one wake-up pipe: the last `install` counts."""
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, _heard)

    def watch(self) -> None:
        """Have the running loop make the calls."""
        asyncio.get_running_loop().add_reader(self.reader, self._woke)

    def renew(self) -> None:
        """In a fork: a pipe of its own under the old descriptors."""
        reader, writer = os.pipe2(_PIPE)
        for fresh, old in ((reader, self.reader), (writer, self._writer)):
            os.dup2(fresh, old, inheritable=False)
            os.close(fresh)

    def wake(self) -> None:
        """Have the loop go round once more."""
        try:
            os.write(self._writer, b"\0")
        except BlockingIOError:
            return  # there is enough to wake it

    def take(self) -> bytes:
        """The numbers of the signals that came, each at least once."""
        try:
            return os.read(self.reader, 4096)
        except BlockingIOError:
            return b""

    def _woke(self) -> None:
        for number in set(self.take()):
            call = self.calls.get(number)
            if call is not None:
                call()

    def close(self) -> None:
        """Hear nothing more. The running loop must not watch any longer."""
        signal.set_wakeup_fd(-1)
        os.close(self.reader)
        os.close(self._writer)


def _heard(*_: object) -> None:
    """Where Python wants a handler: the interpreter has written the number to the pipe by then."""
