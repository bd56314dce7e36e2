"""Durable files: written whole, synced, then renamed into place, and their folder synced.

What a power cut may leave after `write_atomic` returned: the new content. Before it returned: the
old content or the new, never a mixture, and perhaps a `*.tmp-*` file, which `remove_leftovers` sweeps.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_MARK = ".tmp-"


def sync_folder(path: str | os.PathLike[str]) -> None:
    """fsync a folder, so that names made or removed in it survive a power cut (fsync(2), notes)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: str | os.PathLike[str], data: bytes, *, mode: int = 0o600, sync: bool = True) -> None:
    """Replace the file at `path` by `data`; with `sync` file and folder are on disk on return."""
    target = Path(path)
    temporary = target.with_name(f"{target.name}{_MARK}{os.urandom(4).hex()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view):]
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if sync:
        sync_folder(target.parent)


def remove_leftovers(folder: str | os.PathLike[str]) -> int:
    """Remove temporary files that a killed writer left in `folder`; returns how many."""
    count = 0
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            if _MARK in entry.name and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)
                    count += 1
    return count
