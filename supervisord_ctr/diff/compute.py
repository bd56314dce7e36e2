"""Compute: what changed between two directories, as an OCI layer.

Owns the comparison (two trees walked side by side, in name order) and the archive that comes of it:
changed and new entries whole, removed ones as whiteouts, directories above them for their attributes.
With `source_date_epoch` no time is later than it and the bytes depend on the trees alone. Blocking.

Source: OCI image specification, layer.md, "Representing Changes".
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from supervisord_ctr.diff.tarwriter import TarWriter
from supervisord_ctr.errors import from_os_error
from supervisord_ctr.linux import files

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_COMPARE = 1 << 17


@dataclass(frozen=True, slots=True)
class Layer:
    """The uncompressed layer that was written."""

    diff_id: str
    size: int
    entries: int


def write_layer(
    lower: Path | None, upper: Path, sink: Callable[[bytes], object], *, source_date_epoch: float | None = None
) -> Layer:
    """Write the changes from `lower` (None: the empty directory) to `upper` as a tar stream into `sink`.

    The translated `OSError` when a tree cannot be read.
    """
    digest = hashlib.sha256()
    size = 0

    def out(data: bytes) -> None:
        nonlocal size
        digest.update(data)
        size += len(data)
        sink(data)

    bound = None if source_date_epoch is None else int(source_date_epoch * 1e9)
    comparison = _Comparison(TarWriter(out), bound)
    try:
        new = os.open(upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        old = os.open(lower, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if lower is not None else -1
        try:
            comparison.directory(old, new, b"")
        finally:
            os.close(new)
            if old >= 0:
                os.close(old)
    except OSError as error:
        raise from_os_error(error, "make layer of") from error
    comparison.writer.finish()
    return Layer(f"sha256:{digest.hexdigest()}", size, comparison.entries)


class _Comparison:
    """The state of one comparison."""

    def __init__(self, writer: TarWriter, bound: int | None) -> None:
        self.writer = writer
        self.entries = 0
        self._bound = bound
        self._links: dict[tuple[int, int], bytes] = {}
        # Directories above the current one that are not in the archive yet: name and descriptor.
        self._pending: list[tuple[bytes, int]] = []

    def directory(self, old: int, new: int, path: bytes) -> None:
        """Compare two open directories; `old` is -1 where there is none."""
        before = set(map(os.fsencode, os.listdir(old))) if old >= 0 else set()
        after = set(map(os.fsencode, os.listdir(new)))
        for name in sorted(before | after):
            below = path + b"/" + name if path else name
            if name not in after:
                self._flush_pending()
                self._add_whiteout(path, name)
                continue
            status = os.stat(name, dir_fd=new, follow_symlinks=False)
            other = os.stat(name, dir_fd=old, follow_symlinks=False) if name in before else None
            if stat.S_ISDIR(status.st_mode):
                self._enter(old, new, name, below, status, other)
            elif other is None or not _same(old, new, name, other, status):
                self._flush_pending()
                self._add(new, name, below, status)

    def _enter(
        self, old: int, new: int, name: bytes, path: bytes, status: os.stat_result, other: os.stat_result | None
    ) -> None:
        inner = os.open(name, _OPEN, dir_fd=new)
        was = os.open(name, _OPEN, dir_fd=old) if other is not None and stat.S_ISDIR(other.st_mode) else -1
        try:
            depth = len(self._pending)
            self._pending.append((path, inner))
            if was < 0 or other is None or not _same_attributes(old, new, name, other, status):
                self._flush_pending()
            self.directory(was, inner, path)
            del self._pending[depth:]
        finally:
            os.close(inner)
            if was >= 0:
                os.close(was)

    def _flush_pending(self) -> None:
        """Write the directories that lead to a change, once each."""
        for index, (path, fd) in enumerate(self._pending):
            if fd >= 0:
                self._add(fd, b"", path, os.fstat(fd))
                self._pending[index] = (path, -1)

    def _add_whiteout(self, path: bytes, name: bytes) -> None:
        full = path + b"/.wh." + name if path else b".wh." + name
        self.entries += 1
        self.writer.add(full, stat.S_IFREG, mtime=0)

    def _add(self, parent: int, name: bytes, path: bytes, status: os.stat_result) -> None:
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFSOCK:
            return  # a socket without its server is nothing
        mtime = status.st_mtime_ns if self._bound is None else min(status.st_mtime_ns, self._bound)
        link = b""
        self.entries += 1
        if kind == stat.S_IFLNK:
            link = os.readlink(name, dir_fd=parent)
        elif kind != stat.S_IFDIR and status.st_nlink > 1:
            first = self._links.setdefault((status.st_dev, status.st_ino), path)
            if first != path:
                self.writer.add_hard_link(path, first, status, mtime)
                return
        xattrs = _xattrs(parent, name)
        self.writer.add(
            path + b"/" if kind == stat.S_IFDIR else path, kind, mode=stat.S_IMODE(status.st_mode), uid=status.st_uid,
            gid=status.st_gid, size=status.st_size if kind == stat.S_IFREG else 0, mtime=mtime, link=link,
            device=status.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0, xattrs=xattrs,
        )
        if kind == stat.S_IFREG and status.st_size:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                self.writer.body(fd, status.st_size)
            finally:
                os.close(fd)


def _xattrs(parent: int, name: bytes) -> dict[bytes, bytes]:
    """The attributes of `name` (b"": of the directory itself) that go into a layer: capabilities and users' own."""
    place = os.fsdecode(name)
    found = {}
    names = files.list_xattrs_at(parent, place) if name else os.listxattr(parent)
    for attribute in sorted(names):
        if attribute == "security.capability" or (
            attribute.startswith("user.") and not attribute.startswith("user.overlay.")
        ):
            value = files.get_xattr_at(parent, place, attribute) if name else os.getxattr(parent, attribute)
            if value is not None:
                found[os.fsencode(attribute)] = value
    return found


def _same_attributes(old: int, new: int, name: bytes, before: os.stat_result, after: os.stat_result) -> bool:
    if (before.st_mode, before.st_uid, before.st_gid, before.st_rdev) != (
        after.st_mode, after.st_uid, after.st_gid, after.st_rdev
    ):
        return False
    return _xattrs(old, name) == _xattrs(new, name)


def _same(old: int, new: int, name: bytes, before: os.stat_result, after: os.stat_result) -> bool:
    """Whether nothing that a layer carries differs; contents are read where the times cannot tell."""
    if (before.st_dev, before.st_ino) == (after.st_dev, after.st_ino):
        return True
    if not _same_attributes(old, new, name, before, after):
        return False
    if stat.S_ISLNK(after.st_mode):
        return os.readlink(name, dir_fd=old) == os.readlink(name, dir_fd=new)
    if not stat.S_ISREG(after.st_mode):
        return True
    if before.st_size != after.st_size or before.st_mtime_ns != after.st_mtime_ns:
        # Another time with the same bytes is a change, too: the layer carries times.
        return False
    if before.st_mtime_ns % 1_000_000_000:
        return True
    return _same_contents(old, new, name)


def _same_contents(old: int, new: int, name: bytes) -> bool:
    one = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=old)
    try:
        two = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=new)
        try:
            while True:
                left, right = os.read(one, _COMPARE), os.read(two, _COMPARE)
                if left != right:
                    return False
                if not left:
                    return True
        finally:
            os.close(two)
    finally:
        os.close(one)
