"""The quick reader of command lines and argparse agree, or the quick one leaves it to argparse."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pctr.__main__ import _parse_quickly, parse, split_globals
from pctr.command import Command
from pctr.commands import GROUPS, find, load
from pctr.options import Options
from pctr.parsers import full_parser, group_parser

LINES = [
    "run --rm busybox x true", "run -it busybox x sh -c exit", "run -d -e A=b -e C=d --env=E=f busybox web",
    "run --net host -m64m --cpus 0.5 busybox x sh --help -x", "run busybox", "run -ti --memory=1g busybox x -- a b",
    "image pull --platform linux/arm64 --platform linux/amd64 busybox", "image ls", "image ls -q name==x y==z",
    "image rm a b c", "image tag -f a b", "task kill -s9 x", "task kill -s KILL --all x", "task exec -it x sh -c ls",
    "snapshot prepare -t /mnt key parent", "snapshot prepare key", "content ls --format json", "events",
    "ns create a b=c d=e", "container rm -f a b", "image push remote local", "image push remote",
    "pod logs -f --tail 3 x", "lease create --id a -x 2h", "task wait x", "completion bash",
]


def _slowly(group: str, words: list[str]) -> dict[str, Any]:
    args = argparse.Namespace(address=None, namespace=None, debug=None)
    return vars(group_parser(group, words).parse_args(words, args))


@pytest.mark.parametrize("line", LINES)
def test_both_parsers_read_the_same(line: str) -> None:
    first, *words = line.split()
    found = find(first)
    assert found is not None
    quick = _parse_quickly([], found[0], words)
    if "--" not in words:
        assert quick is not None
        assert vars(quick) == _slowly(found[0], words)


@pytest.mark.parametrize("line", [
    "run --rm --help", "run --nope x", "run --net", "run --net sideways x", "image", "image nope", "image rm",
    "image tag x", "task kill", "content ls --format yaml", "run --pull=sometimes x", "version extra",
    "run --rm=yes x", "run --oom-score-adj high x",
])
def test_what_is_wrong_is_left_to_argparse_which_exits_with_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, *words = line.split()
    found = find(first)
    assert found is not None
    assert _parse_quickly([], found[0], words) is None
    with pytest.raises(SystemExit) as caught:
        parse(line.split())
    assert caught.value.code == (0 if "--help" in line else 2)
    shown = capsys.readouterr()
    if "--help" not in line:
        assert shown.err.startswith("pctr: ")


_WORDS = st.lists(st.sampled_from([
    "-a", "--all", "-n", "3", "-n3", "--number=4", "--number", "x", "-ab", "-", "--", "-x", "--list", "--list=y", "z", "",
]), max_size=6)


@given(words=_WORDS)
def test_the_quick_reader_never_disagrees(words: list[str]) -> None:
    def declare(parser: Any) -> None:
        parser.add_argument("-a", "--all", action="store_true")
        parser.add_argument("-b", action="store_true")
        parser.add_argument("-n", "--number", type=int, default=1)
        parser.add_argument("--list", action="append", default=[])
        parser.add_argument("first")
        parser.add_argument("rest", nargs="*")

    options, quick = Options(), SimpleNamespace()
    declare(options)
    if not options.parse(words, quick):
        return
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    declare(parser)
    try:
        slow, unknown = parser.parse_known_intermixed_args(words)
    except SystemExit:
        pytest.fail(f"argparse refuses {words}")
    assert not unknown
    assert vars(quick) == vars(slow)


def test_options_before_the_command() -> None:
    assert split_globals(["-n", "team", "--debug", "image", "-x"]) == (["-n", "team", "--debug"], ["image", "-x"])
    args = parse(["--address", "/a.sock", "image", "ls", "-n", "team"])
    assert (args.address, args.namespace) == ("/a.sock", "team")


def _commands() -> list[Any]:
    found: list[Any] = []
    for group in GROUPS:
        commands = load(group)
        for command in (commands,) if isinstance(commands, Command) else commands:
            found.append(pytest.param(group, command, id=f"{group}-{command.name}"))
    return found


@pytest.mark.parametrize(("group", "command"), _commands())
def test_every_help_has_an_example_of_its_own(group: str, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    words = [group] if isinstance(load(group), Command) else [group, command.name]
    with pytest.raises(SystemExit) as caught:
        parse([*words, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "example" in shown
    for line in command.example.splitlines():
        assert line in shown
    assert any(" ".join(words) in line or group in line for line in command.example.splitlines())


def test_the_full_parser_that_completion_uses_can_be_built() -> None:
    assert full_parser().parse_args(["image", "ls"]).command.name == "ls"


def test_groups_have_no_name_twice() -> None:
    names = [name for group, entry in GROUPS.items() for name in (group, *entry.aliases)]
    assert len(names) == len(set(names))


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["frobnicate"])
    assert caught.value.code == 2
    assert "frobnicate" in capsys.readouterr().err
