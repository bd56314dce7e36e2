"""One ingest being written (see the package for what it owns)."""

from __future__ import annotations

from supervisord_ctr.model import IngestStatus


class IngestWriter:
    """Appends to an ingest and commits it as a blob. One thread at a time.

    A context manager: leaving it closes (the bytes stay for a later resume), it never aborts.
    """

    ref: str
    offset: int
    total: int

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append all of `data` and hash it; returns its length. ResourceExhausted when the disk is full."""
        raise NotImplementedError

    def truncate(self, size: int) -> None:
        """Go back to `size` bytes (at most `offset`); the hash is computed again from the start."""
        raise NotImplementedError

    def digest(self) -> str:
        """The digest of what was written so far."""
        raise NotImplementedError

    def commit(self, size: int = 0, expected: str = "") -> str:
        """Make the ingest a blob, durably, and return its digest; the writer is closed then.

        FailedPrecondition when `size` (not 0) or `expected` (not empty) differ from what was written;
        AlreadyExists when the blob exists: the ingest is gone then, and the blob is good to use.
        """
        raise NotImplementedError

    def status(self) -> IngestStatus:
        """How far it is."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of `ref` and the file; the ingest stays on disk. Twice is fine."""
        raise NotImplementedError

    def __enter__(self) -> IngestWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
