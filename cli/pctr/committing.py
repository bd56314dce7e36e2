"""`pctr container commit`: an image from a container's changes, through the diff service."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any

from google.protobuf.empty_pb2 import Empty

from pctr import image_config, services
from pctr.command import Context, Failed, new_id, parse_labels
from pctr.differences import snapshot_diff
from pctr.output import rfc3339
from pctr.rpc import TASKS, Client
from pctr.unpack import unpack
from supervisord_ctr import errors
from supervisord_ctr.api.services.containers.v1 import containers_pb2
from supervisord_ctr.api.services.images.v1 import images_pb2
from supervisord_ctr.api.services.tasks.v1 import tasks_pb2
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.api.types.task import task_pb2

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def digest_of(data: bytes) -> str:
    """The sha256 digest of a document."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def now() -> str:
    """This moment, or SOURCE_DATE_EPOCH, as image documents have it."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return rfc3339(int(epoch) if epoch.isdecimal() else int(time.time()))


@contextlib.contextmanager
def _paused(client: Client, container: str, wanted: bool) -> Iterator[None]:
    """Freeze the task inside, when it runs."""
    running = False
    if wanted:
        with contextlib.suppress(errors.NotFound):
            running = services.get_task(client, container).status == task_pb2.RUNNING
    if not running:
        yield
        return
    client.unary(TASKS + "Pause", tasks_pb2.PauseTaskRequest(container_id=container), Empty)
    try:
        yield
    finally:
        client.unary(TASKS + "Resume", tasks_pb2.ResumeTaskRequest(container_id=container), Empty)


def uncompressed_digest(client: Client, descriptor: types_pb2.Descriptor) -> str:
    """A layer's diff ID: as its label says, or computed."""
    label = services.content_info(client, descriptor.digest).labels.get("containerd.io/uncompressed")
    if label:
        return label
    import zlib

    inflate = zlib.decompressobj(wbits=47)
    seen = hashlib.sha256()
    for part in services.read_content(client, descriptor.digest):
        seen.update(inflate.decompress(part))
    seen.update(inflate.flush())
    return "sha256:" + seen.hexdigest()


def write_json(client: Client, document: dict[str, Any], media_type: str, labels: dict[str, str]) -> dict[str, Any]:
    """Store a document; its descriptor."""
    data = json.dumps(document, separators=(",", ":")).encode()
    digest = digest_of(data)
    services.write_content(client, f"pctr-{digest}", [data], digest=digest, size=len(data), labels=labels)
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def write_manifest(
    client: Client, config: dict[str, Any], layers: list[dict[str, Any]], *,
    config_labels: dict[str, str] | None = None, media_type: str = OCI_MANIFEST, config_type: str = OCI_CONFIG,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Store config and manifest with the labels that keep their content; manifest's descriptor and document."""
    config_descriptor = write_json(client, config, config_type, config_labels or {})
    manifest = {"schemaVersion": 2, "mediaType": media_type, "config": config_descriptor, "layers": layers}
    labels = {"containerd.io/gc.ref.content.config": config_descriptor["digest"]}
    labels.update({f"containerd.io/gc.ref.content.l.{number}": layer["digest"] for number, layer in enumerate(layers)})
    return write_json(client, manifest, media_type, labels), manifest


def commit(context: Context) -> str:
    """Make the image; its name."""
    args, client = context.args, context.client
    container = services.get_container(client, args.id)
    if not container.snapshot_key or not container.image:
        raise Failed(f"container {args.id}: was not made from an image")
    name = image_config.normalise(args.image)
    base = image_config.load_config(client, image_config.get_image(client, container.image))
    manifest = image_config.read_json(client, base.manifest_digest)
    with services.Lease(client):
        with _paused(client, args.id, not args.no_pause):
            layer = snapshot_diff(
                client, container.snapshotter, container.snapshot_key, media_type=OCI_LAYER,
                ref=f"pctr-commit-{new_id()}",
            )
        config = _changed_config(base.config, uncompressed_digest(client, layer), container, args.author, args.message)
        layers = [*(manifest.get("layers") or ()),
                  {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size}]
        descriptor, document = write_manifest(client, config, layers)
        services.put_image(client, images_pb2.Image(
            name=name, labels=parse_labels(args.label),
            target=types_pb2.Descriptor(
                media_type=descriptor["mediaType"], digest=descriptor["digest"], size=descriptor["size"]),
        ))
        if not args.no_unpack:
            unpack(client, descriptor["digest"], config["rootfs"]["diff_ids"], document, container.snapshotter)
    return name


def _changed_config(
    base: dict[str, Any], diff_id: str, container: containers_pb2.Container, author: str, message: str,
) -> dict[str, Any]:
    config = json.loads(json.dumps(base))
    config["created"] = now()
    if author:
        config["author"] = author
    rootfs = config.setdefault("rootfs", {"type": "layers"})
    rootfs["diff_ids"] = [*(rootfs.get("diff_ids") or ()), diff_id]
    entry = {"created": config["created"], "created_by": f"pctr container commit {container.id}"}
    if author:
        entry["author"] = author
    if message:
        entry["comment"] = message
    config["history"] = [*(config.get("history") or ()), entry]
    return dict(config)
