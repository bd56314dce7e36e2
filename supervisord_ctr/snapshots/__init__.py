"""Snapshots: layers of filesystem states, and how to mount them.

Owns the `Snapshotter` interface (its docstring is the specification) and the implementations
`overlay`, `native` and `proxy`. Knows no namespaces (see `metadata`), mounts nothing itself.
"""

from __future__ import annotations

from supervisord_ctr.snapshots.interface import (
    CAPABILITY_REBASE,
    INHERITED_LABELS,
    Records,
    SnapshotRecord,
    Snapshotter,
)

__all__ = ["CAPABILITY_REBASE", "INHERITED_LABELS", "Records", "SnapshotRecord", "Snapshotter"]
