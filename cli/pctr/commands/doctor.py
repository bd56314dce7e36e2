"""`pctr doctor`: find and repair what was left behind (P5)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pctr import output
from pctr.command import Command, Context, Failed

if TYPE_CHECKING:
    from pctr.command import Arguments


_REMEDIES = (
    (("remove", "gc"), "to remove: 'pctr doctor --repair'"),
    (("pull",), "to fetch again: 'pctr image pull'"),
    (("release",), "held back after a repaired database: 'pctr gc --release'"),
    (("hand",), "to look at: a repair leaves it alone"),
)


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
    table = output.Table("KIND", "ID", "SIZE", "PROBLEM", "REMEDY", "STATE", right=("SIZE",))
    found = report.get("findings") or []
    for entry in found:
        size = int(entry.get("size") or 0)
        table.add(entry.get("kind"), entry.get("id"), output.size(size) if size else output.Cell(None, "-"),
                  entry.get("problem"), entry.get("remedy"), entry.get("state") or "found")
    if found or context.args.format == "json":
        table.show(context.args)
    else:
        print("nothing is left behind")
    left = [entry for entry in found if entry.get("state") != "removed"]
    if left and context.args.format == "table":
        print(_advice(left, repair), file=sys.stderr)
    return 1 if left else 0


def _advice(left: list[dict[str, Any]], repair: bool) -> str:
    """What to do about the rest, in one line for each remedy."""
    lines = []
    for remedies, words in _REMEDIES:
        count = sum(entry.get("remedy") in remedies for entry in left)
        if count:
            doing = "could not be removed" if repair and "remove" in remedies else words
            lines.append(f"{count} {doing}")
    return "\n".join(lines)


COMMAND = Command(
    "doctor", "find and repair what was left behind",
    "pctr doctor\npctr doctor --repair\npctr doctor --verify --format json", _arguments, _run,
)
