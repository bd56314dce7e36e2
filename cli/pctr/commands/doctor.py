"""`pctr doctor`: find and repair what was left behind (P5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pctr import output
from pctr.command import Command, Context, Failed

if TYPE_CHECKING:
    from pctr.command import Arguments


def _arguments(parser: Arguments) -> None:
    parser.add_argument("--repair", action="store_true", help="remove what is found (default: only list it)")
    parser.add_argument("--dry-run", action="store_true", help="only list what is found (the default)")
    parser.add_argument("--verify", action="store_true", help="also read every blob and compare its digest")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="how to print")


def _run(context: Context) -> int:
    from pctr.reports import DOCTOR_PART, ask
    from supervisord_ctr import errors

    repair = context.args.repair and not context.args.dry_run
    try:
        report = ask(context, *DOCTOR_PART, {"repair": repair, "verify": context.args.verify})
    except errors.NotFound:
        report = None
    if report is None:
        raise Failed("this daemon does not examine itself")
    table = output.Table("KIND", "ID", "PROBLEM", "REMEDY", "STATE")
    found = report.get("findings") or []
    for entry in found:
        table.add(entry.get("kind"), entry.get("id"), entry.get("problem"), entry.get("remedy"),
                  entry.get("state") or "found")
    if found or context.args.format == "json":
        table.show(context.args)
    else:
        print("nothing is left behind")
    left = [entry for entry in found if entry.get("state") not in ("repaired", "removed")]
    return 1 if left else 0


COMMAND = Command("doctor", "find and repair what was left behind", "pctr doctor\npctr doctor --repair", _arguments,
                  _run)
