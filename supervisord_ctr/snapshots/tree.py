"""What all local snapshotters share: records in memory, directories by number, crash-safe order.

    ROOT/snapshots/NUMBER/    one snapshot; the number is its record's id and never used twice
    ROOT/notes/NUMBER.json    what its record says, for when the records are lost
    ROOT/trash/NUMBER/        a removed one on its way out

The records are the truth: a directory without a record is the rest of an interrupted call and is
removed by `cleanup`. So a directory is made before its record, and a record is removed before its
directory. After damage to the records, `adopt` makes them again from the notes, so that no running
container's files are taken for rubbish (P6).
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
import logging
import os
import shutil
import stat
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from supervisord_ctr import durable, faults, filters
from supervisord_ctr.aio import Executors, KeyedLock
from supervisord_ctr.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    from_os_error,
)
from supervisord_ctr.linux.files import spread_subdirectories
from supervisord_ctr.model import Mount, SnapshotInfo, SnapshotKind, Usage
from supervisord_ctr.names import LABEL_GID_MAPPING, LABEL_UID_MAPPING
from supervisord_ctr.snapshots.interface import (
    Records,
    SnapshotRecord,
)

log = logging.getLogger(__name__)

_KINDS = {SnapshotKind.ACTIVE: "active", SnapshotKind.VIEW: "view", SnapshotKind.COMMITTED: "committed"}

MADE = faults.declare("snapshot.create.directory", "the directory of a snapshot exists, its record does not")
RECORDED = faults.declare("snapshot.create.recorded", "a snapshot's record exists, no namespace knows of it yet")
COMMITTING = faults.declare("snapshot.commit.before", "a snapshot was measured, it is still active")
COMMITTED = faults.declare("snapshot.commit.recorded", "a snapshot is committed, its namespace still has the key")
REMOVED = faults.declare("snapshot.remove.recorded", "a snapshot's record is gone, its directory is not")


class LocalSnapshotter(abc.ABC):
    """Base of the local snapshotters; a subclass makes directories and says how to mount them."""

    capabilities: frozenset[str] = frozenset()

    def __init__(self, name: str, root: Path, records: Records, executors: Executors) -> None:
        self.name = name
        self.root = Path(root)
        self.executors = executors
        self._records = records
        self._by_key: dict[str, SnapshotRecord] = {}
        self._by_id: dict[int, SnapshotRecord] = {}
        self._children: Counter[int] = Counter()
        self._making: set[int] = set()
        self._reserved: set[str] = set()
        self._accounted: dict[str, Usage] = {}
        self._locks = KeyedLock()
        self._next = 1

    # For subclasses.

    @abc.abstractmethod
    def make(self, number: int, kind: SnapshotKind, parents: Sequence[int], owner: tuple[int, int] | None) -> None:
        """Make the directory `number`. Blocks. `parents` are the ids below, nearest first."""

    @abc.abstractmethod
    def mount_list(self, record: SnapshotRecord, parents: Sequence[int]) -> tuple[Mount, ...]:
        """How to mount an active snapshot or a view."""

    @abc.abstractmethod
    def changes_dir(self, number: int) -> Path:
        """The directory whose disk usage is the snapshot's."""

    def directory(self, number: int) -> Path:
        """The directory of a snapshot."""
        return self.root / "snapshots" / str(number)

    # The interface (see `Snapshotter`).

    async def open(self, *, adopt: bool = False) -> None:
        """Load the records and remove what interrupted calls left; with `adopt` make lost records from notes."""
        for folder in (self.root, *(self.root / name for name in ("snapshots", "notes", "trash"))):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        spread_subdirectories(self.root / "snapshots")
        self._by_key.clear()
        self._by_id.clear()
        self._children.clear()
        for record in await self._records.load():
            self._by_key[record.key] = self._by_id[record.id] = record
        for record in self._by_id.values():
            if record.parent:
                self._children[record.parent] += 1
        numbers = [int(name) for name in os.listdir(self.root / "snapshots") if name.isdigit()]
        self._next = max((*self._by_id, *numbers, 0)) + 1
        if adopt:
            await self._adopt(numbers)
        await self.cleanup()

    async def _adopt(self, numbers: Sequence[int]) -> None:
        """Make records for directories that have a note and no record; parents before children."""
        notes = {}
        for number in numbers:
            if number not in self._by_id and (found := _read_note(self._note(number))) is not None:
                notes[number] = found
        for number in sorted(notes):
            record = notes[number]
            if record.key in self._by_key or (record.parent and record.parent not in {*self._by_id, *notes}):
                log.warning("snapshotter %s: the note of directory %d does not fit, it is left out", self.name, number)
                continue
            await self._records.put(record)
            self._by_key[record.key] = self._by_id[number] = record
            if record.parent:
                self._children[record.parent] += 1
        log.warning("snapshotter %s: %d records were made again from notes", self.name, len(notes))

    def _note(self, number: int) -> Path:
        return self.root / "notes" / f"{number}.json"

    def _write_note(self, record: SnapshotRecord) -> None:
        durable.write_atomic(self._note(record.id), json.dumps({
            "id": record.id, "key": record.key, "parent": record.parent, "kind": int(record.kind),
            "created_at": record.created_at, "updated_at": record.updated_at, "labels": dict(record.labels),
            "size": record.size, "inodes": record.inodes,
        }).encode(), sync=False)

    async def close(self) -> None:  # noqa: B027  not every one holds something
        """Nothing to let go of."""

    def _get(self, key: str) -> SnapshotRecord:
        try:
            return self._by_key[key]
        except KeyError:
            raise NotFound(f"snapshot {key}: does not exist", kind="snapshot", key=key) from None

    def _info(self, record: SnapshotRecord) -> SnapshotInfo:
        parent = self._by_id.get(record.parent)
        return SnapshotInfo(
            record.key, parent.key if parent else "", record.kind, record.created_at, record.updated_at,
            dict(record.labels),
        )

    def _ancestors(self, number: int) -> list[int]:
        chain = []
        while number:
            chain.append(number)
            record = self._by_id.get(number)
            if record is None:
                raise NotFound(f"snapshotter {self.name}: parent {number} is missing", kind="snapshot", key=str(number))
            number = record.parent
        return chain

    async def stat(self, key: str) -> SnapshotInfo:
        """See `Snapshotter.stat`."""
        return self._info(self._get(key))

    async def update(self, info: SnapshotInfo, fieldpaths: Sequence[str] = ()) -> SnapshotInfo:
        """See `Snapshotter.update`."""
        async with self._locks.hold(info.name):
            record = self._get(info.name)
            labels = _updated_labels(record, info.labels, fieldpaths)
            record = replace(record, labels=labels, updated_at=time.time())
            await self._records.put(record, durable=False)
            self._by_key[record.key] = self._by_id[record.id] = record
            return self._info(record)

    async def usage(self, key: str) -> Usage:
        """See `Snapshotter.usage`."""
        record = self._get(key)
        if record.kind == SnapshotKind.ACTIVE:
            return await self.executors.run_io(disk_usage, self.changes_dir(record.id))
        return Usage(record.size, record.inodes)

    def account(self, key: str, usage: Usage) -> None:
        """See `Snapshotter.account`."""
        if key in self._by_key:
            self._accounted[key] = usage

    async def mounts(self, key: str) -> tuple[Mount, ...]:
        """See `Snapshotter.mounts`."""
        record = self._get(key)
        if record.kind == SnapshotKind.COMMITTED:
            raise FailedPrecondition(f"snapshot {key} is not active or a view", kind="snapshot", key=key)
        return self.mount_list(record, self._ancestors(record.parent))

    async def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> tuple[Mount, ...]:
        """See `Snapshotter.prepare`."""
        return await self._create(SnapshotKind.ACTIVE, key, parent, labels or {})

    async def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> tuple[Mount, ...]:
        """See `Snapshotter.view`."""
        return await self._create(SnapshotKind.VIEW, key, parent, labels or {})

    async def _create(
        self, kind: SnapshotKind, key: str, parent: str, labels: Mapping[str, str]
    ) -> tuple[Mount, ...]:
        async with self._locks.hold(key):
            if key in self._by_key or key in self._reserved:
                raise AlreadyExists(f"snapshot {key}: already exists", kind="snapshot", key=key)
            below = self._parent(parent)
            owner = mapped_root(labels)
            number, self._next = self._next, self._next + 1
            now = time.time()
            kept = {name: value for name, value in labels.items() if value}
            record = SnapshotRecord(number, key, below, kind, now, now, kept)
            parents = self._ancestors(below)
            # From here on the parent cannot be removed and the directory is nobody's rubbish.
            self._making.add(number)
            if below:
                self._children[below] += 1
            try:
                await self._make(record, parents, owner)
            except BaseException:
                if below:
                    self._children[below] -= 1
                raise
            finally:
                self._making.discard(number)
            self._by_key[key] = self._by_id[number] = record
        return self.mount_list(record, parents)

    async def _make(self, record: SnapshotRecord, parents: Sequence[int], owner: tuple[int, int] | None) -> None:
        try:
            await self.executors.run_io(self._make_noted, record, parents, owner)
            faults.point(MADE)
            await self._records.put(record, durable=False)
            faults.point(RECORDED)
        except BaseException as error:
            await asyncio.shield(self.executors.run_io(self._discard, str(record.id)))
            if isinstance(error, OSError):
                raise from_os_error(error, f"snapshot {record.key}") from error
            raise

    def _make_noted(
        self, record: SnapshotRecord, parents: Sequence[int], owner: tuple[int, int] | None
    ) -> None:
        self.make(record.id, record.kind, parents, owner)
        self._write_note(record)

    def _parent(self, name: str) -> int:
        if not name:
            return 0
        record = self._by_key.get(name)
        if record is None:
            raise NotFound(f"parent snapshot {name}: does not exist", kind="snapshot", key=name)
        if record.kind != SnapshotKind.COMMITTED:
            raise InvalidArgument(f"parent {name!r} is not a committed snapshot", kind="snapshot", key=name)
        return record.id

    async def commit(
        self, name: str, key: str, labels: Mapping[str, str] | None = None, *, parent: str | None = None
    ) -> None:
        """See `Snapshotter.commit`."""
        async with self._locks.hold(key):
            if name in self._by_key or name in self._reserved:
                raise AlreadyExists(f"committed snapshot {name}: already exists", kind="snapshot", key=name)
            self._reserved.add(name)
            try:
                await self._commit(name, self._get(key), labels or {}, parent)
            finally:
                self._reserved.discard(name)

    async def _commit(
        self, name: str, record: SnapshotRecord, labels: Mapping[str, str], parent: str | None
    ) -> None:
        key = record.key
        if record.kind != SnapshotKind.ACTIVE:
            raise FailedPrecondition(f"snapshot {key!r} is not active", kind="snapshot", key=key)
        below = self._rebased(record, parent)
        if below != record.parent:
            self._children[below] += 1
        try:
            usage = self._accounted.get(key)
            if usage is None:
                usage = await self.executors.run_io(disk_usage, self.changes_dir(record.id))
            faults.point(COMMITTING)
            now = time.time()
            committed = replace(
                record, key=name, parent=below, kind=SnapshotKind.COMMITTED, created_at=now, updated_at=now,
                labels={label: value for label, value in labels.items() if value},
                size=usage.size, inodes=usage.inodes,
            )
            await self.executors.run_io(self._write_note, committed)
            await self._records.put(committed, durable=False)
        except BaseException:
            if below != record.parent:
                self._children[below] -= 1
            raise
        faults.point(COMMITTED)
        self._accounted.pop(key, None)
        del self._by_key[key]
        self._by_key[name] = self._by_id[record.id] = committed

    def _rebased(self, record: SnapshotRecord, parent: str | None) -> int:
        if not parent:
            return record.parent
        recorded = self._by_id.get(record.parent)
        if recorded is not None and recorded.key == parent:
            return record.parent
        if record.parent or "rebase" not in self.capabilities:
            raise InvalidArgument(
                f"cannot change parent of active snapshot {record.key!r} on commit", kind="snapshot", key=record.key
            )
        below = self._by_key.get(parent)
        if below is None:
            raise NotFound(f"parent snapshot {parent}: does not exist", kind="snapshot", key=parent)
        if below.kind != SnapshotKind.COMMITTED:
            raise FailedPrecondition(f"parent {parent!r} is not committed", kind="snapshot", key=parent)
        return below.id

    async def remove(self, key: str) -> None:
        """See `Snapshotter.remove`."""
        async with self._locks.hold(key):
            record = self._get(key)
            if self._children[record.id] > 0:
                raise FailedPrecondition(f"cannot remove snapshot {key} with child", kind="snapshot", key=key)
            # Out of memory first: nobody may build on it while the record goes.
            del self._by_key[key], self._by_id[record.id]
            try:
                await self._records.delete([record.id], durable=False)
            except BaseException:
                self._by_key[key] = self._by_id[record.id] = record
                raise
            faults.point(REMOVED)
            self._children.pop(record.id, None)
            if record.parent:
                self._children[record.parent] -= 1
            self._accounted.pop(key, None)
        await self.executors.run_io(self._discard, str(record.id))

    def _discard(self, name: str) -> None:
        """Rename a directory away, so that its number is free of it at once, then remove it."""
        trash = self.root / "trash" / name
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.root / "notes" / f"{name}.json")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.root / "snapshots" / name, trash)
        remove_tree(trash)

    async def walk(self, filter_texts: Sequence[str] = ()) -> list[SnapshotInfo]:
        """See `Snapshotter.walk`."""
        matching = filters.parse(filter_texts)
        infos = (self._info(self._by_key[key]) for key in sorted(self._by_key))
        return [info for info in infos if matching.matches(_adaptor(info))]

    async def cleanup(self) -> int:
        """See `Snapshotter.cleanup`."""
        def leftovers() -> list[str]:
            return os.listdir(self.root / "snapshots")

        names = await self.executors.run_io(leftovers)
        # Listed first, compared second: what was being made at the listing is made or gone now.
        orphans = [
            name for name in names
            if not (name.isdigit() and (int(name) in self._by_id or int(name) in self._making))
        ]
        if orphans:
            log.info("snapshotter %s: removing %d unrecorded directories", self.name, len(orphans))

        def remove() -> int:
            for name in orphans:
                self._discard(name)
            for note in os.listdir(self.root / "notes"):
                number = note.partition(".")[0]
                if not (number.isdigit() and (int(number) in self._by_id or int(number) in self._making)):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(self.root / "notes" / note)
            rest = os.listdir(self.root / "trash")
            for name in rest:
                remove_tree(self.root / "trash" / name)
            return len(orphans) + len(rest)

        return await self.executors.run_io(remove)

    def strays(self) -> list[tuple[str, int]]:
        """Directories without a record, and removed ones that are still there: path and size. Blocks."""
        found = [
            self.root / "snapshots" / name for name in os.listdir(self.root / "snapshots")
            if not (name.isdigit() and (int(name) in self._by_id or int(name) in self._making))
        ]
        found += [self.root / "trash" / name for name in os.listdir(self.root / "trash")]
        return [(str(path), disk_usage(path).size) for path in found]

    def upper_dir(self, key: str) -> Path | None:
        """See `Snapshotter.upper_dir`."""
        record = self._get(key)
        return self.changes_dir(record.id) if record.kind == SnapshotKind.ACTIVE else None

    def missing(self) -> list[str]:
        """Keys whose directory is gone from the disk (for the report of damage)."""
        return [
            record.key for record in self._by_id.values()
            if record.kind != SnapshotKind.VIEW and not self.directory(record.id).is_dir()
        ]


def _read_note(path: Path) -> SnapshotRecord | None:
    """The record in a note; None when there is none or it is unreadable."""
    try:
        found = json.loads(path.read_bytes())
        return SnapshotRecord(**{**found, "kind": SnapshotKind(found["kind"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _updated_labels(record: SnapshotRecord, wanted: Mapping[str, str], fieldpaths: Sequence[str]) -> dict[str, str]:
    labels = dict(wanted) if not fieldpaths else dict(record.labels)
    for path in fieldpaths:
        if path.startswith("labels."):
            name = path.removeprefix("labels.")
            labels[name] = wanted.get(name, "")
        elif path == "labels":
            labels = dict(wanted)
        else:
            raise InvalidArgument(f"cannot update {path!r} field on snapshot {record.key!r}", key=record.key)
    return {name: value for name, value in labels.items() if value}


def _adaptor(info: SnapshotInfo) -> filters.Adaptor:
    def field(path: Sequence[str]) -> tuple[str, bool]:
        match list(path):
            case ["kind", *_]:
                return _KINDS.get(info.kind, ""), info.kind in _KINDS
            case ["name", *_]:
                return info.name, True
            case ["parent", *_]:
                return info.parent, True
            case ["labels", *rest]:
                return info.labels.get(".".join(rest), ""), ".".join(rest) in info.labels
            case _:
                return "", False

    return field


def mapped_root(labels: Mapping[str, str]) -> tuple[int, int] | None:
    """Host owner of the container's root, from the mapping labels ("CONTAINER:HOST:SIZE[,…]"); None without them."""
    uid, gid = labels.get(LABEL_UID_MAPPING, ""), labels.get(LABEL_GID_MAPPING, "")
    if not uid and not gid:
        return None
    return _map_zero(uid, LABEL_UID_MAPPING), _map_zero(gid, LABEL_GID_MAPPING)


def _map_zero(text: str, label: str) -> int:
    for part in text.split(","):
        fields = part.split(":")
        if len(fields) != 3 or not all(field.isdigit() for field in fields):
            raise InvalidArgument(f"label {label}: {text!r} is not container:host:size", kind="label", key=label)
        container, host, size = map(int, fields)
        if container == 0 and size > 0:
            return host
    raise InvalidArgument(f"label {label}: {text!r} does not map root", kind="label", key=label)


def disk_usage(path: Path) -> Usage:
    """Disk used below `path`, itself included: allocated blocks and inodes, hard links counted once."""
    seen: set[tuple[int, int]] = set()
    size = inodes = 0
    folders = [os.fspath(path)]
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return Usage()
    size += found.st_blocks * 512
    inodes += 1
    while folders:
        try:
            entries = os.scandir(folders.pop())
        except FileNotFoundError:
            continue  # it went while we looked; a running container may do that
        with entries:
            for entry in entries:
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
                    identity = (found.st_dev, found.st_ino)
                    if identity in seen:
                        continue
                    seen.add(identity)
                size += found.st_blocks * 512
                inodes += 1
                if stat.S_ISDIR(found.st_mode):
                    folders.append(entry.path)
    return Usage(size, inodes)


def remove_tree(path: Path) -> None:
    """Remove a directory tree without following links; what cannot be removed is logged and stays."""
    if not os.path.lexists(path):
        return
    failures: list[str] = []

    def failed(_: object, name: str, error: BaseException) -> None:
        if not isinstance(error, FileNotFoundError):
            failures.append(f"{name}: {error}")

    shutil.rmtree(path, onerror=lambda call, name, info: failed(call, name, info[1]))
    if failures:
        log.warning("snapshots: %d entries below %s could not be removed, first %s", len(failures), path, failures[0])
