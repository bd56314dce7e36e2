"""`pctr image pulls`: what is being pulled right now, whoever asked for it (P10).

Our daemon tells of the pulls themselves; of others the running ingests are shown.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from pctr import output
from pctr.command import Context
from pctr.reports import TRANSFER_PART, ask
from pctr.rpc import CONTENT
from supervisord_ctr import errors
from supervisord_ctr.api.services.content.v1 import content_pb2

#: Seconds without progress that are worth telling.
_QUIET = 2.0


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


def pulls(context: Context) -> list[dict[str, Any]] | None:
    """The daemon's pulls, of all namespaces unless one is asked for; None when it does not tell."""
    try:
        answer = ask(context, *TRANSFER_PART, {})
    except errors.NotFound:
        return None
    if answer is None:
        return None
    wanted = getattr(context.args, "namespace", None)
    found = [entry for entry in answer.get("pulls") or () if wanted in (None, entry.get("namespace"))]
    return sorted(found, key=lambda entry: (entry.get("started") or 0, entry.get("reference") or ""))


def pull_table(entries: list[dict[str, Any]]) -> output.Table:
    """One row for each pull: stage, how much is there, since when, how long it may take, when it last moved."""
    table = output.Table(
        "NAMESPACE", "IMAGE", "STAGE", "BLOBS", "DONE", "TOTAL", "PERCENT", "FOR", "LEFT", "QUIET",
        right=("PERCENT",), quiet="IMAGE")
    now = time.time()
    for entry in entries:
        done, total = int(entry.get("done") or 0), int(entry.get("total") or 0)
        share = done / total if total else None
        took = max(0.0, now - float(entry.get("started") or now))
        left = took * (1 - share) / share if share and took > 0 else None
        quiet = float(entry.get("quiet") or 0)
        blobs = entry.get("blobs") or []
        here = sum(blob.get("done") == blob.get("total") for blob in blobs)
        table.add(
            entry.get("namespace"), entry.get("reference"), _stage(entry, blobs),
            output.Cell({"done": here, "total": len(blobs)}, f"{here}/{len(blobs)}"), output.size(done),
            output.size(total) if total else None,
            output.Cell(None if share is None else round(share * 100, 1), "-" if share is None else f"{share:.0%}"),
            output.Cell(round(took, 1), output.human_span(took)),
            output.Cell(left and round(left, 1), "-" if left is None else output.human_span(left)),
            output.Cell(round(quiet, 1), output.human_span(quiet) if quiet >= _QUIET else "-"),
        )
    return table


def _stage(entry: dict[str, Any], blobs: list[dict[str, Any]]) -> str:
    """What most blobs that are not finished are doing, else the pull's own word."""
    events = [str(blob.get("event")) for blob in blobs if blob.get("event") in ("downloading", "extracting")]
    return max(events, key=events.count) if events else str(entry.get("stage") or "starting")


def _table(context: Context) -> output.Table:
    found = pulls(context)
    return table_of(ingests(context)) if found is None else pull_table(found)


def show_pulls(context: Context) -> None:
    """Print them once, or again and again until interrupted."""
    if not context.args.watch:
        _table(context).show(context.args)
        return
    shown = ""
    connection = context.client.connection
    while True:
        text = _table(context).text()
        if text != shown:
            if sys.stdout.isatty():
                sys.stdout.write("\x1b[H\x1b[2J")
            print(text, flush=True)
            shown = text
        connection.pump(0.5)  # nothing is expected: this waits, and notices a daemon that goes
