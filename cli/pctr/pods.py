"""A kubelet's pods and containers over CRI: finding them, and reading what is told of them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from pctr.command import Failed
from pctr.output import Cell, human_span, rfc3339
from pctr.rpc import CRI_RUNTIME, Client
from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2

POD_STATES = {0: "Ready", 1: "NotReady"}
CONTAINER_STATES = {0: "Created", 1: "Running", 2: "Exited", 3: "Unknown"}


class Found(NamedTuple):
    """A pod or a container (then `pod` is its pod's id)."""

    id: str
    kind: str
    pod: str


def list_pods(client: Client) -> list[cri_pb2.PodSandbox]:
    """Pods, newest first."""
    response = client.unary(
        CRI_RUNTIME + "ListPodSandbox", cri_pb2.ListPodSandboxRequest(), cri_pb2.ListPodSandboxResponse)
    return sorted(response.items, key=lambda pod: -pod.created_at)


def list_containers(client: Client) -> list[cri_pb2.Container]:
    """Containers of pods, newest first."""
    response = client.unary(
        CRI_RUNTIME + "ListContainers", cri_pb2.ListContainersRequest(), cri_pb2.ListContainersResponse)
    return sorted(response.containers, key=lambda container: -container.created_at)


def pod_status(client: Client, pod: str) -> cri_pb2.PodSandboxStatusResponse:
    """A pod's status with everything that is told."""
    return client.unary(
        CRI_RUNTIME + "PodSandboxStatus",
        cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True), cri_pb2.PodSandboxStatusResponse,
    )


def container_status(client: Client, container: str) -> cri_pb2.ContainerStatusResponse:
    """A container's status with everything that is told."""
    return client.unary(
        CRI_RUNTIME + "ContainerStatus", cri_pb2.ContainerStatusRequest(container_id=container, verbose=True),
        cri_pb2.ContainerStatusResponse,
    )


def _one(kind: str, word: str, matches: list[Found]) -> Found | None:
    exact = [found for found in matches if found.id == word]
    if exact:
        return exact[0]
    if len({found.id for found in matches}) > 1:
        listed = ", ".join(found.id[:13] for found in matches[:4])
        raise Failed(f"{kind} {word!r} means more than one: {listed}")
    return matches[0] if matches else None


def find_pod(client: Client, word: str) -> str:
    """The id of the pod that an id, its beginning, a name or NAMESPACE/NAME means."""
    matches = [
        Found(pod.id, "pod", pod.id) for pod in list_pods(client)
        if pod.id.startswith(word) or word in (pod.metadata.name, f"{pod.metadata.namespace}/{pod.metadata.name}")
    ]
    found = _one("pod", word, matches)
    if found is None:
        raise errors.NotFound(f"pod {word}: not found", kind="pod", key=word)
    return found.id


def find_container(client: Client, word: str) -> Found:
    """The container that an id, its beginning or a name means; the newest attempt of a name."""
    containers = list_containers(client)
    by_id = [Found(entry.id, "container", entry.pod_sandbox_id) for entry in containers if entry.id.startswith(word)]
    if by_id:
        found = _one("container", word, by_id)
        if found is not None:
            return found
    named = [entry for entry in containers if entry.metadata.name == word]
    if len({entry.pod_sandbox_id for entry in named}) > 1:
        raise Failed(f"container {word!r} is in more than one pod: name it by id")
    if not named:
        raise errors.NotFound(f"container {word}: not found", kind="container", key=word)
    newest = max(named, key=lambda entry: (entry.metadata.attempt, entry.created_at))
    return Found(newest.id, "container", newest.pod_sandbox_id)


def verbose(info: Any) -> dict[str, Any]:
    """The verbose part of a status."""
    try:
        document = json.loads(info.get("info", "") or "{}")
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def nanoseconds_age(stamp: int, now: float) -> Cell:
    """How long ago a CRI time was."""
    if stamp <= 0:
        return Cell(None, "-")
    return Cell(rfc3339(stamp // 10**9, stamp % 10**9), f"{human_span(now - stamp / 1e9)} ago")
