"""Differences between snapshots as layers, through the diff service."""

from __future__ import annotations

import os

from google.protobuf.timestamp_pb2 import Timestamp

from pctr.command import new_id
from pctr.rpc import DIFF, Client
from pctr.services import prepare_snapshot, remove_snapshot, snapshot_mounts, stat_snapshot
from supervisord_ctr import errors
from supervisord_ctr.api.services.diff.v1 import diff_pb2
from supervisord_ctr.api.services.snapshots.v1 import snapshots_pb2
from supervisord_ctr.api.types import types_pb2


def snapshot_diff(
    client: Client, snapshotter: str, key: str, *, lower: str = "", media_type: str, ref: str = "",
    labels: dict[str, str] | None = None,
) -> types_pb2.Descriptor:
    """The layer that leads from `lower` (the parent by default) to `key`.

    With SOURCE_DATE_EPOCH set the result is the same each time.
    """
    views: list[str] = []

    def mounts_of(name: str) -> list[types_pb2.Mount]:
        info = stat_snapshot(client, snapshotter, name)
        if info.kind != snapshots_pb2.COMMITTED:
            return snapshot_mounts(client, snapshotter, name)
        view = f"{name}-view-{new_id()}"
        views.append(view)
        return prepare_snapshot(client, snapshotter, view, name, view=True)

    request = diff_pb2.DiffRequest(media_type=media_type, ref=ref, labels=labels or {})
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if epoch.isdecimal():
        request.source_date_epoch.CopyFrom(Timestamp(seconds=int(epoch)))
    try:
        parent = lower or stat_snapshot(client, snapshotter, key).parent
        if parent:
            request.left.extend(mounts_of(parent))
        request.right.extend(mounts_of(key))
        return client.unary(DIFF + "Diff", request, diff_pb2.DiffResponse).diff
    finally:
        for view in views:
            try:
                remove_snapshot(client, snapshotter, view)
            except errors.NotFound:
                pass
