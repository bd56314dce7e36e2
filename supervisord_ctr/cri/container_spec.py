"""The OCI specification of a container, from its request, its pod and its image.

Owns the order in which the parts are put together, the process, the namespaces, the resources and
the cgroup's path. Mounts and the security context have files of their own.
"""

from __future__ import annotations

import os
import posixpath
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import container_mounts, container_security, ids, userns
from supervisord_ctr.cri.id_mapped import IdMapped
from supervisord_ctr.linux import cgroups
from supervisord_ctr.names import check_line
from supervisord_ctr.oci import cdi, devices
from supervisord_ctr.oci.selinux import Labels
from supervisord_ctr.oci.spec import DEFAULT_PATH, SpecBuilder
from supervisord_ctr.oci.users import User
from supervisord_ctr.sandbox.files import PodFiles
from supervisord_ctr.settings import RuntimeClass


@dataclass(frozen=True)
class ImageConfig:
    """What the specification takes from an image's config."""

    env: Sequence[str] = ()
    entrypoint: Sequence[str] = ()
    cmd: Sequence[str] = ()
    working_dir: str = ""


@dataclass(frozen=True)
class Places:
    """Where the pod's namespaces are; "" is the host's. `pid` is "" for the host's and None for one of its own."""

    network: str = ""
    ipc: str = ""
    uts: str = ""
    user: str = ""
    pid: str | None = None


@dataclass(frozen=True)
class Build:
    """Everything that a specification is built from."""

    namespace: str
    container_id: str
    pod_id: str
    config: pb.ContainerConfig
    pod: pb.PodSandboxConfig
    image: ImageConfig
    image_name: str
    user: User
    files: PodFiles
    places: Places
    handler: RuntimeClass
    systemd: bool
    features: container_mounts.Features
    volumes: Sequence[pb.Mount] = ()
    seccomp_default: bool = False
    cdi_folders: Sequence[str] = ()
    id_mapped: Path = Path()
    selinux: Labels | None = None


def build(what: Build) -> tuple[SpecBuilder, list[IdMapped]]:
    """The specification, and what to mount with mapped owners below `id_mapped` before the container is made.

    Blocking: looks at host paths and devices. Raises `errors.Error`.
    """
    builder = SpecBuilder(what.namespace, what.container_id)
    context = what.config.linux.security_context
    builder.without_mounts("/run", "/dev/shm")
    builder.process.pop("rlimits", None)
    _process(builder, what)
    unified = cgroups.hierarchy().mode == "v2"
    own_cgroup = unified and not context.privileged
    if own_cgroup:
        builder.with_namespace("cgroup")
    mapped = container_mounts.apply(
        builder, what.config.mounts, [*container_mounts.pod_mounts(what.files, what.config), *what.volumes],
        features=what.features, host_cgroup_namespace=unified and not own_cgroup, id_mapped=what.id_mapped,
        label=what.selinux.mount if what.selinux else "",
    )
    _devices(builder, what)
    container_security.apply(
        builder, context, what.pod.linux.security_context,
        host_devices=not what.handler.privileged_without_host_devices, seccomp_default=what.seccomp_default,
        labels=what.selinux,
    )
    _namespaces(builder, what)
    apply_resources(builder, what.config.linux.resources)
    if what.config.linux.HasField("resources"):
        builder.with_oom_score(what.config.linux.resources.oom_score_adj)
    builder.with_cgroup(cgroup_path(what.pod.linux.cgroup_parent, what.container_id, what.namespace, what.systemd))
    _annotations(builder, what)
    if devices_of_vendors := cdi_devices(what.config):
        cdi.Registry(what.cdi_folders).load().inject(builder, devices_of_vendors)
    return builder, mapped


def _process(builder: SpecBuilder, what: Build) -> None:
    config, image = what.config, what.image
    builder.with_args(arguments(config, image))
    builder.with_cwd(config.working_dir or image.working_dir or "/")
    if config.tty:
        builder.with_terminal()
    builder.with_env([DEFAULT_PATH, f"HOSTNAME={what.pod.hostname or socket.gethostname()}"])
    builder.with_env(entry for entry in image.env if "=" in entry)
    for entry in config.envs:
        if not entry.key or "=" in entry.key or "\0" in entry.key or b"\0" in entry.value:
            raise errors.InvalidArgument(f"environment variable {entry.key!r} is not valid", kind="env", key=entry.key)
    builder.with_env(
        f"{entry.key}={entry.value.decode('utf-8', 'surrogateescape')}" for entry in config.envs
    )
    builder.with_user(what.user)


def arguments(config: pb.ContainerConfig, image: ImageConfig) -> list[str]:
    """The command line as Kubernetes defines it: a command replaces the entrypoint and the image's arguments."""
    command, given = list(config.command), list(config.args)
    if not command:
        command = list(image.entrypoint)
        given = given or list(image.cmd)
    if not command and not given:
        raise errors.InvalidArgument("no command specified", kind="container")
    for word in (*command, *given):
        if "\0" in word:
            raise errors.InvalidArgument("an argument holds a null byte", kind="container")
    return command + given


def _devices(builder: SpecBuilder, what: Build) -> None:
    for device in what.config.devices:
        check_line(device.container_path, "device path")
        if not device.host_path or not os.path.exists(device.host_path):
            raise errors.NotFound(f"device {device.host_path!r} not found", kind="device", key=device.host_path)
        path = os.path.realpath(device.host_path)
        builder.with_devices(
            devices.below(path, device.container_path or device.host_path), device.permissions or "rwm"
        )


def _namespaces(builder: SpecBuilder, what: Build) -> None:
    options = what.config.linux.security_context.namespace_options
    userns.check_same(what.pod.linux.security_context.namespace_options, options)
    for kind, path in (("network", what.places.network), ("ipc", what.places.ipc), ("uts", what.places.uts)):
        if path:
            builder.with_namespace(kind, path)
        else:
            builder.with_host_namespace(kind)
    if what.places.pid is None:
        builder.with_namespace("pid")
    elif what.places.pid:
        builder.with_namespace("pid", what.places.pid)
    else:
        builder.with_host_namespace("pid")
    uids, gids = userns.mappings(options)
    if uids:
        builder.with_user_namespace(uids, gids, what.places.user)
        if not what.places.network:
            builder.without_mounts("/sys").with_mounts([{
                "destination": "/sys", "type": "bind", "source": "/sys",
                "options": ["rbind", "rro", "nosuid", "nodev", "noexec"],
            }])
            _first_mount(builder, "/sys")


def _first_mount(builder: SpecBuilder, place: str) -> None:
    """Move the mount at `place` before everything that lies below it."""
    entries: list[dict[str, Any]] = builder.spec["mounts"]
    mine = [entry for entry in entries if posixpath.normpath(entry["destination"]) == place]
    others = [entry for entry in entries if entry not in mine]
    at = next(
        (index for index, entry in enumerate(others) if entry["destination"].startswith(place + "/")), len(others)
    )
    builder.spec["mounts"] = [*others[:at], *mine, *others[at:]]


def swap_accounting() -> bool:
    """Whether the kernel limits swap by cgroup."""
    if cgroups.hierarchy().mode == "v2":
        return os.path.exists("/sys/fs/cgroup/init.scope/memory.swap.max") or _own_v2_swap()
    return os.path.exists("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")


def _own_v2_swap() -> bool:
    try:
        with open("/proc/self/cgroup", encoding="ascii") as handle:
            for line in handle:
                number, _, path = line.rstrip("\n").split(":", 2)
                if number == "0":
                    return os.path.exists(f"/sys/fs/cgroup{path}/memory.swap.max")
    except OSError:
        return False
    return False


def check_resources(resources: pb.LinuxContainerResources) -> None:
    """Raise `InvalidArgument` for what no cgroup takes."""
    for name in ("cpuset_cpus", "cpuset_mems"):
        value = getattr(resources, name)
        if value and not all(char in "0123456789,-" for char in value):
            raise errors.InvalidArgument(f"{name} {value!r} is not a list of numbers", kind="resources", key=name)
    if resources.cpu_period < 0 or resources.cpu_shares < 0:
        raise errors.InvalidArgument("cpu period and shares must not be negative", kind="resources")
    for key, value in resources.unified.items():
        check_line(key, "cgroup file")
        if "/" in key or key.startswith(".") or not key:
            raise errors.InvalidArgument(f"cgroup file {key!r} is not valid", kind="resources", key=key)
        if "\0" in value:
            raise errors.InvalidArgument(f"value of cgroup file {key} holds a null byte", kind="resources", key=key)


def apply_resources(builder: SpecBuilder, resources: pb.LinuxContainerResources) -> None:
    """Limits; a zero leaves the runtime's default. Swap is kept off unless asked for."""
    check_resources(resources)
    builder.with_cpu(
        shares=resources.cpu_shares, quota=resources.cpu_quota, period=resources.cpu_period,
        cpus=resources.cpuset_cpus, mems=resources.cpuset_mems,
    )
    limit, swap = resources.memory_limit_in_bytes, resources.memory_swap_limit_in_bytes
    if (limit or swap) and not swap_accounting():
        swap = 0
    elif limit and not swap:
        swap = limit
    builder.with_memory(limit, swap=swap)
    if resources.hugepage_limits and _huge_pages_controlled():
        builder.with_hugepages((entry.page_size, entry.limit) for entry in resources.hugepage_limits)
    if resources.unified:
        builder.with_unified(resources.unified)


def _huge_pages_controlled() -> bool:
    """A kernel without the controller is tolerated: the kubelet states limits of zero for every page size."""
    if cgroups.hierarchy().mode == "v2":
        return "hugetlb" in cgroups.read("/sys/fs/cgroup/cgroup.controllers").split()
    return os.path.isdir("/sys/fs/cgroup/hugetlb")


def cgroup_path(parent: str, container_id: str, namespace: str, systemd: bool) -> str:
    """The cgroup as the OCI runtime takes it: a path, or "slice:prefix:name" with the systemd driver.

    Raises `InvalidArgument` for the parent of the other driver: the limits of a pod would be set on one
    group while its containers are in another.
    """
    check_line(parent, "cgroup parent")
    if ".." in parent.split("/"):
        raise errors.InvalidArgument(f"cgroup parent {parent!r} must not hold '..'", kind="cgroup", key=parent)
    last = posixpath.basename(parent.rstrip("/"))
    is_slice = last.endswith(".slice")
    if parent.strip("/") and is_slice != systemd:
        driver, shape = ("systemd", "the name of a slice") if systemd else ("cgroupfs", "a path and no slice")
        raise errors.InvalidArgument(
            f"cgroup parent {parent!r} must be {shape}: containers of this runtime handler use the {driver} driver",
            kind="cgroup", key=parent,
        )
    if systemd:
        return f"{last or 'system.slice'}:cri-containerd:{container_id}"
    if parent:
        return posixpath.join("/", parent.lstrip("/"), container_id)
    return f"/{namespace}/{container_id}"


def _annotations(builder: SpecBuilder, what: Build) -> None:
    found = ids.passed_through(what.pod.annotations, what.handler.pod_annotations)
    found.update(ids.passed_through(what.config.annotations, what.handler.container_annotations))
    found.update(ids.annotations_for(
        what.pod_id, what.pod, ids.KIND_CONTAINER, what.config.metadata.name, what.image_name
    ))
    builder.with_annotations(found)


def cdi_devices(config: pb.ContainerConfig) -> list[str]:
    """Names of CDI devices, each once: those of the field, then those of annotations "cdi.k8s.io/…", the older way.

    Raises `InvalidArgument` for what is no full name.
    """
    found = [device.name for device in config.CDI_devices]
    for key, value in sorted(config.annotations.items()):
        if key.startswith("cdi.k8s.io/"):
            found += [name.strip() for name in value.split(",")]
    for name in found:
        if not cdi.is_name(name):
            raise errors.InvalidArgument(f"invalid CDI device reference {name!r}", kind="cdi", key=name)
    return list(dict.fromkeys(found))
