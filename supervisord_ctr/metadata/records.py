"""A local snapshotter's own records, kept in the same database so that one log orders all writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from supervisord_ctr.model import SnapshotKind
from supervisord_ctr.snapshots import SnapshotRecord

if TYPE_CHECKING:
    from supervisord_ctr.metadata.engine import Engine, Transaction


class SnapshotRecords:
    """`snapshots.Records` over the database, for one snapshotter."""

    def __init__(self, engine: Engine, snapshotter: str) -> None:
        self._engine = engine
        self._snapshotter = snapshotter

    async def load(self) -> list[SnapshotRecord]:
        """All records."""
        rows = self._engine.rows(
            "SELECT id, key, parent, kind, created, updated, labels, size, inodes FROM snapshot_records "
            "WHERE snapshotter = ?", (self._snapshotter,),
        )
        return [
            SnapshotRecord(
                number, key, parent, SnapshotKind(kind), created, updated, json.loads(labels or "{}"), size, inodes
            )
            for number, key, parent, kind, created, updated, labels, size, inodes in rows
        ]

    async def put(self, record: SnapshotRecord, *, durable: bool = True) -> None:
        """Insert or replace by id."""

        labels = json.dumps(dict(record.labels)) if record.labels else None

        def work(tx: Transaction) -> None:
            tx.execute(
                "INSERT OR REPLACE INTO snapshot_records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    self._snapshotter, record.id, record.key, record.parent, int(record.kind), record.created_at,
                    record.updated_at, labels, record.size, record.inodes,
                ),
            )

        await self._engine.write(work, durable=durable)

    async def delete(self, ids: Sequence[int], *, durable: bool = True) -> None:
        """Remove records; unknown ids are ignored."""

        def work(tx: Transaction) -> None:
            for number in ids:
                tx.execute("DELETE FROM snapshot_records WHERE snapshotter = ? AND id = ?", (self._snapshotter, number))

        await self._engine.write(work, durable=durable)
