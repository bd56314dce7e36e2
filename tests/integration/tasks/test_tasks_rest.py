"""Shims at rest under a daemon: who looks at tasks does not wake them, and nobody sees anything but the truth."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from supervisord_ctr.api.cgroups.v1 import metrics_pb2 as metrics_v1
from supervisord_ctr.api.cgroups.v2 import metrics_pb2 as metrics_v2
from supervisord_ctr.api.services.tasks.v1 import tasks_pb2
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.api.types.task import task_pb2
from tests.integration.tasks_support import TIMEOUT, Client, shim_family, shim_pid
from tests.support.daemon import DaemonProcess, running_daemon, wait_until

#: More than the second after which the daemon believes what it saw of a task in which nothing happened: events come late.
SETTLED = 1.2


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    """One whose shims rest soon."""
    with running_daemon("[runtime]\nshim_rest = 0.2\n") as made:
        yield made


def pids_of(metric: types_pb2.Metric) -> int:
    kinds = {kind.DESCRIPTOR.full_name: kind for kind in (metrics_v1.Metrics, metrics_v2.Metrics)}
    return int(kinds[metric.data.type_url].FromString(metric.data.value).pids.current)


def at_rest(client: Client, *names: str) -> bool:
    return all(len(shim_family(client, name)) == 1 for name in names)


def settle(client: Client, *names: str) -> None:
    """Until the shims rest and the daemon has seen so."""
    time.sleep(SETTLED)  # noqa: TID251  nothing must happen meanwhile
    client.listed()
    wait_until(lambda: at_rest(client, *names), "the shims rest", TIMEOUT)


def test_p11_lists_states_and_metrics_let_shims_rest(client: Client) -> None:
    names = [client.run("sleep", "1000000") for _ in range(3)]
    settle(client, *names)
    workers = {name: shim_family(client, name) for name in names}
    for _ in range(3):
        assert client.listed() == dict.fromkeys(names, task_pb2.RUNNING)
        assert [client.process(name).status for name in names] == [task_pb2.RUNNING] * 3
        metrics = client.call(client.tasks.Metrics, tasks_pb2.MetricsRequest()).metrics
        assert sorted(metric.id for metric in metrics) == sorted(names)
        assert all(pids_of(metric) == 1 for metric in metrics)
    assert {name: shim_family(client, name) for name in names} == workers
    assert all(family == [shim_pid(client, name)] for name, family in workers.items())
    for name in names:
        client.finish(name)


def test_what_happens_to_a_task_at_rest_is_seen(client: Client) -> None:
    name = client.run("sleep", "1000000")
    settle(client, name)
    pid = client.process(name).pid
    client.call(client.tasks.Pause, tasks_pb2.PauseTaskRequest(container_id=name))
    assert client.status(name) == task_pb2.PAUSED
    client.call(client.tasks.Resume, tasks_pb2.ResumeTaskRequest(container_id=name))
    assert client.status(name) == task_pb2.RUNNING
    settle(client, name)
    os.kill(pid, signal.SIGKILL)
    assert client.wait(name) == 137
    assert client.status(name) == task_pb2.STOPPED
    settle(client, name)
    assert client.process(name).exit_status == 137
    assert client.delete(name) == 137
    client.remove(name)


def test_an_exit_that_nobody_waited_for_is_seen(client: Client) -> None:
    name = client.run("sleep", "1000000")
    settle(client, name)
    os.kill(client.process(name).pid, signal.SIGKILL)
    wait_until(lambda: client.listed() == {name: task_pb2.STOPPED}, "the list tells", TIMEOUT)
    client.finish(name)


def test_p5_a_daemon_killed_while_shims_rest_finds_them(client: Client, daemon: DaemonProcess) -> None:
    names = [client.run("sh", "-c", f"trap 'exit {number}' TERM; while :; do sleep 0.1; done") for number in range(3)]
    settle(client, *names)
    pids = [client.process(name).pid for name in names]
    daemon.kill()
    client.channel.close()
    time.sleep(0.5)  # noqa: TID251  nothing must happen
    os.kill(pids[2], signal.SIGTERM)
    daemon.start()
    client.connect()
    wait_until(lambda: client.listed() == {
        names[0]: task_pb2.RUNNING, names[1]: task_pb2.RUNNING, names[2]: task_pb2.STOPPED,
    }, "all are found", TIMEOUT)
    assert [client.process(name).pid for name in names] == pids
    client.kill(names[1], signal.SIGTERM)
    assert [client.wait(name) for name in names[1:]] == [1, 2]
    for name in names:
        client.finish(name)
