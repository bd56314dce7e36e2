"""A metadata database with its stores in a temporary folder, for tests without a daemon."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from google.protobuf.message import Message

from supervisord_ctr.aio import Executors
from supervisord_ctr.content import LocalContent
from supervisord_ctr.metadata import Database, Engine
from supervisord_ctr.snapshots import Snapshotter
from supervisord_ctr.snapshots.native import NativeSnapshotter
from supervisord_ctr.snapshots.overlay import OverlaySnapshotter


class Stores:
    """A database below `root` and what it told."""

    def __init__(self, root: Path, *, sync: bool = False, collect: bool = False, isolated: bool = False) -> None:
        self.root = root
        self.executors = Executors.create(io=4, cpu=1)
        self.engine = Engine(root / "metadata.db")
        self.local = LocalContent(root / "content", sync=sync)
        self.overlay = OverlaySnapshotter(root / "overlayfs", self.engine.records("overlayfs"), self.executors)
        self.native = NativeSnapshotter(root / "native", self.engine.records("native"), self.executors)
        self.events: list[tuple[str, str, Message]] = []
        snapshotters: dict[str, Snapshotter] = {"overlayfs": self.overlay, "native": self.native}
        self.database = Database(
            self.engine, self.local, snapshotters, lambda *event: self.events.append(event), self.executors,
            collect=collect, isolated=isolated,
        )

    def topics(self) -> list[str]:
        """Topics of the events so far, which are forgotten then."""
        topics = [topic for _, topic, _ in self.events]
        self.events.clear()
        return topics

    async def blob(self, namespace: str, data: bytes, labels: dict[str, str] | None = None, **options: str) -> str:
        """Write a blob; returns its digest."""
        writer = await self.database.content.writer(namespace, f"ref-{len(data)}-{data[:20]!r}", **options)  # type: ignore[arg-type]
        await writer.write(data)
        return await writer.commit(labels=labels)


@contextlib.asynccontextmanager
async def open_stores(
    root: Path, *, sync: bool = False, collect: bool = False, isolated: bool = False
) -> AsyncIterator[Stores]:
    """Stores below `root`, open."""
    stores = Stores(root, sync=sync, collect=collect, isolated=isolated)
    await stores.database.open()
    try:
        yield stores
    finally:
        await stores.database.close()
        stores.executors.close()
