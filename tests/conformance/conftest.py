"""Fixtures of the conformance cases: every case runs on our daemon and on Debian's containerd."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from tests.support.cri import Cri
from tests.support.peers import CONTAINERD, OURS, Peers


@pytest.fixture(scope="session")
def peers() -> Iterator[Peers]:
    """Both daemons, for the whole session."""
    with contextlib.ExitStack() as stack:
        yield Peers(stack)


@pytest.fixture(params=[OURS, CONTAINERD])
def side(request: pytest.FixtureRequest) -> str:
    """Which of the two; `beyond_containerd` narrows it."""
    return str(request.param)


@pytest.fixture
def cri(peers: Peers, side: str) -> Iterator[Cri]:
    """The daemon of this side, without a pod afterwards."""
    made = peers.get(side)
    yield made
    made.sweep()


@pytest.fixture
def pod(cri: Cri) -> tuple[str, pb.PodSandboxConfig]:
    """A privileged pod: it takes containers of every kind."""
    config = cri.pod_config()
    config.linux.security_context.privileged = True
    return cri.run_pod(config)
