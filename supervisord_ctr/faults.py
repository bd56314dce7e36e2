"""Trace points: named places where a test can stop, fail or kill the process.

In production `point("name")` costs one dictionary look-up on an empty dictionary. Tests arm points
through the environment (`PCTR_FAULTS="content.commit=kill;snapshot.rename=error:ENOSPC"`), so the
same code runs in the tests' daemon and the users'. Actions:

    kill            SIGKILL to the own process
    error:ERRNO     raise `OSError` with that errno
    sleep:SECONDS   hold the thread so long

An action may end in `@N`: it then fires at the Nth pass only.
"""

from __future__ import annotations

import errno
import os
import signal
import threading

#: Every point that exists, by name; filled by `declare` at import, so that tests can walk them all.
POINTS: dict[str, str] = {}

_armed: dict[str, tuple[str, str, int]] = {}
_passes: dict[str, int] = {}


def declare(name: str, meaning: str) -> str:
    """State a trace point and what has and has not happened when it is passed."""
    POINTS[name] = meaning
    return name


def arm(text: str) -> None:
    """Arm points from the text form above; an empty text disarms all."""
    _armed.clear()
    _passes.clear()
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        name, _, action = part.partition("=")
        action, _, number = action.partition("@")
        verb, _, argument = action.partition(":")
        if verb not in ("kill", "error", "sleep"):
            raise ValueError(f"unknown fault action {action!r} for trace point {name!r}")
        _armed[name] = (verb, argument, int(number or 0))


def point(name: str) -> None:
    """Pass the trace point `name`; does something only when a test armed it."""
    if not _armed:
        return
    found = _armed.get(name)
    if found is None:
        return
    verb, argument, number = found
    _passes[name] = _passes.get(name, 0) + 1
    if number and _passes[name] != number:
        return
    if verb == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif verb == "error":
        code = getattr(errno, argument)
        raise OSError(code, os.strerror(code), f"trace point {name}")
    else:
        threading.Event().wait(float(argument))


arm(os.environ.get("PCTR_FAULTS", ""))
