"""The loaded C library: every foreign function the project calls, with its types stated once.

Owns the translation from "-1 and errno" to `OSError`. Knows nothing of what the calls are for:
`mounts`, `namespaces`, `processes`, `cgroups` and `files` give them meaning.

System calls that the C library may lack go through `syscall`; their numbers above 424 are the same
on every architecture (Linux 5.1 and later, `scripts/syscall.tbl`).
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_MOUNT_SETATTR = 442

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

libc = ctypes.CDLL(None, use_errno=True)

_char_p, _int, _ulong, _void_p = ctypes.c_char_p, ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p

libc.mount.argtypes = (_char_p, _char_p, _char_p, _ulong, _void_p)
libc.umount2.argtypes = (_char_p, _int)
libc.unshare.argtypes = (_int,)
libc.setns.argtypes = (_int, _int)
libc.prctl.argtypes = (_int, _ulong, _ulong, _ulong, _ulong)
libc.eventfd.argtypes = (ctypes.c_uint, _int)
libc.inotify_init1.argtypes = (_int,)
libc.inotify_add_watch.argtypes = (_int, _char_p, ctypes.c_uint32)
libc.syscall.restype = ctypes.c_long
libc.madvise.argtypes = (_void_p, ctypes.c_size_t, _int)
libc.malloc.argtypes = (ctypes.c_size_t,)
libc.malloc.restype = _void_p
libc.sbrk.argtypes = (ctypes.c_ssize_t,)
libc.sbrk.restype = _void_p

#: Without letting go of the interpreter's lock, which would be one page more of a child's own.
_fork = ctypes.PyDLL(None, use_errno=True).fork


def failure(path: str | os.PathLike[str] | None = None, path2: str | None = None) -> OSError:
    """The `OSError` for the errno of the call that just failed on this thread."""
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), os.fspath(path) if path is not None else None, None, path2)


def check(result: int, path: str | os.PathLike[str] | None = None) -> int:
    """Return `result`, or raise the `OSError` of the failed call when it is -1."""
    if result == -1:
        raise failure(path)
    return result


def syscall(number: int, *arguments: Any, path: str | os.PathLike[str] | None = None) -> int:
    """A raw system call; integers are passed as C longs, everything else as ctypes knows it."""
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return check(int(libc.syscall(ctypes.c_long(number), *converted)), path)


def mount(source: str | None, target: str, fstype: str | None, flags: int, data: str | None) -> None:
    """mount(2)."""
    check(libc.mount(
        None if source is None else os.fsencode(source), os.fsencode(target),
        None if fstype is None else fstype.encode(), flags, None if data is None else os.fsencode(data),
    ), target)


def umount2(target: str, flags: int) -> None:
    """umount2(2)."""
    check(libc.umount2(os.fsencode(target), flags), target)


def unshare(flags: int) -> None:
    """unshare(2): of the calling thread only."""
    check(libc.unshare(flags))


def setns(fd: int, kind: int = 0) -> None:
    """setns(2): of the calling thread only."""
    check(libc.setns(fd, kind))


def prctl(option: int, second: int = 0, third: int = 0, fourth: int = 0, fifth: int = 0) -> int:
    """prctl(2) with integer arguments."""
    return check(libc.prctl(option, second, third, fourth, fifth))


def eventfd(initial: int = 0, flags: int = 0) -> int:
    """eventfd(2)."""
    return check(libc.eventfd(initial, flags))


def inotify_init() -> int:
    """inotify_init1(2), close-on-exec and non-blocking."""
    return check(libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))


def inotify_add_watch(fd: int, path: str, mask: int) -> int:
    """inotify_add_watch(2): the watch's descriptor."""
    return check(libc.inotify_add_watch(fd, os.fsencode(path), mask), path)


def fork() -> int:
    """fork(2) without Python's at-fork handlers: 0 in the child, its pid in the parent.

    For processes with one thread that will not look back: the handlers (logging's locks, the threading
    module's bookkeeping, the random module's seed) write to hundreds of pages that a child then no
    longer shares, and with one thread none of them has anything to repair. Measured: a fresh child
    has 0.4 MiB of memory of its own instead of 1.0 MiB.
    """
    return check(_fork())
