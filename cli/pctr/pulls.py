"""`pctr image pulls`: the ingests that run right now, whoever asked for them (P10)."""

from __future__ import annotations

import sys
import time

from pctr import output
from pctr.command import Context
from pctr.rpc import CONTENT
from supervisord_ctr.api.services.content.v1 import content_pb2


def ingests(context: Context) -> list[content_pb2.Status]:
    """Running ingests by ref."""
    response = context.client.unary(
        CONTENT + "ListStatuses", content_pb2.ListStatusesRequest(), content_pb2.ListStatusesResponse)
    return sorted(response.statuses, key=lambda status: status.ref)


def table_of(statuses: list[content_pb2.Status]) -> output.Table:
    """REF, how much of it is there, since when, how long it may still take."""
    table = output.Table("REF", "DONE", "TOTAL", "PERCENT", "STARTED", "LEFT", right=("PERCENT",))
    now = time.time()
    for status in statuses:
        share = status.offset / status.total if status.total else None
        took = now - status.started_at.seconds - status.started_at.nanos / 1e9
        left = took * (1 - share) / share if share and took > 0 else None
        table.add(
            status.ref, output.size(status.offset), output.size(status.total) if status.total else None,
            output.Cell(None if share is None else round(share * 100, 1), "-" if share is None else f"{share:.0%}"),
            output.age(status.started_at),
            output.Cell(left and round(left, 1), "-" if left is None else output.human_span(left)),
        )
    return table


def show_pulls(context: Context) -> None:
    """Print them once, or again and again until interrupted."""
    if not context.args.watch:
        table_of(ingests(context)).show(context.args)
        return
    shown = ""
    connection = context.client.connection
    while True:
        text = table_of(ingests(context)).text()
        if text != shown:
            if sys.stdout.isatty():
                sys.stdout.write("\x1b[H\x1b[2J")
            print(text, flush=True)
            shown = text
        connection.pump(0.5)  # nothing is expected: this waits, and notices a daemon that goes
