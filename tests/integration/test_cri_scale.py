"""Many pods, two at a time: every call answers, what is listed is what was made, and nothing stays.

The sizes are small; `PCTR_TEST_PODS=100 PCTR_TEST_CONTAINERS=1000` is the size that a node has.
"""

from __future__ import annotations

import concurrent.futures
import os

import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from tests.support.cri import Cri

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PODS = int(os.environ.get("PCTR_TEST_PODS", "6"))
#: Containers in the list, those that do not run included.
CONTAINERS = int(os.environ.get("PCTR_TEST_CONTAINERS", "40"))
NAMES = ("first", "second")


def make(cri: Cri, number: int) -> str:
    """A pod whose containers run and have been looked at."""
    pod, config = cri.run_pod(cri.pod_config(f"many-{number}"))
    for name in NAMES:
        container = cri.run(pod, config, f"echo {number} {name}; exec sleep 100000", name=name)
        answer = cri.runtime.ContainerStatus(
            pb.ContainerStatusRequest(container_id=container, verbose=True), timeout=120
        )
        assert answer.status.state == pb.CONTAINER_RUNNING
        assert '"runtimeSpec"' in answer.info["info"]
    assert cri.pod_status(pod).network.ip
    return pod


def test_p5_p12_many_pods_two_at_a_time_are_listed_looked_at_and_removed(cri: Cri) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as two:
        pods = list(two.map(lambda number: make(cri, number), range(PODS)))
        assert len(set(pods)) == PODS
        running = pb.ContainerFilter(state=pb.ContainerStateValue(state=pb.CONTAINER_RUNNING))
        listed = cri.runtime.ListContainers(pb.ListContainersRequest(filter=running), timeout=120).containers
        assert len(listed) == len(NAMES) * PODS
        assert {item.pod_sandbox_id for item in listed} == set(pods)
        assert len({cri.pod_status(pod).network.ip for pod in pods}) == PODS
        stats = cri.runtime.ListContainerStats(pb.ListContainerStatsRequest(), timeout=120).stats
        assert {entry.attributes.id for entry in stats} == {item.id for item in listed}
        assert len(cri.runtime.ListPodSandboxStats(pb.ListPodSandboxStatsRequest(), timeout=120).stats) == PODS

        def waiting(number: int) -> str:
            name, pod = f"many-{number % PODS}", pods[number % PODS]
            config = cri.container_config("exec sleep 100000", name=f"waiting-{number}")
            return cri.create(pod, cri.pod_config(name), config)

        more = list(two.map(waiting, range(CONTAINERS - len(listed))))
        found = cri.runtime.ListContainers(pb.ListContainersRequest(), timeout=120).containers
        assert {item.id for item in found} == {*more, *(item.id for item in listed)}
        pages = list(cri.runtime.StreamContainers(pb.StreamContainersRequest(), timeout=120))
        assert sorted(item.id for page in pages for item in page.containers) == sorted(item.id for item in found)

        def end(pod: str) -> None:
            cri.stop_pod(pod)
            cri.remove_pod(pod)

        list(two.map(end, pods))
    assert not cri.runtime.ListContainers(pb.ListContainersRequest()).containers
    assert not cri.runtime.ListPodSandbox(pb.ListPodSandboxRequest()).items
    assert cri.leaks() == []
