"""The overlayfs snapshotter: a directory of changes for each snapshot, stacked by the kernel.

    ROOT/snapshots/NUMBER/fs      the changes: upper directory of an active one, a lower one of its children
    ROOT/snapshots/NUMBER/work    overlay's work directory, of active ones only

Committing renames nothing on disk: the record's kind changes. The mounts are containerd's to the
letter, so that clients and shims of either side understand them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from supervisord_ctr.aio import Executors
from supervisord_ctr.errors import Unavailable
from supervisord_ctr.linux.mounts import mount_all, unmount_all
from supervisord_ctr.model import Mount, SnapshotKind
from supervisord_ctr.names import CAPABILITY_REMAP_IDS, LABEL_GID_MAPPING, LABEL_UID_MAPPING
from supervisord_ctr.snapshots.interface import (
    CAPABILITY_REBASE,
    Records,
    SnapshotRecord,
)
from supervisord_ctr.snapshots.tree import LocalSnapshotter


class OverlaySnapshotter(LocalSnapshotter):
    """Layers as overlayfs mounts.

    `options` are further mount options; `index=off` is added where the kernel knows it (a layer is a
    lower directory of many mounts), `userxattr` inside a user namespace. With `remap_ids` the mounts
    carry `uidmap=` and `gidmap=` from the mapping labels.
    """

    def __init__(
        self,
        root: Path,
        records: Records,
        executors: Executors,
        *,
        name: str = "overlayfs",
        options: Sequence[str] = (),
        remap_ids: bool = False,
    ) -> None:
        super().__init__(name, root, records, executors)
        chosen = list(options)
        named = {option.partition("=")[0] for option in chosen}
        if "userxattr" not in named and in_user_namespace():
            chosen.append("userxattr")
        if "index" not in named and Path("/sys/module/overlay/parameters/index").exists():
            chosen.append("index=off")
        self._options = tuple(chosen)
        self._remap_ids = remap_ids
        self.capabilities = frozenset({CAPABILITY_REBASE} | ({CAPABILITY_REMAP_IDS} if remap_ids else set()))

    async def open(self, *, adopt: bool = False) -> None:
        """As the base; Unavailable where overlayfs cannot be mounted over `root` (then `native` still works)."""
        await super().open(adopt=adopt)
        await self.executors.run_io(self._probe)

    def _probe(self) -> None:
        """Mount two empty directories over one another, for that is what every container will need."""
        with tempfile.TemporaryDirectory(prefix="probe-", dir=self.root / "trash") as folder:
            for name in ("lower", "upper", "work", "merged"):
                os.mkdir(f"{folder}/{name}", 0o700)
            words = (f"lowerdir={folder}/lower", f"upperdir={folder}/upper", f"workdir={folder}/work", *self._options)
            try:
                mount_all([Mount("overlay", "overlay", words)], f"{folder}/merged")
            except OSError as error:
                raise Unavailable(
                    f"snapshotter {self.name}: overlayfs cannot be mounted over {self.root}: {error}",
                    kind="snapshotter", key=self.name,
                ) from error
            unmount_all(f"{folder}/merged")

    def changes_dir(self, number: int) -> Path:
        """The upper directory."""
        return self.directory(number) / "fs"

    def make(self, number: int, kind: SnapshotKind, parents: Sequence[int], owner: tuple[int, int] | None) -> None:
        """Make `fs`, owned as the layer below is (or as the mapping says), and `work` for an active one."""
        home = self.directory(number)
        home.mkdir(mode=0o700)
        changes = home / "fs"
        changes.mkdir(mode=0o755)
        os.chmod(changes, 0o755)
        if kind == SnapshotKind.ACTIVE:
            (home / "work").mkdir(mode=0o711)
        if owner is None and parents:
            found = os.lstat(self.changes_dir(parents[0]))
            owner = found.st_uid, found.st_gid
        if owner is not None and owner != (os.getuid(), os.getgid()):
            os.chown(changes, *owner, follow_symlinks=False)

    def mount_list(self, record: SnapshotRecord, parents: Sequence[int]) -> tuple[Mount, ...]:
        """A bind mount where one directory says it all, an overlay mount otherwise."""
        options: list[str] = []
        if self._remap_ids:
            for word, label in (("uidmap", LABEL_UID_MAPPING), ("gidmap", LABEL_GID_MAPPING)):
                if label in record.labels:
                    options.append(f"{word}={record.labels[label]}")
        active = record.kind == SnapshotKind.ACTIVE
        if not parents:
            source = str(self.changes_dir(record.id))
            return (Mount("bind", source, (*options, "rw" if active else "ro", "rbind")),)
        if not active and len(parents) == 1:
            return (Mount("bind", str(self.changes_dir(parents[0])), (*options, "ro", "rbind")),)
        if active:
            options.append(f"workdir={self.directory(record.id) / 'work'}")
            options.append(f"upperdir={self.changes_dir(record.id)}")
        options.append("lowerdir=" + ":".join(str(self.changes_dir(number)) for number in parents))
        return (Mount("overlay", "overlay", (*options, *self._options)),)


def in_user_namespace() -> bool:
    """Whether this process is not in the initial user namespace (user_namespaces(7))."""
    try:
        words = Path("/proc/self/uid_map").read_text().split()
    except OSError:
        return False
    return words != ["0", "0", "4294967295"]
