"""A client of the module's daemon, and a root file system for its containers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.tasks_support import Client, roots
from tests.support.daemon import DaemonProcess


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    yield from roots()


@pytest.fixture
def client(daemon: DaemonProcess, root: Path) -> Iterator[Client]:
    made = Client(daemon, root)
    yield made
    made.close()
