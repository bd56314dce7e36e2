"""Unpack: an image's layers into the snapshots of one snapshotter.

Owns the chain of one image: which layers are there, unpacking the others side by side (where the
snapshotter can commit a layer onto a parent afterwards) or one after another, and committing them in
order. Nothing is committed before the layer's diff ID was compared with the image's configuration; a
layer that fails leaves no snapshot.

What survives a power cut: when the pull returns, every blob and every record is on disk (layers are
recorded without waiting, the image's own record then syncs them all). The unpacked files are on their
way there, as the file system writes them back; `sync=True` waits for them before each commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from supervisord_ctr import faults
from supervisord_ctr.aio import Executors
from supervisord_ctr.diff.pool import Job, UnpackPool
from supervisord_ctr.diff.stream import Applied, Limits, NeedsLower
from supervisord_ctr.errors import AlreadyExists, Error, FailedPrecondition, InvalidArgument, NotFound
from supervisord_ctr.images.config import ImageConfig
from supervisord_ctr.images.inherit import inherit_attributes
from supervisord_ctr.images.progress import EXTRACTED, EXTRACTING, Tracker
from supervisord_ctr.linux import files
from supervisord_ctr.linux.mounts import temp_mount
from supervisord_ctr.model import ContentInfo, Descriptor, Mount, Usage
from supervisord_ctr.names import LABEL_SNAPSHOT_REF, LABEL_UNCOMPRESSED
from supervisord_ctr.snapshots import CAPABILITY_REBASE

if TYPE_CHECKING:
    from supervisord_ctr.metadata import Database
    from supervisord_ctr.metadata.snapshots import NamespacedSnapshotter

log = logging.getLogger(__name__)

UNPACKED = faults.declare("unpack.unpacked", "a layer is in its active snapshot and not committed")


class ImageUnpacker:
    """The layers of one image for one snapshotter, within one namespace and lease."""

    def __init__(
        self, database: Database, executors: Executors, pool: UnpackPool, namespace: str, snapshotter: str,
        lease: str, layers: Sequence[Descriptor], config: ImageConfig, tracker: Tracker, *, scratch: Path,
        limits: Limits | None = None, sync: bool = False,
    ) -> None:
        if len(layers) != len(config.diff_ids):
            raise InvalidArgument(
                f"image has {len(layers)} layers, but its configuration lists {len(config.diff_ids)}", kind="image"
            )
        self.database = database
        self.executors = executors
        self.pool = pool
        self.namespace = namespace
        self.lease = lease
        self.tracker = tracker
        self.scratch = scratch
        self.limits = limits
        self.sync = sync
        self.snapshots: NamespacedSnapshotter = database.snapshotter(snapshotter)
        self.layers = tuple(layers)
        self.diff_ids = config.diff_ids
        self.chain = config.chain_ids()
        self._committed = [asyncio.Event() for _ in layers]
        self._gone: set[str] = set()
        self.rebase = CAPABILITY_REBASE in self.snapshots.capabilities

    async def present(self) -> int:
        """How many layers, from the bottom, need no unpacking; they join the lease."""
        for count in range(len(self.chain), 0, -1):
            if await self.exists(count - 1):
                for event in self._committed[:count]:
                    event.set()
                return count
        return 0

    async def exists(self, index: int) -> bool:
        """Whether layer `index` is committed here or can be shared from another namespace; it joins the lease."""
        name, parent = self.chain[index], self.chain[index - 1] if index else ""
        return await self.snapshots.adopt(self.namespace, name, parent, lease=self.lease)

    def parent(self, index: int) -> str:
        """The chain ID below layer `index`."""
        return self.chain[index - 1] if index else ""

    async def wait_parent(self, index: int) -> None:
        """Return when the layer below is committed."""
        if index:
            await self._committed[index - 1].wait()

    def done(self, index: int) -> None:
        """Layer `index` is committed (by us or by somebody else)."""
        self._committed[index].set()

    @contextlib.asynccontextmanager
    async def extraction(self, index: int, *, on_parent: bool) -> AsyncIterator[str]:
        """An active snapshot to unpack layer `index` into, removed again unless it was committed."""
        key = f"extract-{time.time_ns() % 1_000_000_000}-{secrets.token_urlsafe(3)} {self.chain[index]}"
        labels = {LABEL_SNAPSHOT_REF: self.chain[index]}
        parent = self.parent(index) if on_parent else ""
        await self.snapshots.prepare(self.namespace, key, parent, labels, lease=self.lease, durable=False)
        try:
            yield key
        finally:
            if key not in self._gone:
                await asyncio.shield(self.pool.owner.start(self._remove(key), "remove snapshot"))
            self._gone.discard(key)

    async def _remove(self, key: str) -> None:
        with contextlib.suppress(NotFound):
            await self.snapshots.remove(self.namespace, key, lease=self.lease)

    async def unpack_blob(self, index: int) -> None:
        """Unpack layer `index` from its blob, which is here, onto its committed parent."""
        await self.wait_parent(index)
        descriptor = self.layers[index]
        self.tracker.finish(descriptor, EXTRACTING)
        blob = await self.database.content.reader(self.namespace, descriptor.digest)
        try:
            async with self.extraction(index, on_parent=True) as key:
                mounts = await self.snapshots.mounts(self.namespace, key)
                applied = await apply_to_mounts(
                    self.pool, self.executors, blob.fileno(), blob.size, mounts, self.scratch, self.limits
                )
                await self.commit(index, key, applied, rebased=False)
        except AlreadyExists:
            await self.found(index)
        finally:
            blob.close()

    async def found(self, index: int) -> None:
        """Somebody else committed the layer meanwhile."""
        if not await self.exists(index):
            raise FailedPrecondition(
                f"snapshot {self.chain[index]} is there and cannot be used", kind="snapshot", key=self.chain[index]
            )
        self.done(index)

    async def commit(self, index: int, key: str, applied: Applied, *, rebased: bool) -> None:
        """Commit the unpacked layer onto its parent, after the diff ID was compared."""
        wanted = self.diff_ids[index]
        if applied.diff_id != wanted:
            raise InvalidArgument(
                f"layer {self.layers[index].digest}: wrong diff id calculated on extraction {applied.diff_id!r}, "
                f"the image says {wanted!r}", kind="layer", key=self.layers[index].digest,
            )
        for note in applied.notes:
            log.warning("layer %s: %s", self.layers[index].digest, note)
        faults.point(UNPACKED)
        await self.wait_parent(index)
        if rebased and index and applied.implied:
            await self._inherit(index, key, applied)
        if self.sync:
            await self._sync(key)
        if applied.usage is not None and rebased:
            await self.snapshots.account(self.namespace, key, Usage(*applied.usage))
        await self.snapshots.commit(
            self.namespace, self.chain[index], key, {LABEL_SNAPSHOT_REF: self.chain[index]},
            parent=self.parent(index) or None, lease=self.lease, durable=False,
        )
        self._gone.add(key)
        self.done(index)
        self.tracker.finish(self.layers[index], EXTRACTED)

    async def _inherit(self, index: int, key: str, applied: Applied) -> None:
        upper = await self.snapshots.upper_dir(self.namespace, key)
        assert upper is not None
        view = f"{key} below"
        mounts = await self.snapshots.view(self.namespace, view, self.parent(index), lease=self.lease)
        try:
            await self.executors.run_io(inherit_attributes, upper, applied.implied, mounts, self.scratch)
        finally:
            await asyncio.shield(self.pool.owner.start(self._remove(view), "remove view"))

    async def _sync(self, key: str) -> None:
        upper = await self.snapshots.upper_dir(self.namespace, key)
        if upper is not None:
            await self.executors.run_io(_sync_path, upper)

    async def label(self, index: int) -> None:
        """Note on the blob what it unpacks to, once that is proven."""
        digest, diff_id = self.layers[index].digest, self.diff_ids[index]
        info = await self.database.content.info(self.namespace, digest)
        if info.labels.get(LABEL_UNCOMPRESSED) != diff_id:
            await self.database.content.update(
                self.namespace, ContentInfo(digest, info.size, labels={LABEL_UNCOMPRESSED: diff_id}),
                [f"labels.{LABEL_UNCOMPRESSED}"], durable=False,
            )


class LayerFollower:
    """Unpacks one layer into a snapshot of its own while its blob arrives (`fetch.Follower`).

    `labels` get what is proven of the blob before it is committed.
    """

    def __init__(self, unpacker: ImageUnpacker, index: int, labels: dict[str, str]) -> None:
        self._unpacker = unpacker
        self._labels = labels
        self._index = index
        self._stack = contextlib.AsyncExitStack()
        self._job: Job | None = None
        self._key = ""
        self.applied: Applied | None = None
        self.failed: NeedsLower | AlreadyExists | None = None

    async def __aenter__(self) -> LayerFollower:
        return self

    async def __aexit__(self, *reason: object) -> None:
        await self._abandon()

    async def _abandon(self) -> None:
        try:
            if self._job is not None:
                job, self._job = self._job, None
                await job.abort()
        finally:
            await self._stack.aclose()

    async def begin(self, fd: int, offset: int) -> None:
        """Start, or start over, in an empty snapshot."""
        await self._abandon()
        unpacker = self._unpacker
        try:
            self._key = await self._stack.enter_async_context(unpacker.extraction(self._index, on_parent=False))
        except AlreadyExists as error:
            self.failed = error
            return
        upper = await unpacker.snapshots.upper_dir(unpacker.namespace, self._key)
        assert upper is not None, "a snapshotter that rebases has an upper directory"
        target = os.open(upper, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._job = unpacker.pool.start(
                fd, target, size=unpacker.layers[self._index].size, style="overlay" if self._index else "plain",
                complete=not self._index, limits=unpacker.limits,
            )
        finally:
            os.close(target)
        self._job.available(offset)

    def grown(self, size: int) -> None:
        """See `fetch.Follower`."""
        if self._job is not None:
            self._job.available(size)

    async def complete(self, size: int) -> None:
        """Wait for the unpacking; a layer that needs its parents is left to `finish`."""
        if self._job is None:
            return
        self._unpacker.tracker.finish(self._unpacker.layers[self._index], EXTRACTING)
        await self._job.end(size)
        try:
            self.applied = await self._job.result()
        except NeedsLower as error:
            self.failed = error
        if self.applied is not None and self.applied.diff_id != self._unpacker.diff_ids[self._index]:
            raise InvalidArgument(
                f"layer {self._unpacker.layers[self._index].digest}: wrong diff id calculated on extraction "
                f"{self.applied.diff_id!r}, the image says {self._unpacker.diff_ids[self._index]!r}", kind="layer",
            )
        if self.applied is not None:
            self._labels[LABEL_UNCOMPRESSED] = self.applied.diff_id

    async def finish(self) -> None:
        """Commit the snapshot; or unpack again on top of the parent where the layer needs it."""
        unpacker, index = self._unpacker, self._index
        if self.applied is not None:
            try:
                await unpacker.commit(index, self._key, self.applied, rebased=True)
                return
            except AlreadyExists:
                await unpacker.found(index)
                return
            except NeedsLower as error:
                self.failed = error
        if self.failed is not None:
            log.debug("layer %s: %s", unpacker.layers[index].digest, self.failed)
        await self._abandon()
        await unpacker.wait_parent(index)
        if isinstance(self.failed, AlreadyExists) and await unpacker.exists(index):
            unpacker.done(index)
            return
        await unpacker.unpack_blob(index)


async def apply_to_mounts(
    pool: UnpackPool, executors: Executors, blob_fd: int, size: int, mounts: Sequence[Mount], scratch: Path,
    limits: Limits | None = None,
) -> Applied:
    """Unpack a blob that is complete into what `mounts` show, whatever it is (Diff's Apply, too)."""
    if len(mounts) == 1 and mounts[0].type in ("bind", "rbind") and "ro" not in mounts[0].options:
        plain = not any(word.startswith(("uidmap=", "gidmap=", "X-")) for word in mounts[0].options)
        if plain and not mounts[0].target:
            return await _apply_to_path(pool, blob_fd, size, mounts[0].source, limits)
    if (upper := _upper_alone(mounts)) is not None:
        # Clients that unpack layers side by side name only where the changes go (containerd's unpacker does).
        return await _apply_to_path(pool, blob_fd, size, upper, limits, alone=True)
    async with _mounted(pool, executors, mounts, scratch) as path:
        return await _apply_to_path(pool, blob_fd, size, path, limits)


@contextlib.asynccontextmanager
async def _mounted(
    pool: UnpackPool, executors: Executors, mounts: Sequence[Mount], scratch: Path
) -> AsyncIterator[str]:
    """Where `mounts` are mounted for the length of the block; gone afterwards, also when it never began."""
    mounted = temp_mount(mounts, scratch)
    entering = pool.owner.start(executors.run_io(mounted.__enter__), "mount")

    async def leave() -> None:
        await asyncio.wait([entering])
        if not entering.cancelled() and entering.exception() is None:
            await executors.run_io(mounted.__exit__, None, None, None)

    try:
        yield await asyncio.shield(entering)
    finally:
        await asyncio.shield(pool.owner.start(leave(), "unmount"))


def _upper_alone(mounts: Sequence[Mount]) -> str | None:
    """The upper directory of an overlay mount that names no lower one, and so cannot be mounted."""
    if len(mounts) != 1 or mounts[0].type != "overlay":
        return None
    words = dict(word.partition("=")[::2] for word in mounts[0].options)
    return None if "lowerdir" in words else words.get("upperdir")


async def _apply_to_path(
    pool: UnpackPool, blob_fd: int, size: int, path: str, limits: Limits | None, *, alone: bool = False
) -> Applied:
    try:
        target = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Error(f"open {path}: {error.strerror}") from error
    try:
        if alone:
            return await pool.apply(blob_fd, size, target, style="overlay", complete=False, limits=limits)
        return await pool.apply(blob_fd, size, target, limits=limits)
    finally:
        os.close(target)


def _sync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        files.sync_filesystem(fd)
    finally:
        os.close(fd)
