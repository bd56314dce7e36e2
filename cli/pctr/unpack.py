"""Unpacking an image from the client's side, through the diff and snapshot services."""

from __future__ import annotations

from typing import Any

from google.protobuf.empty_pb2 import Empty

from pctr.command import Failed, new_id
from pctr.image_config import chain_id
from pctr.rpc import DIFF, SNAPSHOTS, Client
from pctr.services import Lease, commit_snapshot, prepare_snapshot, stat_snapshot, update_content_labels
from supervisord_ctr import errors
from supervisord_ctr.api.services.diff.v1 import diff_pb2
from supervisord_ctr.api.services.snapshots.v1 import snapshots_pb2
from supervisord_ctr.api.types import types_pb2

_REFERENCE = "containerd.io/snapshot.ref"


def unpack(
    client: Client, manifest_digest: str, diff_ids: list[str], manifest: dict[str, Any], snapshotter: str,
) -> str:
    """Make the snapshots of all layers that are missing; returns the name of the topmost.

    `manifest` is the document behind `manifest_digest`, `diff_ids` are its config's.
    """
    layers = list(manifest.get("layers") or ())
    if len(layers) != len(diff_ids):
        raise Failed(f"manifest {manifest_digest}: {len(layers)} layers, but its config states {len(diff_ids)}")
    with Lease(client):
        parent = ""
        for number, layer in enumerate(layers):
            name = chain_id(diff_ids[:number + 1])
            _unpack_layer(client, snapshotter, layer, diff_ids[number], name, parent)
            parent = name
        if parent:
            label = f"containerd.io/gc.ref.snapshot.{snapshotter}"
            update_content_labels(client, manifest["config"]["digest"], {label: parent})
    return parent


def _unpack_layer(
    client: Client, snapshotter: str, layer: dict[str, Any], diff_id: str, name: str, parent: str,
) -> None:
    try:
        stat_snapshot(client, snapshotter, name)
        return
    except errors.NotFound:
        pass
    key = f"extract-{new_id()} {name}"
    labels = {_REFERENCE: name}
    try:
        mounts = prepare_snapshot(client, snapshotter, key, parent, labels=labels)
    except errors.AlreadyExists:
        return  # the snapshotter had it after all
    try:
        descriptor = types_pb2.Descriptor(media_type=layer["mediaType"], digest=layer["digest"], size=layer["size"])
        response = client.unary(
            DIFF + "Apply", diff_pb2.ApplyRequest(diff=descriptor, mounts=mounts), diff_pb2.ApplyResponse)
        if response.applied.digest != diff_id:
            raise Failed(f"layer {layer['digest']}: unpacks to {response.applied.digest}, the config says {diff_id}")
        commit_snapshot(client, snapshotter, name, key, labels)
    except errors.AlreadyExists:
        _discard(client, snapshotter, key)
    except BaseException:
        _discard(client, snapshotter, key)
        raise


def _discard(client: Client, snapshotter: str, key: str) -> None:
    try:
        client.unary(
            SNAPSHOTS + "Remove", snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=key), Empty)
    except errors.Error:
        pass  # the lease ends and garbage collection takes it
