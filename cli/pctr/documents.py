"""JSON documents by the interpreter's own C code, without the json package.

Importing json loads the regular-expression engine, which takes longer than all documents of a run. Where
the interpreter has no such code (`_json` belongs to CPython), json does the work. What comes out is the
same; the tests compare the two.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

try:
    from _json import encode_basestring_ascii, make_encoder, make_scanner
except ImportError:
    make_scanner = None  # type: ignore[assignment,misc]

_SPACE = " \t\n\r"


class _Rules:
    """What the scanner asks for: the plain rules of JSON."""

    strict = True
    object_hook = object_pairs_hook = array_hook = None
    parse_float, parse_int = float, int

    @staticmethod
    def parse_constant(word: str) -> Any:
        """NaN and Infinity are no JSON."""
        raise ValueError(f"{word} is no JSON")


def loads(data: bytes) -> Any:
    """The value that UTF-8 bytes state. Raises `ValueError`."""
    text = data.decode()
    if make_scanner is None:
        import json

        return json.loads(text)
    start = len(text) - len(text.lstrip(_SPACE))
    try:
        value, end = make_scanner(_Rules)(text, start)  # type: ignore[arg-type]
    except StopIteration as stop:
        raise ValueError(f"no value at character {stop.value}") from None
    if text[end:].strip(_SPACE):
        raise ValueError(f"more than a value, from character {end} on")
    return value


def _unknown(value: object) -> Any:
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def dumps(value: object) -> str:
    """The value, compact and in ASCII."""
    if make_scanner is None:
        import json

        return json.dumps(value, separators=(",", ":"))
    encode = make_encoder({}, _unknown, encode_basestring_ascii, None, ":", ",", False, False, False)
    return "".join(encode(value, 0))
