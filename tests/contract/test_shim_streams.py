"""What our shim does with streams beyond containerd's: CRI logs, attached clients, loggers, bounded ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from google.protobuf.empty_pb2 import Empty

from supervisord_ctr import errors
from supervisord_ctr.aio import wait_until
from supervisord_ctr.api.runtime.task.v3 import task_pb2 as api
from supervisord_ctr.api.shim.v1 import shim_pb2
from tests.support.shim import PATIENCE, Lab, Shim, Zygote, read_all
from tests.support.streams import AttachedClient, laboratory_with_clients, parse_log

PRIVATE = "pctr.shim.v1.Shim"


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """One zygote for all tests."""
    made = Zygote()
    yield made
    assert made.close() == 0


@pytest.fixture
async def lab(zygote: Zygote) -> AsyncIterator[Lab]:
    """A laboratory of forked shims."""
    async with laboratory_with_clients(zygote) as made:
        yield made


async def test_p4_the_cri_log_has_every_line_of_both_streams(lab: Lab) -> None:
    log = lab.folder / "pod" / "0.log"
    script = "seq 1 20000; echo problem >&2; head -c 40000 /dev/zero | tr '\\0' x; echo; echo -n unfinished"
    shim = await lab.run("c", ["sh", "-c", script], stdout=f"cri-log://{log}", stderr=f"cri-log://{log}")
    assert await shim.wait("c") == 0
    await shim.delete("c")
    records = parse_log(log)
    out = [record for record in records if record[0] == b"stdout"]
    assert [record[2] for record in out[:20000]] == [str(number).encode() for number in range(1, 20001)]
    parts = out[20000:]
    assert [record[1] for record in parts] == [b"P", b"P", b"F", b"P"]
    assert b"".join(record[2] for record in parts[:3]) == b"x" * 40000
    assert parts[3][2] == b"unfinished"
    assert [record[1:] for record in records if record[0] == b"stderr"] == [(b"F", b"problem")]


async def test_p19_rotation_by_others_and_reopening_lose_nothing(lab: Lab) -> None:
    log = lab.folder / "0.log"
    script = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done"
    shim = await lab.run("c", ["sh", "-c", script], stdout=f"cri-log://{log}")
    rotated = lab.folder / "0.log.rotated"
    os.rename(log, rotated)
    await shim.client.call(PRIVATE, "ReopenLog", shim_pb2.ReopenLogRequest(id="c"), Empty)
    assert await shim.wait("c") == 0
    await shim.delete("c")
    lines = [record[2] for path in (rotated, log) for record in parse_log(path)]
    assert lines == [f"line {number}".encode() for number in range(3000)]


async def test_p19_rotation_by_the_shim_is_at_line_ends(lab: Lab) -> None:
    log = lab.folder / "0.log"
    shim = await lab.run("c", ["seq", "1", "30000"], stdout=f"cri-log://{log}?max_size=300000&max_files=9")
    assert await shim.wait("c") == 0
    await shim.delete("c")
    files = [lab.folder / f"0.log.{number}" for number in range(8, 0, -1)] + [log]
    lines = [int(record[2]) for path in files if path.exists() for record in parse_log(path)]
    assert len([path for path in files if path.exists()]) > 2
    assert lines == list(range(lines[0], 30001))


async def test_reopening_needs_a_cri_log(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    with pytest.raises(errors.FailedPrecondition):
        await shim.client.call(PRIVATE, "ReopenLog", shim_pb2.ReopenLogRequest(id="c"), Empty)
    with pytest.raises(errors.NotFound):
        await shim.client.call(PRIVATE, "ReopenLog", shim_pb2.ReopenLogRequest(id="nobody"), Empty)
    await lab.finish(shim, "c")


async def test_s11_log_addresses_are_absolute_and_straight(lab: Lab) -> None:
    for number, address in enumerate(("cri-log://relative/path", "cri-log:///a/../b", "cri-log:///a?what=1", "ftp:///a")):
        name = f"c{number}"
        lab.bundle(name, ["true"])
        shim = await lab.launch(name)
        with pytest.raises(errors.InvalidArgument):
            await lab.create(shim, name, stdout=address)


async def test_an_attached_client_sees_output_and_the_exit(lab: Lab) -> None:
    log = lab.folder / "0.log"
    address = f"cri-log://{log}"
    shim = await lab.run(
        "c", ["sh", "-c", "read x; echo got $x; echo bad >&2; cat; exit 3"], stdin="attach://", stdout=address, stderr=address
    )
    bundle = lab.folder / "b" / "c"
    assert stat.S_IMODE(os.stat(bundle / "attach.sock").st_mode) == 0o600
    client = await AttachedClient.connect(bundle, id="c", stdin=True, stdout=True, stderr=True)
    watcher = await AttachedClient.connect(bundle, id="c", stdin=False, stdout=True, stderr=False)
    assert await client.frame() == (3, b'{"attached": true}')
    assert await watcher.frame() == (3, b'{"attached": true}')
    client.send(0, b"hello\n")
    client.send(0, b"more" * 50000)
    client.send(3, b'{"close_stdin": true}')
    streams, control = await client.rest()
    assert streams == {1: b"got hello\n" + b"more" * 50000, 2: b"bad\n"}
    assert control[-1]["exit"]["status"] == 3
    seen, _ = await watcher.rest()
    assert seen == {1: b"got hello\n" + b"more" * 50000}
    assert await shim.wait("c") == 3
    await shim.delete("c")
    assert not (bundle / "attach.sock").exists()
    assert b"".join(record[2] for record in parse_log(log) if record[0] == b"stdout") == b"got hello" + b"more" * 50000


async def test_an_attached_terminal_is_resized(lab: Lab) -> None:
    lab.bundle("c", ["sh", "-c", "read x; stty size; exit 2"], terminal=True)
    shim = await lab.launch("c")
    await lab.create(shim, "c", terminal=True, stdin="attach://", stdout="attach://")
    await shim.start("c")
    client = await AttachedClient.connect(lab.folder / "b" / "c", id="c", stdin=True, stdout=True, stderr=False)
    client.send(3, b'{"resize": [90, 40]}')
    client.send(0, b"go\n")
    streams, control = await client.rest()
    assert b"40 90" in streams[1]
    assert control[-1]["exit"]["status"] == 2
    await lab.finish(shim, "c")


async def test_input_ends_with_the_client_when_asked_for_once(lab: Lab) -> None:
    shim = await lab.run("c", ["cat"], stdin="attach://?once=1", stdout="attach://")
    client = await AttachedClient.connect(lab.folder / "b" / "c", id="c", stdin=True, stdout=True, stderr=False)
    assert await client.frame() == (3, b'{"attached": true}')
    client.writer.close()
    assert await shim.wait("c") == 0
    await lab.finish(shim, "c")


async def test_attaching_to_nobody_and_nonsense(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    bundle = lab.folder / "b" / "c"
    for wanted in ({"id": "nobody"}, {"id": "c", "exec_id": "nobody"}, {}):
        client = await AttachedClient.connect(bundle, **wanted)
        _, control = await client.rest()
        assert "error" in control[-1]
    reader, writer = await asyncio.open_unix_connection(str(bundle / "attach.sock"))
    writer.write(os.urandom(70000).replace(b"\n", b" "))
    await asyncio.wait_for(reader.read(), PATIENCE)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    await lab.finish(shim, "c")


async def test_p9_a_client_that_does_not_read_is_cut_off_and_harms_nobody(lab: Lab) -> None:
    log = lab.folder / "0.log"
    size = 30_000_000
    shim = await lab.run(
        "c", ["sh", "-c", f"read x; yes 0123456789abcdef | head -c {size}"], stdin="attach://", stdout=f"cri-log://{log}"
    )
    bundle = lab.folder / "b" / "c"
    slow = await AttachedClient.connect(bundle, id="c", stdin=False, stdout=True, stderr=False)
    slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
    starter = await AttachedClient.connect(bundle, id="c", stdin=True, stdout=False, stderr=False)
    starter.send(0, b"go\n")
    assert await asyncio.wait_for(shim.wait("c"), PATIENCE) == 0
    await shim.delete("c")
    # every record adds 40 bytes of time, stream and tag to a line of 17 bytes
    lines = size // 17
    assert abs(os.stat(log).st_size - lines * (17 + 40)) < 200
    slow.writer.close()
    starter.writer.close()


async def test_a_fifo_nobody_reads_does_not_hold_up_the_exit(lab: Lab) -> None:
    out, out_fd = lab.fifo("out")
    shim = await lab.run("c", ["sh", "-c", "yes | head -c 1000000 & sleep 0.1; exit 5"], stdout=out)
    assert await asyncio.wait_for(shim.wait("c"), PATIENCE) == 5
    await asyncio.wait_for(shim.delete("c"), PATIENCE)
    os.close(out_fd)


async def test_p7_an_exec_ends_although_its_child_keeps_the_output_open(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    out, out_fd = lab.fifo("out")
    reading = asyncio.get_running_loop().create_task(read_all(out_fd))
    await shim.exec("c", "e1", ["sh", "-c", "sleep 500 & echo done"], stdout=out)
    await shim.start("c", "e1")
    assert await shim.wait("c", "e1") == 0
    await shim.delete("c", "e1")
    assert await reading == b"done\n"
    await lab.finish(shim, "c")


async def test_p7_a_kill_of_everything_reaches_the_tree_of_an_exec(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    await shim.exec("c", "e1", ["sh", "-c", "sleep 500 & sleep 500 & wait"])
    await shim.start("c", "e1")

    async def count() -> int:
        return len((await shim.call("Pids", api.PidsRequest(id="c"), api.PidsResponse)).processes)

    async def has(number: int) -> bool:
        return await count() == number

    await wait_until(lambda: has(4), PATIENCE, "the exec's children")
    await shim.kill("c", signal.SIGKILL, "e1", everyone=True)
    assert await shim.wait("c", "e1") == 137
    await wait_until(lambda: has(1), PATIENCE, "all of the exec's processes to end")
    await lab.finish(shim, "c")


async def test_file_addresses_are_appended_to(lab: Lab) -> None:
    target = lab.folder / "deep" / "out.txt"
    for number in range(2):
        name = f"c{number}"
        address = f"file://{target}"
        shim = await lab.run(name, ["sh", "-c", f"echo out{number}; echo err{number} >&2"], stdout=address, stderr=address)
        assert await shim.wait(name) == 0
        await shim.delete(name)
    assert sorted(target.read_text().split()) == ["err0", "err1", "out0", "out1"]


async def test_a_logging_program_reads_the_streams(lab: Lab) -> None:
    logger = lab.folder / "logger"
    target = lab.folder / "logged"
    logger.write_text(f"""#!/bin/sh
exec 5>&-
(cat <&3; cat <&4; echo "$CONTAINER_ID $CONTAINER_NAMESPACE $*") > {target}.part
mv {target}.part {target}
""")
    logger.chmod(0o755)
    address = f"binary://{logger}?key=value"
    shim = await lab.run("c", ["sh", "-c", "echo out; echo err >&2"], stdout=address, stderr=address)
    assert await shim.wait("c") == 0
    await shim.delete("c")
    await wait_until(target.exists, PATIENCE, "the logger to end")
    assert target.read_text().split("\n")[:3] == ["out", "err", f"c {lab.namespace} key value"]


async def test_a_logging_program_that_is_not_there(lab: Lab) -> None:
    lab.bundle("c", ["true"])
    shim = await lab.launch("c")
    with pytest.raises(errors.NotFound, match="logging program"):
        await lab.create(shim, "c", stdout="binary:///no/such/logger")


async def test_a_full_disk_never_holds_up_the_container(lab: Lab) -> None:
    small = lab.folder / "small"
    small.mkdir()
    from supervisord_ctr.linux import mounts

    mounts.mount("tmpfs", small, "tmpfs", 0, "size=256k")
    log = small / "0.log"
    shim = await lab.run("c", ["sh", "-c", "seq 1 100000; exit 8"], stdout=f"cri-log://{log}")
    assert await shim.wait("c") == 8
    info = await shim.client.call(PRIVATE, "Info", shim_pb2.InfoRequest(), shim_pb2.InfoResponse)
    await shim.delete("c")
    parse_log(log)
    assert info.containers[0].dropped_bytes > 0


async def test_descriptors_stay_flat_over_many_execs(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])

    async def one(number: int) -> int:
        name = f"e{number}"
        await shim.exec("c", name, ["true"], stdout="attach://", stderr="attach://")
        await shim.start("c", name)
        status = await shim.wait("c", name)
        await shim.delete("c", name)
        return status

    def open_files(shim: Shim) -> int:
        return len(os.listdir(f"/proc/{shim.pid}/fd"))

    assert await one(0) == 0
    before = open_files(shim)
    for first in range(1, 41, 10):
        assert await asyncio.gather(*[one(number) for number in range(first, first + 10)]) == [0] * 10
    await wait_until(lambda: open_files(shim) <= before, PATIENCE, "descriptors to be closed")
    await lab.finish(shim, "c")


async def test_s3_init_and_execs_have_their_three_descriptors_only(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"], stdout="attach://", stderr="attach://")
    await shim.exec("c", "e1", ["sleep", "1000"], stdout="attach://")
    for pid in (await shim.state("c")).pid, await shim.start("c", "e1"):
        await wait_until(
            lambda pid=pid: Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep"), PATIENCE, "the program"
        )
        assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"]
    await lab.finish(shim, "c")


async def test_the_end_of_a_terminals_input_is_typed(lab: Lab) -> None:
    lab.bundle("c", ["sh", "-c", "while read line; do echo got $line; done; exit 6"], terminal=True)
    shim = await lab.launch("c")
    await lab.create(shim, "c", terminal=True, stdin="attach://", stdout="attach://")
    await shim.start("c")
    client = await AttachedClient.connect(lab.folder / "b" / "c", id="c", stdin=True, stdout=True, stderr=False)
    client.send(0, b"a line\n")
    await client.until(b"got a line")
    client.send(3, b'{"close_stdin": true}')
    _, control = await client.rest()
    assert control[-1]["exit"]["status"] == 6
    await lab.finish(shim, "c")


async def test_a_service_managers_words_stay_outside(lab: Lab) -> None:
    assert lab.zygote is not None
    lab.bundle("c", ["sleep", "1000"])
    notifying = Zygote({"NOTIFY_SOCKET": str(lab.folder / "notify")})
    lab.zygote = notifying
    shim = await lab.launch("c")
    notifying.close()
    await lab.create(shim, "c")
    await shim.start("c")
    pid = (await shim.state("c")).pid
    assert b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes()
    assert "notify" not in Path(f"/proc/{pid}/mountinfo").read_text()
    await lab.finish(shim, "c")
