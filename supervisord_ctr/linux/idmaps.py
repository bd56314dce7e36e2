"""Ranges of user and group IDs in a user namespace, and who somebody inside is outside (user_namespaces(7))."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from supervisord_ctr.names import LABEL_GID_MAPPING, LABEL_UID_MAPPING


class IdMap(NamedTuple):
    """`size` IDs from `inside` on are those from `outside` on."""

    inside: int
    outside: int
    size: int


def outside(maps: Iterable[IdMap], owner: int) -> int | None:
    """Who `owner` of the namespace is outside of it; None for somebody who is in none of the ranges."""
    for entry in maps:
        if entry.inside <= owner < entry.inside + entry.size:
            return entry.outside + owner - entry.inside
    return None


def snapshot_labels(uids: Iterable[IdMap], gids: Iterable[IdMap]) -> dict[str, str]:
    """What a snapshotter that maps owners is told."""
    return {LABEL_UID_MAPPING: text(uids), LABEL_GID_MAPPING: text(gids)}


def text(maps: Iterable[IdMap]) -> str:
    """As mount options, snapshot labels and newuidmap's callers write it: "INSIDE:OUTSIDE:SIZE", split by ','."""
    return ",".join(":".join(map(str, entry)) for entry in maps)
