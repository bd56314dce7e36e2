"""Pods through CRI: to running, and away again, with every call's own time."""

from __future__ import annotations

import itertools
import shutil
import statistics
import time

from tests.bench.measure import Case, Row, Session, Values
from tests.bench.pods import Pod, remove_all
from tests.bench.subjects import Subject, cni_plugins

TIMES = 3
SLEEP = ["sleep", "1000000"]
CALLS = ("RunPodSandbox", "CreateContainer", "StartContainer", "ContainerStatus", "StopContainer", "RemoveContainer",
         "StopPodSandbox", "RemovePodSandbox")
GOALS = {"RunPodSandbox": 0.5, "CreateContainer": 0.8, "StartContainer": 0.8, "ContainerStatus": 2.0,
         "StopContainer": 0.8, "StopPodSandbox": 0.5, "RemovePodSandbox": 0.5}


class PodLife(Case):
    """One pod with one container, in a network of its own (CNI bridge) or in the node's."""

    _numbers = itertools.count()

    def __init__(self, *, host_network: bool) -> None:
        self._host = host_network
        self.name = "pod-node" if host_network else "pod-network"
        where = "the node's network" if host_network else "a network of its own"
        self.text = f"a pod with one container in {where}, from RunPodSandbox to running and to its removal, each call"
        self._up, self._down = f"pod in {where}: to running", f"pod in {where}: stop and removal"
        self._tail = " (node's network)" if host_network else ""
        self.rows = (Row(self._up, "ms"), Row(self._down, "ms"),
                     *(Row(call + self._tail, "ms", GOALS.get(call)) for call in CALLS))

    def ready(self, session: Session, subject: Subject) -> None:
        if not self._host and cni_plugins() is None:
            raise RuntimeError("the CNI plugins bridge, host-local and loopback are not installed")
        subject.client.pull(session.reference("bench/busybox"))
        (session.work / "logs").mkdir(exist_ok=True)

    def measure(self, session: Session, subject: Subject) -> Values:
        taken = [self._one(session, subject) for _ in range(TIMES)]
        return {name: statistics.median(item[name] for item in taken) for name in taken[0]}

    def _one(self, session: Session, subject: Subject) -> Values:
        name = f"{self.name}-{next(self._numbers)}"
        image = session.reference("bench/busybox")
        marks = [time.perf_counter()]
        pod = Pod(subject.client, name, session.work / "logs", subject.cgroup, host_network=self._host)
        marks.append(time.perf_counter())
        container = pod.create("main", image, SLEEP)
        marks.append(time.perf_counter())
        pod.start(container)
        marks.append(time.perf_counter())
        for call in (lambda: pod.status(container), lambda: pod.stop_container(container),
                     lambda: pod.remove_container(container), pod.stop, pod.remove):
            call()
            marks.append(time.perf_counter())
        steps = [(after - before) * 1000 for before, after in itertools.pairwise(marks)]
        values = {call + self._tail: step for call, step in zip(CALLS, steps, strict=True)}
        return {self._up: sum(steps[:3]), self._down: sum(steps[4:]), **values}

    def done(self, session: Session, subject: Subject) -> None:
        remove_all(subject.client)
        shutil.rmtree(session.work / "logs", ignore_errors=True)
        subject.client.remove_image(session.reference("bench/busybox"))


def cases() -> list[Case]:
    """All of this module."""
    return [PodLife(host_network=False), PodLife(host_network=True)]
