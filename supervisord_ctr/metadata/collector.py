"""Garbage collection, the working part: reads the graph, removes rows, then what no row names.

A pass has two halves. The first removes rows that no root reaches, in one transaction: when the
database changed since the graph was read, it is read again inside the transaction, so that nothing
that was just referred to can go. The second compares the disk with the rows (listed first, rows read
second, so that what begins meanwhile is safe) and removes what has no row. A failure in one part is
reported and does not end the pass (P16).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from supervisord_ctr import faults
from supervisord_ctr.aio import Executors, TaskOwner
from supervisord_ctr.api.events import events_pb2
from supervisord_ctr.api.services.images.v1 import images_pb2
from supervisord_ctr.errors import Error, FailedPrecondition, NotFound
from supervisord_ctr.metadata import gc
from supervisord_ctr.metadata.codec import load_map
from supervisord_ctr.metadata.content import Content
from supervisord_ctr.metadata.engine import Engine, Row, Transaction, Value
from supervisord_ctr.metadata.gc import CONTAINER, CONTENT, IMAGE, INGEST, LEASE, MOUNT, SNAPSHOT, Graph, Node
from supervisord_ctr.metadata.snapshots import NamespacedSnapshotter
from supervisord_ctr.model import SnapshotInfo

log = logging.getLogger(__name__)

ROWS = faults.declare("gc.rows", "rows of garbage are removed and durable, the disk still holds what they named")
BLOBS = faults.declare("gc.blobs", "blobs without rows were discarded, snapshots not yet")
SNAPSHOTS = faults.declare("gc.snapshots", "one snapshot without row was removed, others may follow")


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a pass removed, or would remove (`dry_run`).

    `removed` are (namespace, kind, key); kinds are those of `gc`, and "blob", "ingest-data",
    "snapshot-data" and "mount-data" for what was there without a row (their namespace is empty).
    """

    removed: tuple[tuple[str, str, str], ...] = ()
    errors: tuple[str, ...] = ()
    seconds: float = 0.0
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class GcOptions:
    """When passes run by themselves; the names are those of containerd's scheduler.

    `pause_threshold` is the share of time that passes may take, `deletion_threshold` how many
    deletions make one due (0: any), `mutation_threshold` how many changes do (0: none), `period` the
    longest time between two.
    """

    schedule_delay: float = 0.2
    startup_delay: float = 1.0
    pause_threshold: float = 0.02
    deletion_threshold: int = 0
    mutation_threshold: int = 100
    period: float = 600.0


class _Source(Protocol):
    def rows(self, statement: str, values: Sequence[Value] = ()) -> list[Row]: ...


def read_graph(source: _Source, now: float) -> Graph:
    """The graph of one moment."""
    graph = Graph(now)
    _read_mounts(source, graph, _read_leases(source, graph))
    _read_images(source, graph)
    _read_content(source, graph)
    for namespace, key, snapshotter, snapshot_key, labels in source.rows(
        "SELECT namespace, id, snapshotter, snapshot_key, labels FROM containers"
    ):
        node = Node(CONTAINER, namespace, key)
        graph.roots.add(node)
        if snapshotter:
            graph.link(node, Node(SNAPSHOT, namespace, f"{snapshotter}/{snapshot_key}"))
        if gc.matters(labels):
            graph.refer(node, load_map(labels))
    for namespace, snapshotter, key, parent, labels in source.rows(
        "SELECT namespace, snapshotter, key, parent, labels FROM snapshots"
    ):
        node = Node(SNAPSHOT, namespace, f"{snapshotter}/{key}")
        graph.all.append(node)
        if parent:
            graph.link(node, Node(SNAPSHOT, namespace, f"{snapshotter}/{parent}"))
        if gc.matters(labels):
            found = load_map(labels)
            graph.refer(node, found)
            if gc.is_root(found):
                graph.roots.add(node)
    for namespace, labels in source.rows("SELECT namespace, labels FROM sandboxes WHERE labels IS NOT NULL"):
        graph.roots.update(gc.references(namespace, load_map(labels)))
    graph.close()
    return graph


def _read_leases(source: _Source, graph: Graph) -> set[tuple[str, str]]:
    """Those that protect something, by namespace and id."""
    flat: dict[tuple[str, str], bool] = {}
    for namespace, key, labels in source.rows("SELECT namespace, id, labels FROM leases"):
        found = load_map(labels) if gc.matters(labels) else {}
        node = Node(LEASE, namespace, key)
        graph.all.append(node)
        if not graph.expires(gc.expiry(found)):
            graph.roots.add(node)
            flat[namespace, key] = gc.is_flat(found)
    for namespace, lease, kind, key in source.rows("SELECT namespace, lease, type, id FROM lease_resources"):
        if (namespace, lease) not in flat:
            continue
        is_flat = flat[namespace, lease]
        if kind == "content":
            graph.roots.add(Node(CONTENT, namespace, key, is_flat))
        elif kind == "images":
            graph.roots.add(Node(IMAGE, namespace, key, is_flat))
        elif kind == "ingests":
            graph.roots.add(Node(INGEST, namespace, key))
        elif kind.startswith("snapshots/"):
            graph.roots.add(Node(SNAPSHOT, namespace, f"{kind.removeprefix('snapshots/')}/{key}", is_flat))
    return set(flat)


def _read_mounts(source: _Source, graph: Graph, leases: set[tuple[str, str]]) -> None:
    for namespace, key, text in source.rows("SELECT namespace, name, value FROM activations"):
        node = Node(MOUNT, namespace, key)
        graph.all.append(node)
        value = json.loads(text)
        if (namespace, value["lease"]) in leases:
            graph.roots.add(node)
        graph.refer(node, value["labels"])


def _read_images(source: _Source, graph: Graph) -> None:
    for namespace, name, digest, labels in source.rows("SELECT namespace, name, digest, labels FROM images"):
        node = Node(IMAGE, namespace, name)
        graph.all.append(node)
        graph.link(node, Node(CONTENT, namespace, digest))
        found = load_map(labels) if gc.matters(labels) else {}
        expired = graph.expires(gc.expiry(found))
        if not expired:
            graph.roots.add(node)
        if found:
            graph.refer(node, found, back=expired)


def _read_content(source: _Source, graph: Graph) -> None:
    for namespace, ref, expires, expected in source.rows("SELECT namespace, ref, expires, expected FROM ingests"):
        node = Node(INGEST, namespace, ref)
        graph.all.append(node)
        if expires is not None and not graph.expires(expires):
            graph.roots.add(node)
        if expected:
            graph.link(node, Node(CONTENT, namespace, expected))
    for namespace, digest, labels in source.rows("SELECT namespace, digest, labels FROM blobs"):
        node = Node(CONTENT, namespace, digest)
        graph.all.append(node)
        if gc.matters(labels):
            found = load_map(labels)
            graph.refer(node, found)
            if gc.is_root(found):
                graph.roots.add(node)


class Collector:
    """Runs passes: on demand, soon after deletions, when something expires, and now and then."""

    def __init__(
        self,
        engine: Engine,
        content: Content,
        snapshotters: Mapping[str, NamespacedSnapshotter],
        executors: Executors,
        options: GcOptions | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._content = content
        self._snapshotters = snapshotters
        self._executors = executors
        self._options = options or GcOptions()
        self._clock = clock
        self._lock = asyncio.Lock()
        self._owner = TaskOwner("gc")
        self._wake = asyncio.Event()
        self._due: float | None = None
        self._mutations = 0
        self._deletions = 0
        self._waiting: asyncio.Task[GcReport] | None = None
        self._next_expiry: float | None = None
        self.last: GcReport | None = None
        #: Further parts of a pass, by other rooms: each returns what it removed and raises `errors.Error`.
        self.parts: list[Callable[[], Awaitable[list[tuple[str, str, str]]]]] = []

    # Scheduling.

    def start(self, first: float | None = None) -> None:
        """Begin to collect by itself; the first pass comes after `first` seconds."""
        self._due = self._now() + (self._options.startup_delay if first is None else first)
        self._owner.start(self._run(), "timer")

    async def close(self) -> None:
        """Stop; a pass that runs is given its end."""
        await self._owner.close()
        async with self._lock:
            pass

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    def schedule(self) -> None:
        """Something was deleted: collect soon, but spend no more than the allowed share of time on it."""
        spent = self.last.seconds if self.last is not None else 0.0
        pause = min(0.5, self._options.pause_threshold)
        self._due_in(max(self._options.schedule_delay, spent / pause if pause > 0 else 0.0))

    def mutated(self, dirty: bool) -> None:
        """Called after every mutation; `dirty` ones may have left garbage."""
        self._mutations += 1
        self._deletions += dirty
        options = self._options
        if (dirty and self._deletions > options.deletion_threshold) or (
            0 < options.mutation_threshold <= self._mutations
        ):
            self._mutations = self._deletions = 0
            self.schedule()

    def _due_in(self, seconds: float) -> None:
        due = self._now() + seconds
        if self._due is None or due < self._due:
            self._due = due
            self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            wait = self._options.period if self._due is None else self._due - self._now()
            if self._next_expiry is not None:
                wait = min(wait, self._next_expiry - self._clock() + 0.05)
            if wait > 0:
                try:
                    async with asyncio.timeout(min(wait, 86400.0)):
                        await self._wake.wait()
                        continue
                except TimeoutError:
                    pass
            self._due = None
            try:
                await self.collect()
            except Error as error:
                log.warning("gc: the pass failed: %s", error)
                self._due_in(60.0)

    async def hold(self, seconds: float) -> None:
        """Collect nothing for so long, also after a restart: what lost its row in a damaged database stays."""
        until = self._clock() + seconds

        def work(tx: Transaction) -> None:
            tx.execute("INSERT OR REPLACE INTO facts VALUES ('gc-held-until', ?)", (str(until),))

        await self._engine.write(work)

    async def release(self) -> None:
        """End a `hold`."""

        def work(tx: Transaction) -> None:
            tx.execute("DELETE FROM facts WHERE key = 'gc-held-until'")

        await self._engine.write(work)

    def held_until(self) -> float:
        """When a `hold` ends; 0 when there is none."""
        row = self._engine.row("SELECT value FROM facts WHERE key = 'gc-held-until'")
        until = float(row[0]) if row else 0.0
        return until if until > self._clock() else 0.0

    async def collect(self, *, dry_run: bool = False) -> GcReport:
        """Run a pass that begins after this call; callers that wait at the same time share it.

        While the collector is held, nothing is removed and the report says so among its errors.
        """
        if dry_run:
            async with self._lock:
                return await self._pass(dry_run=True)
        if (until := self.held_until()) > 0:
            when = f"{datetime.fromtimestamp(until, UTC):%FT%TZ}"
            return GcReport(errors=(f"held until {when}: the database was repaired and rows were lost",))
        if self._waiting is None:
            self._waiting = self._owner.start(self._next_pass(), "pass")
        return await asyncio.shield(self._waiting)

    async def _next_pass(self) -> GcReport:
        async with self._lock:
            self._waiting = None
            report = await self._pass(dry_run=False)
            self.last = report
            if report.removed or report.errors:
                log.info(
                    "gc: %d objects removed, %d errors, %.3f s", len(report.removed), len(report.errors), report.seconds
                )
            return report

    # One pass.

    async def _pass(self, *, dry_run: bool) -> GcReport:
        begin = time.monotonic()
        changes = self._engine.changes
        graph = await self._executors.run_io(self._read)
        if graph.next_expiry != self._next_expiry:
            self._next_expiry = graph.next_expiry
            self._wake.set()
        doomed = await self._executors.run_io(graph.garbage)
        removed = [(node.namespace, node.kind, node.key) for node in doomed]
        errors: list[str] = []
        if dry_run:
            removed.extend(await self._unexplained(doomed))
        else:
            if doomed:
                gone = await self._engine.write(lambda tx: self._remove_rows(tx, doomed, changes))
                removed = [(node.namespace, node.kind, node.key) for node in gone]
                faults.point(ROWS)
            for part in (lambda: self._clean_content(errors), lambda: self._clean_snapshots(errors), *self.parts):
                try:
                    removed.extend(await part())
                except (Error, OSError) as error:
                    errors.append(str(error))
                    log.warning("gc: %s", error)
        return GcReport(tuple(removed), tuple(errors), time.monotonic() - begin, dry_run)

    async def unexplained(self) -> list[tuple[str, str, str]]:
        """What is on disk and has no row: ("", kind, id) with the kinds blob, ingest-data and snapshot-data."""
        async with self._lock:
            return await self._unexplained([])

    async def _unexplained(self, doomed: list[Node]) -> list[tuple[str, str, str]]:
        """What is on disk and would have no row after `doomed` are gone."""
        run_io = self._executors.run_io
        going = set(doomed)

        def stay(kind: str, namespace: str, key: str) -> bool:
            return Node(kind, namespace, key) not in going

        digests = {
            digest for namespace, digest in self._engine.rows("SELECT namespace, digest FROM blobs")
            if stay(CONTENT, namespace, digest)
        }
        refs = set()
        for namespace, ref, backend, expected in self._engine.rows(
            "SELECT namespace, ref, backend, expected FROM ingests"
        ):
            if stay(INGEST, namespace, ref):
                refs.add(backend)
                digests.add(expected)
        local = self._content.local
        blobs = [info.digest for info in await run_io(lambda: list(local.walk())) if info.digest not in digests]
        found = [("", "blob", digest) for digest in blobs]
        for status in await run_io(local.statuses):
            if status.ref not in refs and not local.held(status.ref):
                found.append(("", "ingest-data", status.ref))
        for name, snapshotter in self._snapshotters.items():
            keep = {
                backend for namespace, key, backend in self._engine.rows(
                    "SELECT namespace, key, backend FROM snapshots WHERE snapshotter = ?", (name,)
                ) if stay(SNAPSHOT, namespace, f"{name}/{key}")
            } | snapshotter.pending
            infos = await snapshotter.backend.walk()
            found.extend(("", "snapshot-data", f"{name}/{info.name}") for info in infos if info.name not in keep)
        return found

    def _read(self) -> Graph:
        with self._engine.snapshot() as source:
            return read_graph(source, self._clock())

    def _remove_rows(self, tx: Transaction, doomed: list[Node], changes: int) -> list[Node]:
        if tx.total_changes() != changes:
            still = set(read_graph(tx, self._clock()).garbage())
            doomed = [node for node in doomed if node in still]
        for node in doomed:
            space, key = node.namespace, node.key
            if node.kind == LEASE:
                tx.execute("DELETE FROM leases WHERE namespace = ? AND id = ?", (space, key))
                tx.execute("DELETE FROM lease_resources WHERE namespace = ? AND lease = ?", (space, key))
            elif node.kind == CONTENT:
                tx.execute("DELETE FROM blobs WHERE namespace = ? AND digest = ?", (space, key))
            elif node.kind == INGEST:
                tx.execute("DELETE FROM ingests WHERE namespace = ? AND ref = ?", (space, key))
            elif node.kind == IMAGE:
                tx.execute("DELETE FROM images WHERE namespace = ? AND name = ?", (space, key))
                tx.event(space, "/images/delete", images_pb2.ImageDelete(name=key))
            elif node.kind == MOUNT:
                tx.execute("DELETE FROM activations WHERE namespace = ? AND name = ?", (space, key))
            elif node.kind == SNAPSHOT:
                snapshotter, _, name = key.partition("/")
                tx.execute(
                    "DELETE FROM snapshots WHERE namespace = ? AND snapshotter = ? AND key = ?",
                    (space, snapshotter, name),
                )
                tx.event(
                    space, "/snapshot/remove", events_pb2.SnapshotRemove(key=name, snapshotter=snapshotter)
                )
        return doomed

    async def _clean_content(self, errors: list[str]) -> list[tuple[str, str, str]]:
        run_io = self._executors.run_io
        local = self._content.local
        removed = []
        for digest in await run_io(self._strays):
            # Whoever finds this blob meanwhile holds its lock until the row is there.
            async with self._content.digests.hold(digest):
                if self._refers(digest):
                    continue
                try:
                    await run_io(local.discard, digest)
                    removed.append(("", "blob", digest))
                except NotFound:
                    continue
                except Error as error:
                    errors.append(error.message)
        faults.point(BLOBS)
        await run_io(local.empty_trash)
        self._content.drop_files()
        for ref in await run_io(local.sweep_ingests, self._ingest_refs):
            removed.append(("", "ingest-data", ref))
        self._content.swept = True
        return removed

    def _strays(self) -> list[str]:
        """Blobs on disk that had no row a moment ago. Blocks."""
        on_disk = [info.digest for info in self._content.local.walk()]
        known = {row[0] for row in self._engine.rows(
            "SELECT digest FROM blobs UNION SELECT expected FROM ingests WHERE expected IS NOT NULL"
        )}
        return [digest for digest in on_disk if digest not in known]

    def _refers(self, digest: str) -> bool:
        return (
            self._engine.row("SELECT 1 FROM blobs WHERE digest = ? LIMIT 1", (digest,)) is not None
            or self._engine.row("SELECT 1 FROM ingests WHERE expected = ? LIMIT 1", (digest,)) is not None
        )

    def _ingest_refs(self) -> set[str]:
        return {row[0] for row in self._engine.rows("SELECT backend FROM ingests")}

    async def _clean_snapshots(self, errors: list[str]) -> list[tuple[str, str, str]]:
        removed: list[tuple[str, str, str]] = []
        for snapshotter in self._snapshotters.values():
            try:
                removed.extend(await self._clean_snapshotter(snapshotter, errors))
            except (Error, OSError) as error:
                errors.append(f"snapshotter {snapshotter.name}: {error}")
                log.warning("gc: snapshotter %s: %s", snapshotter.name, error)
        return removed

    async def _clean_snapshotter(
        self, snapshotter: NamespacedSnapshotter, errors: list[str]
    ) -> list[tuple[str, str, str]]:
        removed = []
        infos = {info.name: info for info in await snapshotter.backend.walk()}
        pending = set(snapshotter.pending)
        rows = self._engine.rows("SELECT backend FROM snapshots WHERE snapshotter = ?", (snapshotter.name,))
        keep = {row[0] for row in rows} | pending
        for name in _children_first(infos):
            if name in keep:
                continue
            try:
                await snapshotter.backend.remove(name)
            except NotFound:
                continue
            except FailedPrecondition as error:
                log.debug("gc: snapshotter %s: %s", snapshotter.name, error)
            except Error as error:
                errors.append(f"snapshotter {snapshotter.name}: {error.message}")
            else:
                removed.append(("", "snapshot-data", f"{snapshotter.name}/{name}"))
                faults.point(SNAPSHOTS)
        await snapshotter.backend.cleanup()
        return removed


def _children_first(infos: Mapping[str, SnapshotInfo]) -> list[str]:
    depth: dict[str, int] = {}

    def deep(name: str) -> int:
        chain = []
        while name in infos and name not in depth:
            chain.append(name)
            name = infos[name].parent
        base = depth.get(name, 0)
        for number, link in enumerate(reversed(chain), 1):
            depth[link] = base + number
        return base

    for name in infos:
        deep(name)
    return sorted(infos, key=lambda name: -depth[name])

