r"""Filters: the grammar of the list and watch calls.

Owns parsing and matching; knows no object: an adaptor gives the value of a field path.

    selectors := selector ("," selector)*                   all of them must hold
    selector  := fieldpath [operator value]                 without operator: the field is present
    fieldpath := field ("." field)*
    field     := quoted | [A-Za-z0-9_]+
    operator  := "==" | "!=" | "~="                         ~= is a regular expression, found anywhere
    value     := quoted | a run of printable characters without "," and blanks
    quoted    := "…" with Go's escapes; after ~= also /…/ and |…|

Several filters are or-ed; none, and the empty filter, match all. The grammar is that of containerd's
filter package, its quirks included (`!=` holds for an absent field, `==` does not; blanks are skipped
before a token only where a token is read).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from supervisord_ctr.errors import InvalidArgument

#: Gives the text of a field path, and whether it is present.
Adaptor: TypeAlias = Callable[[Sequence[str]], tuple[str, bool]]

_FIELD = re.compile(r"[A-Za-z0-9_]+")
_OPERATOR = re.compile(r"[=!~]+")
_QUOTES = "/|\""
_SIMPLE_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\"}
_HEX_LENGTHS = {"x": 2, "u": 4, "U": 8}
# Go's syntax that Python spells differently.
_GO_CLASSES = {
    "[:alnum:]": "0-9A-Za-z", "[:alpha:]": "A-Za-z", "[:digit:]": "0-9", "[:lower:]": "a-z", "[:upper:]": "A-Z",
    "[:space:]": r"\t\n\v\f\r ", "[:word:]": "0-9A-Za-z_", "[:xdigit:]": "0-9A-Fa-f", "[:punct:]": r"!-/:-@\[-`{-~",
}


@dataclass(frozen=True, slots=True)
class _Selector:
    path: tuple[str, ...]
    operator: str
    value: str
    pattern: re.Pattern[str] | None

    def matches(self, adaptor: Adaptor) -> bool:
        value, present = adaptor(self.path)
        match self.operator:
            case "":
                return present
            case "==":
                return present and value == self.value
            case "!=":
                return value != self.value
            case _:
                # A pattern that does not compile matches nothing, as in containerd.
                return self.pattern is not None and self.pattern.search(value) is not None


@dataclass(frozen=True, slots=True)
class Filter:
    """Parsed filters: an alternative of conjunctions. Without alternatives it matches everything."""

    alternatives: tuple[tuple[_Selector, ...], ...] = ()

    def matches(self, adaptor: Adaptor) -> bool:
        """Whether any of the filters holds for the object behind `adaptor`."""
        if not self.alternatives:
            return True
        return any(all(selector.matches(adaptor) for selector in every) for every in self.alternatives)

    def names_only(self, field: str) -> set[str] | None:
        """The values when the whole filter says nothing but `FIELD==value` (an index can then be asked); else None."""
        if not self.alternatives:
            return None
        names = set()
        for every in self.alternatives:
            if len(every) != 1 or every[0].path != (field,) or every[0].operator != "==":
                return None
            names.add(every[0].value)
        return names


#: Matches everything.
ALWAYS = Filter()


def parse(texts: Sequence[str]) -> Filter:
    """Filters or-ed together; none, or an empty one among them, matches all. InvalidArgument on bad syntax."""
    if not texts:
        return ALWAYS
    alternatives = tuple(_Parser(text).parse() for text in texts)
    return ALWAYS if not all(alternatives) else Filter(alternatives)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def parse(self) -> tuple[_Selector, ...]:
        if not self.text:
            return ()
        selectors = [self._selector()]
        while self.at < len(self.text):
            if self.text[self.at] != ",":
                raise self._error(self.at, f"unexpected input: {self.text[self.at]}")
            self.at += 1
            selectors.append(self._selector())
        return tuple(selectors)

    def _selector(self) -> _Selector:
        path = [self._field()]
        while self._peek() == ".":
            self.at += 1
            path.append(self._field())
        if self._peek() in ("", ","):
            return _Selector(tuple(path), "", "", None)
        operator = self._operator()
        value = self._value(alternative_quotes=operator == "~=")
        return _Selector(tuple(path), operator, value, _compile(value) if operator == "~=" else None)

    def _peek(self) -> str:
        return self.text[self.at:self.at + 1]

    def _skip_blanks(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def _field(self) -> str:
        self._skip_blanks()
        start = self.at
        if self._peek() and self._peek() in _QUOTES:
            return self._quoted(alternative_quotes=False)
        found = _FIELD.match(self.text, self.at)
        if found is None:
            raise self._error(start, "expected field or quoted")
        self.at = found.end()
        return found.group()

    def _operator(self) -> str:
        self._skip_blanks()
        start = self.at
        if self._peek() and self._peek() in _QUOTES:
            self._quoted(alternative_quotes=True)
            raise self._error(start, 'expected an operator ("=="|"!="|"~=")')
        found = _OPERATOR.match(self.text, self.at)
        if found is None:
            raise self._error(start, 'expected an operator ("=="|"!="|"~=")')
        self.at = found.end()
        if found.group() not in ("==", "!=", "~="):
            raise self._error(start, f'unsupported operator "{found.group()}"')
        return found.group()

    def _value(self, *, alternative_quotes: bool) -> str:
        self._skip_blanks()
        start = self.at
        first = self._peek()
        if first and first in _QUOTES:
            return self._quoted(alternative_quotes=alternative_quotes)
        # A separator or an operator character cannot begin a bare value, only follow in it.
        if first and first not in ",.=!~":
            while self.at < len(self.text) and _is_value_character(self.text[self.at]):
                self.at += 1
        if self.at == start:
            raise self._error(start, "expected value or quoted")
        return self.text[start:self.at]

    def _quoted(self, *, alternative_quotes: bool) -> str:
        start = self.at
        quote = self.text[start]
        result: list[str] = []
        at = start + 1
        while True:
            if at >= len(self.text) or self.text[at] == "\n":
                raise self._error(start, "quoted literal not terminated")
            character = self.text[at]
            if character == quote:
                break
            if character == "\\":
                text, at = self._escape(start, at, quote)
                result.append(text)
            else:
                result.append(character)
                at += 1
        self.at = at + 1
        if not alternative_quotes and quote != '"':
            raise self._error(start, "invalid quote encountered")
        return "".join(result)

    def _escape(self, start: int, at: int, quote: str) -> tuple[str, int]:
        """Decode the escape at `at`; returns its text and where it ends."""
        kind = self.text[at + 1:at + 2]
        if kind == quote:
            return quote, at + 2
        if kind in _SIMPLE_ESCAPES and kind:
            return _SIMPLE_ESCAPES[kind], at + 2
        if kind in _HEX_LENGTHS and kind:
            count = _HEX_LENGTHS[kind]
            digits = self.text[at + 2:at + 2 + count]
            if re.fullmatch(rf"[0-9a-fA-F]{{{count}}}", digits) and int(digits, 16) < 0x110000:
                return chr(int(digits, 16)), at + 2 + len(digits)
            raise self._error(start, "illegal numeric escape sequence")
        digits = self.text[at + 1:at + 4]
        if kind and kind in "01234567":
            if re.fullmatch(r"[0-7]{3}", digits) and int(digits, 8) < 256:
                return chr(int(digits, 8)), at + 4
            raise self._error(start, "illegal numeric escape sequence")
        raise self._error(start, "illegal escape sequence")

    def _error(self, at: int, message: str) -> InvalidArgument:
        where = f"{self.text[:at]} >|{self.text[at]}|< {self.text[at + 1:]}" if at < len(self.text) else self.text
        return InvalidArgument(f"filters: parse error: [{where}]: {message}", kind="filter", key=self.text)


def _is_value_character(character: str) -> bool:
    if character == "," or character.isspace():
        return False
    return unicodedata.category(character)[0] in "LMNPS"


def _compile(pattern: str) -> re.Pattern[str] | None:
    """A Go (RE2) pattern as Python's; None when it is not one."""
    translated = pattern.replace(r"\z", r"\Z").replace(r"\pL", r"[^\W\d_]").replace(r"\pN", r"\d")
    for name, members in _GO_CLASSES.items():
        translated = translated.replace(name, members)
    try:
        return re.compile(translated, re.ASCII)
    except (re.error, OverflowError, RecursionError):
        return None
