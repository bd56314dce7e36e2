"""StopPodSandbox and RemovePodSandbox, and what both need: the pod's environment taken down in steps.

Both may be repeated and succeed for what is gone. A step that fails ends the call with an error that
says which one; the next call goes on there.
"""

from __future__ import annotations

import asyncio
import logging

from supervisord_ctr import errors, faults
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri.container_remove import remove_container
from supervisord_ctr.cri.container_report import publish_pod
from supervisord_ctr.cri.container_stop import stop_now
from supervisord_ctr.cri.core import Core, all_of
from supervisord_ctr.cri.state import Pod
from supervisord_ctr.names import CRI_NAMESPACE
from supervisord_ctr.sandbox import pause

log = logging.getLogger(__name__)

CONTAINERS = faults.declare("cri.pod.stop.containers", "the pod's containers have ended, its network is still attached")
DETACHED = faults.declare("cri.pod.stop.detached", "the pod's network is detached, its record says ready")
REMOVING = faults.declare("cri.pod.remove", "the pod is stopped, its containers are gone, its record is there")


async def stop_pod(core: Core, identity: str) -> None:
    """Stop a pod; a pod that is unknown or stopped already is no error."""
    pod = core.state.pod_or_none(identity)
    if pod is None:
        return
    await core.operations.run(("pod stop", pod.id), lambda: _stop(core, pod))


async def _stop(core: Core, pod: Pod) -> None:
    async with core.hold(pod.id, "stopping containers"):
        if pod.stage in ("stopped", "removing") and core.networks.get(pod.id) is None:
            return
        was_ready = pod.ready
        await _end_containers(core, pod)
        faults.point(CONTAINERS)
        core.stages.enter(pod.id, "detaching the network")
        await _take_down(core, pod)
    if was_ready:
        publish_pod(core, pod, pb.CONTAINER_STOPPED_EVENT)


async def _end_containers(core: Core, pod: Pod) -> None:
    results = await asyncio.gather(
        *(stop_now(core, container, "pod stop") for container in core.state.containers_of(pod.id)),
        return_exceptions=True,
    )
    for result in results:
        if isinstance(result, errors.Error):
            raise type(result)(
                f"failed to stop a container of sandbox {pod.id!r}: {result.message}", kind="sandbox", key=pod.id
            ) from result
        if isinstance(result, BaseException):
            raise result


async def _take_down(core: Core, pod: Pod) -> None:
    """End the pause process, detach the network, then let go of the namespaces and record it; each may be gone."""
    pause.end(pod.pause_pid, pod.pause_start)

    async def record() -> None:
        faults.point(DETACHED)
        if pod.stage != "removing":
            pod.stage = "stopped"
        pod.pause_pid = pod.pause_start = 0
        await core.state.save_pod(pod)

    async def rest() -> None:
        await all_of(core.executors.run_io(core.environments.drop, pod.id), record())

    try:
        await core.networks.detach(pod.id, rest)
    except errors.Error as error:
        if core.networks.get(pod.id) is None:
            raise
        raise errors.Unknown(
            f"failed to destroy network for sandbox {pod.id!r}: {error.message}", kind="sandbox", key=pod.id
        ) from error


async def remove_pod(core: Core, identity: str) -> None:
    """Remove a pod and its containers, stopping what runs; an unknown pod is no error."""
    pod = core.state.pod_or_none(identity)
    if pod is None:
        return
    await core.operations.run(("pod remove", pod.id), lambda: _remove(core, pod))


async def _remove(core: Core, pod: Pod) -> None:
    await stop_pod(core, pod.id)
    await all_of(*(remove_container(core, container.id) for container in core.state.containers_of(pod.id)))
    async with core.hold(pod.id, "removing"):
        if core.state.pod_or_none(pod.id) is not pod:
            return
        faults.point(REMOVING)
        await core.executors.run_io(core.environments.remove, pod.id)
        pod.stage = "removing"
        pod.changed()
        publish_pod(core, pod, pb.CONTAINER_DELETED_EVENT, with_status=False)
        # Asked for at once, they go to disk at once.
        await all_of(_forget_stored(core, pod), core.state.forget_pod(pod))
        core.stats.forget(pod.id)


async def _forget_stored(core: Core, pod: Pod) -> None:
    try:
        await core.database.sandboxes.delete(CRI_NAMESPACE, pod.id)
    except errors.NotFound:
        log.debug("sandbox %s was not in the sandbox store", pod.id)
