"""Inbox: order, bounds, ends and errors."""

from __future__ import annotations

import asyncio

import pytest

from supervisord_ctr.streaming.inbox import Inbox


class Owner:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.read = 0

    def inbox(self, limit: int = 10) -> Inbox:
        def count(size: int) -> None:
            self.read += size

        return Inbox(
            limit, on_full=lambda: self.calls.append("full"), on_room=lambda: self.calls.append("room"), on_read=count
        )


async def test_reads_pieces_in_order_and_joins_small_ones() -> None:
    inbox = Owner().inbox(100)
    for piece in (b"ab", memoryview(b"cde"), b"f"):
        assert inbox.feed(piece)
    assert await inbox.read(4) == b"abcd"
    assert await inbox.read(100) == b"ef"


async def test_a_waiting_reader_is_woken() -> None:
    inbox = Owner().inbox()
    reading = asyncio.get_running_loop().create_task(inbox.read())
    await asyncio.sleep(0)
    inbox.feed(b"x")
    assert await reading == b"x"


async def test_there_is_one_reader() -> None:
    inbox = Owner().inbox()
    reading = asyncio.get_running_loop().create_task(inbox.read())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="one reader"):
        await inbox.read()
    inbox.end()
    assert await reading == b""


async def test_owner_is_told_at_both_marks_and_of_every_byte() -> None:
    owner = Owner()
    inbox = owner.inbox(10)
    inbox.feed(b"x" * 10)
    assert owner.calls == []
    inbox.feed(b"y")
    assert owner.calls == ["full"]
    assert inbox.full
    await inbox.read(5)
    assert owner.calls == ["full"]
    await inbox.read(1)
    assert owner.calls == ["full", "room"]
    inbox.close()
    assert owner.read == 11


async def test_what_came_before_the_end_can_be_read_and_nothing_after_it_counts() -> None:
    inbox = Owner().inbox()
    inbox.feed(b"whole")
    inbox.end()
    assert not inbox.feed(b"late")
    inbox.fail(ConnectionResetError("late reset"))
    assert await inbox.read() == b"whole"
    assert await inbox.read() == b""


async def test_a_reset_before_the_end_drops_what_is_there() -> None:
    owner = Owner()
    inbox = owner.inbox(3)
    inbox.feed(b"part")
    inbox.fail(ConnectionResetError("reset"))
    assert owner.calls == ["full", "room"]
    assert owner.read == 4
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            await inbox.read()


async def test_a_cancelled_reader_leaves_the_inbox_usable() -> None:
    inbox = Owner().inbox()
    reading = asyncio.get_running_loop().create_task(inbox.read())
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    inbox.feed(b"x")
    assert await inbox.read() == b"x"
