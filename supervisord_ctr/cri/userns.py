"""User namespaces: CRI's mappings, checked, and whether a container agrees with its pod."""

from __future__ import annotations

from collections.abc import Sequence

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.linux import idmaps
from supervisord_ctr.linux.idmaps import IdMap


def _one(entries: Sequence[pb.IDMapping], what: str) -> tuple[IdMap, ...]:
    if len(entries) > 1:
        raise InvalidArgument(f"only one {what} mapping can be used, {len(entries)} are given", kind="user namespace")
    if not entries:
        raise InvalidArgument(f"{what} mappings are missing", kind="user namespace")
    for entry in entries:
        if not entry.length:
            raise InvalidArgument(f"a {what} mapping of length 0 maps nothing", kind="user namespace")
        if entry.container_id + entry.length > 1 << 32 or entry.host_id + entry.length > 1 << 32:
            raise InvalidArgument(f"a {what} mapping goes beyond 32 bits", kind="user namespace")
    return tuple(IdMap(entry.container_id, entry.host_id, entry.length) for entry in entries)


def mappings(options: pb.NamespaceOption) -> tuple[tuple[IdMap, ...], tuple[IdMap, ...]]:
    """UID and GID mappings, both empty without a user namespace; raises `InvalidArgument`."""
    if not options.HasField("userns_options"):
        return (), ()
    wanted = options.userns_options
    if wanted.mode == pb.NODE:
        if wanted.uids or wanted.gids:
            raise InvalidArgument("mappings are given for the host's user namespace", kind="user namespace")
        return (), ()
    if wanted.mode != pb.POD:
        raise InvalidArgument(
            f"unsupported user namespace mode {pb.NamespaceMode.Name(wanted.mode)}", kind="user namespace"
        )
    uids, gids = _one(wanted.uids, "uid"), _one(wanted.gids, "gid")
    if uids != gids:
        raise InvalidArgument("uid and gid mappings differ", kind="user namespace")
    return uids, gids


def check_same(pod: pb.NamespaceOption, container: pb.NamespaceOption) -> None:
    """Raise `InvalidArgument` when a container's user namespace is not its pod's."""
    if mappings(pod) != mappings(container):
        raise InvalidArgument(
            "user namespace config for sandbox is different from container", kind="user namespace"
        )


def outside(options: pb.NamespaceOption, uid: int, gid: int) -> tuple[int, int]:
    """Who a user and group of the container are on the host; the same without a user namespace or a mapping."""
    uids, gids = (idmaps.outside(maps, owner) for maps, owner in zip(mappings(options), (uid, gid), strict=True))
    return uid if uids is None else uids, gid if gids is None else gids
