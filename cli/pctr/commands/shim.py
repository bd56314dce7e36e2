"""`pctr shim`: the processes that stand between the daemon and the containers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pctr import output
from pctr.command import Command, Context, document_option, format_option

if TYPE_CHECKING:
    from pctr.command import Arguments


def _list_arguments(parser: Arguments) -> None:
    format_option(parser, "container ids")
    parser.add_argument("--all-namespaces", action="store_true", help="shims of every namespace")


def _list(context: Context) -> None:
    from pctr.shims import shims

    table = output.Table("CONTAINER", "NAMESPACE", "SHIM PID", "TASK PID", "MEMORY", "COMMAND", quiet="CONTAINER")
    for shim in shims(context, every_namespace=getattr(context.args, "all_namespaces", False)):
        table.add(shim.container, shim.namespace, shim.pid or None, shim.task_pid,
                  output.size(shim.memory) if shim.memory is not None else None, shim.command)
    table.show(context.args)


def _info_arguments(parser: Arguments) -> None:
    document_option(parser)
    parser.add_argument("id", metavar="CONTAINER")


def _info(context: Context) -> None:
    from pctr.shims import describe

    output.document(describe(context, context.args.id))


COMMANDS = (
    Command("ls", "list the shims of running containers", "pctr shim ls --format json", _list_arguments, _list,
            ("list",)),
    Command("info", "describe the shim of a container as JSON", "pctr shim info web", _info_arguments, _info,
            ("state", "inspect")),
)
