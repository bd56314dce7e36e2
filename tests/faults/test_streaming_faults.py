"""Kills while streams are open: of the daemon, of shims, of containers. What must end ends, what must not does not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisord_ctr.aio import wait_until
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.errors import Error, Unavailable, Unknown
from supervisord_ctr.streaming import client
from tests.support.streaming import PATIENCE, WebSocketClient, read_all
from tests.support.streaming_pod import Pod, running_pod

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pod() -> Iterator[Pod]:
    with running_pod() as made:
        yield made


def sleepers(seconds: str) -> list[int]:
    """Pids of `sleep SECONDS`."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{entry}/cmdline").read_bytes() == f"sleep\0{seconds}\0".encode():
                    found.append(int(entry))
    return found


async def start_exec(pod: Pod, container: str, *argv: str) -> client.Command:
    return await client.open_command(
        pod.exec_url(container, *argv), stdin=False, stdout=True, stderr=True, tty=False
    )


async def test_s9_execs_of_a_killed_daemon_end_and_the_container_does_not(pod: Pod) -> None:
    container = pod.run("sleep", "40404")
    command = await start_exec(pod, container, "sleep", "50505")
    await wait_until(lambda: len(sleepers("50505")) == 1, PATIENCE, "exec to run")
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, lambda: pod.daemon.restart(kill=True))
    with pytest.raises(Error):
        await asyncio.wait_for(command.wait_status(), PATIENCE)
    await wait_until(lambda: not sleepers("50505"), PATIENCE, "exec to end")
    assert len(sleepers("40404")) == 1
    folder = pod.daemon.state / "cri" / "exec"
    assert not folder.exists() or not list(folder.iterdir())
    again = await start_exec(pod, container, "echo", "alive")
    assert again.stdout is not None
    assert await read_all(again.stdout) == b"alive\n"
    await again.session.finish()


async def test_clients_are_told_when_the_daemon_stops(pod: Pod) -> None:
    container = pod.run("sleep", "41414")
    command = await start_exec(pod, container, "sleep", "51515")
    watcher = await WebSocketClient.connect(pod.exec_url(container, "sleep", "51515"), "v5.channel.k8s.io")
    await wait_until(lambda: len(sleepers("51515")) == 2, PATIENCE, "execs to run")
    loop = asyncio.get_running_loop()
    restarted = loop.run_in_executor(None, pod.daemon.restart)
    with pytest.raises(Unknown, match="the daemon is stopping"):
        await asyncio.wait_for(command.wait_status(), PATIENCE)
    await watcher.read_all()
    assert json.loads(watcher.channel(3))["status"] == "Failure"
    await watcher.close()
    await restarted
    assert not sleepers("51515")
    assert len(sleepers("41414")) == 1


async def test_attach_goes_on_with_the_next_daemon(pod: Pod) -> None:
    container = pod.run("sh", "-c", "while read line; do echo got $line; done", stdin=True)
    command = await client.open_command(
        pod.attach_url(container, stdin=True), stdin=True, stdout=True, stderr=True, tty=False
    )
    await asyncio.get_running_loop().run_in_executor(None, lambda: pod.daemon.restart(kill=True))
    with pytest.raises(Unavailable):
        await asyncio.wait_for(command.wait_status(), PATIENCE)
    command = await client.open_command(
        pod.attach_url(container, stdin=True), stdin=True, stdout=True, stderr=True, tty=False
    )
    assert command.stdin is not None
    assert command.stdout is not None
    await command.stdin.write(b"again\n")
    assert await asyncio.wait_for(command.stdout.read(), PATIENCE) == b"got again\n"
    await command.session.finish()


async def test_an_exec_ends_with_its_container(pod: Pod) -> None:
    container = pod.run("sleep", "42424")
    command = await start_exec(pod, container, "sleep", "52525")
    await wait_until(lambda: len(sleepers("52525")) == 1, PATIENCE, "exec to run")
    await asyncio.get_running_loop().run_in_executor(None, pod.stop, container)
    assert await asyncio.wait_for(command.wait_status(), PATIENCE) == 137
    await command.session.finish()
    assert pod.state(container) == pb.CONTAINER_EXITED


async def test_last_a_killed_shim_ends_its_streams(pod: Pod) -> None:
    """Last, because the pod's other containers have the same shim."""
    container = pod.run("sleep", "43434")
    command = await start_exec(pod, container, "sleep", "53535")
    attached = await client.open_command(
        pod.attach_url(container), stdin=False, stdout=True, stderr=True, tty=False
    )
    await wait_until(lambda: len(sleepers("53535")) == 1, PATIENCE, "exec to run")
    os.kill(_parent(pod.pid(container)), signal.SIGKILL)
    for left in (command, attached):
        with contextlib.suppress(Error):
            assert await asyncio.wait_for(left.wait_status(), PATIENCE) != 0
        await left.session.finish()


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
