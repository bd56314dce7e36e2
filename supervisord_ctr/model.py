"""Values that several rooms share: plain, frozen, without behaviour that touches the system.

Times are seconds since the epoch as `float` (0.0 is "not set"), sizes are bytes, digests are
`algorithm:hex`. `TypedValue` stands for a `google.protobuf.Any` so that the lower floors need no
protobuf.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


def _empty() -> Mapping[str, str]:
    return {}


@dataclass(frozen=True, slots=True)
class TypedValue:
    """A `google.protobuf.Any`: kept and handed on, never interpreted below the services."""

    type_url: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Platform:
    """An OCI platform (image-index.md); empty strings mean "not stated"."""

    os: str = "linux"
    architecture: str = ""
    variant: str = ""
    os_version: str = ""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """An OCI content descriptor (descriptor.md)."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=_empty)
    platform: Platform | None = None


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount as containerd's API states it: options in fstab words ("ro", "rbind", "lowerdir=…")."""

    type: str
    source: str
    options: tuple[str, ...] = ()
    target: str = ""


@dataclass(frozen=True, slots=True)
class ContentInfo:
    """A committed blob."""

    digest: str
    size: int
    created_at: float = 0.0
    updated_at: float = 0.0
    labels: Mapping[str, str] = field(default_factory=_empty)


@dataclass(frozen=True, slots=True)
class IngestStatus:
    """A blob that is being written; `ref` is the client's name for it."""

    ref: str
    offset: int
    total: int = 0
    expected: str = ""
    started_at: float = 0.0
    updated_at: float = 0.0


class SnapshotKind(enum.IntEnum):
    """Numbers of containerd.services.snapshots.v1.Kind."""

    UNKNOWN = 0
    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot: active and view ones go by key, committed ones by name."""

    name: str
    parent: str = ""
    kind: SnapshotKind = SnapshotKind.UNKNOWN
    created_at: float = 0.0
    updated_at: float = 0.0
    labels: Mapping[str, str] = field(default_factory=_empty)


@dataclass(frozen=True, slots=True)
class Usage:
    """Disk used by one snapshot alone, without its parents."""

    size: int = 0
    inodes: int = 0


@dataclass(frozen=True, slots=True)
class Image:
    """A name for a target descriptor."""

    name: str
    target: Descriptor
    labels: Mapping[str, str] = field(default_factory=_empty)
    created_at: float = 0.0
    updated_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Runtime:
    """Which runtime serves a container, and its options."""

    name: str
    options: TypedValue | None = None


@dataclass(frozen=True, slots=True)
class Container:
    """Metadata of a container; its running process is a task."""

    id: str
    labels: Mapping[str, str] = field(default_factory=_empty)
    image: str = ""
    runtime: Runtime = Runtime("")
    spec: TypedValue | None = None
    snapshotter: str = ""
    snapshot_key: str = ""
    created_at: float = 0.0
    updated_at: float = 0.0
    extensions: Mapping[str, TypedValue] = field(default_factory=dict)
    sandbox: str = ""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Metadata of a sandbox (containerd.types.Sandbox)."""

    id: str
    runtime: Runtime = Runtime("")
    spec: TypedValue | None = None
    labels: Mapping[str, str] = field(default_factory=_empty)
    created_at: float = 0.0
    updated_at: float = 0.0
    extensions: Mapping[str, TypedValue] = field(default_factory=dict)
    sandboxer: str = ""


@dataclass(frozen=True, slots=True)
class Lease:
    """What protects its resources from garbage collection while it exists."""

    id: str
    created_at: float = 0.0
    labels: Mapping[str, str] = field(default_factory=_empty)


@dataclass(frozen=True, slots=True)
class LeaseResource:
    """One protected object: type is "content", "ingests" or "snapshots/NAME"."""

    type: str
    id: str


@dataclass(frozen=True, slots=True)
class Namespace:
    """A tenancy of the API."""

    name: str
    labels: Mapping[str, str] = field(default_factory=_empty)


class TaskStatus(enum.IntEnum):
    """Numbers of containerd.v1.types.Status."""

    UNKNOWN = 0
    CREATED = 1
    RUNNING = 2
    STOPPED = 3
    PAUSED = 4
    PAUSING = 5


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended. `status` is 0 to 255, 128 + signal after a signal."""

    status: int
    at: float
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, as the events service tells it."""

    timestamp: float
    namespace: str
    topic: str
    event: TypedValue


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be, or that somebody left behind (`pctr doctor`).

    `remedy` says how it goes away: "remove" and "gc" by a repair, "pull" by pulling again, "release"
    by ending the hold after a repaired database, "hand" by nobody but a person. `size` is in bytes.
    """

    kind: str
    id: str
    problem: str
    remedy: str
    size: int = 0
