"""The local content store: where blobs and ingests lie, and how they are found again.

    ROOT/blobs/ALGORITHM/HEX      a committed blob, 0444, never changed after its rename
    ROOT/trash/                   discarded blobs on their way out
    ROOT/ingest/SHA256-OF-REF/    one ingest; the hash keeps client-chosen refs out of paths
        data                      what was written so far
        ref startedat updatedat   the ref itself, times in RFC 3339
        total                     the announced size, when there is one

The layout is containerd's. A blob becomes visible by one rename after its data are on disk, so a
name below `blobs/` is complete or, after a disk fault, damaged; `walk` leaves damaged ones out,
`info` and `open` do not know them, and the next commit of the same digest replaces them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from supervisord_ctr import durable, faults
from supervisord_ctr.content.writer import ALGORITHMS, IngestWriter, read_ingest_status
from supervisord_ctr.errors import AlreadyExists, DataLoss, InvalidArgument, NotFound, Unavailable, from_os_error
from supervisord_ctr.model import ContentInfo, IngestStatus
from supervisord_ctr.names import check_digest, is_digest

log = logging.getLogger(__name__)

_EMPTY = {name: f"{name}:{hashlib.new(name).hexdigest()}" for name in ALGORITHMS}
_CHUNK = 1 << 20

DELETE = faults.declare("content.delete", "a blob is about to be unlinked; nobody refers to it any more")
ABORT = faults.declare("content.abort", "an ingest is about to be removed; its row is gone or going")


@dataclass(frozen=True, slots=True)
class Damaged:
    """An entry below `blobs/` that cannot be a blob; `reason` says why."""

    path: Path
    reason: str


class BlobFile:
    """An open blob; positional reads are safe from several threads. Close it, or use it as a context manager."""

    def __init__(self, fd: int, size: int, path: Path) -> None:
        self._fd = fd
        self.size = size
        self.path = path

    def fileno(self) -> int:
        """The descriptor, for `sendfile` and the like; it stays owned by this object."""
        return self._fd

    def read_at(self, count: int, offset: int) -> bytes:
        """At most `count` bytes from `offset`; empty at the end."""
        return os.pread(self._fd, count, offset)

    def read_cached(self, count: int, offset: int) -> bytes | None:
        """As `read_at`, but only if the kernel has all of it in memory; None otherwise. Never waits for the disk."""
        wanted = min(count, self.size - offset)
        if wanted <= 0:
            return b""
        buffer = bytearray(wanted)
        try:
            found = os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError:
            return None  # EAGAIN, or a file system without the flag
        return bytes(buffer) if found == wanted else None

    def deleted(self) -> bool:
        """Whether the file has no name any more."""
        return self._fd >= 0 and os.fstat(self._fd).st_nlink == 0

    def close(self) -> None:
        """Give the descriptor back; twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        # Opened on a thread for a caller that was cancelled meanwhile: nobody got it.
        self.close()

    def __enter__(self) -> BlobFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class LocalContent:
    """Blobs and ingests below `root`. With `sync=False` nothing is fsynced (tests, scratch stores)."""

    def __init__(self, root: Path, *, sync: bool = True) -> None:
        self.root = Path(root)
        self.sync = sync
        self._blobs = self.root / "blobs"
        self._ingests = self.root / "ingest"
        self._lock = threading.Lock()
        self._held: dict[str, float] = {}
        self._unsynced: set[Path] = set()
        self._syncing = threading.Lock()
        self._trash = self.root / "trash"
        for folder in (self.root, self._ingests, self._trash, *(self._blobs / name for name in ALGORITHMS)):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    # Blobs.

    def path(self, digest: str) -> Path:
        """Where the blob lies or would lie; InvalidArgument for a bad digest."""
        algorithm, _, encoded = check_digest(digest).partition(":")
        return self._blobs / algorithm / encoded

    def info(self, digest: str) -> ContentInfo:
        """Size and times of a committed blob; NotFound, also for a file that is plainly damaged."""
        path = self.path(digest)
        try:
            found = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            raise NotFound(f"content {digest}: not found", kind="content", key=digest) from None
        except OSError as error:
            raise from_os_error(error, f"content {digest}") from error
        if (reason := _damage(digest, found)) is not None:
            raise NotFound(f"content {digest}: {path} is damaged ({reason})", kind="content", key=digest)
        return _info(digest, found)

    def walk(self) -> Iterator[ContentInfo]:
        """Every committed blob; entries that cannot be blobs are left out (see `damaged`)."""
        for digest, found, _, reason in self._entries():
            if reason is None and found is not None:
                yield _info(digest, found)

    def damaged(self) -> list[Damaged]:
        """Entries below `blobs/` that `walk` leaves out, with the reason."""
        return [Damaged(path, reason) for _, _, path, reason in self._entries() if reason is not None]

    def _entries(self) -> Iterator[tuple[str, os.stat_result | None, Path, str | None]]:
        for folder in os.scandir(self._blobs):
            if folder.name not in ALGORITHMS or not folder.is_dir(follow_symlinks=False):
                yield "", None, Path(folder.path), "not the folder of a known digest algorithm"
                continue
            for entry in os.scandir(folder.path):
                digest = f"{folder.name}:{entry.name}"
                if not is_digest(digest):
                    yield "", None, Path(entry.path), "its name is not a digest"
                    continue
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                yield digest, found, Path(entry.path), _damage(digest, found)

    def verify(self, digest: str) -> None:
        """Read a whole blob and compare its digest; DataLoss when it differs, NotFound."""
        with self.open(digest) as blob:
            hasher = hashlib.new(digest.partition(":")[0])
            offset = 0
            while piece := blob.read_at(_CHUNK, offset):
                hasher.update(piece)
                offset += len(piece)
        actual = f"{digest.partition(':')[0]}:{hasher.hexdigest()}"
        if actual != digest:
            raise DataLoss(f"content {digest}: {self.path(digest)} holds {actual}", kind="content", key=digest)

    def delete(self, digest: str) -> None:
        """Remove a blob; NotFound. Open readers keep reading."""
        self.discard(digest)
        self.empty_trash()

    def discard(self, digest: str) -> None:
        """Make a blob disappear at once by a rename; `empty_trash` gives its space back. NotFound."""
        path = self.path(digest)
        faults.point(DELETE)
        try:
            os.rename(path, self._trash / path.name)
        except FileNotFoundError:
            raise NotFound(f"content {digest}: not found", kind="content", key=digest) from None
        except OSError as error:
            raise from_os_error(error, f"delete content {digest}") from error

    def empty_trash(self) -> int:
        """Give the space of discarded blobs back; returns how many there were."""
        count = 0
        for entry in os.scandir(self._trash):
            with contextlib.suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
                count += 1
        return count

    def open(self, digest: str) -> BlobFile:
        """Open a blob for reading; NotFound. It stays readable after a `delete`."""
        path = self.path(digest)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise NotFound(f"content {digest}: not found", kind="content", key=digest) from None
        except OSError as error:
            raise from_os_error(error, f"open content {digest}") from error
        found = os.fstat(fd)
        if (reason := _damage(digest, found)) is not None:
            os.close(fd)
            raise NotFound(f"content {digest}: {path} is damaged ({reason})", kind="content", key=digest)
        return BlobFile(fd, found.st_size, path)

    # Ingests.

    def ingest_path(self, ref: str) -> Path:
        """The folder of the ingest `ref`."""
        return self._ingests / hashlib.sha256(ref.encode()).hexdigest()

    def writer(self, ref: str, *, total: int = 0, expected: str = "", algorithm: str = "") -> IngestWriter:
        """Start or resume the ingest `ref`; the hash of what lies there already is computed again.

        Unavailable while another writer of this process holds `ref`; AlreadyExists when `expected` is
        committed already; InvalidArgument for an empty ref. An ingest that does not fit (another
        total, unreadable state) starts over, as in containerd. The hash is `algorithm`, else that of
        `expected`, else sha256.
        """
        if not ref:
            raise InvalidArgument("ref must not be empty", kind="ingest")
        if expected:
            self._refuse_existing(expected)
        self._acquire(ref)
        try:
            chosen = algorithm or expected.partition(":")[0] or "sha256"
            return IngestWriter(self, ref, total=total, algorithm=chosen)
        except OSError as error:
            self.release(ref)
            raise from_os_error(error, f"open ingest {ref}") from error
        except BaseException:
            self.release(ref)
            raise

    def _refuse_existing(self, digest: str) -> None:
        try:
            self.info(digest)
        except NotFound:
            return
        raise AlreadyExists(f"content {digest}: already exists", kind="content", key=digest)

    def _acquire(self, ref: str) -> None:
        with self._lock:
            since = self._held.get(ref)
            if since is None:
                self._held[ref] = time.time()
                return
        raise Unavailable(
            f"ref {ref} is locked: another writer holds it for {time.time() - since:.1f} s", kind="ingest", key=ref
        )

    def release(self, ref: str) -> None:
        """Let another writer open `ref`; called by the writer that closes."""
        with self._lock:
            self._held.pop(ref, None)

    def held(self, ref: str) -> bool:
        """Whether a writer of this process has `ref` open."""
        with self._lock:
            return ref in self._held

    def status(self, ref: str) -> IngestStatus:
        """How far an ingest is; NotFound."""
        found = read_ingest_status(self.ingest_path(ref))
        if found is None or found.ref != ref:
            raise NotFound(f"ingest {ref}: not found", kind="ingest", key=ref)
        return found

    def statuses(self) -> list[IngestStatus]:
        """Every ingest on disk, held or not."""
        found = (read_ingest_status(Path(entry.path)) for entry in os.scandir(self._ingests))
        return [status for status in found if status is not None]

    def unreadable_ingests(self) -> list[Path]:
        """Folders of ingests that no ref can be read from and that no writer is making now."""
        with self._lock:
            held = {self.ingest_path(ref) for ref in self._held}
        paths = [Path(entry.path) for entry in os.scandir(self._ingests)]
        return [path for path in paths if path not in held and read_ingest_status(path) is None]

    def abort(self, ref: str) -> None:
        """Drop an ingest and its bytes; NotFound. A writer that has it open cannot commit any more."""
        faults.point(ABORT)
        self._remove_ingest(self.ingest_path(ref), ref)

    def _remove_ingest(self, path: Path, ref: str) -> None:
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            raise NotFound(f"ingest {ref}: not found", kind="ingest", key=ref) from None
        except OSError as error:
            raise from_os_error(error, f"remove ingest {ref}") from error

    def sweep_ingests(self, keep: Callable[[], set[str]]) -> list[str]:
        """Remove every ingest whose ref is not in `keep()` and that no writer holds, readable or not.

        `keep` is asked after the folder was listed: an ingest that begins meanwhile is safe when its
        ref is recorded before its folder is made.
        """
        removed = []
        entries = list(os.scandir(self._ingests))
        paths = {self.ingest_path(ref).name for ref in keep()}
        with self._lock:
            paths.update(self.ingest_path(ref).name for ref in self._held)
        for entry in entries:
            if entry.name in paths:
                continue
            status = read_ingest_status(Path(entry.path))
            ref = status.ref if status is not None else entry.name
            # A writer may have come since the listing.
            if status is not None and self.held(status.ref):
                continue
            faults.point(ABORT)
            try:
                shutil.rmtree(entry.path)
            except FileNotFoundError:
                continue
            removed.append(ref)
        return removed

    def place(self, data: Path, digest: str, size: int, *, sync: bool = True) -> bool:
        """Rename the finished file `data` to its blob; False, and nothing moves, when a sound blob is there already.

        Without `sync` the name is on disk with the next `sync_names`.
        """
        target = self.path(digest)
        try:
            if os.stat(target, follow_symlinks=False).st_size == size:
                return False
            log.warning("content %s: replacing a damaged file at %s", digest, target)
        except FileNotFoundError:
            pass
        os.rename(data, target)
        with self._lock:
            self._unsynced.add(target.parent)
        if sync:
            self.sync_names()
        return True

    def sync_names(self) -> None:
        """Bring the names of all blobs to disk; costs nothing when they are there. `OSError`."""
        with self._syncing:
            with self._lock:
                folders, self._unsynced = self._unsynced, set()
            try:
                if self.sync:
                    for folder in folders:
                        durable.sync_folder(folder)
            except OSError:
                with self._lock:
                    self._unsynced |= folders
                raise


def _info(digest: str, found: os.stat_result) -> ContentInfo:
    return ContentInfo(digest, found.st_size, found.st_mtime, found.st_mtime)


def _damage(digest: str, found: os.stat_result) -> str | None:
    """Why the file cannot be the blob, told from its inode alone; None when nothing speaks against it."""
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file"
    if found.st_size == 0 and digest != _EMPTY[digest.partition(":")[0]]:
        return "empty"
    return None
