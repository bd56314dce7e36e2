"""`pctr` on a daemon with one image in it: ours and Debian's containerd, each for a whole module."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from tests.support.fake_registry import FakeRegistry, fake_registry
from tests.support.pctr_target import Target, busybox_image, running_target


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as made:
        yield made


@pytest.fixture(scope="module", params=["supervisord-ctr", "containerd"])
def target(request: pytest.FixtureRequest, registry: FakeRegistry) -> Iterator[Target]:
    with running_target(request.param) as made:
        made.image = registry.add("suite/busybox", "1", busybox_image())
        made.pctr("image", "pull", made.image)
        yield made
        for row in made.rows("container", "ls"):
            made.pctr("container", "rm", "--force", row["container"])


@pytest.fixture
def name() -> str:
    return f"c{secrets.token_hex(4)}"
