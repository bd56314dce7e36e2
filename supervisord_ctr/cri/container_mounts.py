"""Mounts of a container: what the request asks for, over the pod's files and the defaults.

Owns their order, options, propagation checks and what must exist on the host. Destinations are
handed to the OCI runtime, which resolves them inside the root file system (S2).
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri.id_mapped import IdMapped, map_text
from supervisord_ctr.linux import mounts as system_mounts
from supervisord_ctr.names import check_line
from supervisord_ctr.oci import selinux
from supervisord_ctr.oci.spec import SpecBuilder
from supervisord_ctr.sandbox.files import PodFiles

_CGROUP_OPTIONS = ("nosuid", "noexec", "nodev", "relatime", "ro")
#: Words of `mount_options` that change nothing but one mount.
_EXTRA_OPTIONS = frozenset({"noexec", "exec", "nosuid", "suid", "nodev", "dev", "noatime", "relatime", "nosymfollow"})


@dataclass(frozen=True)
class Features:
    """What the handler's runtime can do."""

    recursive_read_only: bool = True
    idmap: bool = True


def apply(
    builder: SpecBuilder, requested: Sequence[pb.Mount], extra: Sequence[pb.Mount], *, features: Features,
    host_cgroup_namespace: bool, id_mapped: Path, label: str = "",
) -> list[IdMapped]:
    """Put the mounts into the specification. Blocking: looks at the host's paths and makes missing ones.

    What is to be relabelled for SELinux gets `label`, unless that is "". Returns what has to be mounted with mapped
    owners below `id_mapped` before the container is made.
    """
    wanted = list(requested)
    taken = {_clean(mount.container_path) for mount in wanted}
    wanted += [mount for mount in extra if _clean(mount.container_path) not in taken]
    wanted.sort(key=lambda mount: _clean(mount.container_path).count("/"))
    places = {_clean(mount.container_path) for mount in wanted}
    options = list(_CGROUP_OPTIONS)
    if host_cgroup_namespace:
        options += _host_cgroup_words()
    builder.with_mounts([
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options}
    ])
    builder.spec["mounts"] = [
        entry for entry in builder.spec["mounts"]
        if _clean(entry["destination"]) not in places
        and not ("/dev" in places and _clean(entry["destination"]).startswith("/dev/"))
    ]
    mapped: list[IdMapped] = []
    for mount in wanted:
        entry = _entry(builder, mount, features)
        # An image volume is mounted with its label.
        if label and mount.selinux_relabel and not mount.HasField("image"):
            selinux.relabel(entry["source"], label)
        # An image volume is mapped where it is mounted.
        if (mount.uidMappings or mount.gidMappings) and not mount.HasField("image"):
            place = str(len(mapped))
            mapped.append(IdMapped(place, entry["source"], map_text(mount.uidMappings), map_text(mount.gidMappings)))
            entry["source"] = str(id_mapped / place)
        builder.with_mounts([entry])
    return mapped


def _clean(path: str) -> str:
    return posixpath.normpath("/" + path.lstrip("/"))


def _host_cgroup_words() -> list[str]:
    """Options of the host's cgroup2 mount, which a mount without a namespace of its own would take away."""
    for entry in system_mounts.mount_table():
        if entry.target == "/sys/fs/cgroup":
            words = entry.super_options.split(",")
            return [word for word in ("nsdelegate", "memory_recursiveprot") if word in words]
    return []


def _entry(builder: SpecBuilder, mount: pb.Mount, features: Features) -> dict[str, Any]:
    check_line(mount.container_path, "container path")
    check_line(mount.host_path, "host path")
    if not mount.container_path:
        raise errors.InvalidArgument(f"mount of {mount.host_path!r} has no container path", kind="mount")
    source = _source(mount)
    options = ["rbind", _propagation(builder, mount, source), *_access(mount, features)]
    for word in mount.mount_options:
        if word not in _EXTRA_OPTIONS:
            raise errors.InvalidArgument(
                f"mount option {word!r} of {mount.container_path!r} is not allowed", kind="mount", key=word
            )
        options.append(word)
    entry: dict[str, Any] = {
        "destination": mount.container_path, "type": "bind", "source": source, "options": options
    }
    if mount.uidMappings or mount.gidMappings:
        if not features.idmap:
            raise errors.FailedPrecondition(
                f"mount of {mount.host_path!r} needs id mapping, which this kernel does not have", kind="mount"
            )
        if not (mount.uidMappings and mount.gidMappings):
            raise errors.InvalidArgument(
                f"mount of {mount.host_path!r} has a map of users or of groups without the other", kind="mount"
            )
    return entry


def _source(mount: pb.Mount) -> str:
    """The real path on the host; a folder is made where there is nothing."""
    path = mount.host_path
    if not path:
        raise errors.InvalidArgument(f"mount of {mount.container_path!r} has no host path", kind="mount")
    try:
        if not os.path.exists(path):
            os.makedirs(path, 0o755, exist_ok=True)
        return os.path.realpath(path, strict=True)
    except OSError as error:
        raise errors.from_os_error(error, f"failed to prepare host path {path!r}:") from error


def _propagation(builder: SpecBuilder, mount: pb.Mount, source: str) -> str:
    if mount.propagation == pb.PROPAGATION_BIDIRECTIONAL:
        _require(source, ("shared:",), "shared")
        builder.linux["rootfsPropagation"] = "rshared"
        return "rshared"
    if mount.propagation == pb.PROPAGATION_HOST_TO_CONTAINER:
        _require(source, ("shared:", "master:"), "shared or slave")
        if builder.linux.get("rootfsPropagation") != "rshared":
            builder.linux["rootfsPropagation"] = "rslave"
        return "rslave"
    return "rprivate"


def _require(source: str, prefixes: tuple[str, ...], words: str) -> None:
    """Raise unless the mount that `source` lies on propagates (mount_namespaces(7))."""
    best = None
    for entry in system_mounts.mount_table():
        below = source == entry.target or entry.target == "/" or source.startswith(entry.target + "/")
        if below and (best is None or len(entry.target) >= len(best.target)):
            best = entry
    if best is None or not any(word.startswith(prefixes) for word in best.propagation):
        where = best.target if best is not None else "nothing"
        raise errors.FailedPrecondition(
            f"path {source!r} is mounted on {where!r} but it is not a {words} mount", kind="mount", key=source
        )


def _access(mount: pb.Mount, features: Features) -> list[str]:
    if not mount.recursive_read_only:
        return ["ro" if mount.readonly else "rw"]
    if not mount.readonly:
        raise errors.InvalidArgument(
            f"recursive read-only mount conflicts with RW mount (hostPath={mount.host_path!r})", kind="mount"
        )
    if mount.propagation != pb.PROPAGATION_PRIVATE:
        raise errors.InvalidArgument(
            "recursive read-only mount needs private propagation, got "
            f"{pb.MountPropagation.Name(mount.propagation)} (hostPath={mount.host_path!r})", kind="mount"
        )
    if not features.recursive_read_only:
        raise errors.FailedPrecondition(
            "RROUnsupported: runtime handler does not support recursive read-only mounts "
            f"(hostPath={mount.host_path!r})", kind="mount",
        )
    return ["rro"]


def pod_mounts(files: PodFiles, config: pb.ContainerConfig) -> list[pb.Mount]:
    """The pod's files that a container sees unless the request mounts something else there."""
    context = config.linux.security_context
    userns = context.namespace_options.userns_options
    found: list[pb.Mount] = []
    for place, path in (
        ("/etc/hostname", files.hostname), ("/etc/hosts", files.hosts), ("/etc/resolv.conf", files.resolv)
    ):
        if path.exists():
            found.append(pb.Mount(
                container_path=place, host_path=str(path), readonly=context.readonly_rootfs, selinux_relabel=True,
                uidMappings=userns.uids, gidMappings=userns.gids,
            ))
    of_host = context.namespace_options.ipc == pb.NODE
    shm = "/dev/shm" if of_host else str(files.shm)
    if os.path.isdir(shm):
        found.append(pb.Mount(container_path="/dev/shm", host_path=shm, selinux_relabel=not of_host))
    return found
