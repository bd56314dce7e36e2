"""Sealed copies of OCI runtimes: what makes each start of runc cheaper, and no container able to change it.

A program inside a container that is joined by `runc init` can reach that program's file
(CVE-2019-5736), so runc never runs its inner half from the file on the disk: each start makes a bind
mount of the file, or copies it into memory, and starts anew from there. From a sealed file in memory it
need not, and does not (libcontainer, cloned_binary: the seals are what it looks for). One copy, made by
the zygote and inherited by every shim, saves each start of runc a mount and its removal, a seventh
of the time of an exec.

Copies are made of the programs that the configuration names; one that only a request names runs from its file.
A copy serves as long as the file on the disk is the one that was copied.
Source: memfd_create(2), fcntl(2) "File sealing".
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterable

log = logging.getLogger(__name__)

_NAME = "runc"
_MFD_EXEC = 0x10
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
#: Descriptors of copies lie above those that programs are given.
_LOWEST = 64
#: Where SELinux is in force, a program gets its domain by the label of its file; a copy has another.
_SELINUX = "/sys/fs/selinux/enforce"

_Identity = tuple[int, int, int, int, int]
_copies: dict[str, tuple[_Identity, int]] = {}


def prepare(names: Iterable[str]) -> None:
    """Have copies of these runtimes (paths, or looked up on the PATH) for this process and its forks.

    Only of programs called runc: others need not know what the seals mean. A failure is logged and
    changes nothing but speed.
    """
    for name in names:
        _prepare(name)


def refresh() -> None:
    """Copy anew what has been replaced."""
    prepare(list(_copies))


def _prepare(name: str) -> None:
    path = name if "/" in name else shutil.which(name)
    if path is None or os.path.basename(path) != _NAME or _current(path) is not None or os.path.exists(_SELINUX):
        return
    try:
        found = _copy(path)
    except OSError as error:
        log.info("no sealed copy of %s: %s", path, error)
        return
    before = _copies.get(path)
    if found is not None:
        _copies[path] = found
    if before is not None:
        if found is None:
            del _copies[path]
        os.close(before[1])


def program(path: str) -> str:
    """What to execute for `path`: its sealed copy, or the path itself where there is none that is the same."""
    fd = _current(path)
    return path if fd is None else f"/proc/self/fd/{fd}"


def _current(path: str) -> int | None:
    copy = _copies.get(path)
    if copy is None:
        return None
    try:
        return copy[1] if _identity(os.stat(path)) == copy[0] else None
    except OSError:
        return None


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _copy(path: str) -> tuple[_Identity, int] | None:
    """The file's identity and the descriptor of its copy; None for what is no ELF program (a script needs its name)."""
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.pread(source, 4, 0) != b"\x7fELF":
            return None
        status = os.fstat(source)
        memory = _memory()
        try:
            left = status.st_size
            while left and (count := os.sendfile(memory, source, None, left)):
                left -= count
            os.fchmod(memory, 0o500)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
            if left or _identity(os.fstat(source)) != _identity(status):
                return None  # it is being replaced just now
            # Opened anew for reading: a program whose file is open for writing cannot be executed.
            opened = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                return _identity(status), fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, _LOWEST)
            finally:
                os.close(opened)
        finally:
            os.close(memory)
    finally:
        os.close(source)


def _memory() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(_NAME, flags | _MFD_EXEC)
    except OSError:  # before Linux 6.3 there is no such flag, and every such file may be executed
        return os.memfd_create(_NAME, flags)
