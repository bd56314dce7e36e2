"""`pctr explain`: why a pod or container is as it is (P22), and what it died of (P23)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pctr import output
from pctr.command import Command, Context

if TYPE_CHECKING:
    from pctr.command import Arguments


def _arguments(parser: Arguments) -> None:
    parser.add_argument("--format", choices=("table", "json"), default="table", help="how to print")
    parser.add_argument("name", metavar="POD|CONTAINER", help="id, beginning of an id, or name")


def _run(context: Context) -> None:
    from pctr.explaining import explain

    facts = explain(context, context.args.name)
    if context.args.format == "json":
        output.document([{name.lower().replace(" ", "_"): value for name, value in facts}])
        return
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        for number, line in enumerate(str(value).splitlines() or ["-"]):
            print(f"{(name if number == 0 else '').ljust(width)}    {output.plain(line)}".rstrip())


COMMAND = Command(
    "explain", "tell why a pod or container is as it is", "pctr explain kube-system/dns\npctr -n default explain web",
    _arguments, _run,
)
