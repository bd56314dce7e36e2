"""`pctr version`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pctr import output
from pctr.command import Command, Context, format_option

if TYPE_CHECKING:
    from pctr.command import Arguments


def _arguments(parser: Arguments) -> None:
    format_option(parser)


def _run(context: Context) -> None:
    from importlib.metadata import version

    from google.protobuf.empty_pb2 import Empty

    from pctr.rpc import VERSION
    from supervisord_ctr.api.services.version.v1 import version_pb2

    table = output.Table("PART", "VERSION", "REVISION")
    table.add("client", version("supervisord-ctr"), "")
    try:
        server = context.client.unary(VERSION + "Version", Empty(), version_pb2.VersionResponse)
        table.add("server", server.version, server.revision)
    finally:
        table.show(context.args)


COMMAND = Command("version", "print the versions of pctr and the daemon", "pctr version", _arguments, _run)
