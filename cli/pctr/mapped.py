"""Root file systems for user namespaces: owners are shifted by the snapshotter where it can, in a copy where not."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence

from google.protobuf.empty_pb2 import Empty

from pctr.command import Failed, new_id
from pctr.rpc import INTROSPECTION, LEASES, Client
from pctr.services import commit_snapshot, prepare_snapshot, remove_snapshot, stat_snapshot
from supervisord_ctr import errors
from supervisord_ctr.api.services.introspection.v1 import introspection_pb2
from supervisord_ctr.api.services.leases.v1 import leases_pb2
from supervisord_ctr.linux import idmaps
from supervisord_ctr.linux.idmaps import IdMap
from supervisord_ctr.linux.mounts import temp_mount
from supervisord_ctr.model import Mount
from supervisord_ctr.names import CAPABILITY_REMAP_IDS

_FILE_CAPABILITIES = "security.capability"


def can_map(client: Client, snapshotter: str) -> bool:
    """Whether the snapshotter says that it maps owners by itself."""
    request = introspection_pb2.PluginsRequest(filters=[f"type==io.containerd.snapshotter.v1,id=={snapshotter}"])
    found = client.unary(INTROSPECTION + "Plugins", request, introspection_pb2.PluginsResponse)
    return any(CAPABILITY_REMAP_IDS in plugin.capabilities for plugin in found.plugins)


def mapped_parent(
    client: Client, lease: str, snapshotter: str, parent: str, uids: Sequence[IdMap], gids: Sequence[IdMap]
) -> str:
    """The name of a copy of `parent` with mapped owners, made unless it is there; `lease`, which is in use, keeps it.

    Fails when a file belongs to somebody whom the mappings leave out.
    """
    name = f"{parent}-{idmaps.text(uids)}-{idmaps.text(gids)}"
    # First: what was there a moment ago may be collected, since only the containers that use it hold it.
    resource = leases_pb2.Resource(id=name, type=f"snapshots/{snapshotter}")
    client.unary(LEASES + "AddResource", leases_pb2.AddResourceRequest(id=lease, resource=resource), Empty)
    with contextlib.suppress(errors.NotFound):
        stat_snapshot(client, snapshotter, name)
        return name
    key = f"remap-{new_id()} {name}"
    mounts = prepare_snapshot(client, snapshotter, key, parent)
    try:
        with temp_mount([Mount(m.type, m.source, tuple(m.options), m.target) for m in mounts]) as root:
            change_owners(root, uids, gids)
        with contextlib.suppress(errors.AlreadyExists):
            commit_snapshot(client, snapshotter, name, key)
            return name
    except BaseException:
        with contextlib.suppress(errors.Error):
            remove_snapshot(client, snapshotter, key)
        raise
    remove_snapshot(client, snapshotter, key)
    return name


def change_owners(root: str, uids: Sequence[IdMap], gids: Sequence[IdMap]) -> None:
    """Give everything below `root` to those whom its owners are outside. No link is followed."""
    for path, folders, files, folder in os.fwalk(root, follow_symlinks=False):
        names = [*files, *(name for name in folders if stat.S_ISLNK(os.lstat(name, dir_fd=folder).st_mode))]
        for name in names:
            _change(f"{path}/{name}", name, folder, uids, gids)
        _change(path, ".", folder, uids, gids)


def _change(path: str, name: str, folder: int, uids: Sequence[IdMap], gids: Sequence[IdMap]) -> None:
    found = os.lstat(name, dir_fd=folder)
    uid, gid = _outside(uids, found.st_uid), _outside(gids, found.st_gid)
    if uid is None or gid is None:
        raise Failed(f"{path}: its owner {found.st_uid}:{found.st_gid} is in none of the mappings")
    if (uid, gid) == (found.st_uid, found.st_gid):
        return
    regular = stat.S_ISREG(found.st_mode)
    through = f"/proc/self/fd/{folder}/{name}"
    capabilities = None
    if regular:
        with contextlib.suppress(OSError):
            capabilities = os.getxattr(through, _FILE_CAPABILITIES, follow_symlinks=False)
    os.chown(name, uid, gid, dir_fd=folder, follow_symlinks=False)
    # The kernel takes set-user-ID and file capabilities away with a change of owner, chown(2).
    if regular and found.st_mode & (stat.S_ISUID | stat.S_ISGID):
        os.chmod(name, stat.S_IMODE(found.st_mode), dir_fd=folder)
    if capabilities is not None:
        os.setxattr(through, _FILE_CAPABILITIES, capabilities, follow_symlinks=False)


def _outside(maps: Sequence[IdMap], owner: int) -> int | None:
    """Who `owner` is outside; whoever is mapped already (another name of a file) stays. None for a stranger."""
    found = idmaps.outside(maps, owner)
    if found is None and any(entry.outside <= owner < entry.outside + entry.size for entry in maps):
        return owner
    return found
