"""`pctr namespace`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pctr import output
from pctr.command import Command, Context, format_option, parse_labels
from supervisord_ctr import errors

if TYPE_CHECKING:
    from pctr.command import Arguments


def _list_arguments(parser: Arguments) -> None:
    format_option(parser, "names")


def _list(context: Context) -> None:
    from pctr.services import list_namespaces

    table = output.Table("NAME", "LABELS")
    for namespace in list_namespaces(context.client):
        table.add(namespace.name, output.labels(namespace.labels.items()))
    table.show(context.args)


def _create_arguments(parser: Arguments) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("labels", nargs="*", metavar="KEY=VALUE")


def _create(context: Context) -> None:
    from pctr.rpc import NAMESPACES
    from supervisord_ctr.api.services.namespaces.v1 import namespaces_pb2

    namespace = namespaces_pb2.Namespace(name=context.args.name, labels=parse_labels(context.args.labels))
    context.client.unary(
        NAMESPACES + "Create", namespaces_pb2.CreateNamespaceRequest(namespace=namespace),
        namespaces_pb2.CreateNamespaceResponse,
    )
    print(context.args.name)


def _label_arguments(parser: Arguments) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("labels", nargs="+", metavar="KEY=VALUE", help="an empty value removes the label")


def _label(context: Context) -> None:
    from google.protobuf.field_mask_pb2 import FieldMask

    from pctr.rpc import NAMESPACES
    from supervisord_ctr.api.services.namespaces.v1 import namespaces_pb2

    labels = parse_labels(context.args.labels)
    request = namespaces_pb2.UpdateNamespaceRequest(
        namespace=namespaces_pb2.Namespace(name=context.args.name, labels=labels),
        update_mask=FieldMask(paths=[f"labels.{key}" for key in labels]),
    )
    context.client.unary(NAMESPACES + "Update", request, namespaces_pb2.UpdateNamespaceResponse)
    # The answer of some daemons is empty, so it is read again.
    changed = context.client.unary(
        NAMESPACES + "Get", namespaces_pb2.GetNamespaceRequest(name=context.args.name),
        namespaces_pb2.GetNamespaceResponse,
    )
    print(output.labels(changed.namespace.labels.items()).text)


def _remove_arguments(parser: Arguments) -> None:
    parser.add_argument("-c", "--cgroup", action="store_true", help="also remove the namespace's empty cgroups here")
    parser.add_argument("names", nargs="+", metavar="NAME")


def _remove_cgroups(name: str) -> None:
    """The cgroups `/NAME` of this machine, in every hierarchy; those with processes stay."""
    from supervisord_ctr.linux import cgroups
    from supervisord_ctr.names import check_identifier

    check_identifier(name, "namespace")
    try:
        cgroups.remove_empty(f"/{name}")
    except OSError as error:
        raise errors.from_os_error(error, f"namespace {name} is removed, its cgroup is not") from error


def _remove(context: Context) -> int:
    from google.protobuf.empty_pb2 import Empty

    from pctr.rpc import NAMESPACES
    from supervisord_ctr.api.services.namespaces.v1 import namespaces_pb2

    status = 0
    for name in context.args.names:
        try:
            context.client.unary(NAMESPACES + "Delete", namespaces_pb2.DeleteNamespaceRequest(name=name), Empty)
            if context.args.cgroup:
                _remove_cgroups(name)
            print(name)
        except errors.Error as error:
            output.warn(str(error))
            status = 1
    return status


COMMANDS = (
    Command("ls", "list namespaces", "pctr namespace ls", _list_arguments, _list, ("list",)),
    Command("create", "create a namespace", "pctr namespace create team env=test", _create_arguments, _create, ("c",)),
    Command("label", "change a namespace's labels", "pctr namespace label team env=prod", _label_arguments, _label),
    Command("rm", "remove empty namespaces", "pctr namespace rm team\npctr namespace rm --cgroup team",
            _remove_arguments, _remove, ("remove", "delete", "del")),
)
