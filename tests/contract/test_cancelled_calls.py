"""Calls that are cancelled at the worst moment: what they had asked for is undone or finished (P5, S9)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import any_pb2

from supervisord_ctr.aio import wait_until
from supervisord_ctr.diff.pool import UnpackPool
from supervisord_ctr.errors import Error, Unavailable
from supervisord_ctr.images import unpack
from supervisord_ctr.images.layers import compare_mounts
from supervisord_ctr.images.leases import PullLeases
from supervisord_ctr.linux.mounts import mounts_below, temp_mount
from supervisord_ctr.metadata.engine import Transaction
from supervisord_ctr.model import Mount
from supervisord_ctr.services.streaming import Stream
from tests.support.images import file, layer, pack
from tests.support.stores import Stores, open_stores

LONG = 60.0


@pytest.fixture
async def stores(tmp_path: Path) -> AsyncIterator[Stores]:
    async with open_stores(tmp_path / "stores") as made:
        yield made


class Gate:
    """A call on a thread that waits where it is told to, after it has done what it does."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self._reached, self._open = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        made = self._call(*arguments, **options)
        self._reached.set()
        assert self._open.wait(LONG)
        return made

    async def cancelled_there(self, work: Any) -> None:
        """Begin `work`, cancel it once the call is made, and let the call return afterwards."""
        task = asyncio.get_running_loop().create_task(work)
        assert await asyncio.to_thread(self._reached.wait, LONG)
        task.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        # Some calls wait here for what they have to undo.
        self._open.set()
        with pytest.raises(asyncio.CancelledError):
            await task


def open_files(part: str) -> int:
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += part in os.readlink(f"/proc/self/fd/{fd}")
    return count


async def test_a_blob_that_was_being_opened_is_closed(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = await stores.blob("ns", b"some bytes")
    gate = Gate(stores.local.open)
    monkeypatch.setattr(stores.local, "open", gate)
    await gate.cancelled_there(stores.database.content.reader("ns", digest))
    await wait_until(lambda: open_files(digest.partition(":")[2]) == 0, LONG, "the blob is closed")


async def test_s9_a_copy_that_was_being_made_keeps_no_ref_locked(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = stores.database.content
    digest = await stores.blob("one", b"shared")
    writer = await content.writer("two", "ref", expected=digest)
    gate = Gate(stores.local.writer)
    monkeypatch.setattr(stores.local, "writer", gate)
    await gate.cancelled_there(writer.write(b"more"))
    await writer.close()
    monkeypatch.undo()

    async def free() -> bool:
        try:
            again = await content.writer("two", "ref")
        except Unavailable:
            return False
        await again.close()
        return True

    await wait_until(free, LONG, "the ref is free")


async def test_a_mount_that_was_being_made_for_a_layer_goes(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, target = tmp_path / "scratch", tmp_path / "target"
    scratch.mkdir()
    target.mkdir()
    blob = tmp_path / "layer"
    blob.write_bytes(pack(layer(file("a"))))
    gates: list[Gate] = []

    @contextlib.contextmanager
    def slow(mounts: Sequence[Mount], folder: Path) -> Iterator[str]:
        with temp_mount(mounts, folder) as path:
            yield gates[0](path)

    gates.append(Gate(lambda path: path))
    monkeypatch.setattr(unpack, "temp_mount", slow)
    pool = UnpackPool()
    try:
        with open(blob, "rb") as opened:
            await gates[0].cancelled_there(unpack.apply_to_mounts(
                pool, stores.executors, opened.fileno(), blob.stat().st_size,
                [Mount("bind", str(target), ("rbind", "ro"))], scratch,
            ))
        await wait_until(lambda: mounts_below(scratch) == [] and not any(scratch.iterdir()), LONG, "no mount is left")
    finally:
        await pool.close()
    assert list(target.iterdir()) == []


async def test_a_lease_that_was_being_made_for_a_pull_goes(stores: Stores) -> None:
    blocked, go = threading.Event(), threading.Event()

    def wait(_: Transaction) -> None:
        blocked.set()
        assert go.wait(LONG)

    leases = PullLeases(stores.database)
    entered = False

    async def pull() -> None:
        nonlocal entered
        async with leases.hold("ns", reference="registry.test/app:1"):
            entered = True

    async with asyncio.TaskGroup() as group:
        group.create_task(stores.engine.write(wait))
        assert await asyncio.to_thread(blocked.wait, LONG)
        task = group.create_task(pull())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        go.set()
    assert not entered
    await stores.engine.write(lambda _: None)  # after all that was asked for before
    assert await stores.database.leases.list("ns") == []


async def test_a_comparison_that_fails_leaves_no_ingest_of_its_own(stores: Stores, tmp_path: Path) -> None:
    nowhere = [Mount("bind", str(tmp_path / "nowhere"), ("rbind",))]
    for ref in ("", "mine"):
        with pytest.raises((Error, OSError)):
            await compare_mounts(
                stores.database, stores.executors, "ns", [], nowhere, ref=ref, scratch=tmp_path
            )
    assert [status.ref for status in await stores.database.content.statuses("ns")] == ["mine"]


async def test_p9_a_closed_stream_lets_go_of_whoever_waits_to_send() -> None:
    async def nothing() -> AsyncIterator[any_pb2.Any]:
        return
        yield any_pb2.Any()

    stream = Stream(nothing())
    sent = 0

    async def send() -> None:
        nonlocal sent
        while True:
            await stream.send(any_pb2.Any())
            sent += 1

    task = asyncio.get_running_loop().create_task(send())
    before = -1
    while sent != before:
        before = sent
        await asyncio.sleep(0.01)
    stream.close()
    with pytest.raises(Unavailable):
        await task
    assert len([message async for message in stream.outgoing()]) == sent > 0
