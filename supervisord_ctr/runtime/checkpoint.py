"""Checkpoint images as blobs: a folder of CRIU files packed into tar, and unpacked again.

A checkpoint is input from who knows where (S5): only regular files and folders come out of it, each
opened below the target, bounded in number and size. All calls block.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

from supervisord_ctr import errors
from supervisord_ctr.diff import tar
from supervisord_ctr.linux import files

#: Media types that containerd's clients know.
MEDIA_TYPE = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
CONFIG_MEDIA_TYPE = "application/vnd.containerd.container.checkpoint.config.v1+proto"

#: Most files and folders of one image, and most bytes.
MAX_ENTRIES = 100_000
MAX_SIZE = 1 << 40


class _Sink:
    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write

    def write(self, data: bytes) -> int:
        self._write(bytes(data))
        return len(data)


def pack(folder: Path, write: Callable[[bytes], object]) -> None:
    """Write the folder's files and folders as one tar stream, names sorted."""
    with tarfile.open(fileobj=_Sink(write), mode="w|", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
        archive.add(folder, arcname="", recursive=True)


def unpack(next_chunk: Callable[[], bytes], target: Path) -> int:
    """Unpack a tar stream (chunks until b"") below `target`; returns the number of entries.

    `InvalidArgument` for links, devices, names that leave the folder, and beyond the bounds.
    """
    reader = tar.TarReader(next_chunk)
    root = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    count = size = 0
    try:
        while (entry := reader.next()) is not None:
            count += 1
            size += entry.size
            if count > MAX_ENTRIES or size > MAX_SIZE:
                raise errors.InvalidArgument("checkpoint image is too large", kind="checkpoint")
            name = os.path.normpath(entry.name.decode("utf-8", "surrogateescape")).lstrip("/")
            if name in ("", "."):
                continue
            if ".." in name.split("/"):
                raise errors.InvalidArgument(f"checkpoint entry {name!r} leaves the image", kind="checkpoint")
            if entry.type == tar.DIRECTORY:
                _make_folders(root, name)
            elif entry.type == tar.REGULAR and entry.extents is None:
                _write_file(root, name, reader)
            else:
                raise errors.InvalidArgument(
                    f"checkpoint entry {name!r} is neither a file nor a folder", kind="checkpoint"
                )
    except OSError as error:
        raise errors.from_os_error(error, "unpack checkpoint") from error
    finally:
        os.close(root)
    return count


def _make_folders(root: int, name: str) -> None:
    parts = name.split("/")
    for depth in range(1, len(parts) + 1):
        parent = _folder(root, "/".join(parts[:depth - 1]))
        try:
            os.mkdir(parts[depth - 1], 0o700, dir_fd=parent)
        except FileExistsError:
            pass
        finally:
            os.close(parent)


def _folder(root: int, name: str) -> int:
    return files.open_in_root(root, name or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _write_file(root: int, name: str, reader: tar.TarReader) -> None:
    folder, _, base = name.rpartition("/")
    if folder:
        _make_folders(root, folder)
    parent = _folder(root, folder)
    try:
        fd = os.open(base, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
    finally:
        os.close(parent)
    try:
        while piece := reader.body():
            view = memoryview(piece)
            while view:
                view = view[os.write(fd, view):]
    finally:
        os.close(fd)
