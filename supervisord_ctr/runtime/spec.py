"""Reading a container's spec once, for what the runtime room has to know of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from supervisord_ctr import errors
from supervisord_ctr.model import Container

log = logging.getLogger(__name__)

#: The annotation that puts a container into the shim of a pod.
SANDBOX_ANNOTATION = "io.kubernetes.cri.sandbox-id"

Adjust = Callable[[dict[str, Any]], Sequence[str]]


@dataclass(frozen=True, slots=True)
class SpecParts:
    """`data` is the document for the bundle, None when the container has none; `gid` the host's group of a mapped
    root group, 0 without a user namespace; `group` the sandbox whose shim serves the container; `mount_label` the
    SELinux label of the files in its root, "" for none."""

    data: bytes | None
    gid: int = 0
    group: str = ""
    mount_label: str = ""


def read_spec(container: Container, adjust: Adjust | None) -> SpecParts:
    """Parse the spec, have `adjust` change it to what this machine can do, and log what that changed.

    `InvalidArgument` when it is not a JSON object.
    """
    if container.spec is None or not container.spec.value:
        return SpecParts(None, group=container.sandbox)
    try:
        spec: Any = json.loads(container.spec.value)
    except ValueError as error:
        raise errors.InvalidArgument(f"spec of container {container.id} is not JSON: {error}") from error
    if not isinstance(spec, dict):
        raise errors.InvalidArgument(f"spec of container {container.id} is not an object")
    data = container.spec.value
    notes = adjust(spec) if adjust is not None else ()
    if notes:
        log.info("container %s: %s", container.id, "; ".join(notes))
        data = json.dumps(spec, separators=(",", ":")).encode()
    linux = spec.get("linux") or {}
    mappings = linux.get("gidMappings") or ()
    gid = next((entry["hostID"] for entry in mappings if entry.get("containerID") == 0), 0)
    group = container.sandbox or (spec.get("annotations") or {}).get(SANDBOX_ANNOTATION, "")
    return SpecParts(data, gid, group, linux.get("mountLabel") or "")
