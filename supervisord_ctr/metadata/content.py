"""Content as a namespace sees it: which blobs and ingests are its own, their labels and leases.

Owns the rows `blobs` and `ingests`; the bytes are the content store's. Blobs are shared on disk
between namespaces: a client that names the digest it expects gets one that another namespace has
without sending it again (containerd's policy "shared"). With the policy "isolated" it must send all
of it, unless a namespace has it that is labelled to share.

A lock for each digest keeps the collector from discarding a blob between the moment somebody finds
it and the moment its row is durable. No lock is held while bytes are written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from supervisord_ctr import filters
from supervisord_ctr.aio import Executors, KeyedLock, TaskOwner, shielded
from supervisord_ctr.api.events import events_pb2
from supervisord_ctr.content import BlobFile, IngestWriter, LocalContent
from supervisord_ctr.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from supervisord_ctr.metadata.codec import (
    adapt_content,
    adapt_ingest,
    checked_labels,
    dump_map,
    ensure_namespace,
    load_map,
    update_labels,
)
from supervisord_ctr.metadata.engine import Engine, Row, Transaction
from supervisord_ctr.metadata.leases import hold_resource, release_resource
from supervisord_ctr.model import ContentInfo, IngestStatus
from supervisord_ctr.names import LABEL_SHAREABLE, check_digest

log = logging.getLogger(__name__)

#: An ingest that no lease protects is given up after so many seconds.
INGEST_LIFE = 24 * 3600.0
_COPY = 1 << 20


def _load(row: Row) -> ContentInfo:
    return ContentInfo(row[0], row[1], row[2], row[3], load_map(row[4]))


class _Idle:
    """Files of blobs that were read a moment ago: clients read one blob in thousands of small calls."""

    def __init__(self, limit: int = 32) -> None:
        self._limit = limit
        self._files: dict[str, BlobFile] = {}

    def take(self, digest: str) -> BlobFile | None:
        """The file, which is the caller's then."""
        return self._files.pop(digest, None)

    def give(self, digest: str, file: BlobFile) -> None:
        """Keep a file for the next reader, or close it."""
        if digest in self._files or file.deleted():
            file.close()
            return
        self._files[digest] = file
        if len(self._files) > self._limit:
            self._files.pop(next(iter(self._files))).close()

    def drop(self, *, all_files: bool = False) -> None:
        """Close the files of deleted blobs (or all), so that their space is free."""
        for digest, file in list(self._files.items()):
            if all_files or file.deleted():
                del self._files[digest]
                file.close()


class BlobReader:
    """An open blob; close it. Reads are positional and may overlap."""

    def __init__(self, blob: BlobFile, executors: Executors, give_back: Callable[[BlobFile], None]) -> None:
        self._blob = blob
        self._executors = executors
        self._give_back: Callable[[BlobFile], None] | None = give_back
        self.size = blob.size
        self.path: Path = blob.path

    async def read_at(self, count: int, offset: int) -> bytes:
        """At most `count` bytes from `offset`; empty at the end. What the kernel has in memory costs no thread."""
        found = self._blob.read_cached(count, offset)
        if found is not None:
            return found
        return await self._executors.run_io(self._blob.read_at, count, offset)

    def fileno(self) -> int:
        """The descriptor; it stays owned by this object."""
        return self._blob.fileno()

    def close(self) -> None:
        """Give the file back; twice is fine."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back(self._blob)


class ContentWriter:
    """One ingest of a namespace, held until `commit` or `close`.

    `shared` says that the blob is on disk already (another namespace has it): the writer stands at
    its end, `commit` costs nothing, and writing after all begins a copy. Otherwise `blocking` is the
    underlying writer, for a thread that hashes and unpacks in one pass (its write, digest, truncate
    and offset only: commit goes through this object).
    """

    def __init__(self, content: Content, namespace: str, ref: str, backend: str, lease: str | None) -> None:
        self._content = content
        self._namespace = namespace
        self._backend = backend
        self._lease = lease
        self._inner: IngestWriter | None = None
        self._blob: ContentInfo | None = None
        self._started = time.time()
        self._digest = ""
        self._closed = False
        self.ref = ref

    @property
    def shared(self) -> bool:
        """Whether the whole blob is there already."""
        return self._inner is None and self._blob is not None

    @property
    def blocking(self) -> IngestWriter:
        """The underlying writer; FailedPrecondition for a shared blob."""
        if self._inner is None:
            raise FailedPrecondition(f"ingest {self.ref}: the content is there already", kind="ingest", key=self.ref)
        return self._inner

    @property
    def offset(self) -> int:
        """How many bytes there are."""
        return self._inner.offset if self._inner is not None else self._blob.size if self._blob is not None else 0

    @property
    def total(self) -> int:
        """The announced size; 0 when it is not known."""
        return self._inner.total if self._inner is not None else self.offset

    def digest(self) -> str:
        """The digest of what was written so far."""
        if self._digest:
            return self._digest
        if self._inner is not None:
            return self._inner.digest()
        return self._blob.digest if self._blob is not None else ""

    async def status(self) -> IngestStatus:
        """How far it is."""
        if self._inner is not None:
            return replace(self._inner.status(), ref=self.ref)
        return IngestStatus(self.ref, self.offset, self.total, self.digest(), self._started, self._started)

    async def write(self, data: bytes | memoryview) -> int:
        """Append all of `data`; ResourceExhausted when the disk is full."""
        if not data:
            return 0
        if self._inner is None:
            await self._unshare(self.offset)
        return await self._content.executors.run_io(self.blocking.write, data)

    async def truncate(self, size: int) -> None:
        """Go back to `size` bytes."""
        if self._inner is None:
            await self._unshare(size)
        else:
            await self._content.executors.run_io(self._inner.truncate, size)

    async def _unshare(self, size: int) -> None:
        # Whatever becomes of the caller: a writer that was opened is one that `close` knows of.
        await shielded(self._content.owner, self._copy(size), f"unshare {self.ref}")

    async def _copy(self, size: int) -> None:
        if self._blob is None or self._closed:
            raise FailedPrecondition(f"ingest {self.ref}: the writer is closed", kind="ingest", key=self.ref)
        source = self._blob.digest

        def copy() -> IngestWriter:
            writer = self._content.local.writer(self._backend)
            try:
                writer.truncate(0)
                with self._content.local.open(source) as blob:
                    while writer.offset < size:
                        writer.write(blob.read_at(min(_COPY, size - writer.offset), writer.offset))
            except BaseException:
                writer.close()
                raise
            return writer

        inner = await self._content.executors.run_io(copy)
        self._inner = inner
        if self._is_closed():
            await self._content.executors.run_io(inner.close)

    def _is_closed(self) -> bool:
        """Asked again after a wait: whoever had the writer may have gone meanwhile."""
        return self._closed

    async def commit(
        self, size: int = 0, expected: str = "", labels: Mapping[str, str] | None = None, *, durable: bool = True
    ) -> str:
        """Make it a blob of the namespace, durably; returns the digest. The writer is closed then, also after an error.

        FailedPrecondition when `size` (not 0) or `expected` (not empty) differ; the ingest stays and
        may be resumed. AlreadyExists when the namespace has the blob: the ingest is gone then. With
        `durable=False` the record waits for the next durable mutation; the bytes are on disk all the same.
        """
        return await shielded(self._content.owner, self._commit(size, expected, labels, durable), f"commit {self.ref}")

    async def _commit(self, size: int, expected: str, labels: Mapping[str, str] | None, durable: bool) -> str:
        run_io = self._content.executors.run_io
        try:
            kept = checked_labels(labels, "info.labels")
            if self._inner is not None:
                inner = self._inner
                if size and size != inner.offset:
                    raise FailedPrecondition(
                        f'"{self.ref}" failed size validation: {inner.offset} != {size}', kind="ingest", key=self.ref
                    )
                length, digest = inner.offset, inner.digest()
                if not inner.settled or expected not in ("", digest):
                    try:
                        digest = await run_io(inner.settle, size, expected)
                    except FailedPrecondition as error:
                        told = error.message.replace(self._backend, self.ref)
                        raise FailedPrecondition(told, kind="ingest", key=self.ref) from None
                async with self._content.digests.hold(digest):
                    try:
                        # Its name is synced with the first durable mutation that comes after (`Engine.before_sync`).
                        await run_io(inner.commit, size, digest, sync_name=False)
                    except AlreadyExists:
                        pass  # another namespace has it; this one gets its row below
                    fresh = await self._content.settle(self, digest, length, kept, durable)
            else:
                length, digest = self._check_shared(size, expected)
                async with self._content.digests.hold(digest):
                    fresh = await self._content.settle(self, digest, length, kept, durable)
        finally:
            await self.close()
        self._digest = digest
        if not fresh:
            raise AlreadyExists(f"content {digest}: already exists", kind="content", key=digest)
        return digest

    def _check_shared(self, size: int, expected: str) -> tuple[int, str]:
        blob = self._blob
        if blob is None or self._closed:
            raise FailedPrecondition(f"ingest {self.ref}: the writer is closed", kind="ingest", key=self.ref)
        if size and size != blob.size:
            raise FailedPrecondition(f'"{self.ref}" failed size validation: {blob.size} != {size}', key=self.ref)
        if expected and expected != blob.digest:
            raise FailedPrecondition(f'"{self.ref}" unexpected digest', kind="ingest", key=self.ref)
        return blob.size, blob.digest

    def ids(self) -> tuple[str, str | None]:
        """Namespace and lease, for the store."""
        return self._namespace, self._lease

    def begin(self, inner: IngestWriter | None, blob: ContentInfo | None) -> None:
        """Called once by the store: what this writer stands on."""
        self._inner, self._blob = inner, blob

    async def close(self) -> None:
        """Let go of the ref; the ingest stays for a later resume. Twice is fine."""
        if self._closed:
            return
        self._closed = True
        if self._inner is not None:
            self._digest = self._digest or self._inner.digest()
            if not self._inner.closed:
                await self._content.executors.run_io(self._inner.close)


class Content:
    """Blobs and ingests of a namespace."""

    def __init__(
        self, engine: Engine, local: LocalContent, executors: Executors, owner: TaskOwner, *, isolated: bool = False
    ) -> None:
        self._engine = engine
        self._isolated = isolated
        self.local = local
        self.executors = executors
        self.owner = owner
        self._idle = _Idle()
        #: Held by digest while a blob is found and recorded, or discarded.
        self.digests = KeyedLock()
        #: Whether a collection has removed blobs without a row: from then on a blob without one need not be looked for.
        self.swept = False

    async def info(self, namespace: str, digest: str) -> ContentInfo:
        """NotFound; InvalidArgument for a bad digest."""
        return self._info(namespace, check_digest(digest))

    def _info(self, namespace: str, digest: str) -> ContentInfo:
        row = self._engine.row(
            "SELECT digest, size, created, updated, labels FROM blobs WHERE namespace = ? AND digest = ?",
            (namespace, digest),
        )
        if row is None:
            raise NotFound(f"content {digest}: not found", kind="content", key=digest)
        return _load(row)

    async def update(
        self, namespace: str, info: ContentInfo, fieldpaths: Sequence[str] = (), *, durable: bool = True
    ) -> ContentInfo:
        """Change labels or labels.KEY; NotFound; InvalidArgument for other paths."""
        check_digest(info.digest)

        def work(tx: Transaction) -> ContentInfo:
            row = tx.row(
                "SELECT digest, size, created, updated, labels FROM blobs WHERE namespace = ? AND digest = ?",
                (namespace, info.digest),
            )
            if row is None:
                raise NotFound(f"content {info.digest}: not found", kind="content", key=info.digest)
            current = _load(row)
            labels = update_labels(current.labels, info.labels, fieldpaths, f'content info "{info.digest}"')
            updated = replace(current, labels=checked_labels(labels, "info.labels"), updated_at=time.time())
            tx.execute(
                "UPDATE blobs SET labels = ?, updated = ? WHERE namespace = ? AND digest = ?",
                (dump_map(updated.labels), updated.updated_at, namespace, info.digest),
            )
            return updated

        return await self._engine.write(work, durable=durable)

    async def walk(self, namespace: str, filter_texts: Sequence[str] = ()) -> list[ContentInfo]:
        """Those that match (fields digest, labels), by digest."""
        matching = filters.parse(filter_texts)
        rows = self._engine.rows(
            "SELECT digest, size, created, updated, labels FROM blobs WHERE namespace = ? ORDER BY digest",
            (namespace,),
        )
        return [info for info in map(_load, rows) if matching.matches(adapt_content(info))]

    async def delete(self, namespace: str, digest: str, *, lease: str | None = None) -> None:
        """Take the blob from the namespace; the bytes go with the next collection if nobody else has it. NotFound."""
        check_digest(digest)

        def work(tx: Transaction) -> None:
            if not tx.execute("DELETE FROM blobs WHERE namespace = ? AND digest = ?", (namespace, digest)):
                raise NotFound(f"content {digest}: not found", kind="content", key=digest)
            release_resource(tx, namespace, lease, "content", digest)
            tx.dirty = True
            tx.event(namespace, "/content/delete", events_pb2.ContentDelete(digest=digest))

        await self._engine.write(work)

    async def reader(self, namespace: str, digest: str) -> BlobReader:
        """Open a blob of the namespace; NotFound."""
        self._info(namespace, check_digest(digest))
        blob = self._idle.take(digest)
        if blob is None:
            blob = await self.executors.run_io(self.local.open, digest)
        return BlobReader(blob, self.executors, lambda file: self._idle.give(digest, file))

    def drop_files(self, *, all_files: bool = False) -> None:
        """Close files that are kept for the next reader: those of deleted blobs, or all."""
        self._idle.drop(all_files=all_files)

    async def read(self, namespace: str, digest: str, limit: int = 4 << 20) -> bytes:
        """A whole small blob; ResourceExhausted when it is larger than `limit` (S8)."""
        info = self._info(namespace, check_digest(digest))
        if info.size > limit:
            raise ResourceExhausted(
                f"content {digest} is {info.size} bytes long, at most {limit} are read", kind="content", key=digest
            )

        def whole() -> bytes:
            with self.local.open(digest) as blob:
                return blob.read_at(limit, 0)

        return await self.executors.run_io(whole)

    # Ingests.

    async def writer(
        self, namespace: str, ref: str, *, size: int = 0, expected: str = "", lease: str | None = None,
        keep: bool = False,
    ) -> ContentWriter:
        """Start or resume the ingest `ref` of the namespace.

        AlreadyExists when the namespace has `expected` (it joins the lease then); Unavailable while
        another writer holds the ref; NotFound for a lease that does not exist. Without a lease the
        ingest is given up after a day; with `keep` it also lives a day beyond its lease, so that a later
        pull resumes it (P2). See `ContentWriter.shared` for a blob that is on disk already.
        """
        if not ref:
            raise InvalidArgument("ref must not be empty", kind="ingest")
        if expected:
            check_digest(expected)
        opening = self.owner.start(self._writer(namespace, ref, size, expected, lease, keep), f"writer {ref}")
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(self._close_unwanted)
            raise

    def _close_unwanted(self, opening: asyncio.Task[ContentWriter]) -> None:
        """The caller went away while its writer was being opened: nobody else would let go of the ref."""
        if not opening.cancelled() and opening.exception() is None:
            with contextlib.suppress(RuntimeError):  # the room was closed meanwhile
                self.owner.start(opening.result().close(), "close an unwanted writer")

    async def _writer(
        self, namespace: str, ref: str, size: int, expected: str, lease: str | None, keep: bool
    ) -> ContentWriter:
        if not expected:
            backend = await self._record_ingest(namespace, ref, lease, None, keep)
            return await self._open_writer(namespace, ref, backend, size, "", lease)
        async with self.digests.hold(expected):
            await self._refuse_existing(namespace, expected, lease)
            blob = await self._find_shared(expected, size)
            backend = await self._record_ingest(namespace, ref, lease, blob, keep)
            if blob is not None:
                writer = ContentWriter(self, namespace, ref, backend, lease)
                writer.begin(None, blob)
                return writer
        return await self._open_writer(namespace, ref, backend, size, expected, lease)

    async def _open_writer(
        self, namespace: str, ref: str, backend: str, size: int, expected: str, lease: str | None
    ) -> ContentWriter:
        # The blob is known not to be there, so the expected digest only chooses the algorithm.
        algorithm = expected.partition(":")[0]
        try:
            inner = await self.executors.run_io(
                self.local.writer, backend, total=size, algorithm=algorithm or "sha256"
            )
        except Unavailable as error:
            raise Unavailable(error.message.replace(backend, ref), kind="ingest", key=ref) from None
        writer = ContentWriter(self, namespace, ref, backend, lease)
        writer.begin(inner, None)
        return writer

    async def _refuse_existing(self, namespace: str, digest: str, lease: str | None) -> None:
        if self._engine.row("SELECT 1 FROM blobs WHERE namespace = ? AND digest = ?", (namespace, digest)) is None:
            return
        try:
            await self.executors.run_io(self.local.info, digest)
        except NotFound as error:
            log.warning("content %s: recorded and not on disk, it is written again: %s", digest, error)
            return

        def work(tx: Transaction) -> bool:
            """Have the lease hold it, unless a collection took it since it was seen: then it is written again."""
            if tx.row("SELECT 1 FROM blobs WHERE namespace = ? AND digest = ?", (namespace, digest)) is None:
                return False
            hold_resource(tx, namespace, lease, "content", digest)
            return True

        if not lease or await self._engine.write(work):
            raise AlreadyExists(f"content {digest}: already exists", kind="content", key=digest)

    async def _find_shared(self, digest: str, size: int) -> ContentInfo | None:
        if self._isolated and not self._is_shareable(digest):
            return None
        if self.swept and not self._is_recorded(digest):
            return None
        try:
            found = await self.executors.run_io(self.local.info, digest)
        except NotFound:
            return None
        return found if size in (0, found.size) else None

    def _is_recorded(self, digest: str) -> bool:
        """Whether any namespace has the blob."""
        return self._engine.row("SELECT 1 FROM blobs WHERE digest = ? LIMIT 1", (digest,)) is not None

    def _is_shareable(self, digest: str) -> bool:
        """Whether a namespace that shares what it has has the blob."""
        rows = self._engine.rows(
            "SELECT n.labels FROM blobs b JOIN namespaces n ON n.name = b.namespace "
            "WHERE b.digest = ? AND n.labels IS NOT NULL", (digest,),
        )
        return any(load_map(row[0]).get(LABEL_SHAREABLE) == "true" for row in rows)

    async def _record_ingest(
        self, namespace: str, ref: str, lease: str | None, blob: ContentInfo | None, keep: bool
    ) -> str:
        """The ref in the content store. Not synced: an ingest whose row is lost in a power cut is swept."""

        def work(tx: Transaction) -> str:
            ensure_namespace(tx, namespace)
            leased = hold_resource(tx, namespace, lease, "ingests", ref)
            row = tx.row("SELECT backend FROM ingests WHERE namespace = ? AND ref = ?", (namespace, ref))
            backend = row[0] if row else f"{namespace}/{tx.sequence()}/{ref}"
            tx.execute(
                "INSERT OR REPLACE INTO ingests VALUES (?, ?, ?, ?, ?)",
                (
                    namespace, ref, backend, None if leased and not keep else time.time() + INGEST_LIFE,
                    blob.digest if blob else None,
                ),
            )
            return str(backend)

        return await self._engine.write(work, durable=False)

    async def settle(
        self, writer: ContentWriter, digest: str, size: int, labels: Mapping[str, str], durable: bool
    ) -> bool:
        """Record a committed blob and forget its ingest; False when the namespace had it. The digest is held."""
        namespace, lease = writer.ids()
        now = time.time()

        def work(tx: Transaction) -> bool:
            ensure_namespace(tx, namespace)
            fresh = tx.execute(
                "INSERT OR IGNORE INTO blobs VALUES (?, ?, ?, ?, ?, ?)",
                (namespace, digest, size, now, now, dump_map(labels)),
            )
            tx.execute("DELETE FROM ingests WHERE namespace = ? AND ref = ?", (namespace, writer.ref))
            release_resource(tx, namespace, lease, "ingests", writer.ref)
            hold_resource(tx, namespace, lease, "content", digest)
            if fresh:
                tx.event(namespace, "/content/create", events_pb2.ContentCreate(digest=digest, size=size))
            return bool(fresh)

        return await self._engine.write(work, durable=durable)

    async def status(self, namespace: str, ref: str) -> IngestStatus:
        """NotFound."""
        row = self._engine.row(
            "SELECT backend, expected FROM ingests WHERE namespace = ? AND ref = ?", (namespace, ref)
        )
        if row is None:
            raise NotFound(f"reference {ref}: not found", kind="ingest", key=ref)
        try:
            found = await self.executors.run_io(self.local.status, row[0])
        except NotFound:
            raise NotFound(f"reference {ref}: not found", kind="ingest", key=ref) from None
        return replace(found, ref=ref)

    async def statuses(self, namespace: str, filter_texts: Sequence[str] = ()) -> list[IngestStatus]:
        """Those that match (the field ref), by ref."""
        matching = filters.parse(filter_texts)
        rows = self._engine.rows("SELECT ref, backend FROM ingests WHERE namespace = ? ORDER BY ref", (namespace,))

        def read() -> list[IngestStatus]:
            found = []
            for ref, backend in rows:
                try:
                    found.append(replace(self.local.status(backend), ref=ref))
                except NotFound:
                    continue
            return found

        statuses = await self.executors.run_io(read) if rows else []
        return [status for status in statuses if matching.matches(adapt_ingest(status))]

    async def abort(self, namespace: str, ref: str, *, lease: str | None = None) -> None:
        """Drop an ingest and its bytes; NotFound."""

        def work(tx: Transaction) -> tuple[str, str | None]:
            row = tx.row("SELECT backend, expected FROM ingests WHERE namespace = ? AND ref = ?", (namespace, ref))
            if row is None:
                raise NotFound(f"reference {ref}: not found", kind="ingest", key=ref)
            tx.execute("DELETE FROM ingests WHERE namespace = ? AND ref = ?", (namespace, ref))
            release_resource(tx, namespace, lease, "ingests", ref)
            return row[0], row[1]

        backend, _ = await self._engine.write(work)
        try:
            await self.executors.run_io(self.local.abort, backend)
        except NotFound:
            pass  # a shared ingest has no bytes of its own
