"""`pctr completion`: scripts for shells; they ask pctr itself, through argcomplete."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pctr.command import Command, Context

if TYPE_CHECKING:
    from pctr.command import Arguments


def _arguments(parser: Arguments) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell to complete in")


def _run(context: Context) -> None:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["pctr"], use_defaults=True, shell=context.args.shell))


COMMAND = Command(
    "completion", "print a completion script for a shell",
    "source <(pctr completion bash)\npctr completion fish > ~/.config/fish/completions/pctr.fish",
    _arguments, _run,
)
