"""Parts of the shim: logs, pumps, states, arguments, the runtime's words, exits that come early."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pctr_shim import __main__ as program
from pctr_shim import crilog, records, runc, states
from pctr_shim.fdio import FdWriter, Pump
from pctr_shim.reaper import Reaper
from pctr_shim.signals import Signals
from pctr_shim.sinks import NullSink, PipeSink
from pctr_shim.values import any_of, timestamp, type_name

from supervisord_ctr import errors
from supervisord_ctr.aio import wait_until
from supervisord_ctr.api.events import events_pb2
from supervisord_ctr.model import Exit, TaskStatus

RECORD = re.compile(rb"\S+Z (stdout|stderr) ([FP]) (.*)")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[crilog.LogFile]:
    """A log of its own."""
    file = crilog.LogFile(crilog.LogAddress(str(tmp_path / "0.log")))
    file.use()
    yield file
    file.release()


def content(file: crilog.LogFile) -> list[tuple[bytes, bytes]]:
    """(tag, line) of each record."""
    found = []
    for line in Path(file.address.path).read_bytes().split(b"\n")[:-1]:
        match = RECORD.fullmatch(line)
        assert match is not None
        found.append((match[2], match[3]))
    return found


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.binary(max_size=50000).map(lambda data: data.replace(b"a", b"\n")), max_size=6))
def test_a_cri_log_gives_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes]) -> None:
    file = crilog.LogFile(crilog.LogAddress(str(tmp_path_factory.mktemp("log") / "0.log")))
    sink = crilog.CriLogSink(file, "stdout")
    for chunk in chunks:
        assert sink.write(chunk)
    sink.close()
    records_found = content(file)
    assert all(len(line) <= crilog.PART for _, line in records_found)
    text = b"".join(line + (b"\n" if tag == b"F" else b"") for tag, line in records_found)
    assert text == b"".join(chunks)


@pytest.mark.parametrize(("length", "tags"), [
    (crilog.PART - 1, b"F"), (crilog.PART, b"F"), (crilog.PART + 1, b"PF"), (3 * crilog.PART, b"PPF"),
])
def test_a_line_is_split_only_where_it_is_longer_than_a_part(log: crilog.LogFile, length: int, tags: bytes) -> None:
    sink = crilog.CriLogSink(log, "stdout")
    for piece in (b"x" * (length - 1), b"x", b"\n"):
        sink.write(piece)
    sink.close()
    lines = content(log)
    assert b"".join(tag for tag, _ in lines) == tags
    assert b"".join(text for _, text in lines) == b"x" * length


def test_a_log_is_cut_back_to_whole_records_when_the_disk_is_full(log: crilog.LogFile, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = crilog.CriLogSink(log, "stdout")
    sink.write(b"first\n")
    real = os.write

    def half(fd: int, data: Any) -> int:
        if len(data) > 20:
            return real(fd, bytes(data)[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        sink.write(b"second line that does not fit\n")
    assert log.dropped > 0
    sink.write(b"third\n")
    lines = content(log)
    assert lines[0] == (b"F", b"first")
    assert b"bytes of output were dropped here" in lines[1][1]
    assert lines[2:] == [(b"F", b"third")]
    sink.close()


def test_p19_a_rate_cap_says_what_it_dropped(tmp_path: Path) -> None:
    file = crilog.LogFile(crilog.LogAddress(str(tmp_path / "0.log"), max_rate=1000))
    sink = crilog.CriLogSink(file, "stdout")
    for _ in range(200):
        sink.write(b"x" * 50 + b"\n")
    assert file.dropped > 5000
    sink.close()


def test_log_addresses() -> None:
    parsed = crilog.LogAddress.parse("cri-log:///a%20b/c?max_size=10&max_files=3&max_rate=7&max_line=99")
    assert parsed == crilog.LogAddress("/a b/c", 10, 3, 7, 99)
    for wrong in ("cri-log://a/b", "cri-log:relative", "cri-log:///a/../b", "cri-log:///a?x=1", "cri-log:///a?max_size=-1"):
        with pytest.raises(errors.InvalidArgument):
            crilog.LogAddress.parse(wrong)


def test_s11_a_log_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.log").symlink_to("/etc/passwd")
    with pytest.raises(OSError):
        crilog.LogFile(crilog.LogAddress(str(tmp_path / "0.log")))


async def test_a_writer_keeps_what_does_not_fit_in_order() -> None:
    reader, target = os.pipe2(os.O_NONBLOCK)
    writer = FdWriter(target)
    flushed = asyncio.Event()
    writer.on_flushed = flushed.set
    data = b"".join(number.to_bytes(4, "big") for number in range(100_000))
    assert writer.write(data[:4]) is True
    assert writer.write(data[4:200_000]) is False
    assert writer.write(data[200_000:]) is False
    found = bytearray()
    while len(found) < len(data):
        try:
            found += os.read(reader, 65536)
        except BlockingIOError:
            await asyncio.sleep(0)
    assert bytes(found) == data
    await asyncio.wait_for(flushed.wait(), 30)
    assert writer.pending_bytes == 0
    os.close(reader)
    assert writer.write(b"nobody reads") is True
    assert writer.broken
    writer.close()


@pytest.mark.parametrize("tapped", [False, True])
async def test_a_pump_stops_while_its_sink_is_full_and_loses_nothing(tapped: bool) -> None:
    source, feed = os.pipe2(os.O_NONBLOCK)
    out, target = os.pipe2(os.O_NONBLOCK)
    seen = bytearray()
    ended = asyncio.Event()
    pump = Pump(
        source, PipeSink(target), tap=seen.extend, tapped=lambda: tapped, pipe=True, on_end=ended.set
    )
    pump.start()
    data = os.urandom(1_000_000)
    feeder = FdWriter(feed)
    feeder.write(data)
    feeder.close_when_flushed()
    for _ in range(50):
        await asyncio.sleep(0)
    assert not ended.is_set()
    found = bytearray()
    while len(found) < len(data):
        try:
            found += os.read(out, 65536)
        except BlockingIOError:
            await asyncio.sleep(0)
    await asyncio.wait_for(ended.wait(), 30)
    assert bytes(found) == data
    assert bytes(seen) == (data if tapped else b"")
    assert pump.moved == len(data)
    pump.close()
    os.close(out)


def hear(reaper: Reaper) -> Signals:
    """Let the reaper have the exits of this process's children."""
    signals = Signals()
    signals.calls[signal.SIGCHLD] = reaper.reap
    signals.install([signal.SIGCHLD])
    signals.watch()
    return signals


def deaf(signals: Signals) -> None:
    """As it was before."""
    asyncio.get_running_loop().remove_reader(signals.reader)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signals.close()


async def test_an_exit_before_adoption_is_kept_while_somebody_expects_it() -> None:
    reaper = Reaper()
    signals = hear(reaper)
    told: list[tuple[Exit, int]] = []
    try:
        with reaper.expecting():
            early = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 5"], {})
            status = await reaper.run(["/bin/sh", "-c", "exit 3"], {}, {})
            assert status == 3
            with contextlib.suppress(ChildProcessError):  # the reaper may have had it already
                os.waitid(os.P_PID, early, os.WEXITED | os.WNOWAIT)
            reaper.reap()
            reaper.adopt(early, lambda ended, number: told.append((ended, number)))
        late = os.posix_spawn("/bin/sh", ["sh", "-c", "kill -TERM $$"], {})
        done = asyncio.Event()
        reaper.adopt(late, lambda ended, number: (told.append((ended, number)), done.set())[1])
        await asyncio.wait_for(done.wait(), 30)
    finally:
        deaf(signals)
    assert [(ended.pid, ended.status, number) for ended, number in told] == [(early, 5, 0), (late, 143, 15)]


async def test_programs_run_in_the_folder_they_are_given(tmp_path: Path) -> None:
    reaper = Reaper()
    signals = hear(reaper)
    here = os.getcwd()
    try:
        assert await reaper.run(["/bin/sh", "-c", "echo it > made"], {}, {}, str(tmp_path)) == 0
        assert await reaper.run(["/bin/sh", "-c", "exit 4"], {}, {}, str(tmp_path / "gone")) == 4
    finally:
        deaf(signals)
    assert (tmp_path / "made").read_text() == "it\n"
    assert os.getcwd() == here


async def test_a_program_that_may_not_be_executed_is_replaced_by_what_it_stands_for() -> None:
    reaper = Reaper()
    signals = hear(reaper)
    try:
        assert await reaper.run(["/bin/sh", "-c", "exit 6"], {}, {}, program="/nowhere") == 6
        with pytest.raises(FileNotFoundError):
            await reaper.run(["/nowhere"], {}, {}, program="/nowhere/else")
    finally:
        deaf(signals)


async def test_programs_do_not_inherit_what_they_are_not_given() -> None:
    reaper = Reaper()
    signals = hear(reaper)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    ours = os.dup2(reader, 199, inheritable=False)
    try:
        await reaper.run(["/bin/ls", "/proc/self/fd"], {}, {1: writer})
    finally:
        deaf(signals)
        os.close(writer)
        os.close(ours)
    with os.fdopen(reader) as file:
        found = set(file.read().split())
    assert {"0", "1", "2"} <= found
    assert "199" not in found


class FakeProcess:
    """What states need of a process."""

    def __init__(self, state: states.State) -> None:
        self.state = state
        self.label = "c"
        self.did: list[str] = []

    def enter(self, state: states.State) -> None:
        self.state = state

    def enter_if(self, expected: states.State, state: states.State) -> None:
        if self.state is expected:
            self.state = state

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            async def work(*arguments: object) -> None:
                self.did.append(name)
            return work
        return lambda *arguments: self.did.append(name)


INIT_TABLE: list[tuple[states.InitState, str, states.State | None]] = [
    (states.CREATED, "start", states.RUNNING), (states.CREATED, "delete", states.DELETED),
    (states.CREATED, "pause", None), (states.CREATED, "resume", None),
    (states.CREATED_FROM_CHECKPOINT, "start", states.RUNNING), (states.CREATED_FROM_CHECKPOINT, "delete", states.DELETED),
    (states.RUNNING, "start", None), (states.RUNNING, "delete", None), (states.RUNNING, "pause", states.PAUSED),
    (states.RUNNING, "resume", None), (states.PAUSED, "start", None), (states.PAUSED, "delete", None),
    (states.PAUSED, "pause", None), (states.PAUSED, "resume", states.RUNNING), (states.PAUSING, "pause", None),
    (states.PAUSING, "delete", None), (states.STOPPED, "start", None), (states.STOPPED, "delete", states.DELETED),
    (states.STOPPED, "pause", None), (states.STOPPED, "resume", None), (states.DELETED, "start", None),
    (states.DELETED, "delete", None),
]


@pytest.mark.parametrize(("state", "verb", "expected"), INIT_TABLE)
async def test_what_each_state_of_init_allows(
    state: states.InitState, verb: str, expected: states.State | None
) -> None:
    process = FakeProcess(state)
    if expected is None:
        with pytest.raises(errors.FailedPrecondition, match=f"cannot {verb} a"):
            await getattr(state, verb)(process)
        assert process.state is state
    else:
        await getattr(state, verb)(process)
        assert process.state is expected


EXEC_TABLE: list[tuple[states.ExecState, str, states.State | None]] = [
    (states.EXEC_CREATED, "start", states.EXEC_RUNNING), (states.EXEC_CREATED, "delete", states.EXEC_DELETED),
    (states.EXEC_RUNNING, "start", None), (states.EXEC_RUNNING, "delete", None), (states.EXEC_STOPPED, "start", None),
    (states.EXEC_STOPPED, "delete", states.EXEC_DELETED), (states.EXEC_DELETED, "delete", None),
]


@pytest.mark.parametrize(("state", "verb", "expected"), EXEC_TABLE)
async def test_what_each_state_of_an_exec_allows(
    state: states.ExecState, verb: str, expected: states.State | None
) -> None:
    process = FakeProcess(state)
    if expected is None:
        with pytest.raises(errors.FailedPrecondition, match=f"cannot {verb} a"):
            await getattr(state, verb)(process)
    else:
        await getattr(state, verb)(process)
        assert process.state is expected


def test_kills_by_state() -> None:
    for state in (states.CREATED, states.RUNNING, states.PAUSED, states.EXEC_RUNNING):
        process = FakeProcess(state)
        cast(Any, state).kill(process, 15, False)
        assert process.did == ["send"]
    for state in (states.STOPPED, states.DELETED, states.EXEC_STOPPED, states.EXEC_DELETED):
        with pytest.raises(errors.NotFound, match="process already finished"):
            cast(Any, state).kill(FakeProcess(state), 15, False)
    for state in (states.CREATED_FROM_CHECKPOINT, states.EXEC_CREATED):
        with pytest.raises(errors.FailedPrecondition, match="process not created"):
            cast(Any, state).kill(FakeProcess(state), 15, False)
    leftovers = FakeProcess(states.STOPPED)
    cast(Any, states.STOPPED).kill(leftovers, 9, True)
    assert leftovers.did == ["send_to_leftovers"]


def test_states_have_the_published_status() -> None:
    assert [state.status for state in (states.CREATED, states.RUNNING, states.PAUSING, states.PAUSED, states.STOPPED)] == [
        TaskStatus.CREATED, TaskStatus.RUNNING, TaskStatus.PAUSING, TaskStatus.PAUSED, TaskStatus.STOPPED,
    ]


def test_the_last_error_of_the_runtime_is_told(tmp_path: Path) -> None:
    log_path = tmp_path / "log.json"
    log_path.write_text(
        '{"level":"error","msg":"first"}\nnot json\n{"level":"warning","msg":"no"}\n[]\n{"level":"error","msg":" last \\n"}\n'
    )
    assert runc.last_error(str(log_path)) == "last"
    assert runc.last_error(str(tmp_path / "absent")) == ""
    assert isinstance(runc.classify("m", 'container "x" does not exist'), errors.NotFound)
    assert isinstance(runc.classify("m", "container with given ID already exists"), errors.AlreadyExists)
    assert isinstance(runc.classify("m", "anything else"), errors.Unknown)
    with pytest.raises(errors.Internal):
        runc.read_pid(str(tmp_path / "absent"))


def test_exit_records_survive_and_damage_is_none(tmp_path: Path) -> None:
    record = records.ExitRecord("c", "", 12, 137, 1.5, 9, 1, "pod", 9, 1.25)
    records.write(str(tmp_path), record)
    assert records.read(str(tmp_path)) == record
    assert records.read(str(tmp_path), "other") is None
    Path(records.path_of(str(tmp_path))).write_text('{"id": 1')
    assert records.read(str(tmp_path)) is None
    records.remove(str(tmp_path))
    records.remove(str(tmp_path))


def test_arguments_are_read_as_go_reads_them() -> None:
    parsed = program.parse(["-namespace", "n", "--id=c", "-address", "/a", "-publish-binary", "/b", "-debug", "start"])
    assert (parsed.namespace, parsed.id, parsed.address, parsed.publish_binary) == ("n", "c", "/a", "/b")
    assert (parsed.debug, parsed.action) == (True, "start")
    assert program.parse(["-debug=false", "-v"]).debug is False
    for wrong in (["-what"], ["-id"]):
        with pytest.raises(SystemExit):
            program.parse(wrong)


def test_socket_paths_are_where_containerd_looks() -> None:
    path = program.socket_path("/run/containerd/s", "/run/containerd/containerd.sock", "k8s.io", "abc")
    assert path.startswith("/run/containerd/s/")
    assert len(path) == len("/run/containerd/s/") + 64
    assert path != program.socket_path("/run/containerd/s", "/other", "k8s.io", "abc")


def test_values() -> None:
    assert timestamp(0.0) is None
    made = timestamp(1.5)
    assert made is not None
    assert (made.seconds, made.nanos) == (1, 500_000_000)
    packed = any_of(events_pb2.TaskStart(pid=3))
    assert packed.type_url == "containerd.events.TaskStart"
    packed.type_url = "types.googleapis.com/" + packed.type_url
    assert type_name(packed) == "containerd.events.TaskStart"


async def test_p7_output_that_waits_for_this_process_is_no_silence() -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    pump = Pump(reader, NullSink(), tap=lambda data: None, tapped=lambda: False, pipe=True, on_end=lambda: None)
    try:
        assert not pump.behind
        pump.start()
        assert not pump.behind
        os.write(writer, b"late")
        assert pump.behind
        await wait_until(lambda: pump.moved == 4, 30, "the bytes to be moved")
        assert not pump.behind
    finally:
        pump.close()
        os.close(writer)
    assert not pump.behind
