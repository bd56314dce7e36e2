"""After a start: what pods and containers became while no daemon looked, and what a crash left half made.

Owns bringing memory in line with the machine (P6: what runs is listed) and taking away what belongs
to nothing (P5). The first part is done before anybody is served, the second in the background, step
by step and again later for what failed.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import time
from pathlib import Path

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import exits, id_mapped, ids, image_volumes
from supervisord_ctr.cri.container_create import remove_traces
from supervisord_ctr.cri.core import Core
from supervisord_ctr.cri.pods_pause import watch_pause
from supervisord_ctr.cri.pods_run import wanted_environment
from supervisord_ctr.cri.state import Container, Pod
from supervisord_ctr.linux import mounts as system_mounts
from supervisord_ctr.linux import processes
from supervisord_ctr.model import SnapshotKind, TaskStatus
from supervisord_ctr.names import CRI_NAMESPACE, LABEL_GC_ROOT
from supervisord_ctr.sandbox import pause

log = logging.getLogger(__name__)

_OURS = re.compile(r"([0-9a-f]{64})(?:-volume-[0-9]+)?\Z")
#: Seconds between two attempts to take away what could not be.
_FIRST_RETRY, _LONGEST_RETRY = 1.0, 60.0


async def recover(core: Core) -> None:
    """Read the records and compare them with the machine."""
    await core.state.load()
    await core.networks.load()
    await core.images.load()
    await core.executors.run_io(shutil.rmtree, core.run / "exec", True)
    await core.executors.run_io(shutil.rmtree, core.run / "checkpoint", True)
    await core.executors.run_io(id_mapped.drop_all, core.run / "id-mapped")
    for pod in core.state.pods():
        await _pod(core, pod)
    for container in core.state.containers():
        await _container(core, container)


async def _pod(core: Core, pod: Pod) -> None:
    """A ready pod whose namespaces or pause process are gone (a reboot, a kill) is ready no more."""
    if not pod.ready:
        return
    wanted = wanted_environment(pod.id, pod.config)
    whole = await core.executors.run_io(core.environments.intact, wanted)
    if pod.pause_pid and not pause.alive(pod.pause_pid, pod.pause_start):
        whole = False
    if whole:
        watch_pause(core, pod)
    else:
        log.warning("sandbox %s lost its namespaces and is not ready any more", pod.id)
        pod.stage = "stopped"
        await core.state.save_pod(pod)


async def _container(core: Core, container: Container) -> None:
    if container.stage not in ("created", "running"):
        return
    try:
        found = await core.tasks.state(CRI_NAMESPACE, container.id)
    except errors.NotFound:
        if container.running:
            await _lost(core, container)
        return
    if container.running or found.status != TaskStatus.CREATED:
        if not container.running:
            container.stage, container.pid = "running", found.pid
            container.started_at = _start_of(found.pid) or container.created_at
            await core.state.save_container(container)
        exits.watch(core, container)
        return
    log.info("container %s was made but not started when the daemon ended", container.id)
    for step in (
        core.tasks.kill(CRI_NAMESPACE, container.id, "", 9, True), core.tasks.delete(CRI_NAMESPACE, container.id)
    ):
        try:
            await step
        except errors.Error as error:
            log.debug("task of container %s: %s", container.id, error.message)


def _start_of(pid: int) -> int:
    """When a process started, in nanoseconds since the epoch; 0 when it is gone."""
    ticks = processes.read_start_time(pid)
    if not ticks:
        return 0
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return int((boot + ticks / 100) * 1e9)


async def _lost(core: Core, container: Container) -> None:
    """The task is gone and nobody knows how it ended (a reboot): never 0 (P13)."""
    container.stage, container.exit_code, container.reason = "exited", exits.UNKNOWN_EXIT, "Unknown"
    container.message = "the task was gone when the daemon started"
    container.finished_at, container.pid = time.time_ns(), 0
    await core.state.save_container(container)


async def take_orphans_away(core: Core) -> None:
    """Everything that belongs to no pod and no container; repeated with growing pauses until it worked."""
    pause_time = _FIRST_RETRY
    while True:
        left = await one_pass(core)
        if not left:
            break
        log.warning("%d things that belong to no pod could not be taken away yet", left)
        await asyncio.sleep(pause_time)
        pause_time = min(pause_time * 2, _LONGEST_RETRY)


    try:
        await core.networks.collect()
    except errors.Error as error:
        log.info("network plugins collected no garbage: %s", error.message)


async def one_pass(core: Core) -> int:
    """One attempt; returns how many things are left."""
    left = len(await core.networks.release_orphans(wanted_networks(core)))
    for step in (_environments, _stored_containers, _snapshots, _volumes, _folders):
        try:
            left += await step(core)
        except (errors.Error, OSError):
            log.exception("a pass over what was left behind failed in %s", step.__name__)
            left += 1
    return left


def wanted_networks(core: Core) -> set[str]:
    """Pods that are ready, or are being made or stopped right now."""
    return {pod.id for pod in core.state.pods() if pod.ready} | set(core.stages.all())


async def _environments(core: Core) -> int:
    left = 0
    busy = set(core.stages.all())
    known = {pod.id for pod in core.state.pods()}
    for pod_id in await core.executors.run_io(core.environments.known):
        if pod_id in known or pod_id in busy or core.networks.get(pod_id) is not None:
            continue
        try:
            await core.executors.run_io(core.environments.remove, pod_id)
            await core.database.sandboxes.delete(CRI_NAMESPACE, pod_id)
        except errors.NotFound:
            continue
        except (errors.Error, OSError) as error:
            log.warning("environment of former sandbox %s is left: %s", pod_id, error)
            left += 1
    return left


async def _stored_containers(core: Core) -> int:
    """Containers that were stored for CRI but have no record: their creation was cut off."""
    left = 0
    busy = set(core.stages.all())
    wanted = [f'labels."{ids.LABEL_KIND}"=={ids.KIND_CONTAINER}']
    for stored in await core.database.containers.list(CRI_NAMESPACE, wanted):
        if core.state.container_or_none(stored.id) is not None or stored.id in busy or not _OURS.match(stored.id):
            continue
        found = Container(stored.id, "", "", pb.ContainerConfig(), snapshotter=stored.snapshotter)
        try:
            await remove_traces(core, found)
        except (errors.Error, OSError):
            left += 1
    return left


async def _snapshots(core: Core) -> int:
    """Layers and views that were made for containers that do not exist."""
    left = 0
    busy = set(core.stages.all())
    default = core.settings.snapshots.default
    for name in {runtime.snapshotter or default for runtime in core.settings.runtime.classes.values()}:
        try:
            snapshotter = core.database.snapshotter(name)
        except errors.Error:
            continue
        for info in await snapshotter.walk(CRI_NAMESPACE):
            match = _OURS.match(info.name)
            if info.kind == SnapshotKind.COMMITTED or match is None or LABEL_GC_ROOT not in info.labels:
                continue
            if core.state.container_or_none(match[1]) is not None or match[1] in busy:
                continue
            try:
                if "-volume-" in info.name:
                    await core.executors.run_io(system_mounts.unmount_below, image_volumes.folder_of(core, match[1]))
                await snapshotter.remove(CRI_NAMESPACE, info.name)
            except errors.NotFound:
                continue
            except errors.Error as error:
                log.warning("snapshot %s of a former container is left: %s", info.name, error.message)
                left += 1
    return left


async def _volumes(core: Core) -> int:
    return await _leftover_folders(core, core.run / "image-volumes")


async def _folders(core: Core) -> int:
    return await _leftover_folders(core, core.root / "containers")


async def _leftover_folders(core: Core, folder: Path) -> int:
    busy = set(core.stages.all())

    def sweep(known: set[str]) -> int:
        if not folder.is_dir():
            return 0
        for entry in list(folder.iterdir()):
            if entry.name not in known and entry.name not in busy:
                remove_folder(entry)
        return 0

    return await core.executors.run_io(sweep, {container.id for container in core.state.containers()})


def remove_folder(folder: Path) -> None:
    """Unmount what is below a folder and remove it. Blocks."""
    system_mounts.unmount_below(folder)
    shutil.rmtree(folder, ignore_errors=True)
