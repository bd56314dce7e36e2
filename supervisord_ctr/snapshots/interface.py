"""What a snapshotter is: the docstring of `Snapshotter` is the specification.

Owns the interface, the record of one snapshot and where records are kept (a Protocol that
`metadata` implements). Does not mount anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from supervisord_ctr.model import Mount, SnapshotInfo, SnapshotKind, Usage

#: Labels with this prefix are handed from metadata to the snapshotter.
INHERITED_LABELS = "containerd.io/snapshot/"
LABEL_SNAPSHOT_REF = "containerd.io/snapshot.ref"
#: An active snapshot prepared without parent may be committed onto one.
CAPABILITY_REBASE = "rebase"


@runtime_checkable
class Snapshotter(Protocol):
    """Filesystem states and the changes between them.

    Three kinds of snapshots share one space of names. An *active* one (`prepare`) is writable
    through its mounts; a *view* (`view`) is the same read-only; a *committed* one (`commit`) cannot
    change any more and may be a parent. An active snapshot never becomes committed: `commit`
    creates the committed one under `name` and the active `key` is gone. The parent "" is the empty
    directory. Everything that exists may be removed, children first.

    Every method raises NotFound for a key that does not exist. A method that raises has had no
    effect, apart from files that `cleanup` removes. What a method did survives the process when it
    returns; it survives the machine with the next durable write of the metadata, which follows every
    change at once. Concurrent calls for different keys are independent; for one key they are serialised.
    """

    @property
    def name(self) -> str:
        """The name it is known by ("overlayfs")."""
        ...

    @property
    def capabilities(self) -> frozenset[str]:
        """What it offers beyond this interface: `CAPABILITY_*`."""
        ...

    async def open(self, *, adopt: bool = False) -> None:
        """Make ready: called once, before anything else, after the record store is open.

        `adopt` says that records may have been lost: what is on disk is then taken up again where it
        can be, instead of being removed.
        """
        ...

    async def stat(self, key: str) -> SnapshotInfo:
        """The snapshot's kind, parent, labels and times."""
        ...

    async def update(self, info: SnapshotInfo, fieldpaths: Sequence[str] = ()) -> SnapshotInfo:
        """Change labels of `info.name`.

        `fieldpaths` are "labels" (replace all) or "labels.KEY" (set one; an empty value removes it); none means all
        mutable fields. InvalidArgument for any other path.
        """
        ...

    async def usage(self, key: str) -> Usage:
        """Disk used by the snapshot without its parents: recorded for committed, measured for active ones."""
        ...

    async def mounts(self, key: str) -> tuple[Mount, ...]:
        """How to mount an active snapshot or a view, at any time; FailedPrecondition for a committed one."""
        ...

    async def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> tuple[Mount, ...]:
        """Create an active snapshot on `parent` and return its mounts.

        AlreadyExists for a key in use; NotFound for an unknown parent; InvalidArgument for a parent
        that is not committed. A snapshotter that has the layer named by the label
        `containerd.io/snapshot.ref` already may raise AlreadyExists after committing it itself.
        """
        ...

    async def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> tuple[Mount, ...]:
        """Create a view of `parent`; as `prepare` otherwise."""
        ...

    async def commit(
        self, name: str, key: str, labels: Mapping[str, str] | None = None, *, parent: str | None = None
    ) -> None:
        """Turn the changes of the active `key` into the committed `name`.

        `labels` are those of the committed snapshot (the active one's are dropped). With the
        capability "rebase", `parent` puts a snapshot that was prepared without parent onto one;
        otherwise a `parent` that is not the recorded one is InvalidArgument. AlreadyExists for a name
        in use; FailedPrecondition for a view or a committed key.
        """
        ...

    async def remove(self, key: str) -> None:
        """Forget a snapshot; FailedPrecondition while it has children. Disk may be given back by `cleanup`."""
        ...

    async def walk(self, filters: Sequence[str] = ()) -> list[SnapshotInfo]:
        """The snapshots that match: fields name, parent, kind (active, view, committed), labels."""
        ...

    async def cleanup(self) -> int:
        """Remove what removed or interrupted snapshots left on disk; returns how many entries went."""
        ...

    async def close(self) -> None:
        """Let go of resources; twice is fine."""
        ...

    def account(self, key: str, usage: Usage) -> None:
        """Tell what the changes of an active snapshot use, so that `commit` need not measure them."""
        ...

    def upper_dir(self, key: str) -> Path | None:
        """Where an unmounted active layer can be written straight, without parents below; None if it cannot.

        Overlay: the upper directory, in overlay's own form (whiteouts as 0/0 devices, opaque xattrs).
        Native: the directory itself, only for a snapshot without parent.
        """
        ...


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """What a local snapshotter keeps of one snapshot; `id` names its directory, 0 as `parent` means none."""

    id: int
    key: str
    parent: int = 0
    kind: SnapshotKind = SnapshotKind.ACTIVE
    created_at: float = 0.0
    updated_at: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    size: int = 0
    inodes: int = 0


class Records(Protocol):
    """Where a local snapshotter's records live; one writer (the snapshotter), which caches them all."""

    async def load(self) -> list[SnapshotRecord]:
        """All records."""
        ...

    async def put(self, record: SnapshotRecord, *, durable: bool = True) -> None:
        """Insert or replace by id. `durable=False` leaves the sync to the next durable write of the same database."""
        ...

    async def delete(self, ids: Sequence[int], *, durable: bool = True) -> None:
        """Remove records; unknown ids are ignored."""
        ...
