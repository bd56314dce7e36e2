"""Files: paths resolved inside a root, and the file calls that `os` lacks.

Owns openat2(2) and everything built on it: whoever opens a path below a directory that an image or
a container filled uses `open_in_root`, never a joined path. Owns fallocate, reflinks, renameat2,
syncfs. Does not know layers, snapshots or containers.

All calls are blocking, let go of the interpreter lock, and raise `OSError` with errno and path.
Every descriptor is close-on-exec.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

#: openat2(2), "resolve": what path resolution may cross.
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

#: renameat2(2), flags.
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

#: fallocate(2), mode.
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02

#: Flags that need the `mode` of an open.
_CREATING = os.O_CREAT | getattr(os, "O_TMPFILE", 0o20200000)

_SYS_OPENAT2 = 437  # the same on every architecture (syscalls added since Linux 5.1 share numbers)
_FICLONE = 0x40049409
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_TOPDIR_FL = 0x00020000
_FOLLOWED_AT_MOST = 40  # like the kernel's MAXSYMLINKS


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_OpenHow), ctypes.c_size_t)
_libc.renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.syncfs.argtypes = (ctypes.c_int,)


def _raise(path: str | bytes = "") -> OSError:
    number = ctypes.get_errno()
    if path:
        return OSError(number, os.strerror(number), os.fsdecode(path))
    return OSError(number, os.strerror(number))


def openat2(dir_fd: int, path: str | bytes, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2): open `path` relative to `dir_fd`; returns a close-on-exec descriptor.

    A resolution that raced with a rename elsewhere in the tree (EAGAIN) is repeated. Paths with a
    NUL byte raise `OSError` EINVAL, not ValueError, because they come from outside.
    """
    raw = os.fsencode(path)
    if b"\0" in raw:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
    how = _OpenHow(flags | os.O_CLOEXEC, mode if flags & _CREATING else 0, resolve)
    for _ in range(128):
        fd = int(_syscall(_SYS_OPENAT2, dir_fd, raw, ctypes.byref(how), ctypes.sizeof(how)))
        if fd >= 0:
            return fd
        if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            break
    raise _raise(raw)


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace what a small file of ours says, mode 0600; a link in its place is refused (ELOOP).

    Without `open`, which asks the system six things more, for buffers nobody needs. Not atomic: see `durable`.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view):]
    finally:
        os.close(fd)


def open_root(path: str | os.PathLike[str]) -> int:
    """A descriptor (O_PATH) for the directory `path`, to be the root of later `…_in_root` calls."""
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def open_in_root(
    root_fd: int, path: str | bytes, flags: int = os.O_RDONLY, mode: int = 0,
    resolve: int = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS,
) -> int:
    """Open `path` as a process whose `/` is `root_fd` would: absolute links and `..` stay inside.

    Symbolic links are followed inside the root, the last component too unless `flags` has
    O_NOFOLLOW; /proc magic links are refused (ELOOP). "" and "/" name the root itself.
    """
    return openat2(root_fd, path or ".", flags, mode, resolve)


@contextmanager
def opened_in_root(root_fd: int, path: str | bytes, flags: int = os.O_RDONLY, mode: int = 0) -> Iterator[int]:
    """`open_in_root` as a context manager that closes the descriptor."""
    fd = open_in_root(root_fd, path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def read_in_root(root_fd: int, path: str | bytes, limit: int) -> bytes:
    """The content of a regular file inside the root; never blocks on a fifo or device.

    Raises `OSError` EINVAL when `path` is no regular file and EFBIG when it holds more than `limit`
    bytes.
    """
    with opened_in_root(root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY) as fd:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fsdecode(path))
        if found.st_size > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), os.fsdecode(path))
        parts: list[bytes] = []
        left = limit + 1
        while left and (part := os.read(fd, min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
        if not left:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), os.fsdecode(path))
        return b"".join(parts)


def make_dirs_in_root(root_fd: int, path: str | bytes, mode: int = 0o755, made: list[str] | None = None) -> int:
    """A descriptor (O_PATH) for the directory `path` inside the root, made with its parents when missing.

    Links on the way are followed inside the root, also dangling ones: their target is made. The
    names of directories that were made (resolved, without leading slash) are appended to `made`.
    Raises `OSError` ENOTDIR when something else is in the way, ELOOP after 40 links.
    """
    flags = os.O_PATH | os.O_DIRECTORY
    try:
        return open_in_root(root_fd, path, flags)
    except FileNotFoundError:
        pass
    todo = [part for part in reversed(os.fsdecode(path).split("/")) if part not in ("", ".")]
    done: list[str] = []
    links = 0
    while todo:
        part = todo.pop()
        if part == "..":
            del done[-1:]
            continue
        with opened_in_root(root_fd, "/".join(done), flags) as parent:
            try:
                os.mkdir(part, mode, dir_fd=parent)
            except FileExistsError:
                if (target := _link_target(parent, part)) is not None:
                    links += 1
                    if links > _FOLLOWED_AT_MOST:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fsdecode(path)) from None
                    if target.startswith("/"):
                        done.clear()
                    todo.extend(piece for piece in reversed(target.split("/")) if piece not in ("", "."))
                    continue
            else:
                if made is not None:
                    made.append("/".join((*done, part)))
        done.append(part)
    return open_in_root(root_fd, "/".join(done), flags)


def _link_target(dir_fd: int, name: str) -> str | None:
    try:
        return os.readlink(name, dir_fd=dir_fd)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


def at(dir_fd: int, name: str = "") -> str:
    """A path that names `name` below an open directory, for calls that have no dir_fd (xattrs).

    Use with `follow_symlinks=False` and a `name` without slashes.
    """
    return f"/proc/self/fd/{dir_fd}/{name}" if name else f"/proc/self/fd/{dir_fd}"


def get_xattr_at(dir_fd: int, name: str, attribute: str) -> bytes | None:
    """lgetxattr(2) on `name` in `dir_fd`; None when the attribute is absent or not supported."""
    try:
        return os.getxattr(at(dir_fd, name), attribute, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return None
        raise


def list_xattrs_at(dir_fd: int, name: str) -> list[str]:
    """llistxattr(2) on `name` in `dir_fd`; empty where the file system has none."""
    try:
        return os.listxattr(at(dir_fd, name), follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return []
        raise


def rename(
    source: str | bytes, target: str | bytes, flags: int = 0, *, source_fd: int = -100, target_fd: int = -100
) -> None:
    """renameat2(2) with RENAME_NOREPLACE or RENAME_EXCHANGE; -100 is the working directory."""
    if _libc.renameat2(source_fd, os.fsencode(source), target_fd, os.fsencode(target), flags) != 0:
        raise _raise(target)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give back the blocks of a range, the size stays (fallocate(2), FALLOC_FL_PUNCH_HOLE)."""
    if _libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) != 0:
        raise _raise()


def reserve(fd: int, length: int) -> bool:
    """Reserve blocks for the first `length` bytes without changing the size; False when not supported."""
    if _libc.fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, length) == 0:
        return True
    if ctypes.get_errno() in (errno.EOPNOTSUPP, errno.ENOSYS):
        return False
    raise _raise()


def reflink(source_fd: int, target_fd: int) -> bool:
    """Share all blocks of `source_fd` with the empty `target_fd` (ioctl FICLONE); False when not supported."""
    try:
        fcntl.ioctl(target_fd, _FICLONE, source_fd)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS):
            return False
        raise
    return True


def copy_contents(source_fd: int, target_fd: int) -> int:
    """Copy a file's bytes to the empty `target_fd`, by reflink or in the kernel where it can; returns how many.

    Holes are kept (SEEK_DATA) where the file system tells them. Both positions are used up.
    """
    size = os.fstat(source_fd).st_size
    if size and reflink(source_fd, target_fd):
        return size
    os.ftruncate(target_fd, size)
    position = 0
    while position < size:
        try:
            start = os.lseek(source_fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        end = os.lseek(source_fd, start, os.SEEK_HOLE)
        _copy_range(source_fd, target_fd, start, end - start)
        position = end
    return size


def _copy_range(source_fd: int, target_fd: int, offset: int, length: int) -> None:
    end = offset + length
    while offset < end:
        try:
            count = os.copy_file_range(source_fd, target_fd, min(end - offset, 1 << 30), offset, offset)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            count = os.pwrite(target_fd, os.pread(source_fd, min(end - offset, 1 << 20), offset), offset)
        if count == 0:
            return
        offset += count


def sync_filesystem(fd: int) -> None:
    """syncfs(2): every dirty page of the file system that holds `fd` is on disk on return."""
    if _libc.syncfs(fd) != 0:
        raise _raise()


def spread_subdirectories(path: str | os.PathLike[str]) -> bool:
    """Mark a directory as the top of unrelated hierarchies (chattr +T); False where the file system has no such mark.

    ext4 then places each new subdirectory in a block group of its own choice instead of the parent's.
    Without the mark, snapshots made after others were removed land among inodes that were "recently
    deleted", and the kernel skips these one by one at every file creation: 1 ms for each file was
    measured where 50 µs is normal (fs/ext4/ialloc.c, recently_deleted and find_group_orlov).
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags = int.from_bytes(fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8))[:4], "little")
        if not flags & _FS_TOPDIR_FL:
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, (flags | _FS_TOPDIR_FL).to_bytes(8, "little"))
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM):
            return False
        raise
    finally:
        os.close(fd)
    return True
