"""Image volumes: the content of an image, read-only, as a mount of a container.

Owns a view snapshot and a mount for each, both named after the container, and their removal. A sub
path is opened inside the mounted image (S2): links in the image lead nowhere else.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from pathlib import Path

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import ids
from supervisord_ctr.cri.core import Core
from supervisord_ctr.cri.id_mapped import to_maps
from supervisord_ctr.cri.state import Container
from supervisord_ctr.linux import files, idmaps
from supervisord_ctr.linux import mounts as system_mounts
from supervisord_ctr.model import Mount
from supervisord_ctr.names import CAPABILITY_REMAP_IDS, CRI_NAMESPACE, LABEL_GC_ROOT, check_line


def _failed(kind: type[errors.Error], message: str) -> errors.Error:
    """An error with the word that a kubelet knows image volumes' errors by (cri-api, errors)."""
    return kind(f"ImageVolumeMountFailed: {message}", kind="mount")


def folder_of(core: Core, container_id: str) -> Path:
    """Where a container's image volumes are mounted."""
    return core.run / "image-volumes" / container_id


async def mount_all(core: Core, container: Container, label: str) -> None:
    """Mount every image volume and put its path into the request's mount, as if it were a host path.

    Its files bear the SELinux label `label`, "" leaving them those that they have.
    """
    for index, mount in enumerate(container.config.mounts):
        if not mount.HasField("image") or not mount.image.image:
            continue
        if not mount.readonly:
            raise _failed(errors.InvalidArgument, f"image volume at {mount.container_path!r} must be read-only")
        if mount.host_path:
            raise _failed(errors.InvalidArgument, f"{mount.container_path!r} has both an image and a host path")
        check_line(mount.image_sub_path, "image sub path")
        image = await core.images.resolve(mount.image.image)
        key = f"{container.id}-volume-{index}"
        container.image_mounts.append(key)
        snapshotter = core.database.snapshotter(container.snapshotter)
        labels = {LABEL_GC_ROOT: ids.KIND_CONTAINER, **_mapping_labels(mount, snapshotter.capabilities)}
        try:
            layers = await snapshotter.view(CRI_NAMESPACE, key, image.chain_id, labels)
        except errors.NotFound:
            await core.images.unpack(image, container.snapshotter)
            layers = await snapshotter.view(CRI_NAMESPACE, key, image.chain_id, labels)
        target = folder_of(core, container.id) / str(index)
        path = await core.executors.run_io(_mount, layers, target, mount.image_sub_path, label)
        mount.host_path, mount.image.image_ref = path, image.id


def _mapping_labels(mount: pb.Mount, capabilities: Collection[str]) -> dict[str, str]:
    """Labels that have the owners of the image's files mapped, as the mount asks."""
    if not mount.uidMappings and not mount.gidMappings:
        return {}
    if CAPABILITY_REMAP_IDS not in capabilities:
        raise _failed(errors.FailedPrecondition, "the snapshotter cannot map owners, as a user namespace needs it")
    return idmaps.snapshot_labels(to_maps(mount.uidMappings), to_maps(mount.gidMappings))


def _mount(layers: tuple[Mount, ...], target: Path, sub_path: str, label: str) -> str:
    """Mount the view and return what to bind: the mount, or a bind mount of what is at `sub_path` in it."""
    whole = target.with_name(target.name + "-image") if sub_path else target
    whole.mkdir(mode=0o711, parents=True, exist_ok=True)
    found = system_mounts.with_context(layers, label)
    system_mounts.mount_all([Mount(m.type, m.source, (*m.options, "ro"), m.target) for m in found], whole)
    if label and found == layers:
        _label_bind_mount(whole, target.with_name(target.name + "-empty"), label)
    if not sub_path:
        return str(whole)
    root = files.open_root(whole)
    try:
        fd = _open_below(root, sub_path)
        try:
            target.mkdir(mode=0o711, exist_ok=True)
            system_mounts.mount(f"/proc/self/fd/{fd}", str(target), "", system_mounts.MS_BIND)
        finally:
            os.close(fd)
    finally:
        os.close(root)
    return str(target)


def _label_bind_mount(whole: Path, empty: Path, label: str) -> None:
    """Cover a bind mount, which cannot have a label of its own, by an overlay of the same that can."""
    empty.mkdir(mode=0o711, exist_ok=True)
    cover = Mount("overlay", "overlay", (f"lowerdir={whole}:{empty}", "ro"))
    system_mounts.mount_all(system_mounts.with_context((cover,), label), whole)


def _open_below(root: int, sub_path: str) -> int:
    """The folder at `sub_path`; links may lead anywhere below the image's root and nowhere else."""
    try:
        confined = files.RESOLVE_BENEATH | files.RESOLVE_NO_MAGICLINKS
        fd = files.openat2(root, sub_path, os.O_PATH | os.O_CLOEXEC, 0, confined)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise _failed(errors.InvalidArgument, f"image sub path {sub_path!r}: path escapes from parent") from error
        raise _failed(
            errors.NotFound, f"failed to ensure image subpath {sub_path!r}: {(error.strerror or '').lower()}"
        ) from error
    if not os.path.isdir(f"/proc/self/fd/{fd}"):
        os.close(fd)
        raise _failed(errors.InvalidArgument, f"image sub path {sub_path!r}: only directory subpath is supported")
    return fd


def any_of(core: Core, container: Container) -> bool:
    """Whether there are image volumes of the container to take away, as far as is known or on the disk."""
    return bool(container.image_mounts) or folder_of(core, container.id).is_dir()


async def unmount_all(core: Core, container: Container) -> None:
    """Take the mounts and views away; each may be gone."""
    folder = folder_of(core, container.id)
    await core.executors.run_io(_unmount, folder)
    snapshotter = core.database.snapshotter(container.snapshotter)
    for key in container.image_mounts:
        try:
            await snapshotter.remove(CRI_NAMESPACE, key)
        except errors.NotFound:
            continue


def _unmount(folder: Path) -> None:
    if not folder.is_dir():
        return
    names = sorted(entry.name for entry in os.scandir(folder))
    for name in sorted(names, key=lambda text: text.endswith("-image")):
        system_mounts.unmount_all(folder / name)
    for name in names:
        os.rmdir(folder / name)
    os.rmdir(folder)
