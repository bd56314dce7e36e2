"""`pctr image mount` and `unmount`: a snapshot of an image, mounted in our own mount namespace."""

from __future__ import annotations

import os

from pctr import image_config
from pctr.command import Context, Failed
from pctr.services import list_snapshots, prepare_snapshot, remove_snapshot
from pctr.unpack import unpack
from supervisord_ctr import errors

_GC_ROOT = "containerd.io/gc.root"


def mount_image(context: Context) -> None:
    """Mount; the snapshot is named after the folder and kept by a label until `unmount --rm`."""
    from supervisord_ctr.linux.mounts import mount_all
    from supervisord_ctr.model import Mount

    args, client = context.args, context.client
    target = os.path.realpath(args.target)
    if not os.path.isdir(target):
        raise Failed(f"{target}: is not a folder")
    if any(info.name == target for info in list_snapshots(client, context.snapshotter)):
        raise errors.AlreadyExists(f"{target}: an image is mounted there already; unmount it first", key=target)
    config = image_config.load_config(client, image_config.get_image(client, args.image), args.platform)
    labels = {_GC_ROOT: "pctr", "pctr/target": target}
    try:
        mounts = prepare_snapshot(
            client, context.snapshotter, target, config.chain_id, view=not args.rw, labels=labels)
    except errors.NotFound:
        manifest = image_config.read_json(client, config.manifest_digest)
        unpack(client, config.manifest_digest, config.diff_ids, manifest, context.snapshotter)
        mounts = prepare_snapshot(
            client, context.snapshotter, target, config.chain_id, view=not args.rw, labels=labels)
    try:
        mount_all([Mount(entry.type, entry.source, tuple(entry.options), entry.target) for entry in mounts], target)
    except BaseException:
        remove_snapshot(client, context.snapshotter, target)
        raise
    print(target)


def unmount_image(context: Context) -> None:
    """Unmount, and remove the snapshot when asked."""
    from supervisord_ctr.linux.mounts import is_mountpoint, umount

    target = os.path.realpath(context.args.target)
    if is_mountpoint(target):
        umount(target)
    elif not context.args.rm:
        raise Failed(f"{target}: nothing is mounted there")
    if context.args.rm:
        known = {info.name for info in list_snapshots(context.client, context.snapshotter)}
        if target not in known:
            raise errors.NotFound(f"snapshot {target}: not found", kind="snapshot", key=target)
        remove_snapshot(context.client, context.snapshotter, target)
    print(target)
