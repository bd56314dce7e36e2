"""Names and identifiers of pods and containers, and the labels and annotations that others read.

The keys are containerd's, since `crictl`, `ctr`, kubelets and monitoring agents look for them.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.names import check_line

LABEL_KIND = "io.cri-containerd.kind"
KIND_SANDBOX = "sandbox"
KIND_CONTAINER = "container"
LABEL_IMAGE = "io.cri-containerd.image"
IMAGE_MANAGED = "managed"
LABEL_PINNED = "io.cri-containerd.pinned"
PINNED = "pinned"

_PREFIX = "io.kubernetes.cri."
ANNOTATION_TYPE = _PREFIX + "container-type"
ANNOTATION_SANDBOX_ID = _PREFIX + "sandbox-id"
ANNOTATION_SANDBOX_NAMESPACE = _PREFIX + "sandbox-namespace"
ANNOTATION_SANDBOX_NAME = _PREFIX + "sandbox-name"
ANNOTATION_SANDBOX_UID = _PREFIX + "sandbox-uid"
ANNOTATION_CONTAINER_NAME = _PREFIX + "container-name"
ANNOTATION_IMAGE_NAME = _PREFIX + "image-name"

#: Longest name of a pod or container, its namespace and its UID that is taken.
_NAME_LIMIT = 253


def new_id() -> str:
    """64 hexadecimal digits."""
    return secrets.token_hex(32)


def check_segment(value: str, kind: str, *, empty: bool = True) -> str:
    """Return `value` when it may be part of a name: no control bytes, no ".." as a part, 253 characters at most."""
    if not value:
        if empty:
            return value
        raise InvalidArgument(f"{kind} must not be empty", kind=kind)
    check_line(value, kind)
    if len(value) > _NAME_LIMIT or value.startswith("/") or {".", ".."} & set(value.split("/")):
        raise InvalidArgument(f"{kind} {value[:_NAME_LIMIT]!r} is not a valid name", kind=kind, key=value)
    return value


def pod_name(metadata: pb.PodSandboxMetadata) -> str:
    """What a pod is known by when it is made: name, namespace, UID and attempt."""
    check_segment(metadata.name, "pod name")
    check_segment(metadata.namespace, "pod namespace")
    check_segment(metadata.uid, "pod uid")
    return "_".join((metadata.name, metadata.namespace, metadata.uid, str(metadata.attempt)))


def container_name(metadata: pb.ContainerMetadata, pod: pb.PodSandboxMetadata) -> str:
    """What a container is known by when it is made."""
    check_segment(metadata.name, "container name")
    return "_".join((metadata.name, pod.name, pod.namespace, pod.uid, str(metadata.attempt)))


def build_labels(config: Mapping[str, str], image: Mapping[str, str], kind: str) -> dict[str, str]:
    """Labels of the stored object: the image's below the request's, ours on top.

    Labels of an image never carry a key of ours (S4), and those too long for the store are left out,
    since an image must not make a container fail for a label.
    """
    labels = {
        key: value for key, value in image.items()
        if not key.startswith(("io.cri-containerd.", "containerd.io/", _PREFIX))
        and len(key.encode()) + len(value.encode()) <= 4096
    }
    labels.update(config)
    labels[LABEL_KIND] = kind
    return labels


def annotations_for(
    pod_id: str, pod: pb.PodSandboxConfig, kind: str, container: str = "", image: str = ""
) -> dict[str, str]:
    """Annotations that runtimes and agents read from a container's config.json."""
    found = {
        ANNOTATION_TYPE: kind,
        ANNOTATION_SANDBOX_ID: pod_id,
        ANNOTATION_SANDBOX_NAMESPACE: pod.metadata.namespace,
        ANNOTATION_SANDBOX_NAME: pod.metadata.name,
        ANNOTATION_SANDBOX_UID: pod.metadata.uid,
    }
    if container:
        found[ANNOTATION_CONTAINER_NAME] = container
    if image:
        found[ANNOTATION_IMAGE_NAME] = image
    return found


def passed_through(annotations: Mapping[str, str], allowed: list[str]) -> dict[str, str]:
    """Annotations that the configuration hands to the OCI runtime (S4: exact names, or "PREFIX*")."""
    found: dict[str, str] = {}
    for key, value in annotations.items():
        for pattern in allowed:
            if key == pattern or (pattern.endswith("*") and key.startswith(pattern[:-1])):
                found[key] = value
                break
    return found
