"""Limits that this machine lets us set: rlimits and OOM scores without CAP_SYS_RESOURCE (D10).

Without that capability a process may lower its hard limits and raise its `oom_score_adj`, but not
the other way round, and a runtime that tries fails to start the container. So what is asked for is
brought to the nearest value that can be set, and the caller logs what was changed.
"""

from __future__ import annotations

import resource
from typing import Any

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.oci import capabilities

_UNLIMITED = 2**64 - 1
_CAP = "CAP_SYS_RESOURCE"

_can_raise: bool | None = None


def can_raise() -> bool:
    """Whether this process holds CAP_SYS_RESOURCE; asked once."""
    global _can_raise
    if _can_raise is None:
        _can_raise = _CAP in capabilities.current()
    return _can_raise


def own_oom_score_adj() -> int:
    """This process's `oom_score_adj`, the lowest that its children can get without the capability."""
    with open("/proc/self/oom_score_adj", encoding="ascii") as file:
        return int(file.read())


def clamp_oom_score(wanted: int) -> int:
    """The nearest `oom_score_adj` that can be set from here."""
    return wanted if can_raise() else max(wanted, own_oom_score_adj())


def rlimit(kind: str, soft: int, hard: int) -> dict[str, Any]:
    """An entry of `process.rlimits`; `kind` with or without "RLIMIT_", any case."""
    name = kind.upper()
    full = name if name.startswith("RLIMIT_") else f"RLIMIT_{name}"
    if not hasattr(resource, full):
        raise InvalidArgument(f"unknown rlimit {kind!r}", kind="rlimit", key=kind)
    if soft > hard:
        raise InvalidArgument(f"rlimit {kind}: soft {soft} is above hard {hard}", kind="rlimit", key=kind)
    return {"type": full, "soft": soft, "hard": hard}


def _own_hard(kind: str) -> int:
    number = getattr(resource, kind, None)
    if number is None:
        return _UNLIMITED
    hard = resource.getrlimit(number)[1]
    return _UNLIMITED if hard == resource.RLIM_INFINITY else hard


def clamp(spec: dict[str, Any]) -> list[str]:
    """Change `process.rlimits` and `process.oomScoreAdj` of `spec` to what can be set here.

    Returns one line for each change, empty when nothing had to change. Does nothing with
    CAP_SYS_RESOURCE.
    """
    if can_raise():
        return []
    notes: list[str] = []
    process = spec.get("process") or {}
    wanted = process.get("oomScoreAdj")
    if isinstance(wanted, int):
        possible = clamp_oom_score(wanted)
        if possible != wanted:
            process["oomScoreAdj"] = possible
            notes.append(f"oom_score_adj {wanted} becomes {possible}: no {_CAP}")
    for entry in process.get("rlimits") or ():
        own = _own_hard(entry.get("type", ""))
        if entry.get("hard", 0) > own:
            notes.append(f"{entry['type']} {entry['hard']} becomes {own}: no {_CAP}")
            entry["hard"] = own
            entry["soft"] = min(entry.get("soft", 0), own)
    return notes
