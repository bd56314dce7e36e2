"""`pctr snapshot`."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Any

from pctr import output
from pctr.command import (
    Command,
    Context,
    document_option,
    filters_argument,
    format_option,
    label_option,
    new_id,
    parse_labels,
    snapshotter_option,
)
from supervisord_ctr import errors

if TYPE_CHECKING:
    from pctr.command import Arguments

_KINDS = {0: "Unknown", 1: "View", 2: "Active", 3: "Committed"}


def _list_arguments(parser: Arguments) -> None:
    format_option(parser, "keys")
    snapshotter_option(parser)
    filters_argument(parser)


def _list(context: Context) -> None:
    from pctr.services import list_snapshots

    table = output.Table("KEY", "PARENT", "KIND")
    found = list_snapshots(context.client, context.snapshotter, context.args.filters)
    for info in sorted(found, key=lambda info: info.name):
        table.add(info.name, info.parent, _KINDS.get(info.kind, "Unknown"))
    table.show(context.args)


def _tree_arguments(parser: Arguments) -> None:
    parser.add_argument("--format", choices=("table", "json"), default="table",
                        help="how to print: a drawing, or each name with its parent (default: table)")
    snapshotter_option(parser)


def draw_tree(parents: dict[str, str]) -> list[str]:
    """Lines of a tree, from each name's parent ("" for roots)."""
    children: dict[str, list[str]] = {}
    for name, parent in sorted(parents.items()):
        children.setdefault(parent if parent in parents else "", []).append(name)
    lines: list[str] = []
    stack = [(name, "", "") for name in reversed(children.get("", []))]
    while stack:
        name, lead, below = stack.pop()
        lines.append(f"{lead}{name}")
        inner = children.get(name, [])
        for number, child in reversed(list(enumerate(inner))):
            last = number == len(inner) - 1
            stack.append((child, f"{below}{'└── ' if last else '├── '}", f"{below}{'    ' if last else '│   '}"))
    return lines


def _tree(context: Context) -> None:
    from pctr.services import list_snapshots

    parents = {info.name: info.parent for info in list_snapshots(context.client, context.snapshotter)}
    if context.args.format == "json":
        output.document(dict(sorted(parents.items())))
        return
    for line in draw_tree(parents):
        print(output.plain(line))


def _key_arguments(parser: Arguments) -> None:
    snapshotter_option(parser)
    parser.add_argument("key", metavar="KEY")


def _info_arguments(parser: Arguments) -> None:
    document_option(parser)
    _key_arguments(parser)


def _info(context: Context) -> None:
    from pctr.services import stat_snapshot

    info = stat_snapshot(context.client, context.snapshotter, context.args.key)
    output.document({
        "name": info.name, "parent": info.parent, "kind": _KINDS.get(info.kind, "Unknown"),
        "created_at": output.moment(info.created_at).raw, "updated_at": output.moment(info.updated_at).raw,
        "labels": dict(info.labels),
    })


def _mounts_arguments(parser: Arguments) -> None:
    parser.add_argument("--format", choices=("table", "json"), default="table", help="how to print")
    snapshotter_option(parser)
    parser.add_argument("target", metavar="FOLDER", help="where it is to be mounted")
    parser.add_argument("key", metavar="KEY")


def _show_mounts(mounts: list[Any], target: str, how: str) -> None:
    if how == "json":
        output.document([
            {"type": entry.type, "source": entry.source, "target": target, "options": list(entry.options)}
            for entry in mounts
        ])
        return
    for entry in mounts:
        words = ["mount", "-t", entry.type, entry.source, target]
        if entry.options:
            words += ["-o", ",".join(entry.options)]
        print(shlex.join(words))


def _mounts(context: Context) -> None:
    from pctr.services import snapshot_mounts

    args = context.args
    _show_mounts(snapshot_mounts(context.client, context.snapshotter, args.key), args.target, args.format)


def _remove_arguments(parser: Arguments) -> None:
    snapshotter_option(parser)
    parser.add_argument("keys", nargs="+", metavar="KEY")


def _remove(context: Context) -> int:
    from pctr.services import remove_snapshot

    status = 0
    for key in context.args.keys:
        try:
            remove_snapshot(context.client, context.snapshotter, key)
            print(key)
        except errors.Error as error:
            output.warn(str(error))
            status = 1
    return status


def _prepare_arguments(parser: Arguments) -> None:
    parser.add_argument("-t", "--target", metavar="FOLDER", default="", help="print mount commands for this folder")
    parser.add_argument("--mounts", action="store_true", help="print the mounts as JSON")
    label_option(parser, "label of the snapshot")
    snapshotter_option(parser)
    parser.add_argument("key", metavar="KEY")
    parser.add_argument("parent", nargs="?", default="", metavar="PARENT")


def _make(context: Context, *, view: bool) -> None:
    from pctr.services import prepare_snapshot

    args = context.args
    # Nothing refers to a snapshot made by hand, so the label must keep it.
    labels = {"containerd.io/gc.root": "pctr", **parse_labels(args.label)}
    mounts = prepare_snapshot(context.client, context.snapshotter, args.key, args.parent, view=view, labels=labels)
    if args.target or args.mounts:
        _show_mounts(mounts, args.target, "json" if args.mounts else "table")


def _prepare(context: Context) -> None:
    _make(context, view=False)


def _view(context: Context) -> None:
    _make(context, view=True)


def _commit_arguments(parser: Arguments) -> None:
    label_option(parser, "label of the snapshot")
    snapshotter_option(parser)
    parser.add_argument("name", metavar="NAME", help="name of the committed snapshot")
    parser.add_argument("key", metavar="KEY", help="the active snapshot")


def _commit(context: Context) -> None:
    from pctr.services import commit_snapshot

    args = context.args
    labels = {"containerd.io/gc.root": "pctr", **parse_labels(args.label)}
    commit_snapshot(context.client, context.snapshotter, args.name, args.key, labels)
    print(args.name)


def _usage_arguments(parser: Arguments) -> None:
    format_option(parser)
    parser.add_argument("-b", "--bytes", action="store_true", help="sizes in bytes")
    snapshotter_option(parser)
    parser.add_argument("keys", nargs="*", metavar="KEY", help="snapshots (default: all)")


def _usage(context: Context) -> None:
    from pctr.services import list_snapshots, snapshot_usage

    keys = context.args.keys or sorted(info.name for info in list_snapshots(context.client, context.snapshotter))
    table = output.Table("KEY", "SIZE", "INODES", right=("INODES",))
    for key in keys:
        usage = snapshot_usage(context.client, context.snapshotter, key)
        size = output.Cell(usage.size, str(usage.size)) if context.args.bytes else output.size(usage.size)
        table.add(key, size, usage.inodes)
    table.show(context.args)


def _diff_arguments(parser: Arguments) -> None:
    parser.add_argument("--media-type", metavar="TYPE", default="application/vnd.oci.image.layer.v1.tar+gzip",
                        help="what to make (default: a gzipped OCI layer)")
    parser.add_argument("--ref", metavar="REF", default="", help="name of the ingest")
    parser.add_argument("--keep", action="store_true", help="keep the blob and print its digest, not its bytes")
    label_option(parser, "label of the blob")
    snapshotter_option(parser)
    parser.add_argument("lower", metavar="KEY", help="what to compare: alone, with its parent")
    parser.add_argument("upper", metavar="UPPER", nargs="?", default="", help="compare KEY with this instead")


def _diff(context: Context) -> None:
    from pctr.differences import snapshot_diff
    from pctr.services import Lease, read_content

    args, client = context.args, context.client
    labels = parse_labels(args.label)
    if args.keep:
        labels.setdefault("containerd.io/gc.root", "pctr")
    with Lease(client):
        blob = snapshot_diff(
            client, context.snapshotter, args.upper or args.lower, lower=args.lower if args.upper else "",
            media_type=args.media_type, ref=args.ref or f"pctr-diff-{new_id()}", labels=labels,
        )
        if args.keep:
            print(blob.digest)
            return
        for part in read_content(client, blob.digest):
            sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()


def _unpack_arguments(parser: Arguments) -> None:
    snapshotter_option(parser)
    parser.add_argument("digest", metavar="DIGEST", help="digest of a manifest")


def _unpack(context: Context) -> None:
    from pctr.image_config import read_json
    from pctr.unpack import unpack

    client = context.client
    manifest = read_json(client, context.args.digest)
    config = read_json(client, manifest["config"]["digest"])
    diff_ids = list((config.get("rootfs") or {}).get("diff_ids") or ())
    print(unpack(client, context.args.digest, diff_ids, manifest, context.snapshotter))


def _label_arguments(parser: Arguments) -> None:
    snapshotter_option(parser)
    parser.add_argument("key", metavar="KEY")
    parser.add_argument("labels", nargs="+", metavar="KEY=VALUE", help="an empty value removes the label")


def _label(context: Context) -> None:
    from google.protobuf.field_mask_pb2 import FieldMask

    from pctr.rpc import SNAPSHOTS
    from supervisord_ctr.api.services.snapshots.v1 import snapshots_pb2

    labels = parse_labels(context.args.labels)
    request = snapshots_pb2.UpdateSnapshotRequest(
        snapshotter=context.snapshotter, info=snapshots_pb2.Info(name=context.args.key, labels=labels),
        update_mask=FieldMask(paths=[f"labels.{key}" for key in labels]),
    )
    changed = context.client.unary(SNAPSHOTS + "Update", request, snapshots_pb2.UpdateSnapshotResponse).info
    print(output.labels(changed.labels.items()).text)


COMMANDS = (
    Command("ls", "list snapshots", "pctr snapshot ls", _list_arguments, _list, ("list",)),
    Command("tree", "show which snapshot stands on which", "pctr snapshot tree", _tree_arguments, _tree),
    Command("info", "describe a snapshot as JSON", "pctr snapshot info web", _info_arguments, _info, ("inspect",)),
    Command("mounts", "print the mount commands of a snapshot", "pctr snapshot mounts /mnt web", _mounts_arguments,
            _mounts, ("mount",)),
    Command("prepare", "make a writable snapshot", "pctr snapshot prepare -t /mnt scratch sha256:…",
            _prepare_arguments, _prepare),
    Command("view", "make a read-only snapshot", "pctr snapshot view look sha256:…", _prepare_arguments, _view),
    Command("commit", "commit a writable snapshot", "pctr snapshot commit base scratch", _commit_arguments, _commit),
    Command("rm", "remove snapshots", "pctr snapshot rm scratch", _remove_arguments, _remove,
            ("remove", "delete", "del")),
    Command("usage", "show what snapshots take on disk", "pctr snapshot usage", _usage_arguments, _usage),
    Command("diff", "write the difference to the parent as a layer", "pctr snapshot diff web > layer.tar.gz",
            _diff_arguments, _diff),
    Command("unpack", "make the snapshots of a manifest", "pctr snapshot unpack sha256:…", _unpack_arguments, _unpack),
    Command("label", "change a snapshot's labels", "pctr snapshot label scratch team=web", _label_arguments, _label),
)
