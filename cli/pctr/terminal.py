"""The user's own terminal: raw while a container has it, and put back whatever happens."""

from __future__ import annotations

import contextlib
import os
import termios
import tty
from collections.abc import Iterator


def size(descriptor: int) -> tuple[int, int]:
    """Columns and rows of a terminal; (0, 0) when there is none."""
    try:
        columns, rows = os.get_terminal_size(descriptor)
    except OSError:
        return 0, 0
    return columns, rows


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
