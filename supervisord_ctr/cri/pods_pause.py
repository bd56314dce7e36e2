"""The pause process of a pod: made with a pod whose containers share a PID namespace, or when one asks for it."""

from __future__ import annotations

import logging
import os

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import pipes, selinux_labels
from supervisord_ctr.cri.container_report import publish_pod
from supervisord_ctr.cri.core import Core
from supervisord_ctr.cri.state import Pod
from supervisord_ctr.sandbox import pause

log = logging.getLogger(__name__)


async def ensure_pause(core: Core, pod: Pod) -> int:
    """The PID of the pod's pause process, started now if there is none yet.

    Raises `FailedPrecondition` when it is gone: the pod's PID namespace went with it, so the pod is
    no longer whole and must be made anew.
    """
    async with core.locks.hold((pod.id, "pause")):
        if pod.pause_pid:
            if pause.alive(pod.pause_pid, pod.pause_start):
                return pod.pause_pid
            raise errors.FailedPrecondition(
                f"the process that holds the pid namespace of sandbox {pod.id!r} is gone", kind="sandbox", key=pod.id
            )
        own = core.environments.namespace
        options = pod.namespaces
        labels = await selinux_labels.of_pause(core, pod)
        pid, started = await core.forker.fork_pause(
            netns="" if pod.host_network else str(own(pod.id, "net")),
            ipcns="" if options.ipc == pb.NODE else str(own(pod.id, "ipc")),
            utsns="" if pod.host_network else str(own(pod.id, "uts")),
            userns=str(own(pod.id, "user")) if options.userns_options.uids else "",
            hostname=pod.config.hostname, label=labels.process, mount_label=labels.mount,
        )
        pod.pause_pid, pod.pause_start = pid, started
        if pod.stage != "creating":
            # Written before the container that needs it is: records are written in the order they are given.
            core.owner.start(core.state.save_pod(pod), f"record {pod.id}")
            watch_pause(core, pod)
        return pid


def watch_pause(core: Core, pod: Pod) -> None:
    """Notice in the background when the pause process ends: the pod is not ready from then on."""
    if pod.pause_pid:
        core.owner.start(_watch(core, pod), f"pause {pod.id}")


async def _watch(core: Core, pod: Pod) -> None:
    pid, started = pod.pause_pid, pod.pause_start
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        watch = -1
    try:
        if watch >= 0 and pause.alive(pid, started):
            await pipes.wait_readable(watch)
    finally:
        if watch >= 0:
            os.close(watch)
    async with core.locks.hold(pod.id):
        if not pod.ready or pod.pause_pid != pid:
            return
        log.warning("the process that holds the pid namespace of sandbox %s ended", pod.id)
        pod.stage = "stopped"
        await core.state.save_pod(pod)
    publish_pod(core, pod, pb.CONTAINER_STOPPED_EVENT)
