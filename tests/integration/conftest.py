"""Fixtures of the integration tests: a real daemon for each module, in folders of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.cri import Cri, running_cri
from tests.support.daemon import DaemonProcess, running_daemon


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    """A daemon that the module's tests share; it must leave nothing behind when it stops."""
    with running_daemon() as made:
        yield made


@pytest.fixture(scope="module")
def cri() -> Iterator[Cri]:
    """A daemon that the module's tests share as a kubelet's runtime, with an image in it."""
    with running_cri() as made:
        made.pull()
        yield made
