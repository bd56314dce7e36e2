"""The entry point: finds the command that is meant, parses its arguments, reports its failure.

Only the module of the command in use is imported and only its parser is built, because a
command's start is most of what a short run takes.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Any, NoReturn

from pctr.command import DEFAULT_ADDRESS, Command, Context, Failed, UsageError
from pctr.commands import GROUPS, find

_GLOBALS_WITH_VALUE = ("-a", "--address", "-n", "--namespace")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints look like every other message of pctr."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is; exit with 2."""
        self.exit(2, f"pctr: {message}\npctr: see '{self.prog} --help'\n")


def _global_options(parser: argparse.ArgumentParser, *, default: Any) -> None:
    group = parser.add_argument_group("connection")
    group.add_argument(
        "-a", "--address", metavar="SOCKET", default=default,
        help=f"the daemon's socket (PCTR_ADDRESS, CONTAINERD_ADDRESS; default: {DEFAULT_ADDRESS})",
    )
    group.add_argument(
        "-n", "--namespace", metavar="NAME", default=default,
        help="namespace to work in (PCTR_NAMESPACE, CONTAINERD_NAMESPACE; default: default)",
    )
    group.add_argument("--debug", action="store_true", default=default, help="show where an error came from")


def split_globals(argv: list[str]) -> tuple[list[str], list[str]]:
    """The options before the first word, and everything from that word on."""
    at = 0
    while at < len(argv) and argv[at].startswith("-") and argv[at] != "--":
        at += 2 if argv[at] in _GLOBALS_WITH_VALUE else 1
    return argv[:at], argv[at:]


def _leaf(subparsers: Any, command: Command, prog: str) -> None:
    parser = subparsers.add_parser(
        command.name, aliases=list(command.aliases), help=command.summary, prog=f"{prog} {command.name}",
        description=command.summary[:1].upper() + command.summary[1:] + ".", epilog=_epilog(command),
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    _fill(parser, command)


def _epilog(command: Command) -> str:
    lines = command.example.strip().splitlines()
    return "\n".join(["examples:" if len(lines) > 1 else "example:", *(f"  {line}" for line in lines)])


def _fill(parser: argparse.ArgumentParser, command: Command) -> None:
    command.arguments(parser)
    _global_options(parser, default=argparse.SUPPRESS)
    parser.set_defaults(command=command)


def load(group: str) -> tuple[Command, ...] | Command:
    """The command or commands behind a group's name."""
    module = importlib.import_module(f"pctr.commands.{GROUPS[group].module}")
    found: tuple[Command, ...] | Command = getattr(module, "COMMANDS", None) or module.COMMAND
    return found


def group_parser(name: str, argv: list[str]) -> argparse.ArgumentParser:
    """The parser for one group; when `argv` names one of its commands, for that one only."""
    group = GROUPS[name]
    commands = load(name)
    summary = group.summary[:1].upper() + group.summary[1:] + "."
    if isinstance(commands, Command):
        parser = Parser(
            prog=f"pctr {name}", description=summary, epilog=_epilog(commands),
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )
        _fill(parser, commands)
        return parser
    word = next((word for word in argv if not word.startswith("-")), "")
    chosen = [command for command in commands if word == command.name or word in command.aliases]
    parser = Parser(
        prog=f"pctr {name}", description=summary, epilog=f"example:\n  {commands[0].example.strip().splitlines()[0]}",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, title="commands", parser_class=Parser)
    for command in chosen or commands:
        _leaf(subparsers, command, f"pctr {name}")
    return parser


def full_parser() -> argparse.ArgumentParser:
    """Every command at once: for completion, and for tests that look at all of them."""
    parser = Parser(prog="pctr", allow_abbrev=False)
    _global_options(parser, default=None)
    groups = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    for name, group in GROUPS.items():
        commands = load(name)
        if isinstance(commands, Command):
            _leaf(groups, commands, "pctr")
            continue
        inner = groups.add_parser(name, help=group.summary, aliases=list(group.aliases), prog=f"pctr {name}")
        subparsers = inner.add_subparsers(metavar="COMMAND", parser_class=Parser)
        for command in commands:
            _leaf(subparsers, command, f"pctr {name}")
    return parser


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, GROUPS))
    listed = "\n".join(f"  {name.ljust(width)}  {group.summary}" for name, group in GROUPS.items())
    parser = Parser(
        prog="pctr", usage="pctr [-a SOCKET] [-n NAMESPACE] COMMAND …", allow_abbrev=False,
        description="Talk to supervisord-ctr, or to any daemon with containerd's API.",
        epilog=f"commands:\n{listed}\n\nexample:\n  pctr run --rm docker.io/library/busybox hello echo hello",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _global_options(parser, default=None)
    parser.add_argument("--version", action="store_true", help="print pctr's own version")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a command line. Exits like argparse does when they make no sense."""
    before, rest = split_globals(argv)
    found = find(rest[0]) if rest else None
    if found is None:
        parser = _top_parser()
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
        args = _top_parser().parse_args(before)
    return group_parser(found[0], rest[1:]).parse_args(rest[1:], args)


def _report(error: BaseException, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exception(error)
    from pctr.output import warn

    warn(str(error) or type(error).__name__)


def run(argv: list[str]) -> int:
    """Run one command line and return the exit status."""
    from supervisord_ctr.errors import Error

    args = parse(argv)
    context = Context(args, os.environ)
    debug = bool(args.debug)
    try:
        return args.command.run(context) or 0
    except UsageError as error:
        _report(error, debug)
        return 2
    except Failed as error:
        _report(error, debug)
        return error.status
    except BrokenPipeError:
        # Whoever read our output has gone; what is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except KeyboardInterrupt:
        return 130
    except (Error, OSError) as error:
        _report(error, debug)
        return 1
    finally:
        context.close()


def main() -> NoReturn:
    """The console script."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(full_parser())
    status = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = 141
    # Everything is closed and flushed; tearing the interpreter down would only take time.
    os._exit(status)


if __name__ == "__main__":
    main()
