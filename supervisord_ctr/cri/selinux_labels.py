"""Which SELinux labels pods and their containers get: drawn with the pod, kept in its record, gone with it.

Owns the categories in use, which are those in the records of pods and containers, and those of pods being made
(`Core.levels`). Containers of a pod that shares the host's processes or IPC are labelled as others are; a
privileged one's files are labelled, its processes are not: they run as the policy has it for what the OCI
runtime executes (spc_t).
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import AsyncIterator

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri.core import Core
from supervisord_ctr.cri.state import Pod
from supervisord_ctr.names import check_line
from supervisord_ctr.oci import selinux

log = logging.getLogger(__name__)


@functools.cache
def _tell_of_ignored(why: str) -> None:
    """Say once what is not honoured: a kubelet sends the options of a pod's author to every node, and a pod
    that other runtimes start where there is no selinux must start here too."""
    log.warning("selinux options of containers mean nothing here: %s", why)


def asked_of(options: pb.SELinuxOption) -> selinux.Asked:
    """What a request's options ask for; raises `InvalidArgument` for what breaks lines."""
    for value in (options.user, options.role, options.type, options.level):
        check_line(value, "selinux option")
    return selinux.Asked(options.user, options.role, options.type, options.level)


def in_force(core: Core) -> bool:
    """Whether containers get labels at all."""
    return core.settings.cri.enable_selinux and selinux.enabled()


async def _defaults(core: Core, asked: selinux.Asked) -> selinux.Defaults | None:
    """The policy's labels; None, and a word about what was asked for in vain, where there are none."""
    if not in_force(core):
        if asked:
            kernel = selinux.enabled()
            _tell_of_ignored("cri.enable_selinux is false" if kernel else "this kernel runs without selinux")
        return None
    asked.check()
    return await core.executors.run_io(selinux.defaults)


def _taken(core: Core) -> set[str]:
    """Every level in use."""
    found = set(core.levels)
    found.update(selinux.Context.parse(pod.selinux).level for pod in core.state.pods() if pod.selinux)
    found.update(
        container.config.linux.security_context.selinux_options.level for container in core.state.containers()
    )
    return found


@contextlib.asynccontextmanager
async def labelled(core: Core, pod: Pod) -> AsyncIterator[None]:
    """Label `pod`, unless it is. Nobody else gets its categories until the end of the block, when it must be known."""
    asked = asked_of(pod.config.linux.security_context.selinux_options)
    found = await _defaults(core, asked)
    if found is None or pod.selinux:
        yield
        return
    level = asked.level or selinux.draw_level(_taken(core), core.settings.cri.selinux_category_range)
    core.levels.append(level)
    try:
        pod.selinux = str(selinux.pod_label(found, asked, level))
        try:
            await core.executors.run_io(selinux.check_known, pod.selinux)
        except errors.Error:
            pod.selinux = ""
            raise
        yield
    finally:
        core.levels.remove(level)


async def of_container(core: Core, pod: Pod, context: pb.LinuxContainerSecurityContext) -> selinux.Labels | None:
    """The labels of a container, None where it gets none. A pod made before there was a policy is labelled now."""
    asked = asked_of(context.selinux_options)
    found = await _defaults(core, asked)
    if found is None:
        return None
    if not pod.selinux:
        async with labelled(core, pod):
            await core.state.save_pod(pod)
    labels = _labels(found, pod, asked, context.privileged)
    await core.executors.run_io(selinux.check_known, labels.process, labels.mount)
    return labels


async def of_pause(core: Core, pod: Pod) -> selinux.Labels:
    """The labels of the process that holds the PID namespace of the pod."""
    nothing_more = selinux.Asked()
    found = await _defaults(core, nothing_more) if pod.selinux else None
    if found is None:
        return selinux.Labels("", "")
    return _labels(found, pod, nothing_more, pod.config.linux.security_context.privileged)


def _labels(found: selinux.Defaults, pod: Pod, asked: selinux.Asked, privileged: bool) -> selinux.Labels:
    labels = selinux.container_labels(found, selinux.Context.parse(pod.selinux), asked)
    return selinux.Labels("", labels.mount) if privileged else labels
