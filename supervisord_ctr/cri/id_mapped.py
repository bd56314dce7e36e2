"""Id-mapped mounts of a container's volumes, made by the daemon for the moment in which the container is made.

Owns a folder of mount points for each container that starts. Not every OCI runtime can map the owners of a
mount, and those that cannot leave it out without a word (P24): so what the specification of the container
binds is already mapped. The mounts are taken away when the container has its own copies of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.linux import idmaps
from supervisord_ctr.linux import mounts as system_mounts
from supervisord_ctr.linux.idmaps import IdMap


@dataclass(frozen=True)
class IdMapped:
    """What is bound at `place` (in the folder of the container) is `source` with owners mapped; maps are
    "CONTAINER:HOST:SIZE", several split by ','."""

    place: str
    source: str
    uids: str
    gids: str


def to_maps(entries: Iterable[pb.IDMapping]) -> list[IdMap]:
    """What a request says, as ranges."""
    return [IdMap(entry.container_id, entry.host_id, entry.length) for entry in entries]


def map_text(entries: Iterable[pb.IDMapping]) -> str:
    """A map as the kernel's helpers take it."""
    return idmaps.text(to_maps(entries))


def make(folder: Path, wanted: Sequence[IdMapped], namespaces: Mapping[tuple[str, str], Path]) -> None:
    """Mount everything; what was made stays when that fails, for `drop`. Blocks.

    `namespaces` are user namespaces that exist already, by their maps; others are made for the moment.
    """
    folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        known: dict[tuple[str, str], int] = {}
        for entry in wanted:
            target = folder / entry.place
            maps = (entry.uids, entry.gids)
            if maps not in known and maps in namespaces:
                known[maps] = os.open(namespaces[maps], os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, known[maps])
            elif maps not in known:
                known[maps] = stack.enter_context(system_mounts.user_namespace(*maps))
            try:
                if os.path.isdir(entry.source):
                    target.mkdir(mode=0o711, exist_ok=True)
                else:
                    target.touch(mode=0o600, exist_ok=True)
                system_mounts.idmap_mount(entry.source, target, known[maps], recursive=True, map_below=False)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    raise errors.FailedPrecondition(
                        f"owners of {entry.source!r} cannot be mapped: its file system does not support it",
                        kind="mount", key=entry.source,
                    ) from error
                raise errors.from_os_error(error, f"failed to map the owners of {entry.source!r}:") from error


def drop(folder: Path) -> None:
    """Take the mounts away; nothing below a mount that stays is touched. Blocks, may be repeated."""
    with contextlib.suppress(FileNotFoundError):
        for entry in list(folder.iterdir()):
            system_mounts.unmount_all(entry)
            if entry.is_dir():
                entry.rmdir()
            else:
                entry.unlink()
        folder.rmdir()


def drop_all(folder: Path) -> None:
    """Take away what a daemon left that ended in between. Blocks."""
    with contextlib.suppress(FileNotFoundError):
        for entry in list(folder.iterdir()):
            drop(entry)
