"""Inbox: what a peer sent on one stream and nobody has read yet. Bounded by its owner's patience.

Owns the waiting reader and the two marks at which the owner holds and releases the connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from supervisord_ctr.streaming import CHUNK


class Inbox:
    """A queue of bytes with an end. One reader at a time."""

    def __init__(
        self,
        limit: int,
        *,
        on_full: Callable[[], None],
        on_room: Callable[[], None],
        on_read: Callable[[int], None],
    ) -> None:
        self._limit = limit
        self._on_full = on_full
        self._on_room = on_room
        self._on_read = on_read
        self._pieces: deque[bytes | memoryview] = deque()
        self._size = 0
        self._full = False
        self._ended = False
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return self._size

    @property
    def full(self) -> bool:
        """Whether the owner was told to hold."""
        return self._full

    def feed(self, data: bytes | memoryview) -> bool:
        """Add bytes; False when they were dropped because the inbox has ended."""
        if self._ended:
            return False
        if not data:
            return True
        self._pieces.append(data)
        self._size += len(data)
        self._wake()
        if not self._full and self._size > self._limit:
            self._full = True
            self._on_full()
        return True

    def end(self) -> None:
        """No more will come; what is there can still be read."""
        self._ended = True
        self._wake()

    def fail(self, error: Exception) -> None:
        """Nothing more will come and the end is missing: drop what is there, the reader gets `error`.

        After `end` this does nothing: what came is whole, and can be read.
        """
        if self._ended:
            return
        self._error = error
        self._ended = True
        self._drop()
        self._wake()

    def close(self) -> None:
        """The reader wants no more: drop what is there and what comes."""
        self._ended = True
        self._drop()
        self._wake()

    async def read(self, limit: int = CHUNK) -> bytes:
        """Up to `limit` bytes, `b""` at the end; raises the error given to `fail`."""
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if self._ended:
                return b""
            if self._reader is not None:
                raise RuntimeError("a stream has one reader")
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        data = self._take(limit)
        self._taken(len(data))
        return data

    def _take(self, limit: int) -> bytes:
        first = self._pieces.popleft()
        if len(first) >= limit or not self._pieces:
            if len(first) > limit:
                self._pieces.appendleft(memoryview(first)[limit:])
                first = memoryview(first)[:limit]
            return bytes(first)
        taken, size = [first], len(first)
        while self._pieces and size < limit:
            piece = self._pieces.popleft()
            if size + len(piece) > limit:
                self._pieces.appendleft(memoryview(piece)[limit - size :])
                piece = memoryview(piece)[: limit - size]
            taken.append(piece)
            size += len(piece)
        return b"".join(taken)

    def _taken(self, size: int) -> None:
        self._size -= size
        self._on_read(size)
        if self._full and self._size * 2 <= self._limit:
            self._full = False
            self._on_room()

    def _drop(self) -> None:
        size = self._size
        self._pieces.clear()
        if size:
            self._taken(size)

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
