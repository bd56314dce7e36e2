"""Signals by number or name."""

from __future__ import annotations

import signal

from pctr.command import UsageError


def parse_signal(text: str) -> int:
    """`9`, `KILL` or `SIGKILL`, also `RTMIN+3`, to a number. Raises `UsageError`."""
    if text.isdecimal():
        number = int(text)
        if 0 < number <= signal.SIGRTMAX:
            return number
    name = text.upper().removeprefix("SIG")
    base, plus, offset = name.partition("+")
    found = getattr(signal, f"SIG{base}", None)
    if isinstance(found, signal.Signals) and (not plus or offset.isdecimal()):
        return int(found) + int(offset or 0)
    raise UsageError(f"{text!r} is no signal")
