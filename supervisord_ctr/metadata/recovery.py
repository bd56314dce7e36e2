"""A damaged database: told, kept aside, and rebuilt from what can still be read (P6).

Owns the check at start, the salvage of rows, the copy that is taken now and then, and the reserve
that lets the daemon start and delete things on a full disk. Never raises over a damaged file: the
worst result is an empty database beside the damaged one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from supervisord_ctr import durable
from supervisord_ctr.metadata import schema

log = logging.getLogger(__name__)

#: Bytes kept back on the disk so that a full one does not stop the database from working.
RESERVE = 4 << 20
_SIDE_FILES = ("", "-wal", "-shm")


@dataclass(frozen=True, slots=True)
class Repair:
    """What was done about a damaged database."""

    reason: str
    moved_to: Path
    rows: dict[str, int] = field(default_factory=dict)
    damaged_tables: tuple[str, ...] = ()
    from_copy: tuple[str, ...] = ()

    @property
    def lossy(self) -> bool:
        """Whether rows are missing that no copy gave back in full."""
        return bool(self.damaged_tables)

    def __str__(self) -> str:
        lost = f"; tables with lost rows: {', '.join(self.damaged_tables)}" if self.damaged_tables else ""
        copied = f"; completed from the last copy: {', '.join(self.from_copy)}" if self.from_copy else ""
        return (
            f"metadata database was damaged ({self.reason}); it is kept at {self.moved_to}; "
            f"{sum(self.rows.values())} rows were saved{lost}{copied}"
        )


def damage(path: Path) -> str | None:
    """Why the database at `path` cannot be used; None when it is sound or not there."""
    if not path.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            found = [str(row[0]) for row in connection.execute("PRAGMA quick_check(3)")]
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.DatabaseError as error:
        if _is_damage(error):
            return str(error)
        raise
    return None if found == ["ok"] else "; ".join(found)


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) or 0
    return (code & 0xFF) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT)


def rebuild(path: Path, reason: str) -> Repair:
    """Move the damaged database aside and make a new one from its rows and the last copy."""
    aside = path.with_name(f"{path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S%f}")
    for suffix in _SIDE_FILES:
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    fresh = path.with_name(f"{path.name}.rebuilt")
    fresh.unlink(missing_ok=True)
    rows: dict[str, int] = {}
    damaged: list[str] = []
    copied: list[str] = []
    with contextlib.closing(sqlite3.connect(fresh, isolation_level=None)) as target:
        # One transaction, synced once at the end: thousands of rows must not cost thousands of syncs.
        target.execute("PRAGMA synchronous = OFF")
        schema.migrate(target)
        target.execute("BEGIN")
        for table in schema.TABLES:
            rows[table], whole = _salvage(aside, target, table)
            if not whole:
                damaged.append(table)
                added, _ = _salvage(copy_path(path), target, table)
                if added:
                    copied.append(table)
                    rows[table] += added
        target.execute("COMMIT")
    os.chmod(fresh, 0o600)
    _sync(fresh)
    os.rename(fresh, path)
    durable.sync_folder(path.parent)
    return Repair(reason, aside, rows, tuple(damaged), tuple(copied))


def _salvage(source: Path, target: sqlite3.Connection, table: str) -> tuple[int, bool]:
    """Copy the readable rows of `table`; how many were new, and whether the table was read to its end.

    A damaged page stops a scan, so the table is read from both ends: what is lost is what lies on
    or between damaged pages.
    """
    if not source.exists():
        return 0, False
    count = 0
    keys = schema.TABLES[table]
    known = [str(row[1]) for row in target.execute(f"PRAGMA table_info({table})")]
    for direction in ("ASC", "DESC"):
        order = ", ".join(f"{key} {direction}" for key in keys)
        opened = sqlite3.connect(f"file:{source}?mode=ro", uri=True, isolation_level=None)
        with contextlib.closing(opened) as connection:
            try:
                cursor = connection.execute(f"SELECT * FROM {table} ORDER BY {order}")
                names = [column[0] for column in cursor.description]
                chosen = [names.index(name) for name in known if name in names]
                statement = (
                    f"INSERT OR IGNORE INTO {table} ({', '.join(names[at] for at in chosen)}) "
                    f"VALUES ({', '.join('?' * len(chosen))})"
                )
                for row in cursor:
                    count += target.execute(statement, [row[at] for at in chosen]).rowcount
            except sqlite3.DatabaseError as error:
                if "no such table" in str(error):
                    return count, not _unreadable(connection)
                log.debug("salvage of %s from %s (%s): %s", table, source, direction, error)
                continue
            return count, True
    return count, False


def _unreadable(connection: sqlite3.Connection) -> bool:
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.DatabaseError:
        return True
    return False


def copy_path(path: Path) -> Path:
    """Where the copy of the database lies."""
    return path.with_name(f"{path.name}.copy")


def take_copy(path: Path) -> None:
    """Write a consistent copy beside the database (used only when the database is damaged later)."""
    temporary = path.with_name(f"{path.name}.copying")
    temporary.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("VACUUM INTO ?", (str(temporary),))
    os.chmod(temporary, 0o600)
    _sync(temporary)
    os.rename(temporary, copy_path(path))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def hold_reserve(path: Path) -> None:
    """Keep some disk back; quietly without effect when there is none to keep."""
    reserve = path.with_name(f"{path.name}.reserve")
    with contextlib.suppress(FileNotFoundError):
        if reserve.stat().st_blocks * 512 >= RESERVE:
            return
    with contextlib.suppress(OSError):
        fd = os.open(reserve, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, RESERVE)
        except OSError:
            os.unlink(reserve)
            raise
        finally:
            os.close(fd)


def give_reserve(path: Path) -> bool:
    """Give the reserve back to the disk; whether there was one."""
    try:
        os.unlink(path.with_name(f"{path.name}.reserve"))
    except FileNotFoundError:
        return False
    log.warning("metadata: the disk is full, the reserve at %s was given up", path.parent)
    return True
