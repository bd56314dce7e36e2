"""The task API on a real daemon with real runc: our own shim, and Debian's, through one script."""

from __future__ import annotations

import os
import secrets
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import grpc
import pytest

from supervisord_ctr.api.cgroups.v1 import metrics_pb2
from supervisord_ctr.api.runc.v1 import options_pb2
from supervisord_ctr.api.services.containers.v1 import containers_pb2
from supervisord_ctr.api.services.leases.v1 import leases_pb2, leases_pb2_grpc
from supervisord_ctr.api.services.tasks.v1 import tasks_pb2
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.api.types.task import task_pb2
from tests.integration.tasks_support import FOREIGN, OWN, TIMEOUT, Client, Watch, shim_family, shim_pid
from tests.support import player
from tests.support.daemon import DaemonProcess, wait_until
from tests.support.places import SHORT


@pytest.fixture(params=[OWN, FOREIGN], ids=["own", "runc-v2"])
def client(daemon: DaemonProcess, root: Path, request: pytest.FixtureRequest) -> Iterator[Client]:
    made = Client(daemon, root, request.param)
    yield made
    made.close()


def test_a_task_runs_and_tells_how_it_ended(client: Client) -> None:
    name = client.container(["sh", "-c", "echo hello; echo oops >&2; exit 7"])
    pid = client.create(name)
    assert client.status(name) == task_pb2.CREATED
    assert client.start(name) == pid
    assert client.wait(name) == 7
    assert "hello\n" in client.text(name)
    if client.runtime == OWN:
        # Debian's shim writes both streams into the one file.
        assert client.text(name) == "hello\n"
        assert client.text(f"{name}.err") == "oops\n"
    process = client.process(name)
    assert (process.status, process.exit_status, process.pid) == (task_pb2.STOPPED, 7, pid)
    assert process.exited_at.seconds > 0
    assert client.delete(name) == 7
    assert name not in client.listed()
    client.remove(name)


def test_a_killed_task_ends_with_137(client: Client) -> None:
    name = client.run("sleep", "1000")
    assert client.listed()[name] == task_pb2.RUNNING
    client.kill(name)
    assert client.wait(name) == 137
    assert client.finish(name) == 137


def test_events_tell_the_whole_life_in_order(client: Client) -> None:
    with Watch(client) as watch:
        name = client.container(["true"])
        client.create(name)
        client.start(name)
        client.wait(name)
        client.delete(name)
        watch.wait_for("/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete")
    order = [topic for topic in watch.topics if topic.startswith("/tasks/")]
    assert order == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    client.remove(name)


def test_execs_have_exits_of_their_own(client: Client) -> None:
    name = client.run("sleep", "1000")
    streams = {"stdout": f"file://{client.output}/one", "stderr": f"file://{client.output}/one.err"}
    client.exec(name, "one", ["sh", "-c", "echo from exec; exit 3"], **streams)
    assert client.process(name, "one").status == task_pb2.CREATED
    assert client.start(name, "one") > 0
    assert client.wait(name, "one") == 3
    request = tasks_pb2.DeleteProcessRequest(container_id=name, exec_id="one")
    found = client.call(client.tasks.DeleteProcess, request)
    assert (found.id, found.exit_status) == ("one", 3)
    assert client.text("one") == "from exec\n"  # another shim may still be writing it before that
    assert client.code(client.tasks.DeleteProcess, request) == grpc.StatusCode.NOT_FOUND
    client.exec(name, "two", ["sleep", "1000"])
    client.start(name, "two")
    client.kill(name, 15, "two")
    assert client.wait(name, "two") == 143
    assert client.status(name) == task_pb2.RUNNING
    client.finish(name)


def test_pids_name_the_exec(client: Client) -> None:
    name = client.run("sleep", "1000")
    client.exec(name, "inner", ["sleep", "1000"])
    pid = client.start(name, "inner")
    found = client.call(client.tasks.ListPids, tasks_pb2.ListPidsRequest(container_id=name)).processes
    by_pid = {item.pid: item.info for item in found}
    assert set(by_pid) == {client.process(name).pid, pid}
    assert by_pid[pid].type_url.endswith("containerd.runc.v1.ProcessDetails")
    assert options_pb2.ProcessDetails.FromString(by_pid[pid].value).exec_id == "inner"
    client.finish(name)


def test_pause_and_resume(client: Client) -> None:
    name = client.run("sleep", "1000")
    client.call(client.tasks.Pause, tasks_pb2.PauseTaskRequest(container_id=name))
    assert client.status(name) == task_pb2.PAUSED
    client.call(client.tasks.Resume, tasks_pb2.ResumeTaskRequest(container_id=name))
    assert client.status(name) == task_pb2.RUNNING
    client.finish(name)


def test_metrics_and_updates(client: Client) -> None:
    name = client.run("sleep", "1000")
    request = tasks_pb2.UpdateTaskRequest(container_id=name)
    request.resources.type_url = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
    request.resources.value = b'{"memory": {"limit": 67108864}}'
    client.call(client.tasks.Update, request)
    wanted = tasks_pb2.MetricsRequest(filters=[f"id=={name}"])
    (metric,) = client.call(client.tasks.Metrics, wanted).metrics
    assert metric.id == name
    if metric.data.type_url.endswith("v1.Metrics"):
        assert metrics_pb2.Metrics.FromString(metric.data.value).memory.usage.limit == 67108864
    assert client.call(client.tasks.Metrics, tasks_pb2.MetricsRequest(filters=["id==nobody"])).metrics == []
    client.finish(name)


def test_stdin_and_its_end_reach_the_process(client: Client) -> None:
    name = client.container(["cat"])
    pipe = client.output / f"{name}.in"
    os.mkfifo(pipe)
    data = secrets.token_bytes(1 << 16) * 32

    def feed() -> None:
        with open(pipe, "wb") as file:
            file.write(data)

    feeder = threading.Thread(target=feed)
    feeder.start()
    client.create(name, stdin=str(pipe))
    client.start(name)
    feeder.join(TIMEOUT)
    client.call(client.tasks.CloseIO, tasks_pb2.CloseIORequest(container_id=name, stdin=True))
    assert client.wait(name) == 0
    assert (client.output / name).read_bytes() == data
    client.finish(name)


def test_much_output_arrives_whole(client: Client) -> None:
    # Debian's shim writes both streams into one file: dd's last words must not come along.
    name = client.container(["sh", "-c", "dd if=/dev/zero bs=1048576 count=50 2>/dev/null"])
    client.create(name)
    client.start(name)
    assert client.wait(name) == 0
    assert (client.output / name).stat().st_size == 50 << 20
    client.finish(name)


def test_codes_of_errors(client: Client) -> None:
    nobody = tasks_pb2.StartRequest(container_id="nobody")
    assert client.code(client.tasks.Start, nobody) == grpc.StatusCode.NOT_FOUND
    name = client.container(["sleep", "1000"])
    for method, request in (
        (client.tasks.Start, tasks_pb2.StartRequest(container_id=name)),
        (client.tasks.Get, tasks_pb2.GetRequest(container_id=name)),
        (client.tasks.Kill, tasks_pb2.KillRequest(container_id=name, signal=9)),
        (client.tasks.Delete, tasks_pb2.DeleteTaskRequest(container_id=name)),
        (client.tasks.Wait, tasks_pb2.WaitRequest(container_id=name)),
        (client.tasks.Checkpoint, tasks_pb2.CheckpointTaskRequest(container_id=name)),
    ):
        assert client.code(method, request) == grpc.StatusCode.NOT_FOUND
    client.create(name)
    again = tasks_pb2.CreateTaskRequest(container_id=name)
    assert client.code(client.tasks.Create, again) == grpc.StatusCode.ALREADY_EXISTS
    client.start(name)
    request = tasks_pb2.DeleteTaskRequest(container_id=name)
    wanted = grpc.StatusCode.FAILED_PRECONDITION if client.runtime == OWN else grpc.StatusCode.UNKNOWN
    assert client.code(client.tasks.Delete, request) == wanted
    for exec_id, wanted in (("", grpc.StatusCode.INVALID_ARGUMENT), ("a/b", grpc.StatusCode.INVALID_ARGUMENT)):
        execute = tasks_pb2.ExecProcessRequest(container_id=name, exec_id=exec_id)
        assert client.code(client.tasks.Exec, execute) == wanted
    missing = tasks_pb2.StartRequest(container_id=name, exec_id="nobody")
    assert client.code(client.tasks.Start, missing) == grpc.StatusCode.NOT_FOUND
    client.finish(name)
    with pytest.raises(grpc.RpcError) as caught:
        client.tasks.List(tasks_pb2.ListTasksRequest(), timeout=TIMEOUT)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_a_program_that_is_not_there_leaves_nothing(client: Client) -> None:
    name = client.container(["/bin/not-there"])
    with pytest.raises(grpc.RpcError) as caught:
        client.create(name)
    assert "not-there" in caught.value.details()
    assert name not in client.listed()
    bundle = client.daemon.state / "tasks" / client.daemon.namespace / name
    wait_until(lambda: not bundle.exists(), "the bundle is gone", TIMEOUT)
    client.remove(name)


def test_a_runtime_that_is_not_there(client: Client) -> None:
    container = containers_pb2.Container(id=f"c{secrets.token_hex(4)}")
    container.runtime.name = "io.containerd.frob.v9"
    container.spec.value = b"{}"
    client.call(client.containers.Create, containers_pb2.CreateContainerRequest(container=container))
    request = tasks_pb2.CreateTaskRequest(container_id=container.id)
    assert client.code(client.tasks.Create, request) == grpc.StatusCode.NOT_FOUND
    client.remove(container.id)


def test_another_oci_runtime_by_options(daemon: DaemonProcess, root: Path) -> None:
    client = Client(daemon, root)
    try:
        calls = client.output / "calls"
        program = client.output / "my-runc"
        program.write_text(f'#!/bin/sh\necho "$*" >> {calls}\nexec runc "$@"\n')
        program.chmod(0o755)
        name = client.container(["sh", "-c", "exit 4"])
        options = options_pb2.Options(binary_name=str(program), root=str(client.output / "oci"))
        request = tasks_pb2.CreateTaskRequest(container_id=name)
        request.options.type_url = "containerd.runc.v1.Options"
        request.options.value = options.SerializeToString()
        client.call(client.tasks.Create, request)
        client.start(name)
        assert client.wait(name) == 4
        client.finish(name)
        assert f"--root {client.output}/oci" in calls.read_text()
        assert "create" in calls.read_text()
    finally:
        client.close()


def test_a_task_is_restored_from_a_checkpoint_that_is_content(daemon: DaemonProcess, root: Path) -> None:
    client = Client(daemon, root)
    # Until somebody refers to it, a checkpoint is content that nothing but a lease protects.
    leases = leases_pb2_grpc.LeasesStub(client.channel)
    client.call(leases.Create, leases_pb2.CreateRequest(id="checkpointed"))
    client.metadata = daemon.metadata(lease="checkpointed")
    try:
        player.write(client.output / "player")
        options = options_pb2.Options(binary_name=str(client.output / "player"))

        def create(name: str, *found: types_pb2.Descriptor) -> None:
            request = tasks_pb2.CreateTaskRequest(container_id=name, checkpoint=found[0] if found else None)
            request.options.type_url = "containerd.runc.v1.Options"
            request.options.value = options.SerializeToString()
            client.call(client.tasks.Create, request)

        name, again = client.container(["sleep", "1000"]), client.container(["sleep", "1000"])
        create(name)
        client.start(name)
        made = client.call(client.tasks.Checkpoint, tasks_pb2.CheckpointTaskRequest(container_id=name))
        create(again, made.descriptors[0])
        # The runtime reads the images at start, and whoever asked for the task may take a while until then.
        client.call(client.tasks.List, tasks_pb2.ListTasksRequest())
        images = list((daemon.state / "checkpoints").iterdir())
        assert [(folder / "asked").exists() for folder in images] == [True]
        client.start(again)
        assert client.status(again) == task_pb2.RUNNING
        client.finish(again)
        client.finish(name)
        assert list((daemon.state / "checkpoints").iterdir()) == []
    finally:
        client.call(leases.Delete, leases_pb2.DeleteRequest(id="checkpointed"))
        client.close()


def test_p1_a_shim_does_not_hold_the_pipe_that_the_daemon_logs_to(root: Path) -> None:
    daemon = DaemonProcess(Path(tempfile.mkdtemp(prefix="pctr-t-", dir=SHORT)))
    read = threading.Event()
    try:
        with subprocess.Popen(daemon.command(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, start_new_session=True) as process:
            daemon.process, output = process, process.stdout
            assert output is not None

            def drain(output: IO[bytes] = output) -> None:
                output.read()
                read.set()

            thread = threading.Thread(target=drain)
            thread.start()
            daemon.wait_ready()
            client = Client(daemon, root)
            name = client.run("sleep", "1000")
            scores = [Path(f"/proc/{pid}/oom_score_adj").read_text() for pid in (process.pid, shim_pid(client, name))]
            assert int(scores[1]) == min(1000, int(scores[0]) + 1)
            client.channel.close()
            assert daemon.stop() == 0
            assert read.wait(TIMEOUT)
            thread.join()
        daemon.start()
        client.connect()
        assert client.status(name) == task_pb2.RUNNING
        client.finish(name)
        client.close()
        assert daemon.stop() == 0
        wait_until(lambda: daemon.leaks() == [], "nothing is left", TIMEOUT)
    finally:
        daemon.clean()


def test_many_at_once(daemon: DaemonProcess, root: Path) -> None:
    client = Client(daemon, root)
    try:
        names = [client.container(["sh", "-c", f"exit {number}"]) for number in range(12)]
        results: dict[str, int] = {}

        def one(name: str) -> None:
            client.create(name)
            client.start(name)
            results[name] = client.wait(name)
            client.finish(name)

        threads = [threading.Thread(target=one, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * TIMEOUT)
        assert [results.get(name) for name in names] == list(range(12))
    finally:
        client.close()


def test_s9_execs_leave_no_descriptor_behind(daemon: DaemonProcess, root: Path) -> None:
    """Good ones and failing ones, several at a time: daemon and shim end with the descriptors they began with."""
    client = Client(daemon, root)
    try:
        name = client.run("sleep", "1000")
        assert daemon.process is not None
        daemon_pid = daemon.process.pid
        failures: list[str] = []

        def one(number: int) -> None:
            exec_id = f"e{number}"
            program = "true" if number % 3 else "/not/there"
            client.exec(name, exec_id, [program], stdout=f"file://{client.output}/{exec_id}")
            try:
                client.start(name, exec_id)
            except grpc.RpcError:
                if number % 3:
                    failures.append(f"{exec_id} did not start")
            else:
                if client.wait(name, exec_id):
                    failures.append(f"{exec_id} failed")
            client.call(client.tasks.DeleteProcess, tasks_pb2.DeleteProcessRequest(container_id=name, exec_id=exec_id))

        def several(first: int, count: int) -> None:
            threads = [threading.Thread(target=one, args=(first + number,)) for number in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(TIMEOUT)

        def descriptors() -> list[int]:
            families = [daemon_pid], shim_family(client, name)
            return [sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family) for family in families]

        several(0, 6)
        before = descriptors()
        for first in range(6, 54, 6):
            several(first, 6)
        # A thread that works for the first time opens a reader of the database; 48 execs that leak are more than that.
        wait_until(lambda: all(now < then + 24 for now, then in zip(descriptors(), before, strict=True)),
                   f"descriptors are back to {before}, now {descriptors()}", TIMEOUT)
        assert failures == []
        client.finish(name)
    finally:
        client.close()


def test_a_checkpoint_that_the_machine_cannot_make_is_a_clear_error(daemon: DaemonProcess, root: Path) -> None:
    """Where criu works this makes a checkpoint; where it does not, the task runs on and the error tells of the log."""
    client = Client(daemon, root)
    try:
        name = client.run("sleep", "1000")
        try:
            made = client.call(client.tasks.Checkpoint, tasks_pb2.CheckpointTaskRequest(container_id=name))
            assert [item.size > 0 for item in made.descriptors] == [True, True]
        except grpc.RpcError as error:
            assert "criu" in error.details()
            assert client.status(name) == task_pb2.RUNNING
        wrong = tasks_pb2.CheckpointTaskRequest(container_id=name)
        wrong.options.type_url, wrong.options.value = "some.Other", b""
        assert client.code(client.tasks.Checkpoint, wrong) == grpc.StatusCode.INVALID_ARGUMENT
        client.finish(name)
        assert list((daemon.state / "checkpoints").iterdir()) == []
    finally:
        client.close()
