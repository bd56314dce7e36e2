"""The metadata room as one object: engine, stores, snapshotters and collector, opened and closed in order.

Every store method takes the namespace first; mutators take `lease`, the id of the lease that shall
protect what they create. They raise NotFound, AlreadyExists, InvalidArgument and FailedPrecondition
where containerd's metadata does, and publish the events it publishes, after the state is durable
(P14).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

from google.protobuf.message import Message

from supervisord_ctr.aio import Executors, TaskOwner
from supervisord_ctr.content import LocalContent
from supervisord_ctr.errors import Error, InvalidArgument
from supervisord_ctr.metadata.collector import Collector, GcOptions
from supervisord_ctr.metadata.containers import Containers
from supervisord_ctr.metadata.content import Content
from supervisord_ctr.metadata.engine import Engine, PendingEvent
from supervisord_ctr.metadata.images import Images
from supervisord_ctr.metadata.leases import Leases
from supervisord_ctr.metadata.namespaces import Namespaces
from supervisord_ctr.metadata.sandboxes import Sandboxes
from supervisord_ctr.metadata.snapshots import NamespacedSnapshotter
from supervisord_ctr.metadata.tables import Activations, Addresses, CriRecords
from supervisord_ctr.snapshots import Snapshotter
from supervisord_ctr.snapshots.proxy import ProxySnapshotter

#: Tells of an event: namespace, topic, message.
Publish: TypeAlias = Callable[[str, str, Message], None]

log = logging.getLogger(__name__)

#: Seconds without collection after rows were lost: time for clients to name again what they still need.
REPAIR_HOLD = 24 * 3600.0
#: Seconds between two copies of the database that a repair may need.
COPY_PERIOD = 900.0


class Database:
    """All stores over one engine, one content store and the snapshotters.

        engine = Engine(root / "metadata.db")
        overlay = OverlaySnapshotter(root / "overlayfs", engine.records("overlayfs"), executors)
        database = Database(engine, content, {"overlayfs": overlay}, exchange.publish, executors)
        await database.open()

    `collect=False` leaves garbage alone until somebody calls `gc.collect`. `isolated` is for `Content`.
    """

    def __init__(
        self,
        engine: Engine,
        content: LocalContent,
        snapshotters: Mapping[str, Snapshotter],
        publish: Publish,
        executors: Executors,
        *,
        collect: bool = True,
        gc: GcOptions | None = None,
        isolated: bool = False,
    ) -> None:
        self.engine = engine
        self._publish = publish
        self.executors = executors
        self._collecting = collect
        self._open = False
        self._owner = TaskOwner("metadata")
        self._copied_at = 0.0
        self._copied_changes = 0
        self._snapshotters = {
            name: NamespacedSnapshotter(engine, backend, self._owner) for name, backend in snapshotters.items()
        }
        for name, backend in snapshotters.items():
            if isinstance(backend, ProxySnapshotter):
                backend.namespaces = lambda name=name: [row[0] for row in engine.rows(  # type: ignore[misc]
                    "SELECT DISTINCT namespace FROM snapshots WHERE snapshotter = ?", (name,)
                )]
        self.namespaces = Namespaces(engine)
        self.containers = Containers(engine)
        self.sandboxes = Sandboxes(engine)
        self.content = Content(engine, content, executors, self._owner, isolated=isolated)
        self.gc = Collector(engine, self.content, self._snapshotters, executors, gc)
        self.images = Images(engine, self.gc.collect)
        self.leases = Leases(engine, self.gc.collect)
        self.cri = CriRecords(engine)
        self.addresses = Addresses(engine)
        self.activations = Activations(engine)
        #: Snapshotters that could not be opened, with the reason.
        self.unavailable: dict[str, str] = {}

    async def open(self) -> None:
        """Open the file (repairing, migrating), the snapshotters, finish what a crash interrupted, start collecting.

        A snapshotter that cannot be opened is left out and named in `unavailable`.
        """
        self.engine.on_commit = self._committed
        self.engine.before_sync = self.content.local.sync_names
        await self.executors.run_io(self.engine.open)
        lost = self.engine.repair is not None and self.engine.repair.lossy
        if lost:
            await self.gc.hold(REPAIR_HOLD)
        for name, snapshotter in list(self._snapshotters.items()):
            try:
                await snapshotter.backend.open(adopt=lost)
                await snapshotter.recover(adopt=lost)
            except (Error, OSError) as error:
                log.error("snapshotter %s is left out: %s", name, error)
                self.unavailable[name] = str(error)
                del self._snapshotters[name]
        self._open = True
        self.gc.parts.append(self._copy_now_and_then)
        if self._collecting:
            self.gc.start()

    async def _copy_now_and_then(self) -> list[tuple[str, str, str]]:
        """Keep the copy for repairs fresh while the daemon runs; a part of every collection."""
        now = time.monotonic()
        if self.engine.changes != self._copied_changes and now - self._copied_at > COPY_PERIOD:
            self._copied_at, self._copied_changes = now, self.engine.changes
            await self.executors.run_io(self.engine.take_copy)
        return []

    async def close(self) -> None:
        """Stop collecting, finish mutations, keep a copy for repairs, close the snapshotters and the file."""
        if not self._open:
            return
        self._open = False
        await self.gc.close()
        await self._owner.close()
        self.content.drop_files(all_files=True)
        for snapshotter in self._snapshotters.values():
            await snapshotter.backend.close()
        try:
            await self.executors.run_io(self.engine.take_copy)
        except (Error, OSError) as error:
            log.warning("metadata: no copy was kept: %s", error)
        await self.executors.run_io(self.engine.close)

    def _committed(self, events: Sequence[PendingEvent], dirty: bool) -> None:
        for namespace, topic, message in events:
            self._publish(namespace, topic, message)
        if self._open:
            self.gc.mutated(dirty)

    def snapshotter(self, name: str) -> NamespacedSnapshotter:
        """InvalidArgument for an empty name and for one that is not loaded."""
        if not name:
            raise InvalidArgument("snapshotter argument missing", kind="snapshotter")
        try:
            return self._snapshotters[name]
        except KeyError:
            reason = f" ({self.unavailable[name]})" if name in self.unavailable else ""
            raise InvalidArgument(f"snapshotter not loaded: {name}{reason}", kind="snapshotter", key=name) from None

    @property
    def snapshotters(self) -> Mapping[str, NamespacedSnapshotter]:
        """Those that are loaded, by name."""
        return MappingProxyType(self._snapshotters)
