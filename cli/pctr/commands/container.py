"""`pctr container`: the metadata of containers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pctr import output
from pctr.command import (
    Command,
    Context,
    Failed,
    document_option,
    filters_argument,
    format_option,
    label_option,
    parse_labels,
    snapshotter_option,
)
from pctr.create import create_container, create_options
from pctr.options import REMAINDER
from supervisord_ctr import errors

if TYPE_CHECKING:
    from pctr.command import Arguments


def _list_arguments(parser: Arguments) -> None:
    format_option(parser, "ids")
    filters_argument(parser)


def _list(context: Context) -> None:
    from pctr.services import list_containers

    table = output.Table("CONTAINER", "IMAGE", "RUNTIME")
    for container in list_containers(context.client, context.args.filters):
        table.add(container.id, container.image, container.runtime.name)
    table.show(context.args)


def _info_arguments(parser: Arguments) -> None:
    document_option(parser)
    parser.add_argument("--spec", action="store_true", help="only the OCI spec")
    parser.add_argument("id", metavar="CONTAINER")


def _unpacked(value: Any) -> Any:
    """An Any: its JSON when it holds some, its type and size otherwise."""
    if not value.type_url:
        return None
    try:
        return json.loads(value.value)
    except ValueError:
        return {"type_url": value.type_url, "size": len(value.value)}


def _info(context: Context) -> None:
    from pctr.services import get_container

    container = get_container(context.client, context.args.id)
    spec = _unpacked(container.spec)
    if context.args.spec:
        output.document(spec)
        return
    output.document({
        "id": container.id, "image": container.image, "labels": dict(container.labels),
        "runtime": {"name": container.runtime.name, "options": _unpacked(container.runtime.options)},
        "snapshotter": container.snapshotter, "snapshot_key": container.snapshot_key, "sandbox": container.sandbox,
        "created_at": output.moment(container.created_at).raw, "updated_at": output.moment(container.updated_at).raw,
        "extensions": {name: _unpacked(value) for name, value in container.extensions.items()},
        "spec": spec,
    })


def _create_arguments(parser: Arguments) -> None:
    parser.add_argument("--pull", choices=("missing", "always", "never"), default="missing",
                        help="when to pull the image first (default: missing)")
    create_options(parser)
    parser.add_argument("words", nargs=REMAINDER, metavar="IMAGE [ID [COMMAND …]]")


def _create(context: Context) -> None:
    from pctr.commands.run import split_words

    print(create_container(context, *split_words(context.args.words)).id)


def _remove_arguments(parser: Arguments) -> None:
    parser.add_argument("-f", "--force", action="store_true", help="kill and delete its task first")
    parser.add_argument("--keep-snapshot", action="store_true", help="leave its snapshot")
    parser.add_argument("ids", nargs="+", metavar="CONTAINER")


def _remove(context: Context) -> int:
    status = 0
    for name in context.args.ids:
        try:
            remove(context, name, force=context.args.force, keep_snapshot=context.args.keep_snapshot)
            print(name)
        except (errors.Error, Failed) as error:
            output.warn(str(error))
            status = 1
    return status


def remove(context: Context, name: str, *, force: bool = False, keep_snapshot: bool = False) -> None:
    """Delete a container; one with a task that has not ended only with `force`."""
    from pctr.create import Created, remove_container
    from pctr.running import get_record, remove_task
    from pctr.services import get_task
    from supervisord_ctr.api.types.task import task_pb2

    client = context.client
    record = get_record(client, name)
    try:
        task = get_task(client, name)
        if not force and task.status not in (task_pb2.STOPPED, task_pb2.CREATED):
            raise Failed(f"container {name}: its task runs; stop it first, or use --force")
        remove_task(client, name, force=True)
    except errors.NotFound:
        pass
    created = Created(record.id, [], record.image, record.snapshotter, record.snapshot_key)
    remove_container(client, created, keep_snapshot=keep_snapshot)


def _label_arguments(parser: Arguments) -> None:
    parser.add_argument("id", metavar="CONTAINER")
    parser.add_argument("labels", nargs="+", metavar="KEY=VALUE", help="an empty value removes the label")


def _label(context: Context) -> None:
    from pctr.services import update_container
    from supervisord_ctr.api.services.containers.v1 import containers_pb2

    labels = parse_labels(context.args.labels)
    changed = update_container(
        context.client, containers_pb2.Container(id=context.args.id, labels=labels),
        *(f"labels.{key}" for key in labels),
    )
    print(output.labels(changed.labels.items()).text)


def _commit_arguments(parser: Arguments) -> None:
    parser.add_argument("-a", "--author", default="", metavar="NAME", help="author of the image")
    parser.add_argument("-m", "--message", default="", metavar="TEXT", help="comment of the new layer")
    parser.add_argument("--no-pause", action="store_true", help="do not freeze a running task meanwhile")
    parser.add_argument("--no-unpack", action="store_true", help="do not make the new layer's snapshot")
    label_option(parser, "label of the image")
    parser.add_argument("id", metavar="CONTAINER")
    parser.add_argument("image", metavar="IMAGE", help="name of the new image")


def _commit(context: Context) -> None:
    from pctr.committing import commit

    print(commit(context))


def _checkpoint_arguments(parser: Arguments) -> None:
    parser.add_argument("--image", action="store_true", help="store the image's descriptor in it")
    parser.add_argument("--rw", action="store_true", help="store the container's own layer in it")
    parser.add_argument("--task", action="store_true", help="store the running task in it (criu)")
    parser.add_argument("id", metavar="CONTAINER")
    parser.add_argument("reference", metavar="NAME", help="name of the checkpoint image")


def _checkpoint(context: Context) -> None:
    from pctr.container_checkpoints import checkpoint

    checkpoint(context)


def _restore_arguments(parser: Arguments) -> None:
    parser.add_argument("--rw", action="store_true", help="restore the container's own layer")
    parser.add_argument("--live", action="store_true", help="restore the running task")
    parser.add_argument("-d", "--detach", action="store_true", help="do not wait for it")
    snapshotter_option(parser)
    parser.add_argument("id", metavar="CONTAINER", help="id of the new container")
    parser.add_argument("reference", metavar="NAME", help="name of the checkpoint image")


def _restore(context: Context) -> int:
    from pctr.container_checkpoints import restore

    return restore(context)


COMMANDS = (
    Command("ls", "list containers", "pctr container ls 'labels.\"team\"==web'", _list_arguments, _list, ("list",)),
    Command("info", "describe a container as JSON", "pctr container info web", _info_arguments, _info, ("inspect",)),
    Command("create", "create a container without starting it", "pctr container create busybox web sleep 1h",
            _create_arguments, _create),
    Command("rm", "remove containers", "pctr container rm --force web", _remove_arguments, _remove,
            ("remove", "delete", "del")),
    Command("commit", "make an image of a container's changes", "pctr container commit web example.org/web:changed",
            _commit_arguments, _commit),
    Command("label", "change a container's labels", "pctr container label web team=web", _label_arguments, _label),
    Command("checkpoint", "store a container as a checkpoint image",
            "pctr container checkpoint --rw --task web example.org/web:checkpoint", _checkpoint_arguments,
            _checkpoint),
    Command("restore", "make a container of a checkpoint image",
            "pctr container restore --rw --live web2 example.org/web:checkpoint", _restore_arguments, _restore),
)
