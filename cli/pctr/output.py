"""What pctr prints: tables for people, JSON for programs, sizes and ages that can be read.

Owns standard output for lists and documents; knows no command. Cells carry the raw value, which
JSON shows, and a text for the table.
"""

from __future__ import annotations

import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any, TypeAlias

    Value: TypeAlias = Any


class Cell:
    """A value and how a person reads it."""

    __slots__ = ("raw", "text")

    def __init__(self, raw: Any, text: str) -> None:
        self.raw = raw
        self.text = text


def size(count: int) -> Cell:
    """Bytes in binary units."""
    return Cell(count, human_size(count))


def human_size(count: float) -> str:
    """`1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def human_span(seconds: float) -> str:
    """`3 minutes`: the largest unit that fits."""
    seconds = max(0.0, seconds)
    for unit, length in (("year", 31557600), ("month", 2629800), ("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'' if count == 1 else 's'}"
    count = int(seconds)
    return f"{count} second{'' if count == 1 else 's'}"


def rfc3339(seconds: int, nanos: int = 0) -> str:
    """A time as JSON shows it; "" for the time that is not set."""
    if seconds <= 0 and nanos <= 0:
        return ""
    fraction = f".{nanos:09d}".rstrip("0").rstrip(".") if nanos else ""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + fraction + "Z"


def age(timestamp: Any) -> Cell:
    """How long ago a protobuf timestamp was."""
    shown = rfc3339(timestamp.seconds, timestamp.nanos)
    if not shown:
        return Cell(None, "-")
    return Cell(shown, f"{human_span(time.time() - timestamp.seconds)} ago")


def moment(timestamp: Any) -> Cell:
    """A protobuf timestamp as a time."""
    shown = rfc3339(timestamp.seconds, timestamp.nanos)
    return Cell(shown or None, shown or "-")


def labels(entries: Iterable[tuple[str, str]]) -> Cell:
    """Labels in the order of their keys."""
    ordered = dict(sorted(entries))
    return Cell(ordered, ",".join(f"{key}={value}" for key, value in ordered.items()) or "-")


def plain(text: str) -> str:
    """`text` without control characters, which could steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class Table:
    """Rows under columns. `quiet` names the column that `-q` prints (the first by default)."""

    def __init__(self, *columns: str, quiet: str = "", right: Sequence[str] = ()) -> None:
        self.columns = columns
        self.quiet = quiet or columns[0]
        self._right = set(right)
        self.rows: list[tuple[Value, ...]] = []

    def add(self, *values: Value) -> None:
        """One row, a value for each column."""
        if len(values) != len(self.columns):
            raise ValueError(f"{len(values)} values for {len(self.columns)} columns")
        self.rows.append(values)

    def objects(self) -> list[dict[str, Any]]:
        """The rows as JSON has them: keys are the columns in lower case, "_" for blanks."""
        keys = [column.lower().replace(" ", "_") for column in self.columns]
        return [
            dict(zip(keys, (value.raw if isinstance(value, Cell) else value for value in row), strict=True))
            for row in self.rows
        ]

    def text(self) -> str:
        """The aligned table, header first."""
        shown = [list(self.columns)] + [[_text(value) for value in row] for row in self.rows]
        widths = [max(len(row[number]) for row in shown) for number in range(len(self.columns))]
        lines = []
        for row in shown:
            cells = [
                cell.rjust(width) if name in self._right else cell.ljust(width)
                for cell, width, name in zip(row, widths, self.columns, strict=True)
            ]
            lines.append("    ".join(cells).rstrip())
        return "\n".join(lines)

    def show(self, args: Any) -> None:
        """Print as `--format` and `-q` say."""
        if getattr(args, "quiet", False):
            number = self.columns.index(self.quiet)
            for row in self.rows:
                print(_text(row[number]))
        elif getattr(args, "format", "table") == "json":
            document(self.objects())
        else:
            print(self.text())


def _text(value: Value) -> str:
    if isinstance(value, Cell):
        return plain(value.text)
    if value is None or value == "":
        return "-"
    if isinstance(value, (list, tuple)):
        return plain(",".join(map(str, value))) or "-"
    if isinstance(value, dict):
        return labels(value.items()).text
    return plain(str(value))


def document(value: Any) -> None:
    """One JSON document."""
    import json

    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def warn(message: str) -> None:
    """A line on standard error, after `pctr:`."""
    sys.stdout.flush()
    print(f"pctr: {plain(message)}", file=sys.stderr)
