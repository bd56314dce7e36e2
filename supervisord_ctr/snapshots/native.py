"""The native snapshotter: whole copies, for where overlayfs cannot mount.

    ROOT/snapshots/NUMBER/    the whole tree of one snapshot

Preparing copies the parent (sharing extents where the filesystem can), so it costs what the tree
costs; a view is the parent itself, read-only.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from supervisord_ctr.aio import Executors
from supervisord_ctr.model import Mount, SnapshotKind
from supervisord_ctr.snapshots.interface import Records, SnapshotRecord
from supervisord_ctr.snapshots.tree import LocalSnapshotter

#: ioctl_ficlone(2).
_FICLONE = 0x40049409


class NativeSnapshotter(LocalSnapshotter):
    """Layers as copies of directories."""

    def __init__(self, root: Path, records: Records, executors: Executors, *, name: str = "native") -> None:
        super().__init__(name, root, records, executors)

    def changes_dir(self, number: int) -> Path:
        """The tree itself: a copy shares nothing, so all of it is the snapshot's."""
        return self.directory(number)

    def make(self, number: int, kind: SnapshotKind, parents: Sequence[int], owner: tuple[int, int] | None) -> None:
        """Copy the parent for an active snapshot; an empty directory otherwise."""
        home = self.directory(number)
        home.mkdir(mode=0o755)
        os.chmod(home, 0o755)
        if parents and kind == SnapshotKind.ACTIVE:
            copy_tree(self.directory(parents[0]), home)
        if owner is not None:
            os.chown(home, *owner, follow_symlinks=False)

    def mount_list(self, record: SnapshotRecord, parents: Sequence[int]) -> tuple[Mount, ...]:
        """One bind mount."""
        if record.kind == SnapshotKind.VIEW:
            source = self.directory(parents[0] if parents else record.id)
            return (Mount("bind", str(source), ("rbind", "ro")),)
        return (Mount("bind", str(self.directory(record.id)), ("rbind", "rw")),)

    def upper_dir(self, key: str) -> Path | None:
        """The tree, but only for a snapshot without parent."""
        record = self._get(key)
        return super().upper_dir(key) if record.parent == 0 else None


def copy_tree(source: Path, target: Path) -> None:
    """Copy everything below `source` into the existing `target`: owners, modes, times, xattrs, hard links, devices.

    No link is followed. Data go by reflink where possible, else by copy_file_range(2), holes stay holes.
    """
    links: dict[tuple[int, int], str] = {}
    # Times of a folder are set after its entries were made.
    finished: list[tuple[str, os.stat_result]] = []
    folders = [(os.fspath(source), os.fspath(target))]
    while folders:
        here, there = folders.pop()
        found = os.lstat(here)
        finished.append((there, found))
        _copy_attributes(here, there, found)
        with os.scandir(here) as entries:
            for entry in entries:
                goal = os.path.join(there, entry.name)
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(found.st_mode):
                    os.mkdir(goal, 0o700)
                    folders.append((entry.path, goal))
                    continue
                identity = (found.st_dev, found.st_ino)
                if identity in links:
                    os.link(links[identity], goal, follow_symlinks=False)
                    continue
                if found.st_nlink > 1:
                    links[identity] = goal
                _copy_entry(entry.path, goal, found)
    for there, found in reversed(finished):
        os.utime(there, ns=(found.st_atime_ns, found.st_mtime_ns))


def _copy_entry(here: str, there: str, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        os.symlink(os.readlink(here), there)
    elif stat.S_ISREG(found.st_mode):
        _copy_data(here, there, found.st_size)
    else:
        os.mknod(there, found.st_mode, found.st_rdev)
    _copy_attributes(here, there, found)
    os.utime(there, ns=(found.st_atime_ns, found.st_mtime_ns), follow_symlinks=False)


def _copy_attributes(here: str, there: str, found: os.stat_result) -> None:
    os.chown(there, found.st_uid, found.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(found.st_mode):
        os.chmod(there, stat.S_IMODE(found.st_mode))
    for name in os.listxattr(here, follow_symlinks=False):
        os.setxattr(there, name, os.getxattr(here, name, follow_symlinks=False), follow_symlinks=False)


def _copy_data(here: str, there: str, size: int) -> None:
    source = os.open(here, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        target = os.open(there, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.ioctl(target, _FICLONE, source)
            except OSError:
                _copy_extents(source, target, size)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _copy_extents(source: int, target: int, size: int) -> None:
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError:
            break  # nothing but a hole up to the end
        end = os.lseek(source, at, os.SEEK_HOLE)
        while at < end:
            count = os.copy_file_range(source, target, end - at, at, at)
            if count == 0:
                break
            at += count
        at = end
    os.ftruncate(target, size)
