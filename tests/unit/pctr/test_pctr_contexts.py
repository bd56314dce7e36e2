"""The light ExitStack and suppress do what contextlib's do."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from pctr import contexts


class Step:
    """A context that notes what it is left with, and then lets it pass, stops it, or fails itself."""

    def __init__(self, number: int, deed: str, seen: list[str]) -> None:
        self.number, self.deed, self.seen = number, deed, seen

    def __enter__(self) -> int:
        return self.number

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> bool:
        self.seen.append(f"{self.number}: {kind and kind.__name__} {error}")
        if self.deed == "fail":
            raise KeyError(self.number)
        return self.deed == "stop"


def story(error: BaseException | None) -> list[str]:
    """An exception and all that it came from."""
    told: list[str] = []
    while error is not None and len(told) < 20:
        told.append(repr(error))
        error = error.__context__
    return told


def undo(kind: Callable[[], Any], deeds: tuple[str, ...], body_fails: bool) -> tuple[list[str], list[str]]:
    """What every step saw, and what came out."""
    seen: list[str] = []
    try:
        with kind() as stack:
            for number, deed in enumerate(deeds):
                if deed == "call":
                    stack.callback(seen.append, f"{number}: called")
                else:
                    assert stack.enter_context(Step(number, deed, seen)) == number
            if body_fails:
                raise ValueError("body")
    except Exception as error:
        return seen, story(error)
    return seen, []


@pytest.mark.parametrize("body_fails", [False, True])
@pytest.mark.parametrize("deeds", list(itertools.product(("pass", "stop", "fail", "call"), repeat=3)))
def test_a_stack_is_left_like_contextlibs(deeds: tuple[str, ...], body_fails: bool) -> None:
    assert undo(contexts.ExitStack, deeds, body_fails) == undo(contextlib.ExitStack, deeds, body_fails)


def test_what_was_moved_away_is_not_undone() -> None:
    seen: list[str] = []
    with contexts.ExitStack() as stack:
        stack.callback(seen.append, "first")
        moved = stack.pop_all()
        stack.callback(seen.append, "second")
    assert seen == ["second"]
    with moved:
        pass
    assert seen == ["second", "first"]


@pytest.mark.parametrize("raised", [KeyError, IndexError, OSError, FileNotFoundError, KeyboardInterrupt])
@pytest.mark.parametrize("kinds", [(), (LookupError,), (OSError, KeyError)])
def test_suppressed_are_the_kinds_named(kinds: tuple[type[BaseException], ...], raised: type[BaseException]) -> None:
    def comes_through(suppress: Any) -> bool:
        try:
            with suppress(*kinds):
                raise raised
        except BaseException as error:
            assert type(error) is raised
            return True
        return False

    assert comes_through(contexts.suppress) == comes_through(contextlib.suppress)
