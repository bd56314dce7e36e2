"""Remove: a directory tree below an open directory, following no link and without recursion."""

from __future__ import annotations

import errno
import os

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(parent: int, name: bytes) -> None:
    """Remove `name` in the open directory `parent` with everything below it; a name that is gone is fine.

    Depth costs neither descriptors nor stack: one descriptor walks down with O_NOFOLLOW and up through
    "..", and what it finds there must be the directory it came from (`OSError` ESTALE if not).
    """
    try:
        fd = os.open(name, _OPEN, dir_fd=parent)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        os.unlink(name, dir_fd=parent)
        return
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        os.unlink(name, dir_fd=parent)
        return
    # Each level: its name in the level above, its identity, and the directories in it still to be removed.
    levels = [(name, _identity(fd), _unlink_files(fd))]
    try:
        while True:
            below = levels[-1][2]
            if below:
                child = below.pop()
                deeper = os.open(child, _OPEN, dir_fd=fd)
                os.close(fd)
                fd = deeper
                levels.append((child, _identity(fd), _unlink_files(fd)))
                continue
            own_name = levels.pop()[0]
            if not levels:
                os.rmdir(own_name, dir_fd=parent)
                return
            higher = os.open(b"..", _OPEN, dir_fd=fd)
            os.close(fd)
            fd = higher
            if _identity(fd) != levels[-1][1]:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), os.fsdecode(own_name))
            os.rmdir(own_name, dir_fd=fd)
    finally:
        os.close(fd)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _unlink_files(fd: int) -> list[bytes]:
    """Unlink everything in `fd` but directories, whose names are returned."""
    directories = []
    for entry in os.listdir(fd):
        name = os.fsencode(entry)
        try:
            os.unlink(name, dir_fd=fd)
        except IsADirectoryError:
            directories.append(name)
    return directories
