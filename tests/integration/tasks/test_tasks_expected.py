"""A shim is made ready when a container or a pod is made, so that the start of its task need not wait for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.tasks_support import TIMEOUT, Client, shim_pid
from tests.support.cri import running_cri
from tests.support.daemon import DaemonProcess, running_daemon, wait_until
from tests.support.shim import children_named


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    """A daemon that was never asked for a shim."""
    with running_daemon() as made:
        yield made


def zygote(daemon: DaemonProcess) -> int:
    """Pid of the zygote; waits until it serves."""
    assert daemon.process is not None
    pid = daemon.process.pid
    found: list[int] = []

    def serves() -> bool:
        found[:] = children_named(pid, "pctr-zygote")
        return len(found) == 1

    wait_until(serves, "the zygote runs", TIMEOUT)
    return found[0]


def spares(daemon: DaemonProcess) -> list[int]:
    """The shims without work; waits until the zygote serves."""
    return children_named(zygote(daemon), "pctr-spare")


def test_a_container_s_shim_is_ready_before_its_task_is_asked_for(client: Client, daemon: DaemonProcess) -> None:
    client.runtime, own = "io.containerd.no-such-runtime.v9", client.runtime
    client.remove(client.container(["true"]))
    assert spares(daemon) == []
    client.runtime = own
    name = client.container(["sleep", "1000"])
    wait_until(lambda: bool(spares(daemon)), "a shim waits", TIMEOUT)
    (ready,) = spares(daemon)
    client.create(name)
    assert shim_pid(client, name) == ready
    client.finish(name)


def test_p5_a_zygote_that_dies_with_a_shim_ready_or_before_it_heard_of_the_need_costs_nothing(
    client: Client, daemon: DaemonProcess,
) -> None:
    first = client.container(["sleep", "1000"])
    wait_until(lambda: bool(spares(daemon)), "a shim waits", TIMEOUT)
    (ready,) = spares(daemon)
    os.kill(zygote(daemon), signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{ready}").exists(), "a shim without work ends with its zygote", TIMEOUT)
    client.create(first)
    client.finish(first)
    deaf = zygote(daemon)
    os.kill(deaf, signal.SIGSTOP)
    second = client.container(["sh", "-c", "exit 3"])
    os.kill(deaf, signal.SIGKILL)
    client.create(second)
    client.start(second)
    assert client.wait(second) == 3
    client.finish(second)


def test_a_pod_s_shim_is_ready_before_its_first_container() -> None:
    with running_cri() as cri:
        cri.pull()
        pod, config = cri.run_pod()
        wait_until(lambda: bool(spares(cri.daemon)), "a shim waits", TIMEOUT)
        (ready,) = spares(cri.daemon)
        container = cri.create(pod, config, cri.container_config("sleep 1000"))
        cri.start(container)
        assert Path(f"/proc/{ready}/comm").read_text().strip() == "pctr-shim"
        cri.remove_pod(pod)
