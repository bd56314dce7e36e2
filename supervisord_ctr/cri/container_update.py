"""UpdateContainerResources, UpdatePodSandboxResources and ReopenContainerLog."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

from supervisord_ctr import errors
from supervisord_ctr.aio import shielded
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import container_spec
from supervisord_ctr.cri.container_create import resources_of
from supervisord_ctr.cri.core import Core
from supervisord_ctr.cri.state import Container, Pod
from supervisord_ctr.model import TypedValue
from supervisord_ctr.names import CRI_NAMESPACE
from supervisord_ctr.oci.spec import RESOURCES_TYPE_URL, TYPE_URL, SpecBuilder

log = logging.getLogger(__name__)


async def update_resources(core: Core, request: pb.UpdateContainerResourcesRequest) -> None:
    """Change the limits of a container: stored for the next start, and applied at once when it runs.

    Goes on when the client hangs up: what is in force and what is recorded must not differ.
    """
    container = core.state.container(request.container_id)
    await shielded(core.owner, _update(core, container, request), f"update {container.id}")


async def _update(core: Core, container: Container, request: pb.UpdateContainerResourcesRequest) -> None:
    async with core.hold(container.id, "updating"):
        if container.stage not in ("created", "running"):
            raise errors.FailedPrecondition(
                f"container {container.id!r} is in {pb.ContainerState.Name(container.state)} state",
                kind="container", key=container.id,
            )
        stored = await core.database.containers.get(CRI_NAMESPACE, container.id)
        if stored.spec is None:
            raise errors.Internal(f"container {container.id!r} has no specification", kind="container")
        spec: dict[str, Any] = json.loads(stored.spec.value)
        builder = SpecBuilder(CRI_NAMESPACE, container.id, spec=spec)
        container_spec.apply_resources(builder, merged(builder, request.linux))
        if request.linux.oom_score_adj:
            builder.with_oom_score(request.linux.oom_score_adj)
        if container.running:
            resources = {key: value for key, value in builder.resources.items() if key != "devices"}
            if request.linux.memory_limit_in_bytes:
                # A limit below what is in use is refused instead of met by a kill; cgroup v1 does so by itself.
                resources["memory"] = {**resources["memory"], "checkBeforeUpdate": True}
            await core.tasks.update(
                CRI_NAMESPACE, container.id, TypedValue(RESOURCES_TYPE_URL, json.dumps(resources).encode()),
                dict(request.annotations),
            )
        changed = replace(stored, spec=TypedValue(TYPE_URL, json.dumps(spec, separators=(",", ":")).encode()))
        await core.database.containers.update(CRI_NAMESPACE, changed, ["spec"])
        container.resources = resources_of(builder, request.linux)
        await core.state.save_container(container)


def merged(builder: SpecBuilder, asked: pb.LinuxContainerResources) -> pb.LinuxContainerResources:
    """What is asked, checked against what is set: a memory limit above the swap limit takes that along."""
    found = pb.LinuxContainerResources()
    found.CopyFrom(asked)
    memory = builder.resources.get("memory", {})
    limit, swap = memory.get("limit", 0), memory.get("swap", 0)
    if asked.memory_limit_in_bytes and not asked.memory_swap_limit_in_bytes and swap > 0 and swap != limit:
        found.memory_swap_limit_in_bytes = max(swap, asked.memory_limit_in_bytes)
    return found


async def update_pod_resources(core: Core, request: pb.UpdatePodSandboxResourcesRequest) -> None:
    """Note what the kubelet gave the pod; the pod's cgroup itself is the kubelet's."""
    pod = core.state.pod(request.pod_sandbox_id)
    await shielded(core.owner, _update_pod(core, pod, request), f"update {pod.id}")


async def _update_pod(core: Core, pod: Pod, request: pb.UpdatePodSandboxResourcesRequest) -> None:
    async with core.hold(pod.id, "updating"):
        for name in ("resources", "overhead"):
            if request.HasField(name):
                container_spec.check_resources(getattr(request, name))
                kept = pb.LinuxContainerResources()
                kept.CopyFrom(getattr(request, name))
                setattr(pod, name, kept)
                getattr(pod.config.linux, name).CopyFrom(kept)
        await core.state.save_pod(pod)


async def reopen_log(core: Core, identity: str) -> None:
    """Open the container's log file anew after the kubelet renamed it."""
    container = core.state.container(identity)
    if not container.running:
        raise errors.FailedPrecondition(
            f"container {container.id!r} is not running", kind="container", key=container.id
        )
    if container.log_path:
        await core.tasks.reopen_log(CRI_NAMESPACE, container.id)
