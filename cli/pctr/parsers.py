"""Parsers by argparse: for help, for completion, and for command lines that are wrong.

`pctr.__main__` reads the others by `pctr.options`, from the same declarations.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from pctr.command import Command, global_options
from pctr.commands import GROUPS, load

#: Examples in the help of a group.
_GROUP_EXAMPLES = 3
#: Help of positional arguments that need no words of their own.
_WORDS = {
    "IMAGE": "name of an image", "CONTAINER": "id of a container", "DIGEST": "digest of a blob, such as sha256:…",
    "REF": "name of an ingest", "KEY": "key of a snapshot", "PARENT": "snapshot to stand on", "NAME": "its name",
    "ID": "its id", "POD": "id, beginning of an id, name or NAMESPACE/NAME", "FOLDER": "a folder of this machine",
    "KEY=VALUE": "label to set", "[COMMAND …]": "what would run in it",
    "CONTAINER COMMAND …": "id of a container and what to run in it",
    "IMAGE [ID [COMMAND …]]": "image, id of the container (made up when not given) and what to run in it",
}


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        try:
            width = os.get_terminal_size(1).columns
        except OSError:
            width = 100
        super().__init__(prog, max_help_position=32, width=max(60, min(width, 120)))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints look like every other message of pctr."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, "allow_abbrev": False, **values})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse has it, but the parser that knows best complains, not the outermost one."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def add_argument(self, *names: str, **values: Any) -> Any:
        """As argparse has it; a word that means the same everywhere is explained here."""
        if not names[0].startswith("-") and "help" not in values and values.get("metavar") in _WORDS:
            values["help"] = _WORDS[values["metavar"]]
        return super().add_argument(*names, **values)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is, on one line; exit with 2."""
        self.exit(2, f"pctr: {message}; see '{self.prog} --help'\n")


def _leaf(subparsers: Any, command: Command, prog: str) -> None:
    parser = subparsers.add_parser(
        command.name, aliases=list(command.aliases), help=command.summary, prog=f"{prog} {command.name}",
        description=command.summary[:1].upper() + command.summary[1:] + ".", epilog=_epilog(command),
    )
    _fill(parser, command)


def _epilog(command: Command) -> str:
    lines = command.example.strip().splitlines()
    return "\n".join(["examples:" if len(lines) > 1 else "example:", *(f"  {line}" for line in lines)])


def _group_epilog(name: str, commands: Sequence[Command]) -> str:
    """The first example of each of the first commands, and where to read on."""
    lines = [command.example.strip().splitlines()[0] for command in commands[:_GROUP_EXAMPLES]]
    word = "examples:" if len(lines) > 1 else "example:"
    return "\n".join([word, *(f"  {line}" for line in lines), "", f"More about one: pctr {name} COMMAND --help"])


def _fill(parser: argparse.ArgumentParser, command: Command) -> None:
    command.arguments(parser)
    global_options(parser, default=argparse.SUPPRESS)
    parser.set_defaults(command=command)


def group_parser(name: str, argv: list[str]) -> argparse.ArgumentParser:
    """The parser for one group; when `argv` names one of its commands, for that one only."""
    group = GROUPS[name]
    commands = load(name)
    summary = group.summary[:1].upper() + group.summary[1:] + "."
    if isinstance(commands, Command):
        parser = Parser(
            prog=f"pctr {name}", description=summary, epilog=_epilog(commands),
            )
        _fill(parser, commands)
        return parser
    word = next((word for word in argv if not word.startswith("-")), "")
    chosen = [command for command in commands if word == command.name or word in command.aliases]
    parser = Parser(prog=f"pctr {name}", description=summary, epilog=_group_epilog(name, commands))
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, title="commands", parser_class=Parser)
    for command in chosen or commands:
        _leaf(subparsers, command, f"pctr {name}")
    return parser


def full_parser() -> argparse.ArgumentParser:
    """Every command at once: for completion, and for tests that look at all of them."""
    parser = Parser(prog="pctr")
    global_options(parser, default=None)
    groups = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    for name, group in GROUPS.items():
        commands = load(name)
        if isinstance(commands, Command):
            _leaf(groups, commands, "pctr")
            continue
        inner = groups.add_parser(
            name, help=group.summary, aliases=list(group.aliases), prog=f"pctr {name}",
            description=group.summary[:1].upper() + group.summary[1:] + ".", epilog=_group_epilog(name, commands))
        subparsers = inner.add_subparsers(metavar="COMMAND", parser_class=Parser)
        for command in commands:
            _leaf(subparsers, command, f"pctr {name}")
    return parser


def top_parser() -> argparse.ArgumentParser:
    width = max(map(len, GROUPS))
    listed = "\n".join(f"  {name.ljust(width)}  {group.summary}" for name, group in GROUPS.items())
    parser = Parser(
        prog="pctr", usage="pctr [-a SOCKET] [-n NAMESPACE] COMMAND …",
        description="Talk to supervisord-ctr, or to any daemon with containerd's API.",
        epilog=f"commands:\n{listed}\n\nexample:\n  pctr run --rm docker.io/library/busybox hello echo hello",
    )
    global_options(parser, default=None)
    parser.add_argument("--version", action="store_true", help="print pctr's own version")
    return parser


def parse_slowly(before: list[str], rest: list[str], group: str) -> argparse.Namespace:
    """Parse with argparse: `before` the first word, `rest` from it on. Exits with help or a complaint."""
    if not group:
        parser = top_parser()
        args = parser.parse_args(before)
        if args.version:
            from importlib.metadata import version

            parser.exit(0, f"pctr {version('supervisord-ctr')}\n")
        if rest:
            parser.error(f"no command is called {rest[0]!r}")
        parser.print_help(sys.stderr)
        parser.exit(2)
    args = argparse.Namespace(address=None, namespace=None, debug=None)
    if before:
        args = top_parser().parse_args(before)
    return group_parser(group, rest[1:]).parse_args(rest[1:], args)
