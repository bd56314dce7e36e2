"""What is told of pods and containers: statuses, their verbose part, lists, filters and events.

Everything here reads memory (D9). The verbose part alone reads the stored container, since it shows
the whole OCI specification.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from google.protobuf import json_format

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import signals
from supervisord_ctr.cri.core import Core
from supervisord_ctr.cri.state import Container, Pod, matches_labels
from supervisord_ctr.names import CRI_NAMESPACE

log = logging.getLogger(__name__)

#: Items of one message of a `Stream…` call (P12).
PAGE = 250


def container_status(core: Core, container: Container) -> pb.ContainerStatus:
    """The status of a container; shared, not to be changed: events of a large pod hold those of all its containers."""
    image = core.images.get(container.image_id)
    names = ("", "") if image is None else ("".join(image.tags[:1]), "".join(image.digests[:1]))
    status = container.cached_status(names)
    if status is None:
        status = _build_status(container)
        if names[0]:
            status.image.Clear()
            status.image.image = names[0]
        if names[1]:
            status.image_ref = names[1]
        container.keep_status(names, status)
    return status


def _build_status(container: Container) -> pb.ContainerStatus:
    state = container.state
    status = pb.ContainerStatus(
        id=container.id, metadata=container.config.metadata, state=state, created_at=container.created_at,
        image=container.config.image, image_ref=container.image_id, image_id=container.image_id,
        labels=container.config.labels, annotations=container.config.annotations, mounts=container.config.mounts,
        log_path=container.log_path, stop_signal=_stop_signal(container),
    )
    if state != pb.CONTAINER_CREATED:
        status.started_at = container.started_at
    if state in (pb.CONTAINER_EXITED, pb.CONTAINER_UNKNOWN):
        status.finished_at, status.exit_code = container.finished_at, container.exit_code
        status.reason, status.message = exit_reason(container), container.message
    if container.resources is not None:
        status.resources.linux.CopyFrom(container.resources)
    status.user.linux.CopyFrom(
        pb.LinuxContainerUser(uid=container.uid, gid=container.gid, supplemental_groups=container.groups)
    )
    return status


def exit_reason(container: Container) -> str:
    """"OOMKilled", "Completed", "Error", or what was recorded ("StartError" …)."""
    if container.reason:
        return container.reason
    if container.stage != "exited":
        return "Unknown" if container.stage == "unknown" else ""
    if container.oom:
        return "OOMKilled"
    return "Completed" if container.exit_code == 0 else "Error"


def _stop_signal(container: Container) -> pb.Signal.ValueType:
    if container.config.stop_signal != pb.SIGNAL_RUNTIME_DEFAULT:
        return container.config.stop_signal
    value = signals.value_of(container.stop_signal) if container.stop_signal else int(pb.SIGNAL_SIGTERM)
    return pb.Signal.ValueType(value)


async def container_info(core: Core, container: Container) -> dict[str, str]:
    """The verbose part of a container's status."""
    info: dict[str, Any] = {
        "sandboxID": container.pod_id, "pid": container.pid, "removing": container.removing,
        "snapshotKey": container.id, "snapshotter": container.snapshotter,
        "privileged": container.config.linux.security_context.privileged,
        "stage": container.stage, "doing": core.stages.tell(container.id), "oomKilled": container.oom,
        "oomLevel": container.oom_level, "endAskedBy": container.asked, "signal": container.signal,
        "askedSignal": container.asked_signal, "cgroup": container.cgroup,
    }
    info["runtimeType"], spec = "", "null"
    try:
        stored = await core.database.containers.get(CRI_NAMESPACE, container.id)
    except errors.NotFound:
        log.debug("container %s is not in the store", container.id)
    else:
        info["runtimeType"] = stored.runtime.name
        if stored.spec is not None and stored.spec.value:
            spec = stored.spec.value.decode("utf-8", "replace")
    pod = core.state.pod_or_none(container.pod_id)
    if pod is not None:
        info["runtimeOptions"] = _runtime_options(core, pod)
    # Request and specification are JSON already, and large.
    head = json.dumps(info).removesuffix("}")
    return {"info": f'{head}, "config": {container.config_text()}, "runtimeSpec": {spec}}}'}


def _runtime_options(core: Core, pod: Pod) -> dict[str, Any]:
    try:
        name, found = core.handler(pod.handler)
    except errors.InvalidArgument:
        return {}
    return {"handler": name, "binaryName": found.binary, "systemdCgroup": core.systemd_cgroups(pod.handler)}


def pod_info(core: Core, pod: Pod) -> dict[str, str]:
    """The verbose part of a pod's status."""
    attached = core.networks.get(pod.id)
    results = [] if attached is None else [(item.interface, item.result or {}) for item in attached.attachments]
    netns = str(core.environments.namespace(pod.id, "net"))
    namespaces = [
        {"type": kind, "path": str(core.environments.namespace(pod.id, short))}
        for kind, short, own in (
            ("network", "net", not pod.host_network), ("ipc", "ipc", pod.namespaces.ipc != pb.NODE),
            ("uts", "uts", not pod.host_network),
        ) if own
    ]
    if pod.pause_pid:
        namespaces.append({"type": "pid", "path": f"/proc/{pod.pause_pid}/ns/pid"})
    info: dict[str, Any] = {
        "pid": pod.pause_pid, "processStatus": "running" if pod.pause_pid else "none",
        "netNamespaceClosed": not pod.host_network and not core.environments.network_is_open(pod.id),
        "netNamespace": "" if pod.host_network else netns, "image": "",
        "snapshotKey": "", "snapshotter": "", "runtimeHandler": pod.handler,
        "runtimeOptions": _runtime_options(core, pod), "stage": pod.stage, "doing": core.stages.tell(pod.id),
        "config": json_format.MessageToDict(pod.config, preserving_proto_field_name=True),
        "runtimeSpec": {
            "linux": {"namespaces": namespaces, "cgroupsPath": pod.config.linux.cgroup_parent},
            "hostname": pod.config.hostname,
        },
        "cniResult": {"Interfaces": {name: _interface(name, result) for name, result in results}} if results else None,
        "cniResults": [result for _, result in results], "addresses": pod.addresses,
    }
    return {"info": json.dumps(info)}


def _interface(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """One interface of a pod in the form that containerd's users know it from."""
    found: dict[str, Any] = {"IPConfigs": [], "Mac": "", "Sandbox": ""}
    interfaces = result.get("interfaces") or []
    for entry in interfaces:
        if entry.get("name") == name:
            found["Mac"], found["Sandbox"] = entry.get("mac", ""), entry.get("sandbox", "")
    for entry in result.get("ips") or []:
        index = entry.get("interface")
        if not isinstance(index, int) or not interfaces or interfaces[index].get("name") == name:
            found["IPConfigs"].append({"IP": entry["address"].partition("/")[0], "Gateway": entry.get("gateway", "")})
    return found


def statuses_of(core: Core, pod: Pod) -> list[pb.ContainerStatus]:
    """Statuses of the containers of a pod."""
    return [
        container_status(core, container) for container in core.state.containers_of(pod.id)
        if container.stage != "creating"
    ]


def publish_pod(
    core: Core, pod: Pod, kind: pb.ContainerEventType.ValueType, *, with_status: bool = True
) -> None:
    """Tell of a pod; call when a status call shows it (P14)."""
    core.events.publish(
        pod.id, kind, pod.status() if with_status else None, statuses_of(core, pod) if with_status else []
    )


def publish_container(core: Core, container: Container, kind: pb.ContainerEventType.ValueType) -> None:
    """Tell of a container; call when a status call shows it (P14)."""
    pod = core.state.pod_or_none(container.pod_id)
    core.events.publish(
        container.id, kind, pod.status() if pod is not None else None,
        statuses_of(core, pod) if pod is not None else [],
    )


def list_pods(core: Core, wanted: pb.PodSandboxFilter) -> list[pb.PodSandbox]:
    """Pods that match; an ID may be the unique beginning of one."""
    if wanted.id:
        pod = _unique(core.state.pod_or_none, wanted.id)
        pods: Iterable[Pod] = [] if pod is None else [pod]
    else:
        pods = core.state.pods()
    return [
        pod.item() for pod in pods
        if (not wanted.HasField("state") or pod.state == wanted.state.state)
        and matches_labels(pod.config.labels, wanted.label_selector)
    ]


def _unique(look_up: Any, identity: str) -> Any:
    try:
        return look_up(identity)
    except errors.InvalidArgument:
        return None


def select_containers(
    core: Core, identity: str, pod_identity: str, selector: Any
) -> list[Container]:
    """Containers by ID, pod and labels, those being made left out."""
    if identity:
        container = _unique(core.state.container_or_none, identity)
        found: Iterable[Container] = [] if container is None else [container]
    else:
        found = core.state.containers()
    if pod_identity:
        pod = _unique(core.state.pod_or_none, pod_identity)
        pod_id = pod.id if pod is not None else None
        found = [container for container in found if container.pod_id == pod_id]
    return [
        container for container in found
        if container.stage != "creating" and matches_labels(container.config.labels, selector)
    ]


def list_containers(core: Core, wanted: pb.ContainerFilter) -> list[pb.Container]:
    """Containers that match."""
    return [
        container.item()
        for container in select_containers(core, wanted.id, wanted.pod_sandbox_id, wanted.label_selector)
        if not wanted.HasField("state") or container.state == wanted.state.state
    ]


def pages(items: list[Any], size: int = PAGE) -> Iterator[list[Any]]:
    """`items` in pieces that fit into a message; one empty piece when there are none."""
    for start in range(0, max(1, len(items)), size):
        yield items[start:start + size]
