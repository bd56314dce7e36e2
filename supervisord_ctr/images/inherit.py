"""Inherit: attributes of directories that a layer needed but did not list, from the layers below.

A layer is unpacked beside its parents, not on top of them. Where its archive names `a/b/file` and not
`a/b`, the new `a` and `a/b` would hide the owner and mode that lower layers gave them; this room
copies them over once the parent's snapshot is there. Blocking.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from supervisord_ctr.diff.stream import NeedsLower
from supervisord_ctr.linux import files
from supervisord_ctr.linux.mounts import temp_mount
from supervisord_ctr.model import Mount

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_RESOLVE = files.RESOLVE_IN_ROOT | files.RESOLVE_NO_MAGICLINKS | files.RESOLVE_NO_SYMLINKS


def inherit_attributes(upper: Path, implied: Sequence[bytes], lower: Sequence[Mount], scratch: Path) -> None:
    """Give each directory of `implied` below `upper` what the same path has in the mounts `lower`.

    `implied` lists parents before children. NeedsLower when a path leads through a link there: then
    the layer must be unpacked on top of its parent, as its author's tools did.
    """
    with temp_mount(lower, scratch) as mounted:
        lower_root = files.open_root(mounted)
        upper_root = files.open_root(upper)
        try:
            absent: set[bytes] = set()
            for path in implied:
                if path.rpartition(b"/")[0] in absent or not _copy(lower_root, upper_root, path):
                    absent.add(path)
        finally:
            os.close(upper_root)
            os.close(lower_root)


def _copy(lower_root: int, upper_root: int, path: bytes) -> bool:
    """Copy one directory's attributes; False when the lower layers have no directory there."""
    try:
        source = files.open_in_root(lower_root, path, _DIRECTORY, resolve=_RESOLVE)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NeedsLower(f"layer directory {os.fsdecode(path)!r} is a link in a lower layer") from None
        raise
    try:
        target = files.open_in_root(upper_root, path, _DIRECTORY, resolve=_RESOLVE)
        try:
            status = os.fstat(source)
            os.fchown(target, status.st_uid, status.st_gid)
            for name in os.listxattr(source):
                if not name.startswith(("trusted.overlay.", "user.overlay.")):
                    os.setxattr(target, name, os.getxattr(source, name))
            os.fchmod(target, stat.S_IMODE(status.st_mode))
            os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
        finally:
            os.close(target)
    finally:
        os.close(source)
    return True
