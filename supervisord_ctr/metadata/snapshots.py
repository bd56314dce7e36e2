"""Snapshots as a namespace sees them: its own keys, mapped to keys in the snapshotter.

Owns the rows `snapshots` and the order of writes between them and the snapshotter's own records:

    prepare   snapshotter first, row second     a crash between leaves a snapshot without row: collected
    commit    intent, snapshotter, row          a crash between is finished or undone at the next start
    remove    row only                          the collector removes from the snapshotter, children first

Keys in the snapshotter are `NAMESPACE/NUMBER/KEY` with a number that never repeats, so a name that
is removed and made again is another snapshot there.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from supervisord_ctr import faults, filters
from supervisord_ctr.aio import KeyedLock, TaskOwner, shielded
from supervisord_ctr.api.events import events_pb2
from supervisord_ctr.errors import (
    AlreadyExists,
    Error,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unknown,
)
from supervisord_ctr.metadata.codec import (
    adapt_snapshot,
    checked_labels,
    dump_map,
    ensure_namespace,
    load_map,
    update_labels,
)
from supervisord_ctr.metadata.engine import Engine, Row, Transaction
from supervisord_ctr.metadata.leases import hold_resource, release_resource
from supervisord_ctr.model import Mount, SnapshotInfo, SnapshotKind, Usage
from supervisord_ctr.names import LABEL_SNAPSHOT_REF
from supervisord_ctr.snapshots import INHERITED_LABELS, Snapshotter

log = logging.getLogger(__name__)

_COLUMNS = "key, backend, parent, created, updated, labels"
#: Rows of a snapshotter and a key, whichever namespace has them: by the primary key, since there are few namespaces.
_OF_ANY_NAMESPACE = (
    "FROM namespaces n CROSS JOIN snapshots s ON s.namespace = n.name AND s.snapshotter = ? AND s.key = ?"
)

INTENT = faults.declare("metadata.snapshot.intent", "a commit is written down, the snapshotter was not asked yet")


def inherited(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels that the snapshotter gets to see."""
    return {
        key: value for key, value in labels.items()
        if key.startswith(INHERITED_LABELS) or key == LABEL_SNAPSHOT_REF
    }


def _overlay(info: SnapshotInfo, row: Row) -> SnapshotInfo:
    """What the snapshotter says, seen from the namespace."""
    key, _, parent, created, updated, labels = row
    return SnapshotInfo(key, parent or "", info.kind, created, updated, {**info.labels, **load_map(labels)})


class NamespacedSnapshotter:
    """A snapshotter seen from namespaces: as `snapshots.Snapshotter`, with the namespace first."""

    def __init__(self, engine: Engine, backend: Snapshotter, owner: TaskOwner) -> None:
        self._engine = engine
        self.backend = backend
        self.name = backend.name
        self._owner = owner
        self._locks = KeyedLock()
        #: Backend keys in the making: the collector leaves them alone until their row exists.
        self.pending: set[str] = set()

    @property
    def capabilities(self) -> frozenset[str]:
        """What it offers beyond the interface."""
        return self.backend.capabilities

    # Reading.

    def _row(self, namespace: str, key: str) -> Row:
        row = self._engine.row(
            f"SELECT {_COLUMNS} FROM snapshots WHERE namespace = ? AND snapshotter = ? AND key = ?",
            (namespace, self.name, key),
        )
        if row is None:
            raise NotFound(f"snapshot {key} does not exist: not found", kind="snapshot", key=key)
        return row

    async def stat(self, namespace: str, key: str) -> SnapshotInfo:
        """NotFound."""
        row = self._row(namespace, key)
        return _overlay(await self.backend.stat(row[1]), row)

    async def exists(self, namespace: str, key: str) -> bool:
        """Whether the namespace has a snapshot of that key or name."""
        return self._engine.row(
            "SELECT 1 FROM snapshots WHERE namespace = ? AND snapshotter = ? AND key = ?", (namespace, self.name, key)
        ) is not None

    async def usage(self, namespace: str, key: str) -> Usage:
        """NotFound."""
        return await self.backend.usage(self._row(namespace, key)[1])

    async def mounts(self, namespace: str, key: str) -> tuple[Mount, ...]:
        """NotFound; FailedPrecondition for a committed one."""
        backend = self._row(namespace, key)[1]
        try:
            return await self.backend.mounts(backend)
        except FailedPrecondition as error:
            raise FailedPrecondition(error.message.replace(backend, key), kind="snapshot", key=key) from None

    async def upper_dir(self, namespace: str, key: str) -> Path | None:
        """See `Snapshotter.upper_dir`."""
        return self.backend.upper_dir(self._row(namespace, key)[1])

    async def account(self, namespace: str, key: str, usage: Usage) -> None:
        """See `Snapshotter.account`."""
        self.backend.account(self._row(namespace, key)[1], usage)

    async def walk(self, namespace: str, filter_texts: Sequence[str] = ()) -> list[SnapshotInfo]:
        """Those that match (fields name, parent, kind, labels), by key; rows that the snapshotter lost are left out."""
        matching = filters.parse(filter_texts)
        rows = self._engine.rows(
            f"SELECT {_COLUMNS} FROM snapshots WHERE namespace = ? AND snapshotter = ? ORDER BY key",
            (namespace, self.name),
        )
        if not rows:
            return []
        known = {info.name: info for info in await self.backend.walk()}
        found = (_overlay(known[row[1]], row) for row in rows if row[1] in known)
        return [info for info in found if matching.matches(adapt_snapshot(info))]

    async def cleanup(self) -> int:
        """See `Snapshotter.cleanup`."""
        return await self.backend.cleanup()

    # Writing.

    async def update(self, namespace: str, info: SnapshotInfo, fieldpaths: Sequence[str] = ()) -> SnapshotInfo:
        """Change labels or labels.KEY; NotFound; InvalidArgument for other paths or no name."""
        if not info.name:
            raise InvalidArgument("snapshot name must not be empty", kind="snapshot")
        return await shielded(self._owner, self._update(namespace, info, fieldpaths), f"update {info.name}")

    async def _update(self, namespace: str, info: SnapshotInfo, fieldpaths: Sequence[str]) -> SnapshotInfo:
        def work(tx: Transaction) -> Row:
            row = _select(tx, namespace, self.name, info.name)
            if row is None:
                raise NotFound(f"snapshot {info.name} does not exist: not found", kind="snapshot", key=info.name)
            labels = checked_labels(
                update_labels(load_map(row[5]), info.labels, fieldpaths, f'snapshot "{info.name}"'), "info.labels"
            )
            now = time.time()
            tx.execute(
                "UPDATE snapshots SET labels = ?, updated = ? WHERE namespace = ? AND snapshotter = ? AND key = ?",
                (dump_map(labels), now, namespace, self.name, info.name),
            )
            return (*row[:4], now, dump_map(labels))

        row = await self._engine.write(work)
        inner = SnapshotInfo(row[1], labels=inherited(load_map(row[5])))
        return _overlay(await self.backend.update(inner, ["labels"]), row)

    async def prepare(
        self, namespace: str, key: str, parent: str = "", labels: Mapping[str, str] | None = None, *,
        lease: str | None = None, durable: bool = True,
    ) -> tuple[Mount, ...]:
        """See `Snapshotter.prepare`.

        AlreadyExists also when the label `containerd.io/snapshot.ref` names a snapshot that the
        namespace has; what exists joins the lease. With `durable=False` the record waits for the next
        durable mutation (that of the container which needs the snapshot, say).
        """
        work = self._create(namespace, key, parent, labels, lease, view=False, durable=durable)
        return await shielded(self._owner, work, f"prepare {key}")

    async def view(
        self, namespace: str, key: str, parent: str = "", labels: Mapping[str, str] | None = None, *,
        lease: str | None = None, durable: bool = True,
    ) -> tuple[Mount, ...]:
        """See `Snapshotter.view`."""
        work = self._create(namespace, key, parent, labels, lease, view=True, durable=durable)
        return await shielded(self._owner, work, f"view {key}")

    async def _create(
        self, namespace: str, key: str, parent: str, labels: Mapping[str, str] | None, lease: str | None, *,
        view: bool, durable: bool,
    ) -> tuple[Mount, ...]:
        if not key:
            raise InvalidArgument("snapshot key must not be empty", kind="snapshot")
        kept = checked_labels(labels, "info.labels")
        target = kept.get(LABEL_SNAPSHOT_REF, "")
        async with self._locks.hold((namespace, key)):
            bkey, bparent = await self._reserve(namespace, key, parent, target, lease)
            self.pending.add(bkey)
            try:
                make = self.backend.view if view else self.backend.prepare
                now = time.time()
                new = (key, bkey, parent or None, now, now, dump_map(kept))
                found: Row | None = None
                mounts: tuple[Mount, ...] = ()
                try:
                    mounts = await make(bkey, bparent, inherited(kept))
                except AlreadyExists as error:
                    if not target:
                        raise Unknown(f"unexpected error from snapshotter {self.name}: {error.message}") from error
                    found = await self._target_row(target, parent, bparent, kept)
                try:
                    await self._record(
                        namespace, found or new, bparent, lease, view=view or found is not None, durable=durable
                    )
                except BaseException:
                    if found is None:
                        await self._undo(bkey)
                    raise
            finally:
                self.pending.discard(bkey)
        if found is not None:
            raise AlreadyExists(f'target snapshot "{target}": already exists', kind="snapshot", key=target)
        return mounts

    async def _undo(self, bkey: str) -> None:
        try:
            await self.backend.remove(bkey)
        except Error as error:
            log.warning("snapshotter %s: %s could not be undone, gc will: %s", self.name, bkey, error)

    async def _reserve(
        self, namespace: str, key: str, parent: str, target: str, lease: str | None
    ) -> tuple[str, str]:
        """The new key in the snapshotter and the parent's; what exists joins the lease and is AlreadyExists."""

        def work(tx: Transaction) -> tuple[str, str, str]:
            ensure_namespace(tx, namespace)
            for name in (target, key):
                if name and _select(tx, namespace, self.name, name) is not None:
                    hold_resource(tx, namespace, lease, f"snapshots/{self.name}", name)
                    return "", "", name
            bparent = ""
            if parent:
                row = _select(tx, namespace, self.name, parent)
                if row is None:
                    raise NotFound(f"parent snapshot {parent} does not exist: not found", kind="snapshot", key=parent)
                bparent = row[1]
            return f"{namespace}/{tx.sequence()}/{key}", bparent, ""

        bkey, bparent, existing = await self._engine.write(work, durable=False)
        if existing:
            word = "target snapshot" if existing == target else "snapshot"
            raise AlreadyExists(f'{word} "{existing}": already exists', kind="snapshot", key=existing)
        return bkey, bparent

    async def _target_row(self, target: str, parent: str, bparent: str, labels: Mapping[str, str]) -> Row:
        """The row for a layer that the snapshotter had already (the remote snapshotter protocol)."""
        for info in await self.backend.walk([f'labels."{LABEL_SNAPSHOT_REF}"=="{target}"']):
            if (
                info.kind == SnapshotKind.COMMITTED
                and info.labels.get(LABEL_SNAPSHOT_REF) == target
                and info.parent == bparent
            ):
                merged = {**info.labels, **labels}
                return (target, info.name, parent or None, info.created_at, info.updated_at, dump_map(merged))
        raise NotFound(f'target snapshot "{target}" in backend: not found', kind="snapshot", key=target)

    async def _record(
        self, namespace: str, row: Row, bparent: str, lease: str | None, *, view: bool, durable: bool
    ) -> None:
        key, _, parent = row[:3]

        def work(tx: Transaction) -> None:
            hold_resource(tx, namespace, lease, f"snapshots/{self.name}", key)
            if parent:
                above = _select(tx, namespace, self.name, parent)
                if above is None:
                    raise NotFound(f"parent snapshot {parent} does not exist: not found", kind="snapshot", key=parent)
                if above[1] != bparent:
                    raise InvalidArgument(f"mismatched parent {parent} of {key}", kind="snapshot", key=key)
            _insert(tx, namespace, self.name, row)
            if not view:
                tx.event(
                    namespace, "/snapshot/prepare",
                    events_pb2.SnapshotPrepare(key=key, parent=parent or "", snapshotter=self.name),
                )

        await self._engine.write(work, durable=durable)

    async def commit(
        self, namespace: str, name: str, key: str, labels: Mapping[str, str] | None = None, *,
        parent: str | None = None, lease: str | None = None, durable: bool = True,
    ) -> None:
        """See `Snapshotter.commit`; a name that exists joins the lease.

        With `durable=False` the record waits for the next durable mutation.
        """
        if not name:
            raise InvalidArgument("snapshot name must not be empty", kind="snapshot")
        kept = checked_labels(labels, "info.labels")
        work = self._commit(namespace, name, key, kept, parent or "", lease, durable)
        await shielded(self._owner, work, f"commit {key}")

    async def _commit(
        self, namespace: str, name: str, key: str, labels: dict[str, str], parent: str, lease: str | None,
        durable: bool,
    ) -> None:
        async with self._locks.hold((namespace, key)), self._locks.hold((namespace, name, "commit")):
            intent = await self._intend(namespace, name, key, labels, parent, lease)
            self.pending.add(intent["bname"])
            faults.point(INTENT)
            try:
                await self.backend.commit(
                    intent["bname"], intent["bkey"], inherited(labels), parent=intent["rebase"] or None
                )
                await self._finish_commit(namespace, key, intent, lease, durable)
            finally:
                self.pending.discard(intent["bname"])

    async def _intend(
        self, namespace: str, name: str, key: str, labels: dict[str, str], parent: str, lease: str | None
    ) -> dict[str, str]:
        """Check and write down what is about to be done; the result is what `_finish_commit` needs."""

        def work(tx: Transaction) -> dict[str, str] | None:
            if _select(tx, namespace, self.name, name) is not None:
                hold_resource(tx, namespace, lease, f"snapshots/{self.name}", name)
                return None
            row = _select(tx, namespace, self.name, key)
            if row is None:
                raise NotFound(f"snapshot {key} does not exist: not found", kind="snapshot", key=key)
            below = row[2] or parent
            intent = {
                "name": name, "bname": f"{namespace}/{tx.sequence()}/{name}", "bkey": row[1],
                "parent": below, "labels": dump_map(labels) or "", "rebase": "",
            }
            if below:
                above = _select(tx, namespace, self.name, below)
                if above is None:
                    raise NotFound(f"parent snapshot {below} does not exist: not found", kind="snapshot", key=below)
                if not row[2]:
                    intent["rebase"] = above[1]
            tx.execute(
                "UPDATE snapshots SET intent = ? WHERE namespace = ? AND snapshotter = ? AND key = ?",
                (json.dumps(intent), namespace, self.name, key),
            )
            return intent

        intent = await self._engine.write(work, durable=False)
        if intent is None:
            raise AlreadyExists(f'snapshot "{name}": already exists', kind="snapshot", key=name)
        return intent

    async def _finish_commit(
        self, namespace: str, key: str, intent: Mapping[str, str], lease: str | None, durable: bool = True
    ) -> None:
        now = time.time()

        def work(tx: Transaction) -> None:
            name = intent["name"]
            tx.execute(
                "DELETE FROM snapshots WHERE namespace = ? AND snapshotter = ? AND key = ?",
                (namespace, self.name, key),
            )
            row = (name, intent["bname"], intent["parent"] or None, now, now, intent["labels"] or None)
            _insert(tx, namespace, self.name, row)
            release_resource(tx, namespace, lease, f"snapshots/{self.name}", key)
            hold_resource(tx, namespace, lease, f"snapshots/{self.name}", name)
            tx.event(
                namespace, "/snapshot/commit", events_pb2.SnapshotCommit(key=key, name=name, snapshotter=self.name)
            )

        await self._engine.write(work, durable=durable)

    async def recover(self, *, adopt: bool = False) -> None:
        """Finish or forget the commits that a crash interrupted. Called once, before anything else.

        With `adopt`, rows may have been lost: they are made again from the snapshotter's keys, which
        say namespace and name.
        """
        if adopt:
            await self._adopt_rows()
        rows = self._engine.rows(
            "SELECT namespace, key, intent FROM snapshots WHERE snapshotter = ? AND intent IS NOT NULL", (self.name,)
        )
        for namespace, key, text in rows:
            intent = json.loads(text)
            try:
                await self.backend.stat(intent["bname"])
            except NotFound:
                await self._forget_intent(namespace, key)
            else:
                log.info("snapshotter %s: finishing the commit of %s as %s", self.name, key, intent["name"])
                leases = self._engine.rows(
                    "SELECT lease FROM lease_resources WHERE namespace = ? AND type = ? AND id = ?",
                    (namespace, f"snapshots/{self.name}", key),
                )
                for (lease,) in leases or [(None,)]:
                    await self._finish_commit(namespace, key, intent, lease)

    async def _adopt_rows(self) -> None:
        infos = await self.backend.walk()

        def work(tx: Transaction) -> int:
            known = {row[0] for row in tx.rows("SELECT backend FROM snapshots WHERE snapshotter = ?", (self.name,))}
            count = 0
            for info in infos:
                namespace, key = _split(info.name)
                if info.name in known or not namespace:
                    continue
                ensure_namespace(tx, namespace)
                parent = _split(info.parent)[1] or None
                row = (key, info.name, parent, info.created_at, info.updated_at, dump_map(info.labels))
                if _select(tx, namespace, self.name, key) is None:
                    _insert(tx, namespace, self.name, row)
                    count += 1
            return count

        count = await self._engine.write(work)
        if count:
            log.warning("snapshotter %s: %d rows were made again from its keys", self.name, count)

    async def _forget_intent(self, namespace: str, key: str) -> None:
        def work(tx: Transaction) -> None:
            tx.execute(
                "UPDATE snapshots SET intent = NULL WHERE namespace = ? AND snapshotter = ? AND key = ?",
                (namespace, self.name, key),
            )

        await self._engine.write(work)

    async def remove(self, namespace: str, key: str, *, lease: str | None = None) -> None:
        """NotFound; FailedPrecondition while it has children. The disk is given back by the collector."""

        def work(tx: Transaction) -> None:
            if _select(tx, namespace, self.name, key) is None:
                raise NotFound(f"snapshot {key} does not exist: not found", kind="snapshot", key=key)
            child = tx.row(
                "SELECT key FROM snapshots WHERE namespace = ? AND snapshotter = ? AND parent = ? LIMIT 1",
                (namespace, self.name, key),
            )
            if child is not None:
                raise FailedPrecondition(f"cannot remove snapshot {key} with child", kind="snapshot", key=key)
            tx.execute(
                "DELETE FROM snapshots WHERE namespace = ? AND snapshotter = ? AND key = ?",
                (namespace, self.name, key),
            )
            release_resource(tx, namespace, lease, f"snapshots/{self.name}", key)
            tx.dirty = True
            tx.event(namespace, "/snapshot/remove", events_pb2.SnapshotRemove(key=key, snapshotter=self.name))

        async with self._locks.hold((namespace, key)):
            await self._engine.write(work)

    async def adopt(self, namespace: str, name: str, parent: str = "", *, lease: str | None = None) -> bool:
        """Share the committed snapshot `name` (a chain ID) of another namespace instead of unpacking it again.

        Whether the namespace has it now. `parent` must be there already, and be the same on disk.
        """
        found = self._engine.rows(f"SELECT s.backend {_OF_ANY_NAMESPACE}", (self.name, name))
        committed = {backend for (backend,) in found if await self._is_committed(backend)}
        if not committed:
            return False

        def work(tx: Transaction) -> bool:
            if _select(tx, namespace, self.name, name) is not None:
                hold_resource(tx, namespace, lease, f"snapshots/{self.name}", name)
                return True
            above = _select(tx, namespace, self.name, parent) if parent else None
            if parent and above is None:
                return False
            for candidate in tx.rows(
                f"SELECT s.namespace, s.backend, s.parent, s.labels {_OF_ANY_NAMESPACE} AND s.intent IS NULL",
                (self.name, name),
            ):
                there = _select(tx, candidate[0], self.name, candidate[2]) if candidate[2] else None
                if candidate[1] not in committed or (there[1] if there else "") != (above[1] if above else ""):
                    continue
                ensure_namespace(tx, namespace)
                hold_resource(tx, namespace, lease, f"snapshots/{self.name}", name)
                now = time.time()
                _insert(tx, namespace, self.name, (name, candidate[1], parent or None, now, now, candidate[3]))
                return True
            return False

        return await self._engine.write(work)

    async def _is_committed(self, backend: str) -> bool:
        try:
            return (await self.backend.stat(backend)).kind == SnapshotKind.COMMITTED
        except NotFound:
            return False


def _split(backend: str) -> tuple[str, str]:
    """Namespace and key of a key in the snapshotter; empty when it is not one of ours."""
    namespace, _, rest = backend.partition("/")
    number, slash, key = rest.partition("/")
    return (namespace, key) if slash and number.isdigit() else ("", "")


def _select(tx: Transaction, namespace: str, snapshotter: str, key: str) -> Row | None:
    return tx.row(
        f"SELECT {_COLUMNS} FROM snapshots WHERE namespace = ? AND snapshotter = ? AND key = ?",
        (namespace, snapshotter, key),
    )


def _insert(tx: Transaction, namespace: str, snapshotter: str, row: Row) -> None:
    changed = tx.execute(
        "INSERT OR IGNORE INTO snapshots VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL)", (namespace, snapshotter, *row)
    )
    if not changed:
        raise AlreadyExists(f'snapshot "{row[0]}": already exists', kind="snapshot", key=row[0])
