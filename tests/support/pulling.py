"""A puller over stores in a temporary folder and a registry that does as it is told."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from supervisord_ctr.diff.pool import UnpackPool
from supervisord_ctr.diff.stream import Limits
from supervisord_ctr.errors import Error
from supervisord_ctr.images.hosts import HostsConfig
from supervisord_ctr.images.http import Http, Timeouts
from supervisord_ctr.images.progress import Progress
from supervisord_ctr.images.pull import Puller
from supervisord_ctr.model import Image
from tests.support.stores import Stores, open_stores

NAMESPACE = "testing"


class Pulling:
    """Everything a pull needs, and what it left."""

    def __init__(self, stores: Stores, puller: Puller) -> None:
        self.stores = stores
        self.database = stores.database
        self.puller = puller
        self.progress: list[Progress] = []

    async def pull(self, reference: str, **options: Any) -> Image:
        """Pull into the test's namespace."""
        return await self.puller.pull(NAMESPACE, reference, progress=self.progress.append, **options)

    async def left(self) -> dict[str, list[str]]:
        """Names of what the namespace has."""
        snapshots = await self.database.snapshotter("overlayfs").walk(NAMESPACE)
        native = await self.database.snapshotter("native").walk(NAMESPACE)
        return {
            "images": [image.name for image in await self.database.images.list(NAMESPACE)],
            "snapshots": [info.name for info in (*snapshots, *native)],
            "leases": [lease.id for lease in await self.database.leases.list(NAMESPACE)],
        }

    def tree(self, snapshotter: str = "overlayfs") -> list[str]:
        """Every path below the snapshots' directories."""
        return sorted(str(path) for path in (self.stores.root / snapshotter).rglob("*"))


@contextlib.asynccontextmanager
async def open_pulling(
    root: Path, *, config_path: str = "", timeouts: Timeouts | None = None, limits: Limits | None = None,
    retries: int = 3, collect: bool = False,
) -> AsyncIterator[Pulling]:
    """A puller below `root`."""
    async with open_stores(root, collect=collect) as stores, contextlib.AsyncExitStack() as stack:
        pool = UnpackPool(2, idle=30)
        stack.push_async_callback(pool.close)
        http = Http(timeouts)
        stack.push_async_callback(http.close)
        scratch = root / "scratch"
        scratch.mkdir()
        puller = Puller(
            stores.database, stores.executors, pool, http, HostsConfig(config_path), scratch=scratch, retries=retries,
            limits=limits,
        )
        stack.push_async_callback(puller.close)
        yield Pulling(stores, puller)
        assert not list(scratch.iterdir()), "a temporary mount was left"


async def refused(pulling: Pulling, name: str, kind: type[Error], told: str, **options: Any) -> Error:
    """The pull fails so, and leaves no image, snapshot or lease."""
    with pytest.raises(kind, match=told) as caught:
        await pulling.pull(name, **options)
    assert await pulling.left() == {"images": [], "snapshots": [], "leases": []}
    await pulling.database.gc.collect()
    await pulling.database.snapshotter("overlayfs").cleanup()
    assert await pulling.database.content.walk(NAMESPACE) == []
    return caught.value
