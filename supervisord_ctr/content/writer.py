"""One ingest being written: bytes to disk and into the hash, then a rename that makes it a blob."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from supervisord_ctr import faults
from supervisord_ctr.errors import AlreadyExists, FailedPrecondition, NotFound, OutOfRange, from_os_error
from supervisord_ctr.linux import files
from supervisord_ctr.model import IngestStatus
from supervisord_ctr.names import check_digest

if TYPE_CHECKING:
    from supervisord_ctr.content.local import LocalContent

log = logging.getLogger(__name__)

#: Digest algorithms that blobs may have (OCI image specification, descriptor.md).
ALGORITHMS = ("sha256", "sha384", "sha512")
_CHUNK = 1 << 20

CREATED = faults.declare("content.ingest.created", "the folder of an ingest exists, its files do not yet")
SYNCED = faults.declare("content.commit.synced", "the data of an ingest are on disk, the blob has no name yet")
RENAMED = faults.declare("content.commit.renamed", "the blob has its name, the ingest's folder still exists")


class IngestWriter:
    """Appends to an ingest and commits it as a blob. Calls from several threads take turns.

    Made by `LocalContent.writer`. A context manager: leaving it closes (the bytes stay for a later
    resume), it never aborts. After an error of `write`, `offset` still says exactly what is on disk
    and in the hash, so that the caller may go on from there.
    """

    def __init__(self, store: LocalContent, ref: str, *, total: int, algorithm: str) -> None:
        self._store = store
        self._path = store.ingest_path(ref)
        self.ref = ref
        self.total = total
        self.offset = 0
        self._algorithm = algorithm if algorithm in ALGORITHMS else "sha256"
        self._hash = hashlib.new(self._algorithm)
        self._fd = -1
        self._digest = ""
        self._synced = -1
        # A caller that was cancelled closes while a thread still writes for it: without turns that thread
        # would write into whatever file gets the number of the descriptor next.
        self._turn = threading.RLock()
        if not self._resume():
            self._begin()

    def _resume(self) -> bool:
        status = read_ingest_status(self._path)
        if status is None or status.ref != self.ref or (self.total and status.total and self.total != status.total):
            return False
        self.total = status.total or self.total
        self._started = status.started_at
        self._updated = status.updated_at
        self._fd = os.open(self._path / "data", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            while piece := os.read(self._fd, _CHUNK):
                self._hash.update(piece)
                self.offset += len(piece)
        except OSError:
            os.close(self._fd)
            raise
        return True

    def _begin(self) -> None:
        self._started = self._updated = time.time()
        path = os.fspath(self._path)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            shutil.rmtree(path)
            os.mkdir(path, 0o700)
        faults.point(CREATED)
        now = _rfc3339(self._started).encode()
        for name, text in (("ref", self.ref.encode()), ("startedat", now), ("updatedat", now)):
            files.write_file(f"{path}/{name}", text)
        if self.total:
            files.write_file(f"{path}/total", str(self.total).encode())
        self._fd = os.open(f"{path}/data", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def _open_fd(self) -> int:
        if self._fd < 0:
            raise FailedPrecondition(f"ingest {self.ref}: the writer is closed", kind="ingest", key=self.ref)
        return self._fd

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append all of `data` and hash it; returns its length. ResourceExhausted when the disk is full."""
        view = memoryview(data)
        length = len(view)
        with self._turn:
            fd = self._open_fd()
            while view:
                try:
                    count = os.write(fd, view)
                except OSError as error:
                    raise from_os_error(error, f"write ingest {self.ref} at {self.offset} in {self._path}") from error
                self._hash.update(view[:count])
                self.offset += count
                view = view[count:]
            self._updated = time.time()
        return length

    def truncate(self, size: int) -> None:
        """Go back to `size` bytes (at most `offset`); the hash is computed again from the start."""
        with self._turn:
            fd = self._open_fd()
            if not 0 <= size <= self.offset:
                raise OutOfRange(f"ingest {self.ref}: cannot truncate {self.offset} bytes to {size}", key=self.ref)
            os.ftruncate(fd, size)
            self._synced = -1
            os.lseek(fd, 0, os.SEEK_SET)
            self._hash = hashlib.new(self._algorithm)
            self.offset = 0
            while piece := os.read(fd, _CHUNK):
                self._hash.update(piece)
                self.offset += len(piece)

    def fileno(self) -> int:
        """The descriptor of the data, for positional reads of what was written; it stays owned by this object."""
        return self._open_fd()

    def digest(self) -> str:
        """The digest of what was written so far; after `commit` that of the blob."""
        return self._digest or f"{self._algorithm}:{self._hash.hexdigest()}"

    def commit(self, size: int = 0, expected: str = "", *, sync_name: bool = True) -> str:
        """Make the ingest a blob, durably, and return its digest; the writer is closed then, also after an error.

        FailedPrecondition when `size` (not 0) or `expected` (not empty) differ from what was written;
        the ingest stays. AlreadyExists when the blob exists: the ingest is gone then, and the blob is
        good to use. With `sync_name=False` its bytes are on disk, and its name with the next
        `LocalContent.sync_names`.
        """
        with self._turn:
            return self._commit(size, expected, sync_name)

    def _commit(self, size: int, expected: str, sync_name: bool) -> str:
        self._open_fd()
        try:
            digest = self._digest = self._settle(size, expected)
            self._sync()
            faults.point(SYNCED)
            placed = self._store.place(self._path / "data", digest, self.offset, sync=sync_name)
            faults.point(RENAMED)
        except FileNotFoundError as error:
            raise NotFound(f"ingest {self.ref}: aborted meanwhile", kind="ingest", key=self.ref) from error
        except OSError as error:
            raise from_os_error(error, f"commit ingest {self.ref}") from error
        finally:
            self._finish()
        _remove(os.fspath(self._path))
        if not placed:
            raise AlreadyExists(f"content {digest}: already exists", kind="content", key=digest)
        return digest

    @property
    def settled(self) -> bool:
        """Whether all that was written is on disk."""
        return self._synced == self.offset

    @property
    def closed(self) -> bool:
        """Whether it was committed or closed."""
        return self._fd < 0

    def settle(self, size: int = 0, expected: str = "") -> str:
        """What `commit` would check, without committing: the digest, or its errors; the data are on disk afterwards."""
        with self._turn:
            digest = self._settle(size, expected)
            self._sync()
        return digest

    def _sync(self) -> None:
        """Data, size and mode to disk in one go, once: the mode first, or the commit would dirty the inode again."""
        fd = self._open_fd()
        if self._synced != self.offset:
            os.fchmod(fd, 0o444)
            if self._store.sync:
                os.fsync(fd)
            self._synced = self.offset

    def _settle(self, size: int, expected: str) -> str:
        if size and size != self.offset:
            raise FailedPrecondition(
                f"ingest {self.ref}: unexpected commit size {self.offset}, expected {size}", key=self.ref
            )
        if expected:
            algorithm = check_digest(expected).partition(":")[0]
            if algorithm != self._algorithm:
                self._algorithm = algorithm
                self.truncate(self.offset)
        digest = f"{self._algorithm}:{self._hash.hexdigest()}"
        if expected and digest != expected:
            raise FailedPrecondition(
                f"ingest {self.ref}: unexpected commit digest {digest}, expected {expected}", key=self.ref
            )
        return digest

    def status(self) -> IngestStatus:
        """How far it is."""
        return IngestStatus(self.ref, self.offset, self.total, "", self._started, self._updated)

    def close(self) -> None:
        """Let go of `ref` and the file; the ingest stays on disk. Twice is fine."""
        with self._turn:
            if self._fd < 0:
                return
            try:
                with contextlib.suppress(OSError):
                    (self._path / "updatedat").write_text(_rfc3339(self._updated))
            finally:
                self._finish()

    def _finish(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            self._store.release(self.ref)

    def __enter__(self) -> IngestWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _remove(path: str) -> None:
    """Remove the folder of a finished ingest; what stays behind is swept with the next collection."""
    try:
        for name in os.listdir(path):
            os.unlink(f"{path}/{name}")
        os.rmdir(path)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


def read_ingest_status(path: Path) -> IngestStatus | None:
    """What the folder of an ingest says of itself; None when it is incomplete or gone."""
    try:
        found = os.stat(path / "data")
        ref = (path / "ref").read_text()
        started = _seconds((path / "startedat").read_text())
        updated = _seconds((path / "updatedat").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    total = 0
    with contextlib.suppress(FileNotFoundError, ValueError):
        total = int((path / "total").read_text())
    # `updatedat` is written at the start and on close only; the file's own time is fresher between.
    return IngestStatus(ref, found.st_size, total, "", started, max(updated, found.st_mtime))


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text.strip().replace("Z", "+00:00")).timestamp()
