"""What a command is made of, and what it is given: declarations, shared options, the context.

Owns the frame in which every file of `pctr.commands` is written. Parses nothing itself (that is
`pctr.__main__`) and prints nothing (that is `pctr.output`).
"""

from __future__ import annotations

import os

from pctr.options import SUPPRESS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Protocol

    from pctr.rpc import Client

    class Arguments(Protocol):
        """Where a command declares its arguments: an argparse parser, or `pctr.options.Options`."""

        def add_argument(self, *names: str, **values: Any) -> Any:
            """As argparse has it."""

        def add_argument_group(self, title: str, /) -> Any:
            """A titled group, with the same methods."""


DEFAULT_ADDRESS = "/run/supervisord-ctr/supervisord-ctr.sock"
DEFAULT_NAMESPACE = "default"
DEFAULT_SNAPSHOTTER = "overlayfs"
DEFAULT_RUNTIME = "io.containerd.runc.v2"


class UsageError(Exception):
    """The command line makes no sense; pctr exits with 2."""


class Failed(Exception):
    """The command did not do what it was asked to; pctr prints the message and exits with `status`."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Command:
    """One command: `arguments` fills a parser, `run` does the work and returns the exit status (None is 0)."""

    __slots__ = ("aliases", "arguments", "example", "name", "run", "summary")

    def __init__(
        self, name: str, summary: str, example: str, arguments: Callable[[Arguments], None],
        run: Callable[[Context], int | None], aliases: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.summary = summary
        self.example = example
        self.arguments = arguments
        self.run = run
        self.aliases = aliases


class Context:
    """What a running command has: its arguments and, when it asks, a connection to the daemon."""

    def __init__(self, args: Any, environment: Mapping[str, str]) -> None:
        self.args = args
        self.environment = environment
        self._client: Client | None = None

    @property
    def address(self) -> str:
        """The daemon's socket: the option, then PCTR_ADDRESS, CONTAINERD_ADDRESS, our own default."""
        return self._setting("address", "ADDRESS") or DEFAULT_ADDRESS

    @property
    def namespace(self) -> str:
        """The namespace: the option, then PCTR_NAMESPACE, CONTAINERD_NAMESPACE, "default"."""
        return self._setting("namespace", "NAMESPACE") or DEFAULT_NAMESPACE

    def _setting(self, name: str, variable: str) -> str:
        given: str = getattr(self.args, name, "") or ""
        known = self.environment
        return given or known.get(f"PCTR_{variable}", "") or known.get(f"CONTAINERD_{variable}", "")

    @property
    def snapshotter(self) -> str:
        """The snapshotter: the option, then PCTR_SNAPSHOTTER, CONTAINERD_SNAPSHOTTER, "overlayfs"."""
        return self._setting("snapshotter", "SNAPSHOTTER") or DEFAULT_SNAPSHOTTER

    @property
    def client(self) -> Client:
        """The connection, made on first use."""
        if self._client is None:
            from pctr.rpc import Client

            self._client = Client(self.address, self.namespace, start_hint=self._start_hint())
        return self._client

    def _start_hint(self) -> str:
        if self.address == DEFAULT_ADDRESS:
            return "supervisord-ctr"
        return f"supervisord-ctr --address {self.address}"

    def close(self) -> None:
        """Drop the connection, when there is one."""
        if self._client is not None:
            self._client.close()


# -- options that many commands share ------------------------------------------------------------------


def global_options(parser: Arguments, *, default: Any) -> None:
    """Options of every command; `-a` only before the command's name, where no command has its own."""
    group = parser.add_argument_group("connection")
    names = ("--address",) if default == SUPPRESS else ("-a", "--address")
    group.add_argument(
        *names, metavar="SOCKET", default=default,
        help=f"the daemon's socket (PCTR_ADDRESS, CONTAINERD_ADDRESS; default: {DEFAULT_ADDRESS})",
    )
    group.add_argument(
        "-n", "--namespace", metavar="NAME", default=default,
        help="namespace to work in (PCTR_NAMESPACE, CONTAINERD_NAMESPACE; default: default)",
    )
    group.add_argument("--debug", action="store_true", default=default, help="show where an error came from")


def format_option(parser: Arguments, quiet: str = "") -> None:
    """`--format`; with `quiet` also `-q`, which prints only that column."""
    parser.add_argument("--format", choices=("table", "json"), default="table", help="how to print (default: table)")
    if quiet:
        parser.add_argument("-q", "--quiet", action="store_true", help=f"print only the {quiet}")


def document_option(parser: Arguments) -> None:
    """`--format` of commands that print JSON anyway: accepted, so that programs need not know which do."""
    parser.add_argument("--format", choices=("json",), default="json", help="how to print: json, the only one")


def filters_argument(parser: Arguments) -> None:
    """Positional filters, or-ed."""
    parser.add_argument("filters", nargs="*", metavar="FILTER", help='such as \'labels."app"==web\'; several are or-ed')


def snapshotter_option(parser: Arguments) -> None:
    """`--snapshotter`."""
    parser.add_argument("--snapshotter", metavar="NAME", help=f"snapshotter (default: {DEFAULT_SNAPSHOTTER})")


def label_option(parser: Arguments, what: str = "label to set") -> None:
    """`--label`, repeatable."""
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help=f"{what}; may be repeated")


def parse_labels(entries: list[str]) -> dict[str, str]:
    """`KEY=VALUE` words; a word without "=" has an empty value."""
    labels: dict[str, str] = {}
    for entry in entries:
        key, _, value = entry.partition("=")
        if not key:
            raise UsageError(f"label {entry!r} has no key")
        labels[key] = value
    return labels


_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """`512`, `64k`, `1.5GiB` to bytes."""
    word = text.strip().lower()
    unit = word.lstrip("0123456789.")
    number = word[:len(word) - len(unit)]
    unit = unit.strip().removesuffix("ib").removesuffix("b") if unit != "b" else ""
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError):
        raise UsageError(f"{text!r} is not a size (such as 512m or 2GiB)") from None


def parse_duration(text: str) -> float:
    """`90`, `90s`, `1m30s`, `500ms`, `24h`, `7d` to seconds."""
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    rest, total = text.strip(), 0.0
    if rest.replace(".", "", 1).isdecimal():
        return float(rest)
    while rest:
        tail = rest.lstrip("0123456789.")
        number = rest[:len(rest) - len(tail)]
        unit = next((unit for unit in ("ms", "s", "m", "h", "d") if tail.startswith(unit)), "")
        try:
            total += float(number) * units[unit]
        except (ValueError, KeyError):
            raise UsageError(f"{text!r} is not a time span (such as 90s or 1h30m)") from None
        rest = tail[len(unit):]
    return total


def new_id() -> str:
    """A random id of 12 hexadecimal digits."""
    return os.urandom(6).hex()
