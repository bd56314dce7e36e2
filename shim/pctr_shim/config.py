"""What a shim is told when it starts to serve; nothing of it changes afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: Where containerd's own shim keeps the OCI runtime's state; a foreign daemon's tools expect it there.
FOREIGN_RUNTIME_ROOT = "/run/containerd/runc"


def _empty() -> Mapping[str, str]:
    return {}


@dataclass(slots=True)
class ShimConfig:
    """`group` is the container or sandbox that the shim was started for, `socket` its listening path.

    `events` is the ttrpc socket that takes events; without one, `publish_binary` (with
    `address`) is run for each; without both, events go nowhere. `batches`: the daemon is ours and takes several
    events at once.
    """

    namespace: str = ""
    group: str = ""
    bundle: str = ""
    socket: str = ""
    events: str = ""
    batches: bool = False
    publish_binary: str = ""
    address: str = ""
    runtime: str = "runc"
    runtime_root: str = FOREIGN_RUNTIME_ROOT
    debug: bool = False
    env: Mapping[str, str] = field(default_factory=_empty)
    #: The shim's pid; where it has a keeper, that one's.
    pid: int = 0

    def become(self, other: ShimConfig) -> None:
        """Take over what `other` says: who has been given this object before it was known has it from now on."""
        for name in ShimConfig.__slots__:
            setattr(self, name, getattr(other, name))
