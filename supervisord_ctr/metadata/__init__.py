"""Metadata: what the daemon knows, by namespace, in one SQLite database.

Owns the schema (drawn in `schema`), its migrations, the namespaced stores, leases and garbage
collection. Blobs stay in `content` and layers in the snapshotters: this room decides who may see
them and when nobody needs them any more.
"""

from __future__ import annotations

from supervisord_ctr.metadata.database import Database, Publish
from supervisord_ctr.metadata.engine import Engine

__all__ = ["Database", "Engine", "Publish"]
