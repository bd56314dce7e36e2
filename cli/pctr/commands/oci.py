"""`pctr oci`: OCI specs without a daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pctr import output
from pctr.command import Command, Context, document_option
from pctr.create import build_spec, create_options
from pctr.options import REMAINDER

if TYPE_CHECKING:
    from pctr.command import Arguments


def _spec_arguments(parser: Arguments) -> None:
    document_option(parser)
    create_options(parser)
    parser.add_argument("--id", default="container", metavar="ID", help="id that the spec is for")
    parser.add_argument("command_line", nargs=REMAINDER, metavar="[COMMAND …]")


def _spec(context: Context) -> None:
    args: Any = context.args
    builder = build_spec(args, context.namespace, args.id, None, args.command_line or ["sh"])
    output.document(builder.spec)


COMMANDS = (
    Command("spec", "print the spec that a container with these options would have",
            "pctr oci spec --memory 64m --read-only sleep 1h", _spec_arguments, _spec),
)
