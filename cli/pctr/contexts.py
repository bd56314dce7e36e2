"""Clean-up for commands that must start fast: `ExitStack` and `suppress` as contextlib has them.

Importing contextlib brings collections and functools along, which together take as long as several calls to
the daemon. Only what pctr uses before a container runs is here; the tests hold it against the originals.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Any, Self, TypeVar

    T = TypeVar("T")


class suppress:
    """Exceptions of these kinds end the block and go no further."""

    def __init__(self, *kinds: type[BaseException]) -> None:
        self._kinds = kinds

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        return kind is not None and issubclass(kind, self._kinds)


class ExitStack:
    """What is to be undone when the block ends, the last first, whatever fails on the way."""

    def __init__(self) -> None:
        self._exits: list[Callable[..., Any]] = []

    def callback(self, call: Callable[..., Any], /, *arguments: Any) -> None:
        """Have this called at the end; it cannot suppress an exception."""

        def leave(*_: object) -> None:
            call(*arguments)

        self._exits.append(leave)

    def enter_context(self, manager: AbstractContextManager[T]) -> T:
        """Enter a context that is left with the block; what it yields."""
        value = manager.__enter__()
        self._exits.append(manager.__exit__)
        return value

    def pop_all(self) -> ExitStack:
        """Everything moved to another stack: nothing is left for this one to undo."""
        other = ExitStack()
        other._exits, self._exits = self._exits, other._exits
        return other

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None,
    ) -> bool | None:
        current, suppressed = error, False
        while self._exits:
            leave = self._exits.pop()
            try:
                if leave(type(current) if current else None, current, current.__traceback__ if current else None):
                    current, suppressed = None, True
            except BaseException as failure:
                if error is not None and failure is not current and failure.__context__ is error:
                    failure.__context__ = current
                current, suppressed = failure, False
        if current is None or current is error:
            return suppressed
        context = current.__context__
        try:
            raise current
        except BaseException:
            # Raising sets it to what is being handled here, which is not what this one came from.
            current.__context__ = context
            raise
