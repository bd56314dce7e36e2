"""Checkpoint and restore of tasks."""

from __future__ import annotations

import os

from google.protobuf.any_pb2 import Any

from pctr import light
from pctr.command import Context, UsageError
from pctr.create import RUNC_OPTIONS_URL, Created
from pctr.rpc import TASKS, Client
from pctr.running import get_record, mounts_of, run_task, spec_of
from pctr.services import content_info, get_container
from supervisord_ctr.api.runc.v1 import options_pb2
from supervisord_ctr.api.services.tasks.v1 import tasks_pb2

CHECKPOINT_TYPE = "application/vnd.containerd.container.criu.checkpoint.criu.tar"


def _pack(options: options_pb2.CheckpointOptions) -> Any:
    return Any(type_url="containerd.runc.v1.CheckpointOptions", value=options.SerializeToString())


def take_checkpoint(client: Client, container: str, options: options_pb2.CheckpointOptions) -> list[str]:
    """Checkpoint a task; digests of what was stored ([] when it went to a folder)."""
    response = client.unary(
        TASKS + "Checkpoint",
        tasks_pb2.CheckpointTaskRequest(container_id=container, options=_pack(options)),
        tasks_pb2.CheckpointTaskResponse,
    )
    return [descriptor.digest for descriptor in response.descriptors]


def checkpoint_task(context: Context) -> None:
    """`pctr task checkpoint`: into a folder, or into the content store."""
    args, client = context.args, context.client
    if args.exit and args.leave_running:
        raise UsageError("--exit and --leave-running do not go together")
    get_container(client, args.id)
    options = options_pb2.CheckpointOptions(
        exit=args.exit, open_tcp=args.tcp_established, file_locks=args.file_locks,
        image_path=os.path.abspath(args.image_path) if args.image_path else "",
        work_path=os.path.abspath(args.work_path) if args.work_path else "",
    )
    for digest in take_checkpoint(client, args.id, options):
        print(digest)
    if args.image_path:
        print(os.path.abspath(args.image_path))


def restore_task(context: Context) -> int:
    """`pctr task restore`: start a container from criu's images instead of from its command."""
    args, client = context.args, context.client
    if bool(args.image_path) == bool(args.checkpoint):
        raise UsageError("say where the checkpoint is: --image-path or --checkpoint")
    record = get_record(client, args.id)
    args.tty = bool((spec_of(record).get("process") or {}).get("terminal"))
    args.interactive = args.log_uri = args.null_io = args.pid_file = None
    args.no_sig_proxy = False
    checkpoint, options = None, record.runtime.options if record.runtime is not None else None
    if args.checkpoint:
        info = content_info(client, args.checkpoint)
        checkpoint = light.Descriptor(media_type=CHECKPOINT_TYPE, digest=info.digest, size=info.size)
    else:
        merged = options_pb2.Options.FromString(options.value if options is not None else b"")
        merged.criu_image_path = os.path.abspath(args.image_path)
        options = light.Any_(type_url=RUNC_OPTIONS_URL, value=merged.SerializeToString())
    created = Created(record.id, [], record.image, record.snapshotter, record.snapshot_key)
    return run_task(context, created, mounts_of(client, record), checkpoint=checkpoint, options=options)
