"""A registry that does as it is told, and a puller over stores of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.fake_registry import FakeRegistry, fake_registry
from tests.support.pulling import Pulling, open_pulling


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as made:
        yield made


@pytest.fixture
async def pulling(tmp_path: Path) -> AsyncIterator[Pulling]:
    async with open_pulling(tmp_path / "stores") as made:
        yield made
