"""Whiteouts: what a layer hides of the layers below it, written or carried out.

In an overlay's own form a whiteout is a device 0:0 and an opaque directory has an attribute; in a plain
directory that holds the lower layers, what is hidden is removed. Either way entries of the same layer
stay, wherever in the archive they come (OCI image specification, layer.md, "Whiteouts").
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable

from supervisord_ctr.diff.remove import remove_tree
from supervisord_ctr.diff.tar import Entry
from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.linux import files

_OPAQUE = b".wh..wh..opq"


class Whiteouts:
    """The whiteouts of one layer.

    `opaque` is the attribute of an opaque directory, `is_made` tells whether the layer made a path or
    something below it, `forget` drops cached descriptors but for one: directories are about to go.
    """

    def __init__(
        self, overlay: bool, opaque: str, is_made: Callable[[bytes], bool], forget: Callable[[int], None]
    ) -> None:
        self._overlay = overlay
        self._opaque = opaque
        self._is_made = is_made
        self._forget = forget

    def apply(self, entry: Entry, parent: int, head: bytes, base: bytes) -> bool:
        """Apply a `.wh.NAME` (then it returns True) or an opaque marker in the directory `parent`, named `head`."""
        if base == _OPAQUE:
            if self._overlay:
                os.setxattr(files.at(parent), self._opaque, b"y")
            else:
                self._remove_children(parent, head)
            return False
        if base.startswith(b".wh..wh."):
            return False  # other markers of aufs: nothing that an image holds
        hidden = base[4:]
        if hidden in (b"", b".", b".."):
            raise InvalidArgument(
                f"layer entry {os.fsdecode(entry.name)!r}: invalid whiteout name", kind="layer"
            )
        if self._overlay:
            self._hide(parent, hidden)
        else:
            self._remove(parent, hidden, head + b"/" + hidden if head else hidden)
        return True

    def _hide(self, parent: int, hidden: bytes) -> None:
        try:
            os.mknod(hidden, stat.S_IFCHR, 0, dir_fd=parent)
        except FileExistsError:
            # Made by this layer, so only the lower one of that name is to be hidden.
            with contextlib.suppress(NotADirectoryError):
                fd = os.open(hidden, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
                try:
                    os.setxattr(files.at(fd), self._opaque, b"y")
                finally:
                    os.close(fd)

    def _remove_children(self, directory: int, path: bytes) -> None:
        with contextlib.closing(Listing(directory)) as listing:
            for child in listing.names:
                self._remove(listing.fd, child, path + b"/" + child if path else child)

    def _remove(self, parent: int, base: bytes, path: bytes) -> None:
        """Remove `base` unless it, or something below it, belongs to this layer."""
        if not self._is_made(path):
            try:
                status = os.stat(base, dir_fd=parent, follow_symlinks=False)
            except FileNotFoundError:
                return
            if stat.S_ISDIR(status.st_mode):
                self._forget(parent)
                remove_tree(parent, base)
            else:
                if stat.S_ISLNK(status.st_mode):
                    self._forget(parent)
                os.unlink(base, dir_fd=parent)
            return
        try:
            fd = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except (FileNotFoundError, NotADirectoryError):
            return
        try:
            self._remove_children(fd, path)
        finally:
            os.close(fd)


class Listing:
    """The names in a directory, read through a descriptor of its own; close it."""

    def __init__(self, directory: int) -> None:
        self.fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
        self.names = [os.fsencode(name) for name in os.listdir(self.fd)]

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)
