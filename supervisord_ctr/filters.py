"""Filters: the grammar of the list and watch calls. See `parse`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

#: Gives the value of a field path, and whether it is present.
Adaptor: TypeAlias = Callable[[Sequence[str]], tuple[str, bool]]


class Filter:
    """Parsed filters, or-ed."""

    def matches(self, adaptor: Adaptor) -> bool:
        """Whether any of the filters holds."""
        raise NotImplementedError


def parse(texts: Sequence[str]) -> Filter:
    """Filters or-ed together; none matches all. InvalidArgument on bad syntax."""
    raise NotImplementedError
