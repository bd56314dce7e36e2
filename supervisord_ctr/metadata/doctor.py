"""What is wrong with the stores, in words (`pctr doctor`, P5): reads only, repairs nothing.

Owns the examination of database, content store and snapshotters. Every finding says what it is, why
it is one, and how it goes away: by `gc`, by pulling again, or by hand.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from supervisord_ctr.errors import Error
from supervisord_ctr.metadata.database import Database

_WORDS = {
    "blob": "a blob that no namespace knows",
    "ingest-data": "an ingest that no namespace knows",
    "snapshot-data": "a snapshot that no namespace knows",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be. `remedy` is "gc", "pull", "release" or "hand"."""

    kind: str
    id: str
    problem: str
    remedy: str


@runtime_checkable
class _WithMissing(Protocol):
    def missing(self) -> list[str]: ...


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
    report = await database.gc.collect(dry_run=True)
    for _, kind, key in report.removed:
        if kind in _WORDS:
            found.append(Finding(kind, key, _WORDS[kind], "gc"))
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
        if isinstance(snapshotter.backend, _WithMissing):
            for key in snapshotter.backend.missing():
                found.append(Finding("snapshot-data", f"{name}/{key}", "its directory is gone", "hand"))
    return found
