"""`pctr lease`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pctr import output
from pctr.command import (
    Command,
    Context,
    filters_argument,
    format_option,
    label_option,
    new_id,
    parse_duration,
    parse_labels,
)

if TYPE_CHECKING:
    from pctr.command import Arguments


def _list_arguments(parser: Arguments) -> None:
    format_option(parser, "ids")
    filters_argument(parser)


def _list(context: Context) -> None:
    from pctr.rpc import LEASES
    from supervisord_ctr.api.services.leases.v1 import leases_pb2

    table = output.Table("ID", "CREATED AT", "LABELS")
    response = context.client.unary(
        LEASES + "List", leases_pb2.ListRequest(filters=context.args.filters), leases_pb2.ListResponse)
    for lease in sorted(response.leases, key=lambda lease: lease.id):
        table.add(lease.id, output.moment(lease.created_at), output.labels(lease.labels.items()))
    table.show(context.args)


def _create_arguments(parser: Arguments) -> None:
    parser.add_argument("--id", default="", metavar="ID", help="id of the lease (default: made up)")
    parser.add_argument("-x", "--expires", default="24h", metavar="SPAN", help="how long it holds; 0 for ever")
    label_option(parser, "label of the lease")
    parser.add_argument("labels", nargs="*", metavar="KEY=VALUE")


def _create(context: Context) -> None:
    from datetime import UTC, datetime, timedelta

    from pctr.rpc import LEASES
    from supervisord_ctr.api.services.leases.v1 import leases_pb2

    labels = parse_labels([*context.args.label, *context.args.labels])
    seconds = parse_duration(context.args.expires)
    if seconds:
        expires = datetime.now(UTC) + timedelta(seconds=seconds)
        labels["containerd.io/gc.expire"] = expires.strftime("%Y-%m-%dT%H:%M:%SZ")
    request = leases_pb2.CreateRequest(id=context.args.id or f"pctr-{new_id()}", labels=labels)
    print(context.client.unary(LEASES + "Create", request, leases_pb2.CreateResponse).lease.id)


def _remove_arguments(parser: Arguments) -> None:
    parser.add_argument("--sync", action="store_true", help="wait until what it held is collected")
    parser.add_argument("ids", nargs="+", metavar="ID")


def _remove(context: Context) -> None:
    from google.protobuf.empty_pb2 import Empty

    from pctr.rpc import LEASES
    from supervisord_ctr.api.services.leases.v1 import leases_pb2

    for number, name in enumerate(context.args.ids):
        sync = context.args.sync and number == len(context.args.ids) - 1
        context.client.unary(LEASES + "Delete", leases_pb2.DeleteRequest(id=name, sync=sync), Empty)
        print(name)


def _resources_arguments(parser: Arguments) -> None:
    format_option(parser)
    parser.add_argument("id", metavar="ID")


def _resources(context: Context) -> None:
    from pctr.rpc import LEASES
    from supervisord_ctr.api.services.leases.v1 import leases_pb2

    table = output.Table("TYPE", "ID")
    response = context.client.unary(
        LEASES + "ListResources", leases_pb2.ListResourcesRequest(id=context.args.id),
        leases_pb2.ListResourcesResponse,
    )
    for resource in response.resources:
        table.add(resource.type, resource.id)
    table.show(context.args)


COMMANDS = (
    Command("ls", "list leases", "pctr lease ls", _list_arguments, _list, ("list",)),
    Command("create", "create a lease", "pctr lease create --id build --expires 2h", _create_arguments, _create),
    Command("rm", "remove leases", "pctr lease rm --sync build", _remove_arguments, _remove,
            ("remove", "delete", "del")),
    Command("resources", "list what a lease protects", "pctr lease resources build", _resources_arguments, _resources),
)
