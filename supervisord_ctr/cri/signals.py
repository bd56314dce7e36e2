"""Signals: CRI's enumeration, the words of image configurations, and numbers."""

from __future__ import annotations

import signal

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.errors import InvalidArgument

_ALIASES = {"SIGCLD": "SIGCHLD", "SIGPOLL": "SIGIO", "SIGIOT": "SIGABRT", "SIGUNUSED": "SIGSYS"}
_STKFLT = 16
_RTMIN, _RTMAX = 34, 64


def name_of(value: int) -> str:
    """"SIGTERM" for CRI's SIGNAL_SIGTERM, "" for the runtime's default; raises `InvalidArgument`."""
    if value == pb.SIGNAL_RUNTIME_DEFAULT:
        return ""
    try:
        name = pb.Signal.Name(value)  # type: ignore[arg-type]
    except ValueError:
        raise InvalidArgument(f"signal {value} is not one of cri's", kind="signal", key=str(value)) from None
    return name.removeprefix("SIGNAL_").replace("PLUS", "+").replace("MINUS", "-")


def value_of(text: str) -> int:
    """CRI's value for "SIGTERM", "TERM" or "15"; the runtime's default for what CRI has no word for."""
    if not text:
        return int(pb.SIGNAL_RUNTIME_DEFAULT)
    if text.isascii() and text.isdigit():
        try:
            name = signal.Signals(int(text)).name
        except ValueError:
            name = ""
    else:
        name = text.upper()
        name = name if name.startswith("SIG") else "SIG" + name
    wanted = "SIGNAL_" + name.replace("+", "PLUS").replace("-", "MINUS")
    return int(pb.Signal.Value(wanted)) if wanted in pb.Signal.keys() else int(pb.SIGNAL_RUNTIME_DEFAULT)  # noqa: SIM118


def number_of(text: str) -> int:
    """The number of "SIGTERM", "term", "15", "SIGRTMIN+3" or "RTMAX-1"; raises `InvalidArgument`."""
    word = text.strip().upper()
    if word.isascii() and word.isdigit():
        number = int(word)
        if 0 < number <= _RTMAX:
            return number
        raise InvalidArgument(f"unknown signal {text!r}", kind="signal", key=text)
    word = word if word.startswith("SIG") else "SIG" + word
    word = _ALIASES.get(word, word)
    if word == "SIGSTKFLT":
        return _STKFLT
    for base, start, sign in (("SIGRTMIN", _RTMIN, "+"), ("SIGRTMAX", _RTMAX, "-")):
        if word == base:
            return start
        if word.startswith(base + sign) and word[len(base) + 1:].isdigit():
            number = start + int(word[len(base):])
            if _RTMIN <= number <= _RTMAX:
                return number
    try:
        return int(signal.Signals[word])
    except KeyError:
        raise InvalidArgument(f"unknown signal {text!r}", kind="signal", key=text) from None
