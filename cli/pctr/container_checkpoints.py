"""`pctr container checkpoint` and `restore`: a container as an image of its parts.

The index that the name points to holds descriptors, told apart by media type: the container's
record, its runtime options, its own layer, the running task's images, and the image it was made of.
The form is that of containerd's client, so either side reads the other's checkpoints.
"""

from __future__ import annotations

from typing import Any as AnyValue

from pctr import image_config, image_tree, light, services
from pctr.checkpoints import CHECKPOINT_TYPE
from pctr.command import Context, Failed, new_id
from pctr.committing import digest_of, write_json
from pctr.create import Created, remove_container
from pctr.differences import snapshot_diff
from pctr.rpc import CONTAINERS, DIFF, TASKS, Client
from pctr.running import mounts_of, run_task, spec_of
from supervisord_ctr.api.runc.v1 import options_pb2
from supervisord_ctr.api.services.diff.v1 import diff_pb2
from supervisord_ctr.api.services.images.v1 import images_pb2
from supervisord_ctr.api.services.tasks.v1 import tasks_pb2
from supervisord_ctr.api.types import types_pb2

_OPTIONS_TYPE = "application/vnd.containerd.container.checkpoint.options.v1+proto"
_CONFIG_TYPE = "application/vnd.containerd.container.checkpoint.config.v1+proto"
_INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
_IMAGE_NAME = "io.containerd.checkpoint.image.name"
_RUNTIME = "io.containerd.checkpoint.runtime"
_SNAPSHOTTER = "io.containerd.checkpoint.snapshotter"


def _store(client: Client, data: bytes, media_type: str) -> dict[str, AnyValue]:
    digest = digest_of(data)
    services.write_content(client, f"pctr-checkpoint-{new_id()}", [data], digest=digest, size=len(data))
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def _described(descriptor: types_pb2.Descriptor) -> dict[str, AnyValue]:
    return {"mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size}


def checkpoint(context: Context) -> None:
    """Store the container, and what the options name, under one image name."""
    args, client = context.args, context.client
    container = services.get_container(client, args.id)
    parts: list[dict[str, AnyValue]] = []
    with services.Lease(client):
        if args.task:
            from google.protobuf.any_pb2 import Any

            options = options_pb2.CheckpointOptions()
            packed = Any(type_url="containerd.runc.v1.CheckpointOptions", value=options.SerializeToString())
            response = client.unary(
                TASKS + "Checkpoint", tasks_pb2.CheckpointTaskRequest(container_id=args.id, options=packed),
                tasks_pb2.CheckpointTaskResponse,
            )
            parts += [_described(descriptor) for descriptor in response.descriptors]
        if container.runtime.options.value:
            parts.append(_store(client, container.runtime.options.SerializeToString(), _OPTIONS_TYPE))
        if args.image and container.image:
            parts.append(image_tree.descriptor_of(services.get_image(client, container.image).target))
        if args.rw:
            if not container.snapshot_key:
                raise Failed(f"container {args.id}: has no snapshot")
            layer = snapshot_diff(
                client, container.snapshotter, container.snapshot_key, media_type=_LAYER_TYPE,
                ref=f"pctr-checkpoint-{new_id()}",
            )
            parts.append(_described(layer))
        if not any(part["mediaType"] == _CONFIG_TYPE for part in parts):
            parts.append(_store(client, container.spec.SerializeToString(), _CONFIG_TYPE))
        annotations = {_IMAGE_NAME: container.image, _RUNTIME: container.runtime.name,
                       _SNAPSHOTTER: container.snapshotter}
        labels = {f"containerd.io/gc.ref.content.{number}": part["digest"] for number, part in enumerate(parts)}
        index = write_json(
            client, {"schemaVersion": 2, "mediaType": _INDEX_TYPE, "manifests": parts, "annotations": annotations},
            _INDEX_TYPE, labels,
        )
        services.put_image(client, images_pb2.Image(
            name=args.reference, labels={"pctr/checkpoint": args.id},
            target=types_pb2.Descriptor(media_type=_INDEX_TYPE, digest=index["digest"], size=index["size"]),
        ))
    print(args.reference)


def restore(context: Context) -> int:
    """Make a container of a checkpoint, and start it: from its task's images with `--live`."""
    args, client = context.args, context.client
    image = services.get_image(client, args.reference)
    index = image_config.read_json(client, image.target.digest)
    parts: dict[str, dict[str, AnyValue]] = {part["mediaType"]: part for part in index.get("manifests") or ()}
    annotations = index.get("annotations") or {}
    if _CONFIG_TYPE not in parts:
        raise Failed(f"image {args.reference}: is not a checkpoint")
    spec = light.Any_.FromString(image_config.read_blob(client, parts[_CONFIG_TYPE]["digest"]))
    options = None
    if _OPTIONS_TYPE in parts:
        options = light.Any_.FromString(image_config.read_blob(client, parts[_OPTIONS_TYPE]["digest"]))
    base = image_config.load_config(client, image_config.get_image(client, annotations.get(_IMAGE_NAME, "")))
    snapshotter = args.snapshotter or annotations.get(_SNAPSHOTTER) or context.snapshotter
    record = light.Container(
        id=args.id, image=base.name, snapshotter=snapshotter, snapshot_key=args.id, spec=spec,
        runtime=light.Runtime(name=annotations.get(_RUNTIME, ""), options=options),
    )
    client.unary(CONTAINERS + "Create", light.ContainerMessage(container=record), light.ContainerMessage)
    created = Created(args.id, [], base.name, snapshotter, args.id)
    try:
        services.prepare_snapshot(client, snapshotter, args.id, base.chain_id)
        mounts = mounts_of(client, record)
        if args.rw:
            layer = parts.get(_LAYER_TYPE)
            if layer is None:
                raise Failed(f"image {args.reference}: holds no layer of the container; restore without --rw")
            client.unary(DIFF + "Apply", diff_pb2.ApplyRequest(
                diff=types_pb2.Descriptor(media_type=layer["mediaType"], digest=layer["digest"], size=layer["size"]),
                mounts=services.snapshot_mounts(client, snapshotter, args.id),
            ), diff_pb2.ApplyResponse)
        checkpoint_part = parts.get(CHECKPOINT_TYPE)
        if args.live and checkpoint_part is None:
            raise Failed(f"image {args.reference}: holds no running task; restore without --live")
    except BaseException:
        remove_container(client, created)
        raise
    args.tty = bool((spec_of(record).get("process") or {}).get("terminal"))
    args.interactive = args.log_uri = args.null_io = args.pid_file = None
    args.no_sig_proxy = False
    descriptor = None
    if args.live and checkpoint_part is not None:
        descriptor = light.Descriptor(
            media_type=CHECKPOINT_TYPE, digest=checkpoint_part["digest"], size=checkpoint_part["size"])
    return run_task(context, created, mounts, checkpoint=descriptor, remove_unstarted=True)
