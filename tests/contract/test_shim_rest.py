"""A shim that has nothing to do gives its memory back, and nobody notices: not its clients, not its container."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from google.protobuf.empty_pb2 import Empty
from pctr_shim.keeper import HANDING
from pctr_shim.rest import TAKEN_UP, WOKEN, next_patience

from supervisord_ctr import errors
from supervisord_ctr.aio import wait_until
from supervisord_ctr.api.runtime.task.v3 import task_pb2 as api
from supervisord_ctr.api.shim.v1 import shim_pb2
from supervisord_ctr.api.types.task import task_pb2 as types
from supervisord_ctr.linux import processes
from supervisord_ctr.ttrpc import wire
from supervisord_ctr.ttrpc.client import connect_until
from tests.support.shim import PATIENCE, Lab, Shim, Zygote, laboratory, read_all, rested, workers
from tests.support.streams import AttachedClient, laboratory_with_clients, parse_log

PRIVATE = "pctr.shim.v1.Shim"
#: Seconds; a shim that is woken soon waits twice as long the next time, so it is short.
REST = 0.1


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote(rest=REST)
    yield made
    assert made.close() == 0


@pytest.fixture
async def lab(zygote: Zygote) -> AsyncIterator[Lab]:
    async with laboratory_with_clients(zygote) as made:
        yield made


def private_memory(pid: int) -> int:
    """KiB that only this process has."""
    return int(re.findall(r"Private_Dirty: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())[0])


def init_pid(lab: Lab, name: str) -> int:
    """Pid of a container's first process, without asking the shim."""
    return int(json.loads((lab.folder / "runc" / lab.namespace / name / "state.json").read_text())["init_process_pid"])


async def worker_of(shim: Shim) -> int:
    """The shim's worker, as soon as it has one."""
    await wait_until(lambda: len(workers(shim.pid)) == 1, PATIENCE, "a worker")
    return workers(shim.pid)[0]


async def stays_at_work(shim: Shim) -> int:
    """The shim's worker, which does not end though nothing happens."""
    worker = await worker_of(shim)
    await asyncio.sleep(6 * REST)  # noqa: TID251  nothing must happen
    assert workers(shim.pid) == [worker]
    return worker


async def test_p11_a_shim_at_rest_has_no_worker_and_half_the_memory(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    worker = await worker_of(shim)
    working = private_memory(shim.pid) + private_memory(worker)
    await rested(shim)
    print(f"{working} KiB at work, {private_memory(shim.pid)} KiB at rest")
    assert private_memory(shim.pid) < working / 2
    assert Path(f"/proc/{shim.pid}/comm").read_text().strip() == "pctr-shim"
    await lab.finish(shim, "c")
    await rested(shim)


def test_p11_the_zygote_warms_up_without_complaint() -> None:
    """It only tells of what fails then, since nothing but memory depends on it."""
    zygote = Zygote(rest=2.0, stderr=subprocess.PIPE)
    assert zygote.close() == 0
    _, complaints = zygote.process.communicate(timeout=PATIENCE)
    assert complaints == b""


async def test_calls_wake_it_and_find_everything_as_it_was(lab: Lab) -> None:
    address, reader = lab.fifo("out")
    shim = await lab.run("c", ["sleep", "1000"], stdout=address)
    os.close(reader)
    before = await shim.state("c")
    connect = api.ConnectRequest(id="c")
    pids = await shim.call("Connect", connect, api.ConnectResponse)
    await rested(shim)
    assert await shim.state("c") == before
    assert before.status == types.Status.RUNNING
    await rested(shim)
    assert await shim.call("Connect", connect, api.ConnectResponse) == pids
    assert pids.shim_pid == shim.pid
    info = await shim.client.call(PRIVATE, "Info", shim_pb2.InfoRequest(), shim_pb2.InfoResponse, timeout=PATIENCE)
    assert info.pid == shim.pid
    assert [(found.id, found.pid, found.status) for found in info.containers] == [("c", before.pid, "running")]
    assert set(info.containers[0].timings) == {"mount", "create", "start"}
    await lab.finish(shim, "c")
    assert lab.topics("c") == ["create", "start", "exit", "delete"]


async def test_a_client_that_waits_is_told_of_an_exit_during_the_rest(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    waiting = [asyncio.ensure_future(shim.wait("c")) for _ in range(3)]
    pid = (await shim.state("c")).pid
    await rested(shim)
    assert not any(one.done() for one in waiting)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGKILL)
    assert await asyncio.gather(*waiting) == [137, 137, 137]
    assert not Path(f"/proc/{pid}").exists()
    record = json.loads((lab.folder / "b" / "c" / "exit.json").read_text())
    assert (record["pid"], record["exit_status"], record["signal"]) == (pid, 137, 9)
    await lab.wait_topics(lambda topics: topics == ["create", "start", "exit"], "c")
    assert (await shim.delete("c")).exit_status == 137
    await shim.shutdown("c")


async def test_a_stopped_container_rests_and_is_deleted(lab: Lab) -> None:
    log = lab.folder / "0.log"
    shim = await lab.run("c", ["sh", "-c", "echo hello; exit 7"], stdout=f"cri-log://{log}", stderr=f"cri-log://{log}")
    assert await shim.wait("c") == 7
    await rested(shim)
    state = await shim.state("c")
    assert (state.status, state.exit_status) == (types.Status.STOPPED, 7)
    assert await shim.wait("c") == 7
    await rested(shim)
    assert (await shim.delete("c")).exit_status == 7
    assert parse_log(log) == [(b"stdout", b"F", b"hello")]
    assert not (lab.folder / "b" / "c" / "attach.sock").exists()
    await shim.shutdown("c")


async def test_a_created_container_rests_and_is_started(lab: Lab) -> None:
    lab.bundle("c", ["sh", "-c", "exit 5"])
    shim = await lab.launch("c")
    await lab.create(shim, "c")
    await rested(shim)
    await shim.start("c")
    assert await shim.wait("c") == 5
    await shim.delete("c")
    await shim.shutdown("c")


async def test_p4_output_during_the_rest_arrives_and_a_line_may_span_it(lab: Lab) -> None:
    log = lab.folder / "0.log"
    fifo, reader = lab.fifo("err")
    script = "echo -n begun; read x; echo ' and ended'; echo problem >&2; read x; echo last"
    shim = await lab.run(
        "c", ["sh", "-c", script], stdin="attach://", stdout=f"cri-log://{log}", stderr=fifo
    )
    for round_ in range(2):
        await rested(shim)
        assert parse_log(log) == [(b"stdout", b"F", b"begun and ended")] * round_
        client = await AttachedClient.connect(lab.folder / "b" / "c", id="c", stdin=True)
        assert await client.frame() == (3, b'{"attached": true}')
        client.send(0, b"x\n")
        await client.close()
        await wait_until(lambda: log.read_bytes().count(b"\n") > round_, PATIENCE, "the line")  # noqa: B023
    assert await shim.wait("c") == 0
    assert await read_all(reader, lambda data: data == b"problem\n") == b"problem\n"
    assert parse_log(log) == [(b"stdout", b"F", b"begun and ended"), (b"stdout", b"F", b"last")]
    await shim.delete("c")
    await shim.shutdown("c")


async def test_the_program_itself_wakes_the_shim(lab: Lab) -> None:
    log, trigger = lab.folder / "0.log", lab.rootfs / "trigger"
    os.mkfifo(trigger)
    shim = await lab.run(
        "c", ["sh", "-c", "exec 3<>/trigger; read x <&3; echo $x; read x <&3; echo $x"], stdout=f"cri-log://{log}"
    )
    for word in ("one", "two"):
        await rested(shim)
        trigger.write_text(f"{word}\n")
        await wait_until(lambda: word.encode() in log.read_bytes(), PATIENCE, "the line")  # noqa: B023
    assert await shim.wait("c") == 0
    assert [record[2] for record in parse_log(log)] == [b"one", b"two"]
    await shim.delete("c")
    await shim.shutdown("c")


async def test_a_log_that_was_moved_away_is_written_until_it_is_opened_anew(lab: Lab) -> None:
    log, old, trigger = lab.folder / "0.log", lab.folder / "0.log.old", lab.rootfs / "trigger"
    os.mkfifo(trigger)
    script = "exec 3<>/trigger; while read x <&3; do echo $x; done"
    shim = await lab.run("c", ["sh", "-c", script], stdout=f"cri-log://{log}", stderr=f"cri-log://{log}")
    await rested(shim)
    log.rename(old)
    trigger.write_text("old\n")
    await wait_until(lambda: b"old" in old.read_bytes(), PATIENCE, "the line in the old file")
    assert not log.exists()
    await rested(shim)
    await shim.client.call(PRIVATE, "ReopenLog", shim_pb2.ReopenLogRequest(id="c"), Empty, timeout=PATIENCE)
    await rested(shim)
    trigger.write_text("new\n")
    await wait_until(lambda: log.exists() and b"new" in log.read_bytes(), PATIENCE, "the line in the new file")
    assert [record[2] for record in parse_log(old)] == [b"old"]
    await lab.finish(shim, "c")


async def test_a_program_that_closed_its_streams_rests_and_its_log_is_opened_anew(lab: Lab) -> None:
    log = lab.folder / "0.log"
    script = "echo first; exec >/dev/null 2>&1; sleep 1000"
    shim = await lab.run("c", ["sh", "-c", script], stdout=f"cri-log://{log}", stderr=f"cri-log://{log}")
    await wait_until(lambda: b"first" in log.read_bytes(), PATIENCE, "the line")
    for _ in range(2):
        await rested(shim)
        log.unlink()
        await shim.client.call(PRIVATE, "ReopenLog", shim_pb2.ReopenLogRequest(id="c"), Empty, timeout=PATIENCE)
        assert log.read_bytes() == b""
    await rested(shim)
    held = {os.readlink(f"/proc/{shim.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{shim.pid}/fd")}
    assert str(log) in held
    await lab.finish(shim, "c")


async def test_input_reaches_the_process_after_a_rest_and_ends(lab: Lab) -> None:
    path = str(lab.folder / "in")
    os.mkfifo(path)
    output, reader = lab.fifo("out")
    writer = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    shim = await lab.run("c", ["sh", "-c", "read x; echo got $x; cat"], stdin=path, stdout=output)
    await rested(shim)
    os.write(writer, b"one\n")
    seen = asyncio.ensure_future(read_all(os.dup(reader), lambda data: b"got one\n" in data))
    await seen
    await rested(shim)
    os.write(writer, b"two\n")
    os.close(writer)
    await rested(shim)  # the end of a writer is not the end of the input: that is told
    assert (await shim.state("c")).status == types.Status.RUNNING
    await rested(shim)
    await shim.call("CloseIO", api.CloseIORequest(id="c", stdin=True), Empty)
    assert await shim.wait("c") == 0
    assert await read_all(reader, lambda data: data.endswith(b"two\n")) == b"two\n"
    await shim.delete("c")
    await shim.shutdown("c")


async def test_execs_pauses_and_limits_work_between_rests(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    await rested(shim)
    await shim.exec("c", "e", ["sh", "-c", "exit 4"])
    await shim.start("c", "e")
    assert await shim.wait("c", "e") == 4
    await shim.delete("c", "e")
    await rested(shim)
    await shim.call("Pause", api.PauseRequest(id="c"), Empty)
    await rested(shim)
    assert (await shim.state("c")).status == types.Status.PAUSED
    await rested(shim)
    await shim.call("Resume", api.ResumeRequest(id="c"), Empty)
    await rested(shim)
    stats = await shim.call("Stats", api.StatsRequest(id="c"), api.StatsResponse)
    assert stats.stats.type_url.endswith("Metrics")
    await lab.finish(shim, "c")
    assert lab.topics("c") == [
        "create", "start", "exec-added", "exec-started", "exit", "paused", "resumed", "exit", "delete"
    ]


async def test_two_containers_of_one_shim_end_at_different_times(lab: Lab) -> None:
    shim = await lab.run("c1", ["sleep", "1000"])
    lab.bundle("c2", ["sh", "-c", "exit 3"])
    await rested(shim)
    await lab.create(shim, "c2")
    await shim.start("c2")
    assert await shim.wait("c2") == 3
    await rested(shim)
    assert await shim.wait("c2") == 3
    assert (await shim.state("c1")).status == types.Status.RUNNING
    await rested(shim)
    await shim.delete("c2")
    await rested(shim)
    await lab.finish(shim, "c1")


async def test_a_process_that_goes_on_keeps_it_at_work(lab: Lab) -> None:
    """An exec, an attached client, one that has not said yet what it wants: until they are gone."""
    shim = await lab.run("c", ["sleep", "1000"])
    await shim.exec("c", "e", ["sleep", "1000"])
    await shim.start("c", "e")
    worker = await stays_at_work(shim)
    await shim.kill("c", exec_id="e")
    await shim.wait("c", "e")
    await shim.delete("c", "e")
    await rested(shim)
    client = await AttachedClient.connect(lab.folder / "b" / "c", id="c", stdout=True)
    assert await client.frame() == (3, b'{"attached": true}')
    assert await stays_at_work(shim) != worker
    await client.close()
    await rested(shim)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.connect(str(lab.folder / "b" / "c" / "attach.sock"))
        await stays_at_work(shim)
    await rested(shim)
    await lab.finish(shim, "c")


async def test_out_of_memory_kills_are_counted_across_a_rest(lab: Lab) -> None:
    trigger = lab.rootfs / "trigger"
    os.mkfifo(trigger)
    shim = await lab.run(
        "c", ["sh", "-c", "read x < /trigger; exec tail /dev/zero"],
        bundle={"resources": {"memory": {"limit": 16 << 20}}},
    )
    await rested(shim)
    trigger.write_text("x\n")
    assert await shim.wait("c") == 137
    record = json.loads((lab.folder / "b" / "c" / "exit.json").read_text())
    assert (record["oom_kills"] >= 1, record["oom_level"]) == (True, "container")
    assert (await lab.wait_topics(lambda topics: "exit" in topics, "c"))[2:4] == ["oom", "exit"]
    await shim.delete("c")
    await shim.shutdown("c")


async def test_p5_neither_a_daemon_that_goes_nor_sigterm_ends_a_shim_at_rest(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    await rested(shim)
    os.kill(shim.pid, signal.SIGTERM)
    await shim.client.close()
    await lab.stop_events()
    await asyncio.sleep(REST)  # noqa: TID251  nothing must happen
    assert workers(shim.pid) == []
    assert "woken" not in (lab.folder / "c.log").read_text()
    os.kill(init_pid(lab, "c"), signal.SIGKILL)
    await wait_until((lab.folder / "b" / "c" / "exit.json").exists, PATIENCE, "the exit record")
    await lab.serve_events()
    assert await lab.wait_topics(lambda topics: "exit" in topics, "c") == ["create", "start", "exit"]


async def test_p5_events_wait_with_a_shim_at_rest_for_the_next_daemon(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    await rested(shim)
    await shim.client.close()
    await lab.stop_events()
    os.kill(init_pid(lab, "c"), signal.SIGKILL)
    await wait_until((lab.folder / "b" / "c" / "exit.json").exists, PATIENCE, "the exit record")
    await rested(shim)
    assert lab.topics("c") == ["create", "start"]
    await lab.serve_events()
    shim.client = await connect_until(shim.path, PATIENCE)
    assert (await shim.state("c")).exit_status == 137
    assert await lab.wait_topics(lambda topics: "exit" in topics, "c") == ["create", "start", "exit"]
    await rested(shim)
    assert (await shim.delete("c")).exit_status == 137
    assert await lab.wait_topics(lambda topics: "delete" in topics, "c") == ["create", "start", "exit", "delete"]


async def test_a_request_of_a_client_that_is_gone_is_carried_out(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    await rested(shim)
    state, kill = (
        shim_pb2.Request(service="containerd.task.v3.Task", method=method, payload=payload.SerializeToString())
        for method, payload in (("State", api.StateRequest(id="c")), ("Kill", api.KillRequest(id="c", signal=9)))
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(shim.path)
        client.sendall(wire.pack(1, wire.REQUEST, 0, state.SerializeToString()))
        await asyncio.to_thread(client.recv, 4096)
        await rested(shim)
        os.kill(shim.pid, signal.SIGSTOP)  # so that the keeper sees request and end together
        client.sendall(wire.pack(3, wire.REQUEST, 0, kill.SerializeToString()))
    os.kill(shim.pid, signal.SIGCONT)
    await wait_until((lab.folder / "b" / "c" / "exit.json").exists, PATIENCE, "the exit record")
    assert await shim.wait("c") == 137
    await shim.delete("c")
    await shim.shutdown("c")


async def test_an_exit_while_a_worker_hands_over_is_told_to_the_next_one() -> None:
    zygote = Zygote({"PCTR_FAULTS": f"{HANDING}=sleep:0.5@1"}, rest=REST)
    try:
        async with laboratory("zygote", zygote) as lab:
            shim = await lab.run("c", ["sleep", "1000"])
            waiting = asyncio.ensure_future(shim.wait("c"))
            pid = (await shim.state("c")).pid
            worker = await worker_of(shim)
            await wait_until(lambda: "rests" in (lab.folder / "c.log").read_text(), PATIENCE, "the hand-over")
            os.kill(pid, signal.SIGKILL)
            assert await waiting == 137
            assert worker not in workers(shim.pid)
            assert (await shim.delete("c")).exit_status == 137
            await lab.wait_topics(lambda topics: topics == ["create", "start", "exit", "delete"], "c")
            await shim.shutdown("c")
    finally:
        zygote.close()


async def test_a_keeper_that_may_open_no_more_files_leaves_the_worker_at_work(lab: Lab) -> None:
    lab.bundle("c", ["sleep", "1000"])
    shim = await lab.launch("c")
    worker = await worker_of(shim)
    comm = Path(f"/proc/{shim.pid}/comm")
    await wait_until(lambda: comm.read_text() == "pctr-shim\n", PATIENCE, "the keeper to have been introduced")
    used = {int(fd) for fd in os.listdir(f"/proc/{shim.pid}/fd")}
    only_two = [fd for fd in range(64) if fd not in used][2]
    before = resource.prlimit(shim.pid, resource.RLIMIT_NOFILE, (only_two, 4096))
    await lab.create(shim, "c")
    await shim.start("c")
    log = lab.folder / "c.log"
    await wait_until(lambda: "no rest: the keeper did not get" in log.read_text(), PATIENCE, "the refusal")
    assert workers(shim.pid) == [worker]
    assert (await shim.state("c")).status == types.Status.RUNNING
    resource.prlimit(shim.pid, resource.RLIMIT_NOFILE, (min(1024, before[0]), 4096))
    await shim.state("c")
    await rested(shim)
    await lab.finish(shim, "c")


@pytest.mark.parametrize("fault", ["EMFILE", "ETOOMANYREFS"])
async def test_p13_a_worker_that_cannot_hand_over_works_on(fault: str) -> None:
    """It has too many open files, or too many are on their way: no reason for a container to end."""
    zygote = Zygote({"PCTR_FAULTS": f"{HANDING}=error:{fault}@1"}, rest=REST)
    try:
        async with laboratory("zygote", zygote) as lab:
            shim = await lab.run("c", ["sleep", "1000"])
            worker, log = await worker_of(shim), lab.folder / "c.log"
            await wait_until(lambda: "no rest: the keeper did not get" in log.read_text(), PATIENCE, "the failure")
            assert workers(shim.pid) == [worker]
            descriptors = len(os.listdir(f"/proc/{shim.pid}/fd"))
            assert (await shim.state("c")).status == types.Status.RUNNING
            await rested(shim)  # the next attempt succeeds
            assert len(os.listdir(f"/proc/{shim.pid}/fd")) > descriptors
            await lab.finish(shim, "c")
            await lab.wait_topics(lambda topics: topics == ["create", "start", "exit", "delete"], "c")
    finally:
        zygote.close()


async def test_what_a_shim_was_started_with_may_be_gone_when_it_is_woken(lab: Lab) -> None:
    """An OCI runtime that is being replaced, a folder of logs that was removed: a running container needs neither."""
    runtime, logs = lab.folder / "own" / "runc", lab.folder / "logs"
    for folder in (runtime.parent, logs):
        folder.mkdir()
    shutil.copy("/usr/sbin/runc", runtime)
    lab.bundle("c", ["sleep", "1000"])
    shim = await lab.launch("c", log=str(logs / "shim.log"))
    await lab.create(shim, "c", options=lab.options(binary_name=str(runtime)))
    await shim.start("c")
    await rested(shim)
    runtime.unlink()
    shutil.rmtree(logs)
    assert (await shim.state("c")).status == types.Status.RUNNING
    await shim.exec("c", "e", ["true"])
    with pytest.raises(errors.Error):
        await shim.start("c", "e")
    await shim.delete("c", "e")
    await rested(shim)
    shutil.copy("/usr/sbin/runc", runtime)
    await shim.exec("c", "e", ["true"])
    await shim.start("c", "e")
    assert await shim.wait("c", "e") == 0
    await shim.delete("c", "e")
    await lab.finish(shim, "c")


@pytest.mark.parametrize("point", [WOKEN, TAKEN_UP])
async def test_p5_a_worker_that_dies_while_it_takes_up_is_followed_by_another(point: str) -> None:
    """It has done nothing yet: no reason for a container to end, nor for a client to lose its connection."""
    zygote = Zygote({"PCTR_FAULTS": f"{point}=sleep:0.5"}, rest=REST)
    try:
        async with laboratory("zygote", zygote) as lab:
            log = lab.folder / "0.log"
            shim = await lab.run("c", ["sh", "-c", "read x; echo got $x; exit 6"], stdin="attach://",
                                 stdout=f"cri-log://{log}", stderr=f"cri-log://{log}")
            waiting = asyncio.ensure_future(shim.wait("c"))
            await rested(shim)
            descriptors = sorted(os.listdir(f"/proc/{shim.pid}/fd"))
            asked = asyncio.ensure_future(shim.state("c"))
            killed = set[int]()
            for _ in range(3):
                worker = await worker_of(shim)
                assert not asked.done()
                assert worker not in killed
                os.kill(worker, signal.SIGKILL)
                killed.add(worker)
                await wait_until(lambda: workers(shim.pid) != [worker], PATIENCE, "the worker's end")  # noqa: B023
            assert (await asked).status == types.Status.RUNNING
            await rested(shim)
            assert sorted(os.listdir(f"/proc/{shim.pid}/fd")) == descriptors
            client = await AttachedClient.connect(lab.folder / "b" / "c", id="c", stdin=True)
            assert await client.frame() == (3, b'{"attached": true}')
            client.send(0, b"it\n")
            assert await waiting == 6
            await client.close()
            assert parse_log(log) == [(b"stdout", b"F", b"got it")]
            await shim.delete("c")
            await shim.shutdown("c")
    finally:
        zygote.close()


async def test_a_shim_dies_as_one(lab: Lab) -> None:
    """SIGKILL to the keeper takes the worker along, and the other way round."""
    for name in ("c1", "c2"):
        shim = await lab.run(name, ["sleep", "1000"])
        started = processes.read_start_time(shim.pid)
        worker = await worker_of(shim)
        worker_started = processes.read_start_time(worker)
        os.kill(shim.pid if name == "c1" else worker, signal.SIGKILL)
        await wait_until(lambda: not processes.is_alive(shim.pid, started), PATIENCE, "the end of the keeper")  # noqa: B023
        await wait_until(lambda: not processes.is_alive(worker, worker_started), PATIENCE, "of the worker")  # noqa: B023
        await asyncio.wait_for(shim.client.wait_closed(), PATIENCE)


async def test_many_rests_keep_descriptors_and_memory(lab: Lab) -> None:
    address, reader = lab.fifo("out")
    shim = await lab.run("c", ["sleep", "1000"], stdout=address)
    os.close(reader)
    def open_files() -> int:
        return len(os.listdir(f"/proc/{shim.pid}/fd"))

    await rested(shim)
    await shim.state("c")
    await rested(shim)
    descriptors, memory = open_files(), private_memory(shim.pid)
    for _ in range(3):
        await shim.state("c")
        await rested(shim)
    # The keeper lets go of the way to a worker just after that has gone.
    await wait_until(lambda: open_files() <= descriptors, PATIENCE, f"at most {descriptors} open files")
    assert private_memory(shim.pid) <= memory + 64
    await lab.finish(shim, "c")


def test_rests_that_end_soon_come_less_often() -> None:
    assert next_patience(2.0, 2.0, rested=100.0) == 2.0
    assert next_patience(2.0, 2.0, rested=1.0) == 4.0
    assert next_patience(4.0, 2.0, rested=1.0) == 8.0
    assert next_patience(60.0, 2.0, rested=1.0) == 60.0
    assert next_patience(60.0, 2.0, rested=100.0) == 2.0
