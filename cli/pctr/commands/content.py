"""`pctr content`: blobs by digest, and ingests that are still written."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pctr import output
from pctr.command import Command, Context, Failed, filters_argument, format_option, label_option, parse_labels
from pctr.commands.image import registry_arguments, registry_options
from supervisord_ctr import errors

if TYPE_CHECKING:
    from pctr.command import Arguments


def _list_arguments(parser: Arguments) -> None:
    format_option(parser, "digests")
    filters_argument(parser)


def _list(context: Context) -> None:
    from pctr.services import list_content

    table = output.Table("DIGEST", "SIZE", "AGE", "LABELS")
    for info in list_content(context.client, context.args.filters):
        table.add(info.digest, output.size(info.size), output.age(info.created_at), output.labels(info.labels.items()))
    table.show(context.args)


def _get_arguments(parser: Arguments) -> None:
    parser.add_argument("digest", metavar="DIGEST")


def _get(context: Context) -> None:
    from pctr.services import read_content

    for part in read_content(context.client, context.args.digest):
        sys.stdout.buffer.write(part)
    sys.stdout.buffer.flush()


def _fetch_arguments(parser: Arguments) -> None:
    parser.add_argument("--platform", action="append", default=[], metavar="OS/ARCH", help="platform; may be repeated")
    parser.add_argument("--all-platforms", action="store_true", help="every platform of the image")
    label_option(parser, "label of the image")
    registry_arguments(parser)
    parser.add_argument("image", metavar="IMAGE")


def _fetch(context: Context) -> None:
    from pctr.pulling import pull_image

    args = context.args
    print(pull_image(
        context, args.image, platforms=args.platform, all_platforms=args.all_platforms, unpack=False,
        labels=parse_labels(args.label), options=registry_options(args), quiet=args.quiet,
    ))


def _object_arguments(parser: Arguments) -> None:
    registry_arguments(parser)
    parser.add_argument("reference", metavar="REPOSITORY", help="such as registry:5000/team/app")
    parser.add_argument("digest", metavar="DIGEST")


def _fetch_object(context: Context) -> None:
    from pctr.objects import fetch_object

    fetch_object(context)


def _push_object(context: Context) -> None:
    from pctr.objects import push_object

    push_object(context)


def _ingest_arguments(parser: Arguments) -> None:
    parser.add_argument("--expected-digest", metavar="DIGEST", default="", help="fail unless the bytes have it")
    parser.add_argument("--expected-size", type=int, metavar="BYTES", default=0, help="fail unless so many come")
    label_option(parser, "label of the blob")
    parser.add_argument("ref", metavar="REF", help="name of the ingest")
    parser.add_argument("file", metavar="FILE", nargs="?", default="-", help="file (default: standard input)")


def _ingest(context: Context) -> None:
    from pctr.services import Writer

    args = context.args
    source = sys.stdin.buffer if args.file == "-" else open(args.file, "rb")  # noqa: SIM115
    with source:
        writer = Writer(context.client, args.ref, digest=args.expected_digest, size=args.expected_size)
        try:
            if writer.offset:
                if not source.seekable():
                    raise Failed(f"ingest {args.ref}: holds {writer.offset} bytes already; abort it or give a file")
                source.seek(writer.offset)
            while data := source.read(1 << 20):
                writer.write(data)
            if args.expected_size and writer.offset != args.expected_size:
                raise Failed(f"ingest {args.ref}: {writer.offset} bytes came, expected {args.expected_size}")
            print(writer.commit(parse_labels(args.label)))
        finally:
            writer.close()


def _active_arguments(parser: Arguments) -> None:
    format_option(parser, "refs")
    parser.add_argument("filters", nargs="*", metavar="FILTER", help="such as 'ref~=^layer-'")


def _active(context: Context) -> None:
    from pctr.rpc import CONTENT
    from supervisord_ctr.api.services.content.v1 import content_pb2

    table = output.Table("REF", "SIZE", "TOTAL", "AGE", "EXPECTED")
    response = context.client.unary(
        CONTENT + "ListStatuses", content_pb2.ListStatusesRequest(filters=context.args.filters),
        content_pb2.ListStatusesResponse,
    )
    for status in sorted(response.statuses, key=lambda status: status.ref):
        table.add(
            status.ref, output.size(status.offset), output.size(status.total) if status.total else None,
            output.age(status.started_at), status.expected,
        )
    table.show(context.args)


def _abort_arguments(parser: Arguments) -> None:
    parser.add_argument("refs", nargs="+", metavar="REF")


def _abort(context: Context) -> None:
    from google.protobuf.empty_pb2 import Empty

    from pctr.rpc import CONTENT
    from supervisord_ctr.api.services.content.v1 import content_pb2

    for ref in context.args.refs:
        context.client.unary(CONTENT + "Abort", content_pb2.AbortRequest(ref=ref), Empty)
        print(ref)


def _remove_arguments(parser: Arguments) -> None:
    parser.add_argument("digests", nargs="+", metavar="DIGEST")


def _remove(context: Context) -> int:
    from google.protobuf.empty_pb2 import Empty

    from pctr.rpc import CONTENT
    from supervisord_ctr.api.services.content.v1 import content_pb2

    status = 0
    for digest in context.args.digests:
        try:
            context.client.unary(CONTENT + "Delete", content_pb2.DeleteContentRequest(digest=digest), Empty)
            print(digest)
        except errors.Error as error:
            output.warn(str(error))
            status = 1
    return status


def _label_arguments(parser: Arguments) -> None:
    parser.add_argument("digest", metavar="DIGEST")
    parser.add_argument("labels", nargs="+", metavar="KEY=VALUE", help="an empty value removes the label")


def _label(context: Context) -> None:
    from pctr.services import content_info, update_content_labels

    update_content_labels(context.client, context.args.digest, parse_labels(context.args.labels))
    print(output.labels(content_info(context.client, context.args.digest).labels.items()).text)


def _edit_arguments(parser: Arguments) -> None:
    parser.add_argument("--editor", metavar="COMMAND", default="", help="editor (default: $EDITOR, then vi)")
    parser.add_argument("--validate", metavar="COMMAND", default="", help="command that must accept the result")
    label_option(parser, "label of the copy; without containerd.io/gc.root=… the next collection takes it")
    parser.add_argument("digest", metavar="DIGEST")


def _edit(context: Context) -> None:
    from pctr.objects import edit_object

    edit_object(context)


def _prune_arguments(parser: Arguments) -> None:
    parser.add_argument("--references", action="store_true",
                        help="remove labels that only keep layers of images that are unpacked")
    parser.add_argument("--dry-run", action="store_true", help="only say what would change")


def _prune(context: Context) -> None:
    from pctr.objects import prune_references

    prune_references(context)


COMMANDS = (
    Command("ls", "list blobs", "pctr content ls 'labels.\"containerd.io/uncompressed\"'", _list_arguments, _list,
            ("list",)),
    Command("get", "write a blob to standard output", "pctr content get sha256:… > layer.tar.gz", _get_arguments, _get),
    Command("fetch", "fetch all content of an image without unpacking it", "pctr content fetch --all-platforms busybox",
            _fetch_arguments, _fetch),
    Command("fetch-object", "fetch one blob from a registry",
            "pctr content fetch-object registry:5000/app sha256:… > blob", _object_arguments, _fetch_object),
    Command("push-object", "send one blob to a registry", "pctr content push-object registry:5000/app sha256:…",
            _object_arguments, _push_object),
    Command("ingest", "store a file as a blob", "pctr content ingest my-file ./file", _ingest_arguments, _ingest),
    Command("active", "list ingests that are not committed yet", "pctr content active", _active_arguments, _active),
    Command("abort", "throw away ingests", "pctr content abort my-file", _abort_arguments, _abort),
    Command("rm", "remove blobs", "pctr content rm sha256:…", _remove_arguments, _remove, ("remove", "delete", "del")),
    Command("label", "change a blob's labels", "pctr content label sha256:… team=web", _label_arguments, _label),
    Command("edit", "store an edited copy of a blob", "pctr content edit --label containerd.io/gc.root=mine sha256:…",
            _edit_arguments, _edit),
    Command("prune", "drop references that keep content nobody needs", "pctr content prune --references --dry-run",
            _prune_arguments, _prune),
)
