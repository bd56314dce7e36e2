"""What is wrong with the stores, in words (`pctr doctor`, P5): reads only, repairs nothing.

Owns the examination of database, content store and snapshotters. Every finding says what it is, why
it is one, and how it goes away: by `gc`, by pulling again, or by hand.
"""

from __future__ import annotations

import contextlib
import time
from typing import Protocol, runtime_checkable

from supervisord_ctr.errors import Error
from supervisord_ctr.metadata.database import Database
from supervisord_ctr.model import Finding

_WORDS = {
    "blob": "a blob that no namespace knows",
    "ingest-data": "an ingest that no namespace knows",
    "snapshot-data": "a snapshot that no namespace knows",
}


@runtime_checkable
class _Local(Protocol):
    """What local snapshotters tell beyond the interface."""

    def missing(self) -> list[str]: ...

    def strays(self) -> list[tuple[str, int]]: ...


async def examine(database: Database, *, verify: bool = False) -> list[Finding]:
    """Everything that is found; with `verify` every blob is read and its digest compared, which takes its time."""
    found: list[Finding] = []
    engine, local = database.engine, database.content.local
    run_io = database.executors.run_io
    if engine.repair is not None:
        found.append(Finding("database", str(engine.path), str(engine.repair), "hand"))
    if (until := database.gc.held_until()) > 0:
        left = f"garbage is kept for {until - time.time():.0f} s more, after the repair of a database"
        found.append(Finding("gc", "hold", left, "release"))
    for name, reason in database.unavailable.items():
        found.append(Finding("snapshotter", name, reason, "hand"))
    found += await _unexplained(database)
    for damaged in await run_io(local.damaged):
        found.append(Finding("blob", str(damaged.path), damaged.reason, "hand"))
    on_disk = {info.digest: info.size for info in await run_io(lambda: list(local.walk()))}
    for namespace, digest, size in engine.rows("SELECT namespace, digest, size FROM blobs"):
        if digest not in on_disk:
            found.append(Finding("content", f"{namespace}/{digest}", "its bytes are not on disk", "pull"))
        elif on_disk[digest] != size:
            problem = f"{on_disk[digest]} bytes instead of {size}"
            found.append(Finding("content", f"{namespace}/{digest}", problem, "pull"))
    if verify:
        for digest in on_disk:
            try:
                await run_io(local.verify, digest)
            except Error as error:
                found.append(Finding("content", digest, error.message, "pull"))
    for name, snapshotter in database.snapshotters.items():
        known = {info.name for info in await snapshotter.backend.walk()}
        for namespace, key, backend in engine.rows(
            "SELECT namespace, key, backend FROM snapshots WHERE snapshotter = ?", (name,)
        ):
            if backend not in known:
                problem = "the snapshotter does not know it"
                found.append(Finding("snapshot", f"{namespace}/{name}/{key}", problem, "hand"))
        if isinstance(snapshotter.backend, _Local):
            for key in snapshotter.backend.missing():
                found.append(Finding("snapshot-data", f"{name}/{key}", "its directory is gone", "hand"))
            for path, size in await run_io(snapshotter.backend.strays):
                found.append(Finding("snapshot-directory", path, "a directory that no snapshot has", "gc", size))
    return found


async def _unexplained(database: Database) -> list[Finding]:
    """What is on disk and no namespace knows; garbage that merely waits for its collection is not among it."""
    local, run_io = database.content.local, database.executors.run_io
    found = []
    sizes = {info.digest: info.size for info in await run_io(lambda: list(local.walk()))}
    sizes.update({status.ref: status.offset for status in await run_io(local.statuses)})
    for _, kind, key in await database.gc.unexplained():
        size = sizes.get(key, 0)
        if kind == "snapshot-data":
            name, _, inner = key.partition("/")
            with contextlib.suppress(Error):
                size = (await database.snapshotters[name].backend.usage(inner)).size
        found.append(Finding(kind, key, _WORDS[kind], "gc", size))
    for path in await run_io(local.unreadable_ingests):
        found.append(Finding("ingest-data", str(path), "an ingest without a readable state", "gc"))
    return found
