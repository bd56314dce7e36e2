"""The local content store (see the package for what it owns)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from supervisord_ctr.content.writer import IngestWriter
from supervisord_ctr.model import ContentInfo, IngestStatus


@dataclass(frozen=True, slots=True)
class Damaged:
    """A file below `blobs/` that cannot be a blob; `reason` says why."""

    path: Path
    reason: str


class BlobFile:
    """An open blob; positional reads are safe from several threads. Close it, or use it as a context manager."""

    size: int

    def fileno(self) -> int:
        """The descriptor, for `sendfile` and the like; owned by this object."""
        raise NotImplementedError

    def read_at(self, count: int, offset: int) -> bytes:
        """At most `count` bytes from `offset`; empty at the end."""
        raise NotImplementedError

    def close(self) -> None:
        """Give the descriptor back; twice is fine."""
        raise NotImplementedError

    def __enter__(self) -> BlobFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalContent:
    """Blobs and ingests below `root`. With `sync=False` nothing is fsynced (tests, scratch stores)."""

    def __init__(self, root: Path, *, sync: bool = True) -> None:
        self.root = root
        self.sync = sync

    def path(self, digest: str) -> Path:
        """Where the blob lies or would lie; InvalidArgument for a bad digest."""
        raise NotImplementedError

    def info(self, digest: str) -> ContentInfo:
        """Size and times of a committed blob; NotFound."""
        raise NotImplementedError

    def walk(self) -> Iterator[ContentInfo]:
        """Every committed blob; entries that cannot be blobs are left out (see `damaged`)."""
        raise NotImplementedError

    def damaged(self) -> list[Damaged]:
        """Entries below `blobs/` that `walk` leaves out, with the reason."""
        raise NotImplementedError

    def delete(self, digest: str) -> None:
        """Remove a blob; NotFound."""
        raise NotImplementedError

    def open(self, digest: str) -> BlobFile:
        """Open a blob for reading; NotFound. It stays readable after a `delete`."""
        raise NotImplementedError

    def writer(self, ref: str, *, total: int = 0, expected: str = "") -> IngestWriter:
        """Start or resume the ingest `ref`.

        Unavailable while another writer of this process holds `ref`; AlreadyExists when `expected` is
        committed already; InvalidArgument for an empty ref or a total that differs from the ingest's.
        """
        raise NotImplementedError

    def status(self, ref: str) -> IngestStatus:
        """How far an ingest is; NotFound."""
        raise NotImplementedError

    def statuses(self) -> list[IngestStatus]:
        """Every ingest on disk, held or not."""
        raise NotImplementedError

    def abort(self, ref: str) -> None:
        """Drop an ingest and its bytes; NotFound."""
        raise NotImplementedError
