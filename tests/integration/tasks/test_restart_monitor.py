"""Containers that are started again because their labels say so, by a real daemon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from supervisord_ctr.api.services.containers.v1 import containers_pb2
from supervisord_ctr.api.services.introspection.v1 import introspection_pb2, introspection_pb2_grpc
from supervisord_ctr.api.types.task import task_pb2
from tests.integration.tasks_support import Client
from tests.support.daemon import DaemonProcess, running_daemon, wait_until

RESTART = "containerd.io/restart."


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with running_daemon("[restart]\ninterval = 0.2\n") as made:
        yield made


def label(client: Client, name: str, **labels: str) -> None:
    """Set restart labels."""
    container = containers_pb2.Container(id=name, labels={RESTART + key: value for key, value in labels.items()})
    request = containers_pb2.UpdateContainerRequest(container=container)
    request.update_mask.paths.extend(f"labels.{RESTART}{key}" for key in labels)
    client.call(client.containers.Update, request)


def count(client: Client, name: str) -> int:
    found = client.call(client.containers.Get, containers_pb2.GetContainerRequest(id=name)).container
    return int(found.labels.get(f"{RESTART}count", "0"))


def gone(client: Client, name: str) -> bool:
    try:
        client.status(name)
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND
        return True
    return False


@pytest.fixture
def looks(daemon: DaemonProcess, root: Path) -> Iterator[Callable[[], None]]:
    """Waits until the monitor has looked once more at everything, and is done with what it saw the time before."""
    probe = Client(daemon, root, "io.containerd.nothing.v1")
    name = probe.container(["true"])

    def wait() -> None:
        # Each look counts up and fails: there is no such runtime.
        probe.connect()
        label(probe, name, status="running")
        before = count(probe, name)
        wait_until(lambda: count(probe, name) > before + 2, "the monitor looks")
        label(probe, name, status="stopped")
        probe.channel.close()

    yield wait
    probe.connect()
    probe.close()


def test_p4_what_ends_is_started_again_by_the_next_daemon_too(
    client: Client, daemon: DaemonProcess, looks: Callable[[], None]
) -> None:
    name = client.container(["sh", "-c", "echo up; sleep 0.1; exit 3"])
    log = client.output / "log"
    label(client, name, status="running", loguri=f"file://{log}")
    wait_until(lambda: log.exists() and log.read_text().count("up") >= 3, "it runs a third time")
    assert count(client, name) >= 3
    client.channel.close()
    daemon.restart(kill=True)
    client.connect()
    before = count(client, name)
    wait_until(lambda: count(client, name) > before + 1, "the next daemon starts it, too")
    stop(client, name, looks)


def stop(client: Client, name: str, looks: Callable[[], None]) -> None:
    """Have it stopped by its label; a restart that was under way is over, too, when the container is removed."""
    label(client, name, status="stopped")
    looks()
    wait_until(lambda: gone(client, name) or stopped(client, name), "it is stopped")
    if gone(client, name):
        client.remove(name)
    else:
        client.finish(name)  # it had ended by itself, which is what was wanted


def stopped(client: Client, name: str) -> bool:
    """Whether its task has ended; between two tasks there is none for a moment."""
    return not gone(client, name) and client.listed().get(name) == task_pb2.STOPPED


def test_a_failure_is_tried_so_many_times(client: Client, looks: Callable[[], None]) -> None:
    name = client.run("sh", "-c", "exit 3")
    wait_until(lambda: stopped(client, name), "it has failed by itself")
    label(client, name, status="running", policy="on-failure:2")
    wait_until(lambda: count(client, name) == 2, "it is tried twice")
    looks()  # the count comes before the second try
    wait_until(lambda: stopped(client, name), "it has failed again")
    assert count(client, name) == 2
    assert client.finish(name) == 3


def test_a_running_one_is_left_alone(client: Client, looks: Callable[[], None]) -> None:
    name = client.run("sleep", "1000")
    label(client, name, status="running")
    looks()
    assert count(client, name) == 0
    assert client.status(name) == task_pb2.RUNNING
    stop(client, name, looks)


def test_clients_are_told_which_policies_there_are(client: Client) -> None:
    stub = introspection_pb2_grpc.IntrospectionStub(client.channel)
    found = stub.Plugins(introspection_pb2.PluginsRequest(filters=["id==restart"])).plugins
    assert [(plugin.type, list(plugin.capabilities)) for plugin in found] == [
        ("io.containerd.monitor.container.v1", ["no", "always", "on-failure", "unless-stopped"])
    ]
