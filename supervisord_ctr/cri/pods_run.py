"""RunPodSandbox: namespaces, files and network of a pod, made side by side, without a process.

Repeating the call joins the running operation, or returns the pod that it made (D9, P3). Nothing is
recorded as a pod before it is ready: what a crash leaves is a folder and a network record, both of
which the recovery takes down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from typing import Any

from google.protobuf import json_format

from supervisord_ctr import errors, faults
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import bandwidth, container_spec, ids, selinux_labels, userns
from supervisord_ctr.cri.container_report import publish_pod
from supervisord_ctr.cri.core import Core, Stage, all_of
from supervisord_ctr.cri.pods_pause import ensure_pause, watch_pause
from supervisord_ctr.cri.state import Pod
from supervisord_ctr.model import Sandbox, TypedValue
from supervisord_ctr.names import CRI_NAMESPACE, check_line
from supervisord_ctr.sandbox import cni, pause
from supervisord_ctr.sandbox.environment import Wanted
from supervisord_ctr.sandbox.files import Dns

log = logging.getLogger(__name__)

#: There where systemd is the init system (sd_booted(3)).
_SYSTEMD_RUNS = "/run/systemd/system"

ENVIRONMENT = faults.declare("cri.pod.environment", "the pod's namespaces are pinned, its network is not attached")
NETWORK = faults.declare("cri.pod.network", "the pod's network is attached, the pod is not recorded")
RECORDED = faults.declare("cri.pod.recorded", "the pod is recorded as ready, the caller does not know its id")


async def run_pod(core: Core, request: pb.RunPodSandboxRequest) -> str:
    """The ID of the pod that the request describes, made now, before, or by another call right now."""
    if not request.HasField("config") or not request.config.HasField("metadata"):
        raise errors.InvalidArgument("sandbox config must include metadata", kind="sandbox")
    name = ids.pod_name(request.config.metadata)
    known = core.state.pod_named(name)
    if known is not None and known.stage != "creating":
        if known.ready and known.config == request.config and known.handler == request.runtime_handler:
            return known.id
        raise errors.AlreadyExists(
            f"sandbox name {name!r} belongs to sandbox {known.id}, which is {known.stage}"
            + (" with another configuration" if known.ready else ""), kind="sandbox", key=known.id,
        )
    return await core.operations.run(("pod", name), lambda: _run(core, name, request))


def wanted_environment(pod_id: str, config: pb.PodSandboxConfig) -> Wanted:
    """What the pod's environment is made of; raises `InvalidArgument` for what cannot be."""
    options = config.linux.security_context.namespace_options
    for kind, value in (("network", options.network), ("ipc", options.ipc)):
        if value not in (pb.POD, pb.NODE):
            raise errors.InvalidArgument(f"{kind} namespace of a sandbox must be POD or NODE", kind="sandbox")
    uids, gids = userns.mappings(options)
    own_network = options.network != pb.NODE
    if not own_network and config.hostname not in ("", socket.gethostname()):
        raise errors.InvalidArgument(
            f"hostname {config.hostname!r} cannot be set for a pod in the host's network", kind="sandbox"
        )
    dns = None
    if config.HasField("dns_config"):
        dns = Dns(list(config.dns_config.servers), list(config.dns_config.searches), list(config.dns_config.options))
    sysctls = dict(config.linux.sysctls)
    if own_network:
        sysctls.setdefault("net.ipv4.ip_unprivileged_port_start", "0")
        if not uids:
            sysctls.setdefault("net.ipv4.ping_group_range", "0 2147483647")
    wanted = Wanted(
        id=pod_id, hostname=config.hostname, dns=dns, own_network=own_network, own_ipc=options.ipc != pb.NODE,
        own_uts=own_network, sysctls=sysctls, uids=uids, gids=gids,
    )
    wanted.check()
    return wanted


def check_cgroups(core: Core, pod_id: str, request: pb.RunPodSandboxRequest) -> None:
    """Raise now what would keep every container of the pod from starting."""
    systemd = core.systemd_cgroups(request.runtime_handler)
    container_spec.cgroup_path(request.config.linux.cgroup_parent, pod_id, CRI_NAMESPACE, systemd)
    if systemd and not os.path.isdir(_SYSTEMD_RUNS):
        raise errors.FailedPrecondition(
            "containers of this runtime handler use the systemd cgroup driver, but systemd does not run on this host",
            kind="runtime handler", key=request.runtime_handler,
        )


def network_request(core: Core, pod_id: str, config: pb.PodSandboxConfig) -> cni.Request:
    """What is asked of the network plugins, with the names that containerd's pods have there."""
    metadata = config.metadata
    for value in (metadata.namespace, metadata.name, metadata.uid):
        check_line(value, "pod metadata")
    arguments = {
        "IgnoreUnknown": "1", "K8S_POD_NAMESPACE": metadata.namespace, "K8S_POD_NAME": metadata.name,
        "K8S_POD_INFRA_CONTAINER_ID": pod_id, "K8S_POD_UID": metadata.uid,
    }
    if any(";" in value for value in arguments.values()):
        raise errors.InvalidArgument(f"metadata of sandbox {metadata.name!r} must not hold ';'", kind="sandbox")
    capabilities: dict[str, Any] = {
        "portMappings": port_mappings(config),
        "bandwidth": bandwidth.of_annotations(config.annotations),
        "io.kubernetes.cri.pod-annotations": dict(config.annotations),
    }
    if config.HasField("dns_config"):
        dns = config.dns_config
        capabilities["dns"] = {
            key: list(values) for key, values in
            (("servers", dns.servers), ("searches", dns.searches), ("options", dns.options)) if values
        }
    if config.linux.cgroup_parent:
        capabilities["cgroupPath"] = config.linux.cgroup_parent
    netns = core.environments.namespace(pod_id, "net")
    return cni.Request(pod_id, str(netns), arguments, capabilities)


def port_mappings(config: pb.PodSandboxConfig) -> list[dict[str, Any]]:
    """Host ports, as the `portMappings` capability has them; entries without a host port mean nothing."""
    found: list[dict[str, Any]] = []
    for mapping in config.port_mappings:
        if mapping.host_port <= 0:
            continue
        if mapping.host_port > 65535 or not 0 < mapping.container_port <= 65535:
            raise errors.InvalidArgument(
                f"port mapping {mapping.host_port} to {mapping.container_port} is out of range", kind="sandbox"
            )
        entry: dict[str, Any] = {
            "hostPort": mapping.host_port, "containerPort": mapping.container_port,
            "protocol": pb.Protocol.Name(mapping.protocol).lower(),
        }
        if mapping.host_ip:
            entry["hostIP"] = mapping.host_ip
        found.append(entry)
    return found


async def _run(core: Core, name: str, request: pb.RunPodSandboxRequest) -> str:
    handler, _ = core.handler(request.runtime_handler)
    pod_id = ids.new_id()
    wanted = wanted_environment(pod_id, request.config)
    check_cgroups(core, pod_id, request)
    pod = Pod(pod_id, name, pb.PodSandboxConfig(), request.runtime_handler, runtime=handler)
    pod.config.CopyFrom(request.config)
    if pod.config.linux.HasField("resources"):
        pod.resources = pod.config.linux.resources
    if pod.config.linux.HasField("overhead"):
        pod.overhead = pod.config.linux.overhead
    net = None if pod.host_network else network_request(core, pod_id, pod.config)
    label = f"{pod.config.metadata.namespace}/{pod.config.metadata.name}"
    with core.stages.track(pod_id, "namespaces", label) as stage:
        async with selinux_labels.labelled(core, pod), contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(_undo, core, pod)
            await _make(core, pod, wanted, net, stage)
            stage.enter("record")
            pod.stage, pod.created_at = "ready", time.time_ns()
            await all_of(core.networks.confirm(pod_id), _store(core, pod), core.state.save_pod(pod))
            core.state.add_pod(pod)
            undo.pop_all()
    watch_pause(core, pod)
    faults.point(RECORDED)
    publish_pod(core, pod, pb.CONTAINER_CREATED_EVENT)
    publish_pod(core, pod, pb.CONTAINER_STARTED_EVENT)
    return pod_id


async def _make(core: Core, pod: Pod, wanted: Wanted, net: cni.Request | None, stage: Stage) -> None:
    """The network namespace beside the record of the intent, then network and files side by side."""
    made = core.owner.start(
        core.executors.run_io(core.environments.make_network_namespace, wanted), f"namespaces {pod.id}"
    )

    begun: list[asyncio.Task[Any]] = [made]

    async def rest() -> None:
        await asyncio.shield(made)
        faults.point(ENVIRONMENT)
        stage.enter("network" if net else "files")
        files = core.owner.start(core.executors.run_io(core.environments.make_rest, wanted), f"files {pod.id}")
        begun.append(files)
        await asyncio.shield(files)
        if pod.namespaces.pid == pb.POD:
            pause = core.owner.start(ensure_pause(core, pod), f"pause {pod.id}")
            begun.append(pause)
            await asyncio.shield(pause)
        # Its first container will want a shim; plugins keep us waiting anyway.
        core.tasks.expect(CRI_NAMESPACE, core.runtime(pod.handler).name)

    try:
        async with asyncio.TaskGroup() as group:
            attached = group.create_task(_attach(core, pod, net, made))
            group.create_task(rest())
    except BaseExceptionGroup as failures:
        raise _first(failures) from failures
    finally:
        # What a thread or the zygote has begun it also ends, whoever was called off: the undo must come after it.
        await asyncio.wait(begun)
    pod.addresses = attached.result()
    faults.point(NETWORK)


async def _attach(
    core: Core, pod: Pod, net: cni.Request | None, namespace: asyncio.Task[None]
) -> list[str]:
    if net is None:
        return []
    try:
        return await core.networks.attach(net, asyncio.shield(namespace))
    except errors.Error as error:
        kind = type(error) if type(error).__init__ is errors.Error.__init__ else errors.Unknown
        raise kind(
            f"failed to setup network for sandbox {pod.id!r}: {error.message}", kind="sandbox", key=pod.id
        ) from error


async def _store(core: Core, pod: Pod) -> None:
    """The sandbox as the native face shows it."""
    metadata = json_format.MessageToJson(pod.config, indent=None).encode()
    await core.database.sandboxes.create(CRI_NAMESPACE, Sandbox(
        id=pod.id, runtime=core.runtime(pod.handler), sandboxer="podsandbox",
        labels=_short_labels(ids.build_labels(pod.config.labels, {}, ids.KIND_SANDBOX)),
        spec=TypedValue("runtime.v1.PodSandboxConfig", pod.config.SerializeToString()),
        extensions={"config": TypedValue("types.containerd.io/runtime.v1.PodSandboxConfig+json", metadata)},
    ))


def _short_labels(labels: dict[str, str]) -> dict[str, str]:
    """Labels that the store takes; a pod with a longer one keeps it in its own record."""
    return {key: value for key, value in labels.items() if len(key.encode()) + len(value.encode()) <= 4096}


async def _undo(core: Core, pod: Pod) -> None:
    """Take down what was made; what cannot be is left to `recover` and told in the log."""
    core.state.drop_pod(pod)
    pause.end(pod.pause_pid, pod.pause_start)
    steps = (
        core.networks.detach(pod.id) if core.networks.get(pod.id) is not None else None,
        core.executors.run_io(core.environments.remove, pod.id),
        core.database.sandboxes.delete(CRI_NAMESPACE, pod.id),
        core.state.forget_pod(pod),
    )
    for step in steps:
        if step is None:
            continue
        try:
            await step
        except errors.NotFound:
            continue
        except (errors.Error, OSError):
            log.exception("sandbox %s is not wholly taken down after it failed to start", pod.id)


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that the caller shall see: the first one that is ours."""
    ours = failures.subgroup(errors.Error)
    found: BaseException = (ours or failures)
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
