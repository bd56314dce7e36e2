"""What a worker leaves to the next one of its shim: descriptors, and descriptions that name them by number.

Every object that goes on describes itself as a JSON value (`leave`), and is made again from that (`resume`).
What is in the middle of something raises `Busy`; then the worker goes on working.
"""

from __future__ import annotations

from collections.abc import Sequence


class Busy(Exception):
    """Something goes on that cannot be put down now; the text says what."""


class Belongings:
    """Descriptors in the order in which they are handed over. -1, no descriptor, stays -1."""

    def __init__(self, descriptors: Sequence[int] = ()) -> None:
        self.descriptors = list(descriptors)

    def leave(self, fd: int) -> int:
        """Leave a descriptor: the number by which the next worker takes it."""
        if fd < 0:
            return -1
        self.descriptors.append(fd)
        return len(self.descriptors) - 1

    def take(self, number: int) -> int:
        """The descriptor that was left under this number; it is the taker's."""
        return self.descriptors[number] if number >= 0 else -1
