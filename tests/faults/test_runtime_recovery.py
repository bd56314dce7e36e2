"""Kills: of the daemon while containers run and end, of shims, of the zygote, and at every trace point.

Afterwards nothing may be left, nothing that ran may be lost, and no exit status may be wrong.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from supervisord_ctr import faults
from supervisord_ctr.api.events import events_pb2
from supervisord_ctr.api.runc.v1 import options_pb2
from supervisord_ctr.api.services.tasks.v1 import tasks_pb2
from supervisord_ctr.api.types.task import task_pb2
from supervisord_ctr.runtime import bundle, shims, tasks
from tests.integration.tasks_support import FOREIGN, OWN, TIMEOUT, Client, Watch, roots, shim_pid
from tests.support.daemon import DaemonProcess, running_daemon, wait_until
from tests.support.shim import zygote_of

#: Trace points of this room, walked below.
POINTS = sorted(name for name in faults.POINTS if name.startswith("runtime."))
RUNTIMES = pytest.mark.parametrize("runtime", [OWN, FOREIGN], ids=["own", "runc-v2"])

assert all(module.__name__ for module in (bundle, shims, tasks))


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    yield from roots()


@contextlib.contextmanager
def client_of(daemon: DaemonProcess, root: Path, runtime: str = OWN) -> Iterator[Client]:
    made = Client(daemon, root, runtime)
    try:
        yield made
    finally:
        made.close()


def zygote_pid(daemon: DaemonProcess) -> int:
    """Pid of the daemon's zygote; 0 when it has none just now."""
    assert daemon.process is not None
    return zygote_of(daemon.process.pid)


def bundle_of(daemon: DaemonProcess, name: str) -> Path:
    return daemon.state / "tasks" / daemon.namespace / name


@RUNTIMES
def test_p4_p13_containers_outlive_a_killed_daemon(root: Path, runtime: str) -> None:
    with running_daemon() as daemon, client_of(daemon, root, runtime) as client:
        script = "trap 'exit 9' TERM; i=0; while :; do echo line $i; i=$((i+1)); sleep 0.01; done"
        writes = client.run("sh", "-c", script)
        ends = client.run("sh", "-c", "sleep 1.5; exit 5")
        client.wait_text(writes, "line 3")
        daemon.kill()
        client.channel.close()
        size = len(client.text(writes))
        wait_until(lambda: len(client.text(writes)) > size + 200, "it writes on without a daemon", TIMEOUT)
        daemon.start()
        client.connect()
        assert set(client.listed()) == {writes, ends}
        assert client.status(writes) == task_pb2.RUNNING
        assert client.wait(ends) == 5
        assert client.process(ends).exit_status == 5
        assert client.delete(ends) == 5
        client.remove(ends)
        pid = client.process(writes).pid
        size = len(client.text(writes))
        wait_until(lambda: len(client.text(writes)) > size, "it writes on", TIMEOUT)
        client.exec(writes, "probe", ["true"])
        client.start(writes, "probe")
        assert client.wait(writes, "probe") == 0
        client.kill(writes, 15)
        assert client.wait(writes) == 9
        assert client.finish(writes) == 9
        assert not Path(f"/proc/{pid}").exists()


@RUNTIMES
def test_p13_an_exit_during_the_absence_is_kept_for_whoever_asks(root: Path, runtime: str) -> None:
    with running_daemon() as daemon, client_of(daemon, root, runtime) as client:
        name = client.run("sh", "-c", "echo started; sleep 1; exit 42")
        pid = client.process(name).pid
        client.wait_text(name, "started")
        daemon.kill()
        client.channel.close()
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the container ends without a daemon", TIMEOUT)
        daemon.start()
        client.connect()
        assert client.listed() == {name: task_pb2.STOPPED}
        assert client.wait(name) == 42
        assert client.finish(name) == 42


@RUNTIMES
def test_p5_a_killed_shim_takes_its_container_along(root: Path, runtime: str) -> None:
    with running_daemon() as daemon, client_of(daemon, root, runtime) as client:
        name = client.run("sleep", "1000")
        pid = client.process(name).pid
        with Watch(client) as watch:
            waiting = client.tasks.Wait.future(
                tasks_pb2.WaitRequest(container_id=name), metadata=client.metadata, timeout=TIMEOUT
            )
            os.kill(shim_pid(client, name), signal.SIGKILL)
            assert waiting.result().exit_status == 137
            watch.wait_for("/tasks/exit", "/tasks/delete")
        told = next(item for item in watch.seen if item.topic == "/tasks/exit")
        exited = events_pb2.TaskExit.FromString(told.event.value)
        assert (exited.container_id, exited.exit_status) == (name, 137)
        assert client.listed() == {}
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the container is gone", TIMEOUT)
        wait_until(lambda: not bundle_of(daemon, name).exists(), "its bundle is gone", TIMEOUT)
        assert client.code(client.tasks.Get, tasks_pb2.GetRequest(container_id=name)) == grpc.StatusCode.NOT_FOUND
        client.create(name)
        client.start(name)
        assert client.finish(name) == 137


@RUNTIMES
def test_p5_a_shim_killed_during_the_absence_is_cleaned_up_after(root: Path, runtime: str) -> None:
    with running_daemon() as daemon, client_of(daemon, root, runtime) as client:
        name = client.run("sleep", "1000")
        kept = client.run("sleep", "1000")
        pid, shim = client.process(name).pid, shim_pid(client, name)
        daemon.kill()
        client.channel.close()
        os.kill(shim, signal.SIGKILL)
        daemon.start()
        client.connect()
        wait_until(lambda: client.listed() == {kept: task_pb2.RUNNING}, "one is gone, one runs on", TIMEOUT)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "its container is gone", TIMEOUT)
        assert not bundle_of(daemon, name).exists()
        client.remove(name)
        client.finish(kept)


def test_a_killed_zygote_costs_no_container(root: Path) -> None:
    with running_daemon() as daemon, client_of(daemon, root) as client:
        name = client.run("sh", "-c", "while :; do echo on; sleep 0.05; done")
        for _ in range(2):
            victim = wait_until(lambda: zygote_pid(daemon), "a zygote", TIMEOUT)
            os.kill(victim, signal.SIGKILL)
            other = client.run("sh", "-c", "exit 6")
            assert client.wait(other) == 6
            client.finish(other)
            assert zygote_pid(daemon) != victim
        assert client.status(name) == task_pb2.RUNNING
        client.finish(name)


def test_the_daemon_and_the_zygote_killed_together(root: Path) -> None:
    with running_daemon() as daemon, client_of(daemon, root) as client:
        name = client.run("sleep", "1000")
        zygote = zygote_pid(daemon)
        os.kill(zygote, signal.SIGKILL)
        daemon.kill()
        client.channel.close()
        daemon.start()
        client.connect()
        assert client.listed() == {name: task_pb2.RUNNING}
        assert client.finish(name) == 137


def test_a_graceful_restart_leaves_containers_alone(root: Path) -> None:
    with running_daemon() as daemon, client_of(daemon, root) as client:
        name = client.run("sleep", "1000")
        pid = client.process(name).pid
        client.channel.close()
        daemon.restart()
        client.connect()
        assert (client.status(name), client.process(name).pid) == (task_pb2.RUNNING, pid)
        client.finish(name)


@RUNTIMES
def test_p5_a_daemon_killed_while_the_runtime_makes_the_container(root: Path, runtime: str) -> None:
    with running_daemon() as daemon, client_of(daemon, root, runtime) as client:
        begun, go = client.output / "begun", client.output / "go"
        program = client.output / "slow-runc"
        program.write_text(
            f'#!/bin/sh\ncase "$*" in *create*) touch {begun}; while [ ! -e {go} ]; do sleep 0.05; done;; esac\n'
            'exec runc "$@"\n'
        )
        program.chmod(0o755)
        name = client.container(["sleep", "1000"])
        request = tasks_pb2.CreateTaskRequest(container_id=name)
        request.options.type_url = "containerd.runc.v1.Options"
        request.options.value = options_pb2.Options(binary_name=str(program)).SerializeToString()
        creating = client.tasks.Create.future(request, metadata=client.metadata, timeout=TIMEOUT)
        wait_until(begun.exists, "the runtime is at work", TIMEOUT)
        daemon.kill()
        with contextlib.suppress(grpc.RpcError):
            creating.result()
        client.channel.close()
        go.touch()
        daemon.start()
        client.connect()
        # Adopted when the shim finished it for the next daemon, else taken back: never half of it.
        for found in client.listed():
            assert client.finish(found) == 137
        again = client.run("sleep", "1000")
        client.finish(again)


@pytest.mark.parametrize(("runtime", "point"), [
    *((OWN, point) for point in POINTS),
    # With a foreign shim only the points differ where the shim is half way.
    *((FOREIGN, point) for point in POINTS if point.startswith("runtime.shim.")),
])
def test_p5_p13_a_daemon_killed_at_a_trace_point_leaves_nothing_wrong(root: Path, runtime: str, point: str) -> None:
    """One life of a task with the daemon killed at `point`; the next daemon goes on from what is there."""
    armed = {"PCTR_FAULTS": f"{point}=kill@1"}
    with running_daemon(environment=armed) as daemon, client_of(daemon, root, runtime) as client:
        bystander = client.container(["sleep", "1000"])
        name = client.container(["sh", "-c", "exit 3"])
        steps = (
            lambda: client.create(name), lambda: client.start(name), lambda: client.wait(name),
            lambda: client.delete(name),
        )
        died = False
        for step in steps:
            try:
                result = step()
                assert step is not steps[2] or result == 3
            except grpc.RpcError as error:
                if died:
                    # What a killed daemon had not finished was taken back whole, or is there whole.
                    assert error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION), error
                    break
                assert daemon.process is not None
                assert daemon.process.wait(TIMEOUT) == -signal.SIGKILL
                died = True
                daemon.environment = {}
                client.channel.close()
                daemon.start()
                client.connect()
        assert died, f"{point} was never passed"
        for found, status in client.listed().items():
            assert found == name
            if status != task_pb2.STOPPED:
                client.kill(found)
            assert client.wait(found) in (3, 137)
            client.delete(found)
        client.create(name)
        client.start(name)
        assert client.wait(name) == 3
        assert client.delete(name) == 3
        client.remove(name)
        client.remove(bystander)
        left = daemon.state / "tasks" / daemon.namespace
        wait_until(lambda: list(left.iterdir()) == [], "no bundle is left", TIMEOUT)
        wait_until(lambda: list((daemon.state / "s").iterdir()) == [], "no socket is left", TIMEOUT)
