"""The user's own terminal: raw while a container has it, and put back whatever happens."""

from __future__ import annotations

import contextlib
import os
import termios
import tty
from collections.abc import Callable, Iterator
from typing import Protocol


def size(descriptor: int) -> tuple[int, int]:
    """Columns and rows of a terminal; (0, 0) when there is none."""
    try:
        columns, rows = os.get_terminal_size(descriptor)
    except OSError:
        return 0, 0
    return columns, rows


class _Sent(Protocol):
    @property
    def done(self) -> bool: ...


class SizeRelay:
    """Keeps the size of a process's terminal at ours, with one call at a time.

    Daemons work on calls side by side, so of two that are on their way the older may take effect
    last. `send` begins a call with columns and rows; it gives None when none can be made now.
    """

    def __init__(self, send: Callable[[int, int], _Sent | None]) -> None:
        self._send = send
        self._under_way: _Sent | None = None
        self._due = False

    def changed(self) -> None:
        """Our size is another, or the process does not know it yet."""
        self._due = True
        self.settle()

    def settle(self) -> None:
        """Send what is due unless a call is under way; call this whenever answers may have come."""
        if not self._due or (self._under_way is not None and not self._under_way.done):
            return
        width, height = size(1) if size(1) != (0, 0) else size(0)
        if not width or not height:
            self._due = False
            return
        self._under_way = self._send(width, height)
        self._due = self._under_way is None


@contextlib.contextmanager
def raw(descriptor: int) -> Iterator[None]:
    """Raw mode inside, the former settings afterwards; nothing when it is no terminal."""
    if not os.isatty(descriptor):
        yield
        return
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor, termios.TCSANOW)
        yield
    finally:
        # TCSADRAIN waits for the output that is still on its way; a hung-up terminal cannot be restored.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
