"""Metadata: what the daemon knows, by namespace, in one SQLite database.

Owns the schema (drawn in `schema`), its migrations, the namespaced stores, leases and garbage
collection. Blobs stay in `content` and layers in the snapshotters: this room decides who may see
them and when nobody needs them any more.
"""

from __future__ import annotations

from supervisord_ctr.metadata.collector import Collector, GcOptions, GcReport
from supervisord_ctr.metadata.containers import Containers
from supervisord_ctr.metadata.content import BlobReader, Content, ContentWriter
from supervisord_ctr.metadata.database import Database, Publish
from supervisord_ctr.metadata.engine import Engine
from supervisord_ctr.metadata.images import Images
from supervisord_ctr.metadata.leases import Leases
from supervisord_ctr.metadata.namespaces import Namespaces
from supervisord_ctr.metadata.records import SnapshotRecords
from supervisord_ctr.metadata.sandboxes import Sandboxes
from supervisord_ctr.metadata.snapshots import NamespacedSnapshotter
from supervisord_ctr.metadata.tables import Activations, Addresses, CriRecords

__all__ = [
    "Activations", "Addresses", "BlobReader", "Collector", "Containers", "Content", "ContentWriter", "CriRecords",
    "Database", "Engine", "GcOptions", "GcReport", "Images", "Leases", "NamespacedSnapshotter", "Namespaces", "Publish",
    "Sandboxes", "SnapshotRecords",
]
