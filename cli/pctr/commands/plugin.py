"""`pctr plugin`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pctr import output
from pctr.command import Command, Context, filters_argument, format_option

if TYPE_CHECKING:
    from pctr.command import Arguments


def _list_arguments(parser: Arguments) -> None:
    format_option(parser)
    parser.add_argument("-d", "--detailed", action="store_true", help="also exports, capabilities and errors")
    filters_argument(parser)


def _platforms(plugin: object) -> output.Cell:
    names = ["/".join(filter(None, (entry.os, entry.architecture, entry.variant)))
             for entry in plugin.platforms]  # type: ignore[attr-defined]
    return output.Cell(names, ",".join(names) or "-")


def _list(context: Context) -> None:
    from pctr.rpc import INTROSPECTION
    from supervisord_ctr.api.services.introspection.v1 import introspection_pb2

    response = context.client.unary(
        INTROSPECTION + "Plugins", introspection_pb2.PluginsRequest(filters=context.args.filters),
        introspection_pb2.PluginsResponse,
    )
    columns = ("TYPE", "ID", "PLATFORMS", "STATUS")
    table = output.Table(*columns, *(("EXPORTS", "CAPABILITIES", "ERROR") if context.args.detailed else ()))
    for plugin in response.plugins:
        failed = plugin.HasField("init_err")
        skipped = failed and "skip" in plugin.init_err.message
        row = [plugin.type, plugin.id, _platforms(plugin), "skip" if skipped else "error" if failed else "ok"]
        if context.args.detailed:
            row += [output.labels(plugin.exports.items()), list(plugin.capabilities), plugin.init_err.message]
        table.add(*row)
    table.show(context.args)


COMMANDS = (
    Command("ls", "list what the daemon is made of", "pctr plugin ls 'type~=snapshotter'", _list_arguments, _list,
            ("list",)),
)
