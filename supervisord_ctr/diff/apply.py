"""Apply: one layer's tar stream into one directory, trusting nothing that the layer says.

Owns confinement (D4, S1), limits (S8) and whiteouts. Every parent directory is opened with
`openat2(RESOLVE_IN_ROOT)`; entries are then made relative to that descriptor with calls that follow
no link. A descriptor names a directory and not a path, so replacing a directory by a link while its
descriptor is cached leads nowhere new; the cache is emptied all the same.

What a name may be: absolute names and `a/../b` are taken as below the root, as containerd does.
Refused with InvalidArgument: a name or hard link that climbs out of the root, entries below a link
that replaced a directory of the same layer, entries below an absolute link of the same layer that
leads to nothing, owners beyond 2^31-1, anything above the limits. Reserved overlay attributes are
dropped and noted.

Nothing is synced here: the caller decides what survives a power cut.
Source: OCI image specification, layer.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from pathlib import Path

from supervisord_ctr import faults
from supervisord_ctr.diff.compression import Readable
from supervisord_ctr.diff.maker import OutOfOrder, Spread
from supervisord_ctr.diff.remove import remove_tree
from supervisord_ctr.diff.stream import Applied, LayerStream, Limits, NeedsLower
from supervisord_ctr.diff.tar import BLOCK, CHAR, DIRECTORY, FIFO, LINK, REGULAR, SYMLINK, Entry, TarReader
from supervisord_ctr.diff.whiteouts import Listing, Whiteouts
from supervisord_ctr.errors import InvalidArgument, from_os_error
from supervisord_ctr.linux import files

ENTRY = faults.declare("diff.apply.entry", "some entries of a layer are in its directory, the next one is not")
APPLIED = faults.declare("diff.apply.done", "all entries of a layer are in its directory, nobody was told")

_CACHED_PARENTS = 128
_MAX_ID = (1 << 31) - 1
_MAX_TIME = (1 << 63) - 1
_MAX_XATTRS = 1024
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PARENT = os.O_PATH | os.O_DIRECTORY


class LayerApplier:
    """Applies layers; blocking, one call per thread. `exact_umask` says that the process's umask is 0."""

    def __init__(self, *, exact_umask: bool = False) -> None:
        self._exact_umask = exact_umask

    def apply(
        self, stream: Readable, target: Path | int, *, limits: Limits | None = None, style: str = "plain",
        userxattr: bool = False, complete: bool = True, spread: Spread = Spread.NEVER,
    ) -> Applied:
        """Inflate `stream` and unpack it into `target` (a path or a directory's descriptor).

        `style` "plain" removes what whiteouts name; "overlay" writes overlayfs' own form. With
        `complete=False` lower layers exist that cannot be seen here. InvalidArgument for a hostile,
        damaged or oversized layer, NeedsLower, or the translated `OSError` with the entry's name. What
        was made stays: the directory is the caller's to discard. With `spread` a second process makes
        small files (`maker`); only for a process with one thread and a umask of 0.
        """
        limits = limits or Limits()
        root = files.open_root(target) if isinstance(target, Path) else os.dup(target)
        unpacking = _Unpacking(root, limits, style, userxattr, complete, self._exact_umask)
        try:
            # The fork first: the stream has a thread.
            if spread != Spread.NEVER and self._exact_umask:
                unpacking.spread(always=spread == Spread.ALWAYS)
            source = LayerStream(stream, limits)
            try:
                reader = TarReader(source.next_chunk)
                unpacking.run(reader)
                reader.drain()
                faults.point(APPLIED)
                return Applied(
                    source.diff_id(), source.size, unpacking.entries, tuple(unpacking.implied),
                    None if unpacking.replaced else (unpacking.disk, unpacking.inodes), tuple(unpacking.notes),
                )
            finally:
                source.close()
        finally:
            unpacking.end()
            os.close(root)


class _Unpacking:
    """The state of one layer being unpacked."""

    def __init__(self, root: int, limits: Limits, style: str, userxattr: bool, complete: bool, exact: bool) -> None:
        self._root = root
        self._limits = limits
        self._overlay = style == "overlay"
        self._opaque = "user.overlay.opaque" if userxattr else "trusted.overlay.opaque"
        self._complete = complete
        self._exact = exact
        self._owner = (os.geteuid(), os.getegid())
        self.entries = 0
        self.implied: list[bytes] = []
        self.notes: list[str] = []
        self.disk = 4096  # the root itself
        self.inodes = 1
        self.replaced = False
        self._size = 0
        # Parent path → (descriptor, whether new entries there inherit a group).
        self._parents: dict[bytes, tuple[int, bool]] = {}
        # Directories that the layer lists, with the times to set at the end.
        self._directories: dict[bytes, tuple[int, int]] = {}
        # Links of this layer that are absolute, and those that replaced a directory of this layer.
        self._absolute: set[bytes] = set()
        self._swapped: set[bytes] = set()
        # Everything of this layer; only kept where whiteouts remove files.
        self._made: set[bytes] = set()
        self._whiteouts = Whiteouts(self._overlay, self._opaque, self._is_made, self._forget)
        self._others: OutOfOrder | None = None

    def spread(self, *, always: bool) -> None:
        """Have small files made by a second process where their order does not matter."""
        with contextlib.closing(Listing(self._root)) as listing:
            empty = not listing.names
        if empty:
            with contextlib.suppress(OSError):  # no more processes, say: then by this one
                self._others = OutOfOrder(self._root, always=always)

    def run(self, reader: TarReader) -> None:
        """Unpack every entry, then set the directories' times."""
        deadline = time.monotonic() + self._limits.seconds
        most = self._limits.entries
        while (entry := reader.next()) is not None:
            self.entries += 1
            if self.entries > most:
                raise InvalidArgument(f"layer has more than {most} entries", kind="layer")
            if not self.entries & 0xFF and time.monotonic() > deadline:
                raise InvalidArgument(f"layer took more than {self._limits.seconds:g} s to unpack", kind="layer")
            faults.point(ENTRY)
            try:
                self._apply(entry, reader)
            except OSError as error:
                error.filename = None
                raise from_os_error(error, f"layer entry {os.fsdecode(entry.name)!r}") from error
        if self._others is not None:
            self._others.maker.flush()
        self._set_times()

    def end(self) -> None:
        """Let everything go; nothing is made any more then."""
        if self._others is not None:
            self._others.maker.close()
        self.close()

    def close(self) -> None:
        """Close the cached descriptors."""
        for fd, _ in self._parents.values():
            os.close(fd)
        self._parents.clear()

    # Names.

    def _clean(self, entry: Entry, name: bytes, what: str) -> bytes:
        """`name` without leading slash, ".", ".." and empty parts; "" is the root itself."""
        if len(name) > self._limits.name:
            raise InvalidArgument(
                f"layer entry {os.fsdecode(name[:64])!r}…: {what} of {len(name)} bytes is too long", kind="layer"
            )
        parts: list[bytes] = []
        for part in name.split(b"/"):
            if part == b"..":
                if not parts:
                    raise InvalidArgument(
                        f"layer entry {os.fsdecode(entry.name)!r}: {what} {os.fsdecode(name)!r} leads out of the root",
                        kind="layer",
                    )
                parts.pop()
            elif part and part != b".":
                parts.append(part)
        if len(parts) > self._limits.depth:
            raise InvalidArgument(
                f"layer entry {os.fsdecode(name[:64])!r}…: {what} is {len(parts)} levels deep, "
                f"at most {self._limits.depth} are allowed", kind="layer",
            )
        return b"/".join(parts)

    def _parent(self, entry: Entry, head: bytes) -> tuple[int, bool]:
        found = self._parents.get(head)
        if found is not None:
            return found
        if self._swapped or self._absolute:
            self._check_links(entry, head)
        try:
            fd = files.open_in_root(self._root, head, _PARENT)
        except FileNotFoundError:
            fd = self._make_parents(entry, head)
        if len(self._parents) >= _CACHED_PARENTS:
            self.close()
        status = os.fstat(fd)
        found = self._parents[head] = (fd, status.st_gid != self._owner[1])
        return found

    def _check_links(self, entry: Entry, head: bytes) -> None:
        """Refuse parents that lead through a hostile link of this layer."""
        position = 0
        while position >= 0:
            position = head.find(b"/", position + 1)
            prefix = head if position < 0 else head[:position]
            if prefix in self._swapped:
                raise InvalidArgument(
                    f"layer entry {os.fsdecode(entry.name)!r}: its parent {os.fsdecode(prefix)!r} is a link that "
                    "replaced a directory of the same layer", kind="layer",
                )
            if prefix in self._absolute:
                try:
                    os.close(files.open_in_root(self._root, prefix, _PARENT))
                except FileNotFoundError:
                    raise InvalidArgument(
                        f"layer entry {os.fsdecode(entry.name)!r}: its parent {os.fsdecode(prefix)!r} is an absolute "
                        "link to nothing in the layer", kind="layer",
                    ) from None

    def _make_parents(self, entry: Entry, head: bytes) -> int:
        """Make a missing parent directory; NeedsLower when a dangling link leads there and lower layers may know."""
        above = self._others.new_below(head) if self._others is not None else None
        if above is not None:
            fd, paths = self._make_new(entry, above, head)
        else:
            made: list[str] = []
            fd = files.make_dirs_in_root(self._root, head, 0o755, made)
            paths = [os.fsencode(path) for path in made]
        if not self._complete and any(not (head == path or head.startswith(path + b"/")) for path in paths):
            os.close(fd)
            raise NeedsLower(f"layer entry {os.fsdecode(entry.name)!r}: its parent is a link into a lower layer")
        for path in paths:
            if not self._exact:
                with files.opened_in_root(self._root, path, os.O_RDONLY | os.O_DIRECTORY) as directory:
                    os.fchmod(directory, 0o755)
        self.implied += paths
        if self._others is not None:
            for path in paths:
                self._others.made_directory(path)
        self.disk += 4096 * len(paths)
        self.inodes += len(paths)
        if not self._overlay:
            self._made.update(paths)
        return fd

    def _make_new(self, entry: Entry, above: bytes, head: bytes) -> tuple[int, list[bytes]]:
        """Make the directories of `head` below `above`, where nothing has their names."""
        fd, path, paths = os.dup(self._parent(entry, above)[0]), above, []
        try:
            for part in head[len(above):].lstrip(b"/").split(b"/"):
                os.mkdir(part, 0o755, dir_fd=fd)
                inner = os.open(part, _PARENT | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                os.close(fd)
                fd, path = inner, path + b"/" + part if path else part
                paths.append(path)
        except BaseException:
            os.close(fd)
            raise
        return fd, paths

    def _forget(self, keep: int) -> None:
        """Empty the cache of parents, but for the descriptor in use."""
        for head, (fd, _) in list(self._parents.items()):
            if fd != keep:
                os.close(fd)
                del self._parents[head]

    # Entries.

    def _apply(self, entry: Entry, reader: TarReader) -> None:
        name = entry.name
        if b"/." in name or b"//" in name or name[:1] in (b"/", b".") or name[-1:] == b"/" or len(name) > 1000:
            name = self._clean(entry, name, "name")
        if not name:
            return  # the root itself: its attributes are the snapshotter's
        head, _, base = name.rpartition(b"/")
        kind = entry.type
        hidden = base[:4] == b".wh."
        if not hidden and not (0 <= entry.uid <= _MAX_ID and 0 <= entry.gid <= _MAX_ID):
            raise InvalidArgument(
                f"layer entry {os.fsdecode(entry.name)!r}: owner {entry.uid}:{entry.gid} is outside 0 to {_MAX_ID}",
                kind="layer",
            )
        if self._others is not None:
            if not self._others.keeps_order(head, name, hidden or kind == LINK):
                self._in_order()
            elif kind == REGULAR and not hidden and self._others.takes(entry, head):
                self._count(entry)
                self._others.take(entry, head, base, _times(entry), reader)
                if not self._overlay:
                    self._made.add(name)
                return
        parent, inherits = self._parent(entry, head)
        if hidden:
            if self._whiteouts.apply(entry, parent, head, base):
                self.inodes += 1
                self.replaced = self.replaced or not self._overlay
            return
        chown = inherits or (entry.uid, entry.gid) != self._owner
        if kind == REGULAR:
            self._file(entry, reader, parent, base, name, chown)
        elif kind == DIRECTORY:
            self._directory(entry, parent, base, name, chown)
        elif kind == LINK:
            self._link(entry, parent, base, name)
        elif kind == SYMLINK:
            self._symlink(entry, parent, base, name, chown)
        elif kind in (CHAR, BLOCK, FIFO):
            self._node(entry, parent, base, name, chown)
        else:
            raise InvalidArgument(
                f"layer entry {os.fsdecode(entry.name)!r}: unhandled tar entry type {kind}", kind="layer"
            )
        if not self._overlay:
            self._made.add(name)

    def _is_made(self, path: bytes) -> bool:
        """Whether this layer made `path` or something below it."""
        below = path + b"/"
        return path in self._made or any(made.startswith(below) for made in self._made)

    def _in_order(self) -> None:
        """Make everything here from now on, one entry after another."""
        others, self._others = self._others, None
        if others is not None:
            try:
                others.maker.flush()
            finally:
                others.maker.close()

    def _count(self, entry: Entry) -> None:
        self._size += entry.size
        self.disk += (entry.stored + 4095) & -4096
        self.inodes += 1
        if self._size > self._limits.size:
            raise InvalidArgument(f"layer holds more than {self._limits.size} bytes of files", kind="layer")

    def _file(self, entry: Entry, reader: TarReader, parent: int, base: bytes, name: bytes, chown: bool) -> None:
        self._count(entry)
        mode = entry.mode & 0o7777
        try:
            fd = os.open(base, _CREATE, mode, dir_fd=parent)
        except FileExistsError:
            self._clear(parent, base, name)
            fd = os.open(base, _CREATE, mode, dir_fd=parent)
        try:
            if entry.extents is not None:
                _write_sparse(fd, entry, reader)
            elif entry.size:
                while piece := reader.body():
                    while (count := os.write(fd, piece)) < len(piece):
                        piece = piece[count:]
            if chown:
                os.fchown(fd, entry.uid, entry.gid)
            if entry.xattrs is not None:
                self._set_xattrs(entry, fd, b"")
            if not self._exact or mode & 0o6000:
                os.fchmod(fd, mode)
            os.utime(fd, ns=_times(entry))
        finally:
            os.close(fd)

    def _directory(self, entry: Entry, parent: int, base: bytes, name: bytes, chown: bool) -> None:
        mode = entry.mode & 0o7777
        existed = opaque = False
        try:
            os.mkdir(base, mode, dir_fd=parent)
        except FileExistsError:
            status = os.stat(base, dir_fd=parent, follow_symlinks=False)
            existed = stat.S_ISDIR(status.st_mode)
            if not existed:
                opaque = self._clear(parent, base, name)
                os.mkdir(base, mode, dir_fd=parent)
        if existed or opaque or entry.xattrs is not None or chown or mode & 0o6000 or not self._exact:
            fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                if existed or chown:
                    os.fchown(fd, entry.uid, entry.gid)
                if entry.xattrs is not None:
                    self._set_xattrs(entry, fd, b"")
                if opaque:
                    os.setxattr(fd, self._opaque, b"y")
                os.fchmod(fd, mode)
            finally:
                os.close(fd)
            cached = self._parents.pop(name, None)
            if cached is not None:
                os.close(cached[0])
        if not existed:
            self.disk += 4096
            self.inodes += 1
            if self._others is not None:
                self._others.made_directory(name)
        self._directories[name] = _times(entry)

    def _link(self, entry: Entry, parent: int, base: bytes, name: bytes) -> None:
        target = self._clean(entry, entry.link, "hard link target")
        head, _, target_base = target.rpartition(b"/")
        if not target_base:
            raise InvalidArgument(
                f"layer entry {os.fsdecode(entry.name)!r}: hard link to {os.fsdecode(entry.link)!r}", kind="layer"
            )
        if target == name:
            return
        if self._swapped or self._absolute:
            self._check_links(entry, head)
        cached = self._parents.get(head)
        try:
            source = cached[0] if cached is not None else files.open_in_root(self._root, head, _PARENT)
            try:
                try:
                    os.link(target_base, base, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
                except FileExistsError:
                    os.close(os.open(target_base, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source))
                    self._clear(parent, base, name, keep=source)
                    os.link(target_base, base, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
            finally:
                if cached is None:
                    os.close(source)
        except FileNotFoundError:
            if not self._complete:
                raise NeedsLower(f"layer entry {os.fsdecode(name)!r}: its hard link leads into a lower layer") from None
            raise InvalidArgument(
                f"layer entry {os.fsdecode(name)!r}: hard link target {os.fsdecode(entry.link)!r} does not exist",
                kind="layer",
            ) from None
        self._settle_link(entry, parent, base)

    def _settle_link(self, entry: Entry, parent: int, base: bytes) -> None:
        """Give the inode what the link's own header says, where that differs."""
        status = os.stat(base, dir_fd=parent, follow_symlinks=False)
        mode = entry.mode & 0o7777
        if (status.st_uid, status.st_gid) != (entry.uid, entry.gid):
            os.chown(base, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
            status = os.stat(base, dir_fd=parent, follow_symlinks=False)
        if stat.S_ISREG(status.st_mode) and (stat.S_IMODE(status.st_mode) != mode or entry.xattrs is not None):
            fd = os.open(base, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
            try:
                if entry.xattrs is not None:
                    self._set_xattrs(entry, fd, b"")
                os.fchmod(fd, mode)
            finally:
                os.close(fd)
        times = _times(entry)
        if status.st_mtime_ns != times[1]:
            os.utime(base, ns=times, dir_fd=parent, follow_symlinks=False)

    def _symlink(self, entry: Entry, parent: int, base: bytes, name: bytes, chown: bool) -> None:
        try:
            os.symlink(entry.link, base, dir_fd=parent)
        except FileExistsError:
            replaced = name in self._directories or name in self.implied
            self._clear(parent, base, name)
            if replaced:
                self._swapped.add(name)
            os.symlink(entry.link, base, dir_fd=parent)
        self.inodes += 1
        if len(entry.link) >= 60:
            self.disk += 4096
        if entry.link[:1] == b"/":
            self._absolute.add(name)
        if chown:
            os.chown(base, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        if entry.xattrs is not None:
            self._set_xattrs(entry, parent, base)
        os.utime(base, ns=_times(entry), dir_fd=parent, follow_symlinks=False)

    def _node(self, entry: Entry, parent: int, base: bytes, name: bytes, chown: bool) -> None:
        kind = {CHAR: stat.S_IFCHR, BLOCK: stat.S_IFBLK, FIFO: stat.S_IFIFO}[entry.type]
        mode = entry.mode & 0o7777
        if not (0 <= entry.major < 1 << 12 and 0 <= entry.minor < 1 << 20):
            raise InvalidArgument(
                f"layer entry {os.fsdecode(name)!r}: no such device {entry.major}:{entry.minor}", kind="layer"
            )
        self.inodes += 1
        device = os.makedev(entry.major, entry.minor) if entry.type != FIFO else 0
        try:
            os.mknod(base, kind | mode, device, dir_fd=parent)
        except FileExistsError:
            self._clear(parent, base, name)
            os.mknod(base, kind | mode, device, dir_fd=parent)
        if chown:
            os.chown(base, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        if entry.xattrs is not None:
            self._set_xattrs(entry, parent, base)
        if not self._exact or mode & 0o6000:
            # Just made here and nobody else writes below the root, so it is no link; AT_SYMLINK_NOFOLLOW
            # does not exist for fchmodat(2).
            os.chmod(base, mode, dir_fd=parent)
        os.utime(base, ns=_times(entry), dir_fd=parent, follow_symlinks=False)

    def _set_xattrs(self, entry: Entry, fd: int, base: bytes) -> None:
        """Set the attributes on the open `fd`, or on `base` in the directory `fd`."""
        attributes = entry.xattrs or {}
        if len(attributes) > _MAX_XATTRS:
            raise InvalidArgument(
                f"layer entry {os.fsdecode(entry.name)!r} has more than {_MAX_XATTRS} attributes", kind="layer"
            )
        for key, value in attributes.items():
            if key.startswith((b"trusted.overlay.", b"user.overlay.")):
                self._note(f"{os.fsdecode(entry.name)}: reserved attribute {os.fsdecode(key)} dropped")
                continue
            try:
                if base:
                    os.setxattr(files.at(fd, os.fsdecode(base)), key, value, follow_symlinks=False)
                else:
                    os.setxattr(fd, key, value)
            except OSError as error:
                special = entry.type not in (REGULAR, DIRECTORY, LINK)
                if error.errno == errno.ENOTSUP or (
                    error.errno == errno.EPERM and special and key.startswith(b"user.")
                ):
                    self._note(f"{os.fsdecode(entry.name)}: attribute {os.fsdecode(key)} not supported here, dropped")
                    continue
                raise

    def _note(self, text: str) -> None:
        if len(self.notes) < 20:
            self.notes.append(text[:512])

    # What is in the way.

    def _clear(self, parent: int, base: bytes, name: bytes, keep: int = -1) -> bool:
        """Remove what has the name `base`; whether that was an overlay whiteout.

        `keep` is a second descriptor in use, which must then not be closed.
        """
        self.replaced = True
        status = os.stat(base, dir_fd=parent, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            remove_tree(parent, base)
            self._forget_below(parent, name, keep)
            return False
        if stat.S_ISLNK(status.st_mode):
            self._forget_below(parent, name, keep)
        os.unlink(base, dir_fd=parent)
        return self._overlay and stat.S_ISCHR(status.st_mode) and status.st_rdev == 0

    def _forget_below(self, parent: int, name: bytes, keep: int) -> None:
        """Forget what is known of `name` and below: it is gone."""
        for head, (fd, _) in list(self._parents.items()):
            if fd not in (parent, keep):
                os.close(fd)
                del self._parents[head]
        below = name + b"/"
        self._directories = {
            path: times for path, times in self._directories.items() if path != name and not path.startswith(below)
        }
        self._absolute = {path for path in self._absolute if path != name and not path.startswith(below)}
        self.implied = [path for path in self.implied if path != name and not path.startswith(below)]
        if self._made:
            self._made = {path for path in self._made if path != name and not path.startswith(below)}

    def _set_times(self) -> None:
        """Directories last: every entry made in them moved their times."""
        for name, times in self._directories.items():
            head, _, base = name.rpartition(b"/")
            try:
                cached = self._parents.get(head)
                if cached is None:
                    if len(self._parents) >= _CACHED_PARENTS:
                        self.close()
                    cached = self._parents[head] = (files.open_in_root(self._root, head, _PARENT), False)
                os.utime(base, ns=times, dir_fd=cached[0], follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                error.filename = None
                raise from_os_error(error, f"layer entry {os.fsdecode(name)!r}") from error


def _times(entry: Entry) -> tuple[int, int]:
    """Access and modification time: an access time earlier than the modification is not believed (as containerd)."""
    mtime = entry.mtime if 0 <= entry.mtime <= _MAX_TIME else 0
    atime = entry.atime
    return (mtime if atime is None or not mtime <= atime <= _MAX_TIME else atime), mtime


def _write_sparse(fd: int, entry: Entry, reader: TarReader) -> None:
    os.ftruncate(fd, entry.size)
    piece = memoryview(b"")
    for offset, length in entry.extents or ():
        while length:
            if not piece:
                piece = reader.body()
            count = os.pwrite(fd, piece[:length], offset)
            piece = piece[count:]
            offset += count
            length -= count


__all__ = ["Applied", "LayerApplier", "Limits", "NeedsLower"]
