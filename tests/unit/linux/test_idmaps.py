"""Ranges of IDs in user namespaces."""

from __future__ import annotations

from supervisord_ctr.linux import idmaps
from supervisord_ctr.linux.idmaps import IdMap

UIDS = [IdMap(0, 100000, 1000), IdMap(5000, 300000, 10)]
GIDS = [IdMap(0, 200000, 500)]


def test_somebody_inside_is_who_the_range_says_outside() -> None:
    assert [idmaps.outside(UIDS, owner) for owner in (0, 999, 5000, 5009)] == [100000, 100999, 300000, 300009]


def test_nobody_is_made_up_for_who_is_in_no_range() -> None:
    assert [idmaps.outside(UIDS, owner) for owner in (1000, 4999, 5010, 100000)] == [None] * 4
    assert idmaps.outside([], 0) is None


def test_a_snapshotter_is_told_users_and_groups_apart() -> None:
    assert idmaps.snapshot_labels(UIDS, GIDS) == {
        "containerd.io/snapshot/uidmapping": "0:100000:1000,5000:300000:10",
        "containerd.io/snapshot/gidmapping": "0:200000:500",
    }
