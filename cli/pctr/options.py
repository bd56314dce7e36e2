"""A quick reader of command lines that are right; argparse is for those that are not.

Importing argparse and filling a parser takes longer than most commands do. Commands declare their
arguments once, by calls of `add_argument`; `Options` records these calls and reads a command line
by them. Whatever it does not understand (a mistake, `--help`, an unusual declaration) it leaves to
argparse, which then reports it: `parse` returns None. The tests hold the two against each other.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: argparse.REMAINDER and argparse.SUPPRESS, without argparse.
REMAINDER = "..."
SUPPRESS = "==SUPPRESS=="

_ACTIONS = ("store", "store_true", "store_false", "store_const", "append")


class Parsed:
    """What a command line said, as attributes (types.SimpleNamespace would load the types module)."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class _Option:
    __slots__ = ("action", "choices", "const", "convert", "default", "destination", "nargs", "required")

    def __init__(self, names: tuple[str, ...], values: dict[str, Any]) -> None:
        self.action = values.get("action", "store")
        self.nargs = values.get("nargs")
        self.choices = values.get("choices")
        self.convert = values.get("type")
        self.required = values.get("required", False)
        self.const = values.get("const", {"store_true": True, "store_false": False}.get(self.action))
        self.default = values.get("default", {"store_true": False, "store_false": True}.get(self.action))
        name = next((name for name in names if name.startswith("--")), names[0])
        self.destination = values.get("dest") or name.lstrip("-").replace("-", "_")

    def value(self, word: str) -> Any:
        """The word converted and checked; `ValueError` otherwise."""
        value = self.convert(word) if self.convert is not None else word
        if self.choices is not None and value not in self.choices:
            raise ValueError(word)
        return value


class Options:
    """Records declarations, then reads a command line by them."""

    def __init__(self) -> None:
        self._options: dict[str, _Option] = {}
        self._positionals: list[_Option] = []
        self._simple = True

    def add_argument(self, *names: str, **values: Any) -> None:
        """As argparse has it, for the actions and kinds that the commands use."""
        option = _Option(names, values)
        if option.action not in _ACTIONS:
            self._simple = False
        if not names[0].startswith("-"):
            self._positionals.append(option)
            return
        if option.nargs is not None:
            self._simple = False
        for name in names:
            self._options[name] = option

    def add_argument_group(self, *_: Any, **__: Any) -> Options:
        """Groups only matter for help."""
        return self

    def set_defaults(self, **_: Any) -> None:
        """Defaults beside the arguments are left to argparse."""
        self._simple = False

    def parse(self, words: list[str], namespace: Parsed) -> bool:
        """Fill `namespace`; False when argparse has to look at it."""
        if not self._simple:
            return False
        for option in (*self._options.values(), *self._positionals):
            if option.default != SUPPRESS and not hasattr(namespace, option.destination):
                default = option.default
                setattr(namespace, option.destination, list(default) if isinstance(default, list) else default)
        given: set[int] = set()
        try:
            positionals = self._read_options(words, namespace, given)
            return positionals is not None and self._assign(positionals, namespace) and all(
                not option.required or id(option) in given for option in self._options.values()
            )
        except ValueError:
            return False

    def _read_options(self, words: list[str], namespace: Parsed, given: set[int]) -> list[str] | None:
        positionals: list[str] = []
        open_ended = bool(self._positionals) and self._positionals[-1].nargs == REMAINDER
        at = 0
        while at < len(words):
            word = words[at]
            at += 1
            if word == "--":
                return None
            if not word.startswith("-") or word == "-":
                positionals.append(word)
                if open_ended and len(positionals) >= len(self._positionals):
                    return positionals + words[at:]
                continue
            name, value, short = self._split(word)
            option = self._options.get(name)
            if option is None:
                return None
            given.add(id(option))
            if option.action in ("store", "append"):
                if value is None:
                    if short:
                        words = [*words[:at], f"-{short}", *words[at:]]
                    if at == len(words) or (words[at].startswith("-") and words[at] != "-"):
                        return None
                    value = words[at]
                    at += 1
                self._store(option, option.value(value), namespace)
            else:
                if value is not None:
                    return None
                setattr(namespace, option.destination, option.const)
                if short:
                    words = [*words[:at], f"-{short}", *words[at:]]
        return positionals

    def _split(self, word: str) -> tuple[str, str | None, str]:
        """Name, value if attached, and further short flags: `--a=b`, `-ab`, `-it`."""
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            return name, value if equals else None, ""
        name = word[:2]
        option = self._options.get(name)
        if len(word) == 2 or option is None:
            return name, None, ""
        if option.action in ("store", "append"):
            return name, word[2:].removeprefix("="), ""
        return name, None, word[2:]

    @staticmethod
    def _store(option: _Option, value: Any, namespace: Parsed) -> None:
        if option.action == "append":
            getattr(namespace, option.destination).append(value)
        else:
            setattr(namespace, option.destination, value)

    def _assign(self, words: list[str], namespace: Parsed) -> bool:
        """Give the words to the positionals: single ones first, one that takes many at the end."""
        rest = list(words)
        for number, option in enumerate(self._positionals):
            last = number == len(self._positionals) - 1
            if option.nargs is None:
                if not rest:
                    return False
                setattr(namespace, option.destination, option.value(rest.pop(0)))
            elif option.nargs == "?":
                if rest:
                    setattr(namespace, option.destination, option.value(rest.pop(0)))
            elif option.nargs in ("*", "+", REMAINDER) and last:
                if option.nargs == "+" and not rest:
                    return False
                if rest or option.nargs != "*" or option.default is None:
                    setattr(namespace, option.destination, [option.value(word) for word in rest])
                rest = []
            else:
                return False
        return not rest
