"""The SQLite file: one writer thread with group commit, readers of their own.

Owns connections, transactions and durability; knows no store. A mutation is a function of a
`Transaction`. Mutations that wait while one batch is being synced are committed together, by one
fsync, each in a savepoint of its own, so that one that fails undoes nothing of the others.

Reads run on the calling thread over a connection of that thread: a look-up of a row is some 10 µs,
less than a change of threads, and WAL readers never wait for the writer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from google.protobuf.message import Message

from supervisord_ctr import faults
from supervisord_ctr.errors import (
    DataLoss,
    Error,
    FailedPrecondition,
    Internal,
    ResourceExhausted,
    Unavailable,
    from_os_error,
)
from supervisord_ctr.metadata import recovery, schema
from supervisord_ctr.metadata.records import SnapshotRecords

T = TypeVar("T")
Row: TypeAlias = tuple[Any, ...]
Value: TypeAlias = str | bytes | int | float | None
#: An event to be told once the mutation is durable: namespace, topic, message.
PendingEvent: TypeAlias = tuple[str, str, Message]

log = logging.getLogger(__name__)

_BATCH = 256
# Changed rows after which the log is moved into the file: when nobody waits, and at the latest.
_CHECKPOINT_SOON = 1000
_CHECKPOINT_LATEST = 20_000

BEFORE_COMMIT = faults.declare("metadata.commit.before", "mutations are written into a transaction, not committed")
AFTER_COMMIT = faults.declare("metadata.commit.after", "mutations are durable, nobody was told")


class Transaction:
    """What a mutation may do: statements, events for afterwards, a hint that garbage may have come into being."""

    __slots__ = ("_connection", "dirty", "events")

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.events: list[PendingEvent] = []
        self.dirty = False

    def execute(self, statement: str, values: Sequence[Value] = ()) -> int:
        """Run a statement; returns how many rows it changed."""
        return self._connection.execute(statement, values).rowcount

    def row(self, statement: str, values: Sequence[Value] = ()) -> Row | None:
        """The first row, or None."""
        found: Row | None = self._connection.execute(statement, values).fetchone()
        return found

    def rows(self, statement: str, values: Sequence[Value] = ()) -> list[Row]:
        """All rows."""
        return self._connection.execute(statement, values).fetchall()

    def total_changes(self) -> int:
        """Rows changed over this connection so far, those of the running transaction included; see `Engine.changes`."""
        return self._connection.total_changes

    def event(self, namespace: str, topic: str, message: Message) -> None:
        """Tell of this once the mutation is durable (P14)."""
        self.events.append((namespace, topic, message))

    def sequence(self) -> int:
        """The next number of a sequence that never repeats."""
        found = self.row(
            "INSERT INTO facts (key, value) VALUES ('sequence', '1') "
            "ON CONFLICT (key) DO UPDATE SET value = CAST(value AS INTEGER) + 1 RETURNING value"
        )
        assert found is not None
        return int(found[0])


class Reader:
    """A consistent view of the database for several statements."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def rows(self, statement: str, values: Sequence[Value] = ()) -> list[Row]:
        """All rows."""
        return self._connection.execute(statement, values).fetchall()


@dataclass(slots=True)
class _Mutation(Generic[T]):
    work: Callable[[Transaction], T]
    durable: bool
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[T]
    events: list[PendingEvent] = field(default_factory=list)
    dirty: bool = False
    result: T | None = None
    error: BaseException | None = None


class Engine:
    """One database file. Plain to construct; nothing is opened before `open`.

    `on_commit` is called on the event loop's thread after every durable mutation, with its events and
    whether it may have left garbage, before the caller of `write` goes on.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.repair: recovery.Repair | None = None
        self.on_commit: Callable[[Sequence[PendingEvent], bool], None] = lambda events, dirty: None
        #: Called on the writer's thread before mutations become durable: brings to disk what they speak of. `OSError`.
        self.before_sync: Callable[[], None] = lambda: None
        #: Rows changed by committed mutations since `open`; a state is unchanged while this is.
        self.changes = 0
        self._queue: queue.SimpleQueue[list[_Mutation[Any]] | None] = queue.SimpleQueue()
        self._asked: dict[asyncio.AbstractEventLoop, list[_Mutation[Any]]] = {}
        self._thread: threading.Thread | None = None
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._readers_lock = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._durable = True
        self._uncheckpointed = 0
        self._failed: DataLoss | None = None

    def records(self, snapshotter: str) -> SnapshotRecords:
        """Where the local snapshotter of that name keeps its records; usable once the engine is open."""
        return SnapshotRecords(self, snapshotter)

    # Opening and closing.

    def open(self) -> None:
        """Check, repair, migrate, start the writer. Blocks; FailedPrecondition for a database of a newer release."""
        if self._thread is not None:
            return
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._writer = self._prepare()
        except sqlite3.OperationalError as error:
            if not recovery.give_reserve(self.path):
                raise _translate(error, self.path) from error
            self._writer = self._prepare()
        recovery.hold_reserve(self.path)
        self._thread = threading.Thread(target=self._run, name="db", daemon=True)
        self._thread.start()

    def _prepare(self) -> sqlite3.Connection:
        reason = recovery.damage(self.path)
        if reason is not None:
            self.repair = recovery.rebuild(self.path, reason)
            log.error("%s", self.repair)
        connection = self._connect()
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            self.path.chmod(0o600)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            schema.migrate(connection)
        except BaseException:
            connection.close()
            raise
        self.changes = connection.total_changes
        return connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, cached_statements=512, timeout=30
        )
        connection.execute("PRAGMA cache_size = -4096")
        return connection

    def close(self) -> None:
        """Finish what is queued, write the log back into the file, close. Twice is fine."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        for loop in list(self._asked):
            self._hand_over(loop)
        self._queue.put(None)
        thread.join()
        with self._readers_lock:
            for connection in self._readers:
                connection.close()
            self._readers.clear()
        self._local = threading.local()
        if self._writer is not None:
            with contextlib.suppress(sqlite3.Error, OSError):
                self.before_sync()
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._writer.close()
            self._writer = None

    # Reading.

    def _reader(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            if self._thread is None:
                raise Unavailable("metadata database is closed")
            connection = self._connect()
            connection.execute("PRAGMA query_only = ON")
            self._local.connection = connection
            with self._readers_lock:
                self._readers.append(connection)
        return connection

    def row(self, statement: str, values: Sequence[Value] = ()) -> Row | None:
        """The first row, or None."""
        try:
            found: Row | None = self._reader().execute(statement, values).fetchone()
        except sqlite3.Error as error:
            raise _translate(error, self.path) from error
        return found

    def rows(self, statement: str, values: Sequence[Value] = ()) -> list[Row]:
        """All rows, of one moment."""
        try:
            return self._reader().execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise _translate(error, self.path) from error

    def version(self) -> int:
        """A number that is another one after every commit, as the calling thread's connection sees it."""
        row = self.row("PRAGMA data_version")
        return int(str(row[0])) if row else 0

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Reader]:
        """One moment's view for several statements; keep it short, the log cannot shrink meanwhile."""
        connection = self._reader()
        connection.execute("BEGIN")
        try:
            yield Reader(connection)
        finally:
            connection.execute("ROLLBACK")

    # Writing.

    async def write(self, work: Callable[[Transaction], T], *, durable: bool = True) -> T:
        """Run `work` in the writer's next transaction and return its result once that is durable.

        Cancelling the caller does not cancel the mutation. With `durable=False` the caller does not
        wait for the disk: a crash of the machine may undo the mutation, but never without undoing
        everything after it, for the log is a sequence.
        """
        if self._thread is None:
            raise Unavailable("metadata database is closed")
        if self._failed is not None:
            raise self._failed
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()  # whose cancelling leaves the mutation in the queue
        mutation = _Mutation(work, durable, loop, future)
        asked = self._asked.get(loop)
        if asked is None:
            # What else is asked for in this turn of the loop goes along, and to disk at once: the writer would
            # take the first and let the others wait for a second time at the disk.
            asked = self._asked[loop] = []
            loop.call_soon(self._hand_over, loop)
        asked.append(mutation)
        return await future

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        asked = self._asked.pop(loop, None)
        if asked:
            self._queue.put(asked)

    def _run(self) -> None:
        closing = False
        while not closing:
            batch: list[_Mutation[Any]] = []
            found = self._queue.get()
            while True:
                if found is None:
                    closing = True
                    break
                batch += found
                if len(batch) >= _BATCH:
                    break
                try:
                    found = self._queue.get_nowait()
                except queue.Empty:
                    break
            if batch:
                self._commit(batch)
                if self._queue.empty() or self._uncheckpointed > _CHECKPOINT_LATEST:
                    self._checkpoint()

    def _commit(self, batch: list[_Mutation[Any]]) -> None:
        assert self._writer is not None
        connection = self._writer
        try:
            self._transact(connection, batch)
        except (sqlite3.Error, OSError) as error:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                if _is_full(error) and recovery.give_reserve(self.path):
                    return self._commit(batch)
                translated = _translate(error, self.path)
            else:
                translated = from_os_error(error, "commit to the metadata database")
            if isinstance(translated, DataLoss):
                self._failed = translated
            for mutation in batch:
                mutation.error = mutation.error or translated
                mutation.events = []
        by_loop: dict[asyncio.AbstractEventLoop, list[_Mutation[Any]]] = {}
        for mutation in batch:
            by_loop.setdefault(mutation.loop, []).append(mutation)
        for loop, mutations in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop ended: nobody waits any more
                loop.call_soon_threadsafe(self._deliver, mutations)
        return None

    def _transact(self, connection: sqlite3.Connection, batch: list[_Mutation[Any]]) -> None:
        durable = any(mutation.durable for mutation in batch)
        if durable != self._durable:
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._durable = durable
        before = connection.total_changes
        connection.execute("BEGIN IMMEDIATE")
        for mutation in batch:
            transaction = Transaction(connection)
            mutation.error = None
            connection.execute("SAVEPOINT mutation")
            try:
                mutation.result = mutation.work(transaction)
            except sqlite3.IntegrityError as error:
                mutation.error = Internal(f"metadata database: {error}")
            except sqlite3.Error:
                raise
            except BaseException as error:
                mutation.error = error
            if mutation.error is not None:
                connection.execute("ROLLBACK TO mutation")
            else:
                mutation.events, mutation.dirty = transaction.events, transaction.dirty
            connection.execute("RELEASE mutation")
        if durable:
            self.before_sync()
        faults.point(BEFORE_COMMIT)
        connection.execute("COMMIT")
        faults.point(AFTER_COMMIT)
        self.changes = connection.total_changes
        self._uncheckpointed += self.changes - before

    def _deliver(self, mutations: list[_Mutation[Any]]) -> None:
        for mutation in mutations:
            if mutation.error is None:
                try:
                    self.on_commit(mutation.events, mutation.dirty)
                except Exception:
                    log.exception("metadata: telling of a mutation failed")
            if mutation.future.done():
                continue
            if mutation.error is not None:
                mutation.future.set_exception(mutation.error)
            else:
                mutation.future.set_result(mutation.result)

    def _checkpoint(self) -> None:
        """Move the log into the file while nobody waits."""
        if self._uncheckpointed < _CHECKPOINT_SOON or self._writer is None:
            return
        self._uncheckpointed = 0
        try:
            self.before_sync()
            self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except (sqlite3.Error, OSError) as error:
            log.warning("metadata: checkpoint of %s failed: %s", self.path, error)

    def take_copy(self) -> None:
        """Write the copy that a later repair may need, and take the reserve again if it was given up. Blocks.

        ResourceExhausted when the disk is full.
        """
        recovery.hold_reserve(self.path)
        try:
            recovery.take_copy(self.path)
        except sqlite3.Error as error:
            raise _translate(error, self.path) from error


def _is_full(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) or 0
    return (code & 0xFF) == sqlite3.SQLITE_FULL


def _translate(error: sqlite3.Error, path: Path) -> Error:
    code = (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF
    text = f"metadata database {path}: {error}"
    if code == sqlite3.SQLITE_FULL:
        return ResourceExhausted(text)
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return DataLoss(f"{text}; it is repaired at the next start")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Unavailable(text)
    if code == sqlite3.SQLITE_READONLY:
        return FailedPrecondition(text)
    return Internal(text)
