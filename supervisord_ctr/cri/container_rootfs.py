"""A container's root file system before it runs: who its user is, and what its volumes begin with.

Owns looking into an image's root. Every path is opened inside it with `openat2` (S2), so links that
leave it lead nowhere. All calls block.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.linux import files
from supervisord_ctr.linux import mounts as system_mounts
from supervisord_ctr.model import Mount
from supervisord_ctr.oci import users

#: Entries that one volume may begin with.
_ENTRY_LIMIT = 1_000_000


@dataclass(frozen=True)
class Asked:
    """Who a container shall run as: words of the request over words of the image."""

    user: str
    groups: tuple[int, ...]
    merge: bool


def asked_user(context: pb.LinuxContainerSecurityContext, image_user: str) -> Asked:
    """What to resolve; raises `InvalidArgument` for a group without a user."""
    user = context.run_as_username
    if not user and context.HasField("run_as_user"):
        user = str(context.run_as_user.value)
    if context.HasField("run_as_group"):
        if not user:
            raise errors.InvalidArgument(
                f"run_as_group {context.run_as_group.value} is given without a user", kind="security context"
            )
        user += f":{context.run_as_group.value}"
    if context.supplemental_groups_policy not in (pb.Merge, pb.Strict):
        raise errors.InvalidArgument(
            f"supplemental groups policy {context.supplemental_groups_policy} is unknown", kind="security context"
        )
    for group in context.supplemental_groups:
        if not 0 <= group <= users.MAX_ID:
            raise errors.InvalidArgument(f"supplemental group {group} is out of range", kind="security context")
    return Asked(
        user or image_user, tuple(context.supplemental_groups), context.supplemental_groups_policy == pb.Merge
    )


def _readable(mounts: Sequence[Mount]) -> list[Mount]:
    """The same mounts for looking only: read-only, and with owners as the image states them."""
    found: list[Mount] = []
    for mount in mounts:
        options = tuple(
            word for word in mount.options if word != "volatile" and not word.startswith(("uidmap=", "gidmap="))
        )
        found.append(Mount(mount.type, mount.source, (*options, "ro"), mount.target))
    return found


@contextlib.contextmanager
def opened_root(mounts: Sequence[Mount], folder: Path):  # type: ignore[no-untyped-def]
    """The root file system as an open directory, mounted read-only for the length of the block."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with system_mounts.temp_mount(_readable(mounts), folder) as path:
        fd = files.open_root(path)
        try:
            yield fd
        finally:
            os.close(fd)


def resolve(root_fd: int, asked: Asked) -> users.User:
    """The user in the root's passwd and group; the image's groups only where the policy merges."""
    return users.resolve(
        root_fd, asked.user, extra_groups=[str(group) for group in asked.groups], supplementary=asked.merge
    )


def fill_volume(root_fd: int, place: str, target: Path) -> None:
    """Copy what the image has at `place` into the empty folder `target`, with owners, modes and xattrs."""
    target.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        source = files.open_in_root(root_fd, place.lstrip("/") or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise errors.from_os_error(error, f"cannot open volume {place!r} of the image:") from error
    try:
        destination = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            _copy_folder(source, destination, [0], 0)
        finally:
            os.close(destination)
    finally:
        os.close(source)


def _copy_folder(source: int, target: int, count: list[int], depth: int) -> None:
    if depth > 256:
        raise errors.ResourceExhausted("a volume of the image is nested deeper than 256 folders")
    with os.scandir(source) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        count[0] += 1
        if count[0] > _ENTRY_LIMIT:
            raise errors.ResourceExhausted(f"a volume of the image holds more than {_ENTRY_LIMIT} entries")
        about = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISDIR(about.st_mode):
            os.mkdir(name, 0o700, dir_fd=target)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
            inner, made = os.open(name, flags, dir_fd=source), os.open(name, flags, dir_fd=target)
            try:
                _copy_folder(inner, made, count, depth + 1)
            finally:
                os.close(inner)
                os.close(made)
        else:
            _copy_entry(source, target, name, about)
    _copy_attributes(source, target)


def _copy_entry(source: int, target: int, name: str, about: os.stat_result) -> None:
    if stat.S_ISREG(about.st_mode):
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=source)
        try:
            made = os.open(
                name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=target
            )
            try:
                files.copy_contents(fd, made)
                _copy_attributes(fd, made)
            finally:
                os.close(made)
        finally:
            os.close(fd)
    elif stat.S_ISLNK(about.st_mode):
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        os.chown(name, about.st_uid, about.st_gid, dir_fd=target, follow_symlinks=False)
    else:
        os.mknod(name, about.st_mode, about.st_rdev, dir_fd=target)
        os.chown(name, about.st_uid, about.st_gid, dir_fd=target, follow_symlinks=False)
        os.chmod(name, stat.S_IMODE(about.st_mode), dir_fd=target)


def _copy_attributes(source: int, target: int) -> None:
    about = os.fstat(source)
    os.fchown(target, about.st_uid, about.st_gid)
    os.fchmod(target, stat.S_IMODE(about.st_mode))
    for name in os.listxattr(source):
        if name != "security.selinux" and not name.startswith("trusted.overlay."):
            with contextlib.suppress(OSError):
                os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(about.st_atime_ns, about.st_mtime_ns))
