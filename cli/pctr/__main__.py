"""The entry point: finds the command that is meant, parses its arguments, reports its failure.

Only the module of the command in use is imported and only its parser is built, because a
command's start is most of what a short run takes.
"""

from __future__ import annotations

import os
import sys

from pctr.command import Command, Context, Failed, UsageError, global_options
from pctr.commands import find, load
from pctr.options import SUPPRESS, Options, Parsed

# Stated, not imported: the typing module takes as long to load as all of pctr.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_GLOBALS_WITH_VALUE = ("-a", "--address", "-n", "--namespace")


def split_globals(argv: list[str]) -> tuple[list[str], list[str]]:
    """The options before the first word, and everything from that word on."""
    at = 0
    while at < len(argv) and argv[at].startswith("-") and argv[at] != "--":
        at += 2 if argv[at] in _GLOBALS_WITH_VALUE else 1
    return argv[:at], argv[at:]


def select(group: str, words: list[str]) -> tuple[Command, list[str]] | None:
    """The command that is meant inside a group, and the words that are its own."""
    commands = load(group)
    if isinstance(commands, Command):
        return commands, words
    for command in commands:
        if words and (words[0] == command.name or words[0] in command.aliases):
            return command, words[1:]
    return None


def _parse_quickly(before: list[str], group: str, words: list[str]) -> Parsed | None:
    selected = select(group, words)
    if selected is None:
        return None
    command, words = selected
    args = Parsed(command=command)
    top = Options()
    global_options(top, default=None)
    options = Options()
    command.arguments(options)
    global_options(options, default=SUPPRESS)
    return args if top.parse(before, args) and options.parse(words, args) else None


def parse(argv: list[str]) -> Any:
    """The arguments of a command line. Exits like argparse does when they make no sense."""
    before, rest = split_globals(argv)
    found = find(rest[0]) if rest else None
    if found is not None and (args := _parse_quickly(before, found[0], rest[1:])) is not None:
        return args
    from pctr.parsers import parse_slowly

    return parse_slowly(before, rest, found[0] if found is not None else "")


def _report(error: BaseException, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exception(error)
    from pctr.output import warn

    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror.lower()}" if error.filename else error.strerror.lower()
    warn(text)


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

        from pctr.parsers import full_parser

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
