"""Content: blobs by digest on the local disk, and the resumable ingests that become blobs.

Owns `ROOT/blobs/ALGORITHM/HEX` (committed, read-only, never changed) and `ROOT/ingest/HASH/`
(being written). Knows neither namespaces nor labels: `metadata` puts those on top. Everything here
blocks and is safe to call from several threads; callers put it on the `io` executor.
"""

from __future__ import annotations

from supervisord_ctr.content.local import BlobFile, Damaged, LocalContent
from supervisord_ctr.content.writer import IngestWriter

__all__ = ["BlobFile", "Damaged", "IngestWriter", "LocalContent"]
