"""Progress over a stream: few messages, in order, and the last word on every blob."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from google.protobuf import any_pb2

from supervisord_ctr.api.types.transfer import transfer_pb2 as transfer
from supervisord_ctr.images.progress import Progress
from supervisord_ctr.services.streaming import ProgressSender, Stream


async def nobody() -> AsyncIterator[any_pb2.Any]:
    await asyncio.get_running_loop().create_future()
    yield any_pb2.Any()


@contextlib.asynccontextmanager
async def sending(pace: float) -> AsyncIterator[tuple[ProgressSender, list[tuple[str, str, int]], Stream]]:
    stream = Stream(nobody())
    got: list[tuple[str, str, int]] = []

    async def collect() -> None:
        async for message in stream.outgoing():
            event = transfer.Progress.FromString(message.value)
            got.append((event.name, event.event, event.progress))

    sender = ProgressSender(stream, pace=pace)
    async with asyncio.TaskGroup() as group:
        group.create_task(collect())
        run = group.create_task(sender.run())
        yield sender, got, stream
        sender.end()
        await run
        stream.close()


def blob(name: str, event: str, done: int) -> Progress:
    return Progress(event, name, (), None, done, 100)


async def test_of_one_blob_only_the_newest_event_waits() -> None:
    async with sending(pace=3600) as (sender, got, _):
        sender.offer(Progress("Resolving"))
        while not got:
            await asyncio.sleep(0)
        # Nothing is sent before the pace allows it, or the end does.
        sender.offer(Progress("Pulling"))
        sender.offer(blob("parent", "waiting", 0))
        sender.offer(blob("child", "waiting", 0))
        for done in range(0, 101, 10):
            sender.offer(blob("child", "downloading", done))
        sender.offer(blob("parent", "complete", 100))
        sender.offer(blob("child", "extracted", 100))
        sender.offer(Progress("saved", "image"))
    assert got == [
        ("", "Resolving", 0), ("", "Pulling", 0), ("parent", "complete", 100), ("child", "extracted", 100),
        ("image", "saved", 0),
    ]


async def test_events_go_out_while_the_work_goes_on() -> None:
    async with sending(pace=0.001) as (sender, got, _):
        for number in range(3):
            sender.offer(blob(f"blob-{number}", "downloading", number))
            while len(got) <= number:
                await asyncio.sleep(0.001)
    assert [name for name, _, _ in got] == ["blob-0", "blob-1", "blob-2"]


async def test_a_client_that_went_away_ends_the_sending() -> None:
    async with sending(pace=0.001) as (sender, got, stream):
        stream.close()
        sender.offer(blob("one", "waiting", 0))
    assert got == []


async def test_a_last_status_comes_before_and_after_a_named_event_since_ctr_shows_it_then() -> None:
    async with sending(pace=3600) as (sender, got, _):
        sender.offer(Progress("Pulling"))
        sender.offer(blob("one", "complete", 100))
        sender.offer(Progress("saved", "image"))
        sender.offer(Progress("Completed pull"))
    assert got == [
        ("", "Pulling", 0), ("one", "complete", 100), ("image", "saved", 0), ("", "Completed pull", 0),
        ("image", "saved", 0), ("", "Completed pull", 0),
    ]
