"""`pctr gc`: collect what nothing refers to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pctr import output
from pctr.command import Command, Context, Failed, new_id

if TYPE_CHECKING:
    from pctr.command import Arguments


def _arguments(parser: Arguments) -> None:
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    parser.add_argument("--release", action="store_true", help="also what is held back after a repaired database")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="how to print")


def _run(context: Context) -> None:
    from pctr.reports import GC_PART, ask
    from supervisord_ctr import errors

    try:
        report = ask(context, *GC_PART, {
            "collect": True, "dry_run": context.args.dry_run, "release": context.args.release})
    except errors.NotFound:
        report = None
    if report is None:
        if context.args.dry_run:
            raise Failed("this daemon cannot say what it would remove")
        _by_lease(context)
        return
    table = output.Table("KIND", "NAMESPACE", "ID", "STATE")
    for entry in report.get("removed") or ():
        table.add(entry.get("kind"), entry.get("namespace"), entry.get("id"),
                  "would be removed" if context.args.dry_run else "removed")
    table.show(context.args)
    for message in report.get("errors") or ():
        output.warn(str(message))


def _by_lease(context: Context) -> None:
    """Any daemon with containerd's API collects before it answers a synchronous deletion of a lease."""
    from google.protobuf.empty_pb2 import Empty

    from pctr.rpc import LEASES
    from supervisord_ctr.api.services.leases.v1 import leases_pb2

    client = context.client
    lease = client.unary(
        LEASES + "Create", leases_pb2.CreateRequest(id=f"pctr-gc-{new_id()}"), leases_pb2.CreateResponse).lease
    client.unary(LEASES + "Delete", leases_pb2.DeleteRequest(id=lease.id, sync=True), Empty)


COMMAND = Command("gc", "collect what nothing refers to", "pctr gc --dry-run", _arguments, _run)
