"""CreateContainer: snapshot, user, volumes and specification of a container; nothing runs yet.

Repeating the call joins the running operation or returns the container that it made and that was
not started (D9, P3). The record comes last: what a crash leaves is a snapshot and a stored container
without a record, which the recovery removes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from supervisord_ctr import errors, faults
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import (
    checkpoint,
    container_mounts,
    container_rootfs,
    container_spec,
    ids,
    image_volumes,
    selinux_labels,
    signals,
)
from supervisord_ctr.cri import userns as user_namespaces
from supervisord_ctr.cri.container_report import publish_container
from supervisord_ctr.cri.core import Core, Stage, all_of
from supervisord_ctr.cri.image_store import ImageRecord
from supervisord_ctr.cri.pods_pause import ensure_pause
from supervisord_ctr.cri.state import Container, Pod
from supervisord_ctr.linux import idmaps
from supervisord_ctr.linux import mounts as system_mounts
from supervisord_ctr.model import Container as StoredContainer
from supervisord_ctr.model import Mount, TypedValue
from supervisord_ctr.names import CAPABILITY_REMAP_IDS, CRI_NAMESPACE, LABEL_GC_ROOT, check_line
from supervisord_ctr.oci import selinux
from supervisord_ctr.oci.spec import TYPE_URL, SpecBuilder
from supervisord_ctr.oci.users import User

log = logging.getLogger(__name__)

SNAPSHOT = faults.declare("cri.container.snapshot", "the container's snapshot is there, nothing refers to it")
STORED = faults.declare("cri.container.stored", "the container is stored and recorded, the caller does not know its id")


async def create_container(core: Core, request: pb.CreateContainerRequest) -> str:
    """The ID of the container that the request describes, made now, before, or by another call right now."""
    pod = core.state.pod(request.pod_sandbox_id)
    if not request.config.HasField("metadata"):
        raise errors.InvalidArgument("container config must include metadata", kind="container")
    if not request.sandbox_config.HasField("metadata"):
        raise errors.InvalidArgument("pod sandbox config must include metadata", kind="sandbox")
    if not pod.ready:
        raise errors.FailedPrecondition(f"sandbox container {pod.id!r} is not running", kind="sandbox", key=pod.id)
    name = ids.container_name(request.config.metadata, request.sandbox_config.metadata)
    known = core.state.container_named(name)
    if known is not None and known.stage != "creating":
        if known.stage == "created" and known.pod_id == pod.id and _same(known.config, request.config):
            return known.id
        raise errors.AlreadyExists(
            f"container name {name!r} belongs to container {known.id}, which is {known.stage}",
            kind="container", key=known.id,
        )
    return await core.operations.run(("container", name), lambda: _create(core, pod, name, request))


def _same(kept: pb.ContainerConfig, asked: pb.ContainerConfig) -> bool:
    """Whether the request is the one that made the container; what was filled in since does not count."""
    plain = pb.ContainerConfig()
    plain.CopyFrom(asked)
    for mine, theirs in zip(kept.mounts, plain.mounts, strict=False):
        if mine.HasField("image") and theirs.HasField("image"):
            theirs.host_path, theirs.image.image_ref = mine.host_path, mine.image.image_ref
    return bool(plain == kept)


def log_path(pod: pb.PodSandboxConfig, config: pb.ContainerConfig) -> str:
    """Where the container's output goes, "" for nowhere; never outside the pod's log folder (S11)."""
    if not pod.log_directory or not config.log_path:
        return ""
    check_line(pod.log_directory, "log directory")
    check_line(config.log_path, "log path")
    if not pod.log_directory.startswith("/"):
        raise errors.InvalidArgument(f"log directory {pod.log_directory!r} is not absolute", kind="log path")
    path = Path(config.log_path)
    if path.is_absolute() or ".." in path.parts:
        raise errors.InvalidArgument(
            f"log path {config.log_path!r} must stay below the log directory", kind="log path", key=config.log_path
        )
    return str(Path(pod.log_directory) / path)


async def _create(core: Core, pod: Pod, name: str, request: pb.CreateContainerRequest) -> str:
    config = pb.ContainerConfig()
    config.CopyFrom(request.config)
    checkpointed = await checkpoint.find(core, config.image.image)
    image = await core.images.resolve(checkpointed.base_image if checkpointed else config.image.image)
    container = Container(ids.new_id(), name, pod.id, config)
    container.log_path = log_path(request.sandbox_config, config)
    container.image_id, container.image_digest = image.id, image.target.digest
    container.image_name = image.main_name
    container.stop_signal = signals.name_of(config.stop_signal) or image.config.stop_signal
    container.snapshotter = core.snapshotter(pod.handler)
    container.runtime = core.runtime(pod.handler).name
    container.checkpoint = checkpointed.path if checkpointed else ""
    label = f"{core.label(pod.id)}/{config.metadata.name}"
    with core.stages.track(container.id, "image volumes", label) as stage:
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(_undo, core, container)
            labels = await selinux_labels.of_container(core, pod, config.linux.security_context)
            await image_volumes.mount_all(core, container, labels.mount if labels else "")
            spec = await _prepare(core, pod, container, image, request, labels, stage)
            stage.enter("storing")
            container.stage, container.created_at = "created", time.time_ns()
            await all_of(_store(core, pod, container, image, spec), core.state.save_container(container))
            faults.point(STORED)
            if core.state.pod_or_none(pod.id) is not pod or not pod.ready:
                raise errors.FailedPrecondition(
                    f"sandbox {pod.id!r} was stopped while a container was created in it", kind="sandbox", key=pod.id
                )
            core.state.add_container(container)
            undo.pop_all()
    publish_container(core, container, pb.CONTAINER_CREATED_EVENT)
    return container.id


async def _prepare(
    core: Core, pod: Pod, container: Container, image: ImageRecord, request: pb.CreateContainerRequest,
    labels: selinux.Labels | None, stage: Stage,
) -> SpecBuilder:
    """Snapshot, user and volumes, then the specification: beside the snapshot, where nothing is looked up in it."""
    config = container.config
    stage.enter("snapshot")
    volumes = _volumes(core, container, image)
    asked = container_rootfs.asked_user(config.linux.security_context, image.config.user)
    places = await _places(core, pod, config)
    known = None if volumes else _known_user(core, image, asked)
    if known is not None:
        made = await all_of(
            _snapshot(core, container, image),
            _specification(core, pod, container, image, request, known, places, (), labels),
        )
        faults.point(SNAPSHOT)
        builder: SpecBuilder = made[1]
        return builder
    mounts = await _snapshot(core, container, image)
    faults.point(SNAPSHOT)
    stage.enter("user and volumes")
    user = await _user_and_volumes(core, image, asked, mounts, volumes)
    stage.enter("specification")
    return await _specification(core, pod, container, image, request, user, places, volumes, labels)


async def _specification(
    core: Core, pod: Pod, container: Container, image: ImageRecord, request: pb.CreateContainerRequest, user: User,
    places: container_spec.Places, volumes: Sequence[pb.Mount], labels: selinux.Labels | None,
) -> SpecBuilder:
    """The specification; what the status tells of it is noted in `container`."""
    config = container.config
    container.uid, container.gid, container.groups = user.uid, user.gid, list(user.additional_gids)
    handler_name, handler = core.handler(pod.handler)
    what = container_spec.Build(
        namespace=CRI_NAMESPACE, container_id=container.id, pod_id=pod.id, config=config,
        pod=request.sandbox_config, user=user,
        image=container_spec.ImageConfig(
            image.config.env, image.config.entrypoint, image.config.cmd, image.config.working_dir
        ),
        image_name=config.image.user_specified_image or container.image_name,
        files=core.environments.files(pod.id), places=places, handler=handler,
        systemd=core.systemd_cgroups(handler_name), features=features(core.root), volumes=volumes,
        seccomp_default=core.settings.cri.seccomp_default, cdi_folders=core.settings.cri.cdi_dirs,
        id_mapped=core.id_mapped_folder(container.id), selinux=labels,
    )
    try:
        builder, mapped = await core.executors.run_io(container_spec.build, what)
    except errors.Error as error:
        raise type(error)(
            f"failed to generate container {container.id!r} spec: failed to generate spec opts: {error.message}",
            kind=error.kind, key=error.key,
        ) from error
    container.id_mapped = [list(astuple(entry)) for entry in mapped]
    container.cgroup = builder.linux["cgroupsPath"]
    container.resources = resources_of(builder, config.linux.resources)
    return builder


def features(root: Path) -> container_mounts.Features:
    """What mounts can do here, with snapshots below the file system of `root`.

    Recursive read-only needs mount_setattr(2), in every kernel from 5.12 on.
    """
    return container_mounts.Features(recursive_read_only=True, idmap=system_mounts.supports_idmap(root))


def resources_of(builder: SpecBuilder, asked: pb.LinuxContainerResources) -> pb.LinuxContainerResources:
    """The limits in force, as the status tells them."""
    found = pb.LinuxContainerResources()
    found.CopyFrom(asked)
    cpu, memory = builder.resources.get("cpu", {}), builder.resources.get("memory", {})
    found.cpu_shares, found.cpu_quota = cpu.get("shares", 0), cpu.get("quota", 0)
    found.cpu_period = cpu.get("period", 0)
    found.cpuset_cpus, found.cpuset_mems = cpu.get("cpus", ""), cpu.get("mems", "")
    found.memory_limit_in_bytes = memory.get("limit", 0)
    found.memory_swap_limit_in_bytes = memory.get("swap", 0)
    found.oom_score_adj = builder.process.get("oomScoreAdj", 0)
    return found


async def _snapshot(core: Core, container: Container, image: ImageRecord) -> tuple[Mount, ...]:
    """The writable layer; an image that is not unpacked for this snapshotter is, now."""
    snapshotter = core.database.snapshotter(container.snapshotter)
    labels: dict[str, str] = {LABEL_GC_ROOT: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    uids, gids = user_namespaces.mappings(container.config.linux.security_context.namespace_options)
    if uids:
        if CAPABILITY_REMAP_IDS not in snapshotter.capabilities:
            raise errors.FailedPrecondition(
                f"snapshotter {container.snapshotter!r} does not support user namespaces", kind="snapshotter"
            )
        labels.update(idmaps.snapshot_labels(uids, gids))
    parent = image.chain_id
    # Not durable by itself: the stored container that needs it is, and takes it along.
    try:
        return await snapshotter.prepare(CRI_NAMESPACE, container.id, parent, labels, durable=False)
    except errors.NotFound:
        await core.images.unpack(image, container.snapshotter)
        return await snapshotter.prepare(CRI_NAMESPACE, container.id, parent, labels, durable=False)


def _volumes(core: Core, container: Container, image: ImageRecord) -> list[pb.Mount]:
    """Folders for the volumes that the image declares and the request does not mount."""
    taken = {"/" + mount.container_path.strip("/") for mount in container.config.mounts}
    userns = container.config.linux.security_context.namespace_options.userns_options
    found: list[pb.Mount] = []
    for place in image.config.volumes:
        check_line(place, "volume of the image")
        path = "/" + place.strip("/")
        if path in taken or path == "/":
            continue
        folder = core.container_folder(container.id) / "volumes" / ids.new_id()
        found.append(pb.Mount(
            container_path=path, host_path=str(folder), selinux_relabel=True, uidMappings=userns.uids,
            gidMappings=userns.gids,
        ))
    return found


def _known_user(core: Core, image: ImageRecord, asked: container_rootfs.Asked) -> User | None:
    """Who runs, as far as the image need not be looked into: it was asked before, or it does not matter."""
    known = core.images.users.get((image.chain_id, asked))
    if known is None and not asked.user and not asked.merge:
        return User(0, 0, (0, *(group for group in asked.groups if group)))
    return known


async def _user_and_volumes(
    core: Core, image: ImageRecord, asked: container_rootfs.Asked, mounts: tuple[Mount, ...], volumes: list[pb.Mount]
) -> User:
    """Who runs, and the volumes filled: both from the mounted root."""

    def look() -> User:
        with container_rootfs.opened_root(mounts, core.run / "look") as root_fd:
            user = container_rootfs.resolve(root_fd, asked)
            for volume in volumes:
                container_rootfs.fill_volume(root_fd, volume.container_path, Path(volume.host_path))
        return user

    try:
        user = await core.executors.run_io(look)
    except OSError as error:
        raise errors.from_os_error(error, "cannot look into the image's root:") from error
    core.images.remember_user((image.chain_id, asked), user)
    return user


async def _places(core: Core, pod: Pod, config: pb.ContainerConfig) -> container_spec.Places:
    """Where the namespaces of the pod, or of the container that is named as target, are."""
    options = config.linux.security_context.namespace_options
    pid: str | None
    if options.pid == pb.CONTAINER:
        pid = None
    elif options.pid == pb.NODE:
        pid = ""
    elif options.pid == pb.TARGET:
        pid = f"/proc/{_target(core, pod, options.target_id)}/ns/pid"
    elif pod.namespaces.pid == pb.NODE:
        pid = ""
    else:
        pid = f"/proc/{await ensure_pause(core, pod)}/ns/pid"
    own = core.environments.namespace
    return container_spec.Places(
        network="" if pod.host_network else str(own(pod.id, "net")),
        ipc="" if pod.namespaces.ipc == pb.NODE else str(own(pod.id, "ipc")),
        uts="" if pod.host_network else str(own(pod.id, "uts")),
        user=str(own(pod.id, "user")), pid=pid,
    )


def _target(core: Core, pod: Pod, target_id: str) -> int:
    target = core.state.container_or_none(target_id)
    if target is None or target.pod_id != pod.id:
        raise errors.InvalidArgument(
            f"invalid target container: {target_id!r} is not in sandbox {pod.id!r}", kind="container", key=target_id
        )
    if not target.running or not target.pid:
        raise errors.FailedPrecondition(
            f"invalid target container: {target_id!r} is not running", kind="container", key=target_id
        )
    return target.pid


async def _store(core: Core, pod: Pod, container: Container, image: ImageRecord, spec: SpecBuilder) -> None:
    """The container as the native face shows it."""
    data = spec.to_json()
    owner = (0, 0)
    options = container.config.linux.security_context.namespace_options
    if options.HasField("userns_options"):
        # Nobody in the namespace could open /dev/stdout otherwise: its pipe would belong to an unknown user.
        owner = user_namespaces.outside(options, container.uid, container.gid)
    await core.database.containers.create(CRI_NAMESPACE, StoredContainer(
        id=container.id, labels=_labels(container.config, image.config.labels), image=container.image_name,
        runtime=core.runtime(pod.handler, owner), spec=TypedValue(TYPE_URL, data), snapshotter=container.snapshotter,
        snapshot_key=container.id, sandbox=pod.id,
        extensions={"io.cri-containerd.container.metadata": TypedValue(
            "github.com/containerd/cri/pkg/store/container/Metadata",
            json.dumps({"Metadata": {"ID": container.id, "Name": container.name, "SandboxID": pod.id}}).encode(),
        )},
    ))


def _labels(config: pb.ContainerConfig, image: Mapping[str, str]) -> dict[str, str]:
    labels = ids.build_labels(config.labels, image, ids.KIND_CONTAINER)
    return {key: value for key, value in labels.items() if len(key.encode()) + len(value.encode()) <= 4096}


async def _undo(core: Core, container: Container) -> None:
    """Remove what was made; what cannot be removed is left to the recovery and told in the log."""
    await remove_traces(core, container)
    await core.state.forget_container(container)


async def remove_traces(core: Core, container: Container) -> None:
    """Stored container, snapshot, image volumes and folders; each may be gone.

    Raises the first failure after every step was tried.
    """
    await all_of(remove_files(core, container), remove_stored(core, container))


async def remove_files(core: Core, container: Container) -> None:
    """Image volumes and folders, which few containers have; failures are logged and the first is raised."""
    steps = []
    if image_volumes.any_of(core, container):
        steps.append(("image volumes", image_volumes.unmount_all(core, container)))
    folder = core.container_folder(container.id)
    if folder.is_dir():
        steps.append(("folder", core.executors.run_io(shutil.rmtree, folder, True)))
    await _try_all(container, steps)


async def remove_stored(core: Core, container: Container) -> None:
    """The stored container and its snapshot, in one write; failures are logged and the first is raised."""
    snapshotter = core.database.snapshotter(container.snapshotter)
    await _try_all(container, [
        ("stored container", core.database.containers.delete(CRI_NAMESPACE, container.id)),
        ("snapshot", snapshotter.remove(CRI_NAMESPACE, container.id)),
    ])


async def _try_all(container: Container, steps: Sequence[tuple[str, Coroutine[Any, Any, None]]]) -> None:
    failures: list[BaseException] = []
    results = await asyncio.gather(*(step for _, step in steps), return_exceptions=True)
    for (what, _), result in zip(steps, results, strict=True):
        if isinstance(result, BaseException) and not isinstance(result, errors.NotFound):
            log.warning("%s of container %s is not removed: %s", what, container.id, result)
            failures.append(result)
    if failures:
        raise failures[0]
