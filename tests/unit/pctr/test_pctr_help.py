"""Help: every command of `pctr` and of the daemon says what it does, explains each argument and shows an example."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

import pytest
from pctr.commands import GROUPS, load
from pctr.parsers import full_parser, group_parser, top_parser

from supervisord_ctr import __main__ as daemon


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """`parser` and all below it, once each."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in dict.fromkeys(action.choices.values()):
                yield from parsers(inner)


EVERY = [*list(parsers(full_parser()))[1:], top_parser(), *parsers(daemon.parser()),
         *(group_parser(name, []) for name in GROUPS)]
LEAVES = [parser for parser in parsers(full_parser()) if "command" in parser._defaults]


@pytest.mark.parametrize("parser", EVERY, ids=lambda parser: parser.prog)
def test_every_help_describes_itself_and_shows_an_example(parser: argparse.ArgumentParser) -> None:
    program = parser.prog.split()[0]
    assert parser.description
    heading, *lines = (parser.epilog or "").strip().splitlines()
    if parser.prog == "pctr":
        heading, *lines = (parser.epilog or "").strip().partition("\n\n")[2].splitlines()
    assert heading == ("examples:" if sum(line.startswith("  ") for line in lines) > 1 else "example:")
    assert any(program in line for line in lines)


@pytest.mark.parametrize("parser", EVERY, ids=lambda parser: parser.prog)
def test_every_argument_is_explained(parser: argparse.ArgumentParser) -> None:
    silent = [action.option_strings or action.metavar or action.dest for action in parser._actions
              if not action.help and not isinstance(action, argparse._SubParsersAction)]
    assert silent == []


@pytest.mark.parametrize("parser", LEAVES, ids=lambda parser: parser.prog)
def test_the_examples_are_accepted(parser: argparse.ArgumentParser) -> None:
    for line in parser._defaults["command"].example.strip().splitlines():
        words = shlex.split(line.partition(" > ")[0].removeprefix("source <(").removesuffix(")"))
        assert words[0] == "pctr"
        group = next(word for word in words if word in GROUPS)
        args = group_parser(group, words[words.index(group) + 1:]).parse_args(words[words.index(group) + 1:])
        assert args.command.name == parser._defaults["command"].name


def test_summaries_are_plain_words() -> None:
    for name in GROUPS:
        commands = load(name)
        for command in commands if isinstance(commands, tuple) else (commands,):
            assert command.summary == command.summary.strip()
            assert not command.summary.endswith(".")
            assert command.summary[0].islower()


def test_whatever_describes_or_lists_prints_json_when_asked() -> None:
    describing = ("as json", "list ", "show ", "describe ", "tell ", "print the spec")
    silent = [parser.prog for parser in LEAVES
              if any(word in f"{parser.description} ".lower() for word in describing)
              and "--format" not in parser._option_string_actions]
    assert silent == []
