"""The task service of a shim: one suite for ours (forked, and bootstrapped) and for containerd's."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty

from supervisord_ctr import errors
from supervisord_ctr.aio import wait_until
from supervisord_ctr.api.cgroups.v1 import metrics_pb2 as metrics_v1
from supervisord_ctr.api.runc.v1 import options_pb2
from supervisord_ctr.api.runtime.task.v3 import task_pb2 as api
from supervisord_ctr.api.types.task import task_pb2 as types
from supervisord_ctr.linux import cgroups, mounts
from supervisord_ctr.linux.processes import children
from tests.support.shim import KINDS, PATIENCE, Lab, Zygote, laboratory, read_all

#: containerd's shim answers many refusals with a code of unknown.
REFUSED = (errors.FailedPrecondition, errors.Unknown)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """One zygote for all tests."""
    made = Zygote()
    yield made
    assert made.close() == 0


@pytest.fixture(params=KINDS)
async def lab(request: pytest.FixtureRequest, zygote: Zygote) -> AsyncIterator[Lab]:
    """A laboratory of each kind."""
    async with laboratory(request.param, zygote) as made:
        yield made


async def test_a_life_from_create_to_delete(lab: Lab) -> None:
    lab.bundle("c", ["sleep", "1000"])
    shim = await lab.launch("c")
    pid = await lab.create(shim, "c")
    state = await shim.state("c")
    assert (state.status, state.pid, state.id) == (types.Status.CREATED, pid, "c")
    assert await shim.start("c") == pid
    assert (await shim.state("c")).status == types.Status.RUNNING
    waiting = [asyncio.get_running_loop().create_task(shim.wait("c")) for _ in range(3)]
    await shim.kill("c", signal.SIGKILL)
    assert await asyncio.gather(*waiting) == [137] * 3
    state = await shim.state("c")
    assert (state.status, state.exit_status) == (types.Status.STOPPED, 137)
    assert state.exited_at.seconds > 0
    deleted = await shim.delete("c")
    assert (deleted.pid, deleted.exit_status) == (pid, 137)
    with pytest.raises(errors.NotFound):
        await shim.state("c")
    topics = await lab.wait_topics(lambda found: "delete" in found)
    assert topics == ["create", "start", "exit", "delete"]
    exit_event = next(message for topic, message in lab.events if topic == "/tasks/exit")
    assert (exit_event.id, exit_event.container_id, exit_event.pid, exit_event.exit_status) == ("c", "c", pid, 137)
    await shim.shutdown("c")
    await asyncio.wait_for(shim.client.wait_closed(), PATIENCE)
    await wait_until(lambda: not os.path.exists(shim.path), PATIENCE, "the socket to go")


async def test_an_exit_before_start_returns_is_not_lost(lab: Lab) -> None:
    for number in range(4):
        name = f"c{number}"
        lab.bundle(name, ["sh", "-c", f"exit {number}"])
        shim = await lab.launch(name)
        await lab.create(shim, name)
        await shim.start(name)
        assert await shim.wait(name) == number
        await shim.delete(name)
        topics = await lab.wait_topics(lambda found: "delete" in found, name)
        assert topics == ["create", "start", "exit", "delete"]


async def test_stdout_and_stderr_arrive_whole(lab: Lab) -> None:
    out, out_fd = lab.fifo("out")
    err, err_fd = lab.fifo("err")
    script = "yes 0123456789abcdef | head -c 3000000; echo oops >&2"
    reading = asyncio.gather(read_all(out_fd), read_all(err_fd))
    shim = await lab.run("c", ["sh", "-c", script], stdout=out, stderr=err)
    assert await shim.wait("c") == 0
    await shim.delete("c")
    data, problem = await asyncio.wait_for(reading, PATIENCE)
    expected = (b"0123456789abcdef\n" * 200000)[:3000000]
    assert hashlib.md5(data).digest() == hashlib.md5(expected).digest()
    assert problem == b"oops\n"


async def test_stdin_reaches_the_process_and_close_io_ends_it(lab: Lab) -> None:
    out, out_fd = lab.fifo("out")
    err, err_fd = lab.fifo("err")
    into = str(lab.folder / "fifo-in")
    os.mkfifo(into)
    writer = os.open(into, os.O_RDWR | os.O_CLOEXEC)
    reading = asyncio.gather(read_all(out_fd), read_all(err_fd))
    shim = await lab.run("c", ["cat"], stdin=into, stdout=out, stderr=err)
    os.write(writer, b"some input\n")
    os.close(writer)
    await shim.call("CloseIO", api.CloseIORequest(id="c", stdin=True), Empty)
    assert await shim.wait("c") == 0
    await shim.delete("c")
    assert await reading == [b"some input\n", b""]


async def test_execs_have_exits_and_output_of_their_own(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    out, out_fd = lab.fifo("out")
    err, err_fd = lab.fifo("err")
    reading = asyncio.gather(read_all(out_fd), read_all(err_fd))
    await shim.exec("c", "e1", ["sh", "-c", "echo from exec; exit 9"], stdout=out, stderr=err)
    state = await shim.state("c", "e1")
    assert (state.status, state.id) == (types.Status.CREATED, "e1")
    with pytest.raises(errors.AlreadyExists):
        await shim.exec("c", "e1", ["true"])
    pid = await shim.start("c", "e1")
    assert pid > 0
    assert await shim.wait("c", "e1") == 9
    assert (await shim.state("c", "e1")).status == types.Status.STOPPED
    with pytest.raises(errors.NotFound):
        await shim.kill("c", signal.SIGTERM, "e1")
    deleted = await shim.delete("c", "e1")
    assert (deleted.pid, deleted.exit_status) == (pid, 9)
    assert await reading == [b"from exec\n", b""]
    with pytest.raises(errors.NotFound):
        await shim.state("c", "e1")
    assert (await shim.state("c")).status == types.Status.RUNNING
    topics = await lab.wait_topics(lambda found: "exit" in found)
    assert topics == ["create", "start", "exec-added", "exec-started", "exit"]
    exit_event = next(message for topic, message in lab.events if topic == "/tasks/exit")
    assert (exit_event.id, exit_event.container_id, exit_event.exit_status) == ("e1", "c", 9)
    await lab.finish(shim, "c")


async def test_execs_side_by_side(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])

    async def one(number: int) -> int:
        name = f"e{number}"
        await shim.exec("c", name, ["sh", "-c", f"exit {number}"])
        await shim.start("c", name)
        status = await shim.wait("c", name)
        await shim.delete("c", name)
        return status

    assert await asyncio.gather(*[one(number) for number in range(8)]) == list(range(8))
    await lab.finish(shim, "c")


async def test_the_container_exit_is_told_after_those_of_its_execs(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    await shim.exec("c", "e1", ["sleep", "1000"])
    await shim.start("c", "e1")
    await shim.kill("c")
    assert await shim.wait("c") == 137
    assert await shim.wait("c", "e1") == 137
    await lab.wait_topics(lambda found: found.count("exit") == 2)
    assert [message.id for topic, message in lab.events if topic == "/tasks/exit"] == ["e1", "c"]
    with pytest.raises(REFUSED):
        await shim.exec("c", "e2", ["true"])
    await shim.delete("c", "e1")
    await lab.finish(shim, "c")


async def test_a_terminal_has_the_size_that_was_set(lab: Lab) -> None:
    out, out_fd = lab.fifo("out")
    into = str(lab.folder / "fifo-in")
    os.mkfifo(into)
    writer = os.open(into, os.O_RDWR | os.O_CLOEXEC)
    lab.bundle("c", ["sh", "-c", "read x; stty size; read y; exit 4"], terminal=True)
    shim = await lab.launch("c")
    await lab.create(shim, "c", terminal=True, stdin=into, stdout=out)
    await shim.start("c")
    await shim.call("ResizePty", api.ResizePtyRequest(id="c", width=77, height=33), Empty)
    reading = asyncio.get_running_loop().create_task(read_all(out_fd, lambda data: b"33 77" in data))
    os.write(writer, b"go\n")
    assert b"33 77" in await reading
    os.write(writer, b"end\n")
    assert await shim.wait("c") == 4
    os.close(writer)
    await lab.finish(shim, "c")


async def test_pause_and_resume(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    await shim.call("Pause", api.PauseRequest(id="c"), Empty)
    assert (await shim.state("c")).status == types.Status.PAUSED
    with pytest.raises(REFUSED):
        await shim.exec("c", "e", ["true"])
    await shim.call("Resume", api.ResumeRequest(id="c"), Empty)
    assert (await shim.state("c")).status == types.Status.RUNNING
    await lab.wait_topics(lambda found: found[-2:] == ["paused", "resumed"])
    await lab.finish(shim, "c")


async def test_a_paused_container_can_be_killed(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    await shim.call("Pause", api.PauseRequest(id="c"), Empty)
    await shim.kill("c")
    assert await shim.wait("c") == 137
    await lab.finish(shim, "c")


async def test_pids_name_the_execs(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    await shim.exec("c", "e1", ["sleep", "1000"])
    pid = await shim.start("c", "e1")
    found = (await shim.call("Pids", api.PidsRequest(id="c"), api.PidsResponse)).processes
    assert len(found) == 2
    details = next(process.info for process in found if process.pid == pid)
    assert options_pb2.ProcessDetails.FromString(details.value).exec_id == "e1"
    await lab.finish(shim, "c")


async def test_stats_are_cgroup_metrics(lab: Lab) -> None:
    shim = await lab.run("c", ["sh", "-c", "head -c 1000000 /bin/busybox >/dev/null; sleep 1000"])
    stats = (await shim.call("Stats", api.StatsRequest(id="c"), api.StatsResponse)).stats
    if cgroups.hierarchy().mode == "v2":
        assert stats.type_url.endswith("io.containerd.cgroups.v2.Metrics")
    else:
        assert stats.type_url.endswith("io.containerd.cgroups.v1.Metrics")
        metrics = metrics_v1.Metrics.FromString(stats.value)
        assert metrics.pids.current >= 1
        assert metrics.memory.usage.usage > 0
        assert metrics.cpu.usage.total > 0
    await lab.finish(shim, "c")


async def test_update_changes_limits(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    resources = AnyMessage(
        type_url="types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", value=b'{"pids":{"limit":17}}'
    )
    await shim.call("Update", api.UpdateTaskRequest(id="c", resources=resources), Empty)
    group = cgroups.at(f"/{lab.namespace}/c")
    assert cgroups.read(f"{group.folder('pids')}/pids.max") == "17"
    await lab.finish(shim, "c")


async def test_refusals(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    for method, request in (
        ("State", api.StateRequest(id="nobody")), ("Start", api.StartRequest(id="nobody")),
        ("Kill", api.KillRequest(id="nobody", signal=9)), ("Delete", api.DeleteRequest(id="nobody")),
        ("State", api.StateRequest(id="c", exec_id="nobody")), ("Wait", api.WaitRequest(id="c", exec_id="nobody")),
    ):
        with pytest.raises(errors.NotFound):
            await shim.call(method, request, api.StateResponse)
    with pytest.raises(REFUSED):
        await shim.start("c")
    with pytest.raises(REFUSED):
        await shim.delete("c")
    with pytest.raises(REFUSED):
        await shim.call("Resume", api.ResumeRequest(id="c"), Empty)
    await shim.exec("c", "e1", ["true"])
    with pytest.raises(errors.FailedPrecondition):
        await shim.kill("c", signal.SIGTERM, "e1")
    await shim.kill("c")
    assert await shim.wait("c") == 137
    with pytest.raises(errors.NotFound):
        await shim.kill("c", signal.SIGTERM)
    with pytest.raises(REFUSED):
        await shim.start("c")
    with pytest.raises(REFUSED):
        await shim.call("Pause", api.PauseRequest(id="c"), Empty)
    await lab.finish(shim, "c")


async def test_a_program_that_is_not_there(lab: Lab) -> None:
    lab.bundle("c", ["/no/such/program"])
    shim = await lab.launch("c")
    with pytest.raises(errors.Error, match="OCI runtime create failed.*no such file"):
        await lab.create(shim, "c")
    assert mounts.mounts_below(lab.folder / "b" / "c") == []
    with pytest.raises(errors.NotFound):
        await shim.state("c")
    await shim.shutdown("c")


async def test_an_exec_that_cannot_start(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    await shim.exec("c", "e1", ["/no/such/program"])
    with pytest.raises(errors.Error, match="OCI runtime exec failed.*no such file"):
        await shim.start("c", "e1")
    assert (await shim.state("c", "e1")).status == types.Status.CREATED
    with pytest.raises(errors.Error):
        await shim.kill("c", exec_id="e1")
    await shim.delete("c", "e1")
    with pytest.raises(errors.NotFound):
        await shim.state("c", "e1")
    assert (await shim.state("c")).status == types.Status.RUNNING
    await lab.finish(shim, "c")


async def test_the_root_file_system_is_mounted_and_unmounted(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    assert mounts.is_mountpoint(lab.folder / "b" / "c" / "rootfs")
    await lab.finish(shim, "c")
    assert mounts.mounts_below(lab.folder / "b" / "c") == []
    assert not cgroups.at(f"/{lab.namespace}/c").exists()


async def test_a_created_task_can_be_deleted(lab: Lab) -> None:
    lab.bundle("c", ["sleep", "1000"])
    shim = await lab.launch("c")
    pid = await lab.create(shim, "c")
    await shim.delete("c")
    await wait_until(lambda: not os.path.exists(f"/proc/{pid}"), PATIENCE, "the created process to go")
    assert mounts.mounts_below(lab.folder / "b" / "c") == []
    await shim.shutdown("c")


async def test_two_containers_in_one_shim(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    lab.bundle("d", ["sh", "-c", "exit 6"])
    await lab.create(shim, "d")
    await shim.start("d")
    assert await shim.wait("d") == 6
    await shim.delete("d")
    await shim.call("Shutdown", api.ShutdownRequest(id="d"), Empty)
    connected = await shim.call("Connect", api.ConnectRequest(id="c"), api.ConnectResponse)
    assert connected.shim_pid == shim.pid
    assert connected.task_pid == (await shim.state("c")).pid
    await lab.finish(shim, "c")


async def test_without_a_pid_namespace_what_init_leaves_is_killed(lab: Lab) -> None:
    shim = await lab.run("c", ["sh", "-c", "sleep 1000 & sleep 1000 & wait"], bundle={"pidns": False})
    group = cgroups.at(f"/{lab.namespace}/c")
    await wait_until(lambda: len(group.pids()) == 3, PATIENCE, "three processes")
    pids = group.pids()
    await shim.kill("c")
    assert await shim.wait("c") == 137
    await wait_until(lambda: not any(_runs(pid) for pid in pids), PATIENCE, "all of them to end")
    await lab.finish(shim, "c")


async def test_orphans_are_reaped(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"], bundle={"pidns": False})
    await shim.exec("c", "e1", ["sh", "-c", "(sleep 0.2 &) ; exit 0"])
    await shim.start("c", "e1")
    assert await shim.wait("c", "e1") == 0
    await shim.delete("c", "e1")

    def zombies() -> list[int]:
        return [pid for pid in children(shim.pid) if not _runs(pid)]

    group = cgroups.at(f"/{lab.namespace}/c")
    await wait_until(lambda: len(group.pids()) == 1, PATIENCE, "the orphan to end")
    await wait_until(lambda: not zombies(), PATIENCE, "no zombie to be left")
    await lab.finish(shim, "c")


def _runs(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text() and os.path.exists(f"/proc/{pid}")
    except OSError:
        return False
