"""`pctr info`: what the daemon says of itself, and how much it keeps in the namespace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pctr import output
from pctr.command import Command, Context, format_option

if TYPE_CHECKING:
    from pctr.command import Arguments


def _arguments(parser: Arguments) -> None:
    format_option(parser)


def _run(context: Context) -> None:
    from google.protobuf.empty_pb2 import Empty

    from pctr.rpc import INTROSPECTION, VERSION
    from pctr.services import list_containers, list_images, list_namespaces, list_tasks
    from supervisord_ctr.api.services.introspection.v1 import introspection_pb2
    from supervisord_ctr.api.services.version.v1 import version_pb2

    client = context.client
    server = client.unary(INTROSPECTION + "Server", Empty(), introspection_pb2.ServerResponse)
    version = client.unary(VERSION + "Version", Empty(), version_pb2.VersionResponse)
    facts = {
        "address": context.address, "uuid": server.uuid, "pid": server.pid or None, "version": version.version,
        "revision": version.revision, "namespace": context.namespace,
        "namespaces": len(list_namespaces(client)), "images": len(list_images(client)),
        "containers": len(list_containers(client)), "tasks": len(list_tasks(client)),
    }
    if context.args.format == "json":
        output.document([facts])
        return
    table = output.Table("FACT", "VALUE")
    for name, value in facts.items():
        table.add(name, value)
    for warning in server.deprecations:
        table.add("deprecated", f"{warning.id}: {warning.message}")
    print(table.text())


COMMAND = Command("info", "describe the daemon", "pctr info --format json", _arguments, _run)
