"""Exec through CRI, the streaming server, a real shim and runc (P7, P9, S9)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisord_ctr.aio import wait_until
from supervisord_ctr.errors import Unavailable, Unknown
from supervisord_ctr.streaming import client
from tests.support.streaming import PATIENCE, WebSocketClient, read_all
from tests.support.streaming_pod import Pod, running_pod

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

#: Execs that are dropped, and the size of the archive that travels; a thorough run has 1000 and 1024.
DROPPED = int(os.environ.get("PCTR_TEST_EXECS", "40"))
ARCHIVE_MIB = int(os.environ.get("PCTR_TEST_ARCHIVE_MIB", "8"))


@pytest.fixture(scope="module")
def pod() -> Iterator[Pod]:
    with running_pod() as made:
        yield made


@pytest.fixture(scope="module")
def container(pod: Pod) -> str:
    return pod.run("sh", "-c", "trap exit TERM; while true; do sleep 1000 & wait; done")


async def run(pod: Pod, container: str, *argv: str, data: bytes | None = None) -> tuple[int, bytes, bytes]:
    """Exec over SPDY: (exit code, stdout, stderr)."""
    url = pod.exec_url(container, *argv, stdin=data is not None)
    command = await client.open_command(url, stdin=data is not None, stdout=True, stderr=True, tty=False)

    async def feed() -> None:
        if command.stdin is not None and data is not None:
            with contextlib.suppress(BrokenPipeError):
                await command.stdin.write(data)
            await command.stdin.close()

    async with asyncio.timeout(PATIENCE + ARCHIVE_MIB), asyncio.TaskGroup() as group:
        group.create_task(feed())
        out = group.create_task(read_all(command.stdout))
        err = group.create_task(read_all(command.stderr))
    try:
        return await asyncio.wait_for(command.wait_status(), PATIENCE), out.result(), err.result()
    finally:
        await command.session.finish()


@pytest.mark.parametrize("code", [0, 1, 42, 137, 255])
async def test_exit_codes_pass_through(pod: Pod, container: str, code: int) -> None:
    script = f"echo out; echo err >&2; exit {code}" if code != 137 else "echo out; echo err >&2; kill -9 $$"
    assert await run(pod, container, "sh", "-c", script) == (code, b"out\n", b"err\n")


async def test_missing_command_gives_the_error_that_people_know(pod: Pod, container: str) -> None:
    with pytest.raises(Unknown) as caught:
        await run(pod, container, "no-such-command")
    message = str(caught.value)
    assert message.startswith(
        "Internal error occurred: error executing command in container: failed to exec in container: failed to start exec"
    )
    assert 'exec: "no-such-command": executable file not found in $PATH' in message


async def test_input_ends_with_the_clients_half_and_output_is_whole(pod: Pod, container: str) -> None:
    data = random.Random(1).randbytes(24 << 20)
    code, out, err = await run(pod, container, "cat", data=data)
    assert (code, out == data, err) == (0, True, b"")


async def test_tar_travels_in_both_directions(pod: Pod, container: str, tmp_path: Path) -> None:
    data = random.Random(2).randbytes(4 << 20) * max(1, ARCHIVE_MIB // 4)
    assert await run(pod, container, "sh", "-c", "cat > /tmp/in", data=data) == (0, b"", b"")
    code, archive, _ = await run(pod, container, "tar", "-cf", "-", "-C", "/tmp", "in")
    assert code == 0
    assert await run(pod, container, "sh", "-c", "cd /tmp && tar -xf - -O | cat > /tmp/out", data=archive) == (0, b"", b"")
    code, back, _ = await run(pod, container, "cat", "/tmp/out")
    assert back == data


async def test_p7_a_child_in_the_background_does_not_keep_the_exec(pod: Pod, container: str) -> None:
    code, out, _ = await run(pod, container, "sh", "-c", "echo before; sleep 900 & echo after")
    assert (code, out) == (0, b"before\nafter\n")


async def test_p9_output_of_an_ended_process_waits_for_a_slow_client(pod: Pod, container: str) -> None:
    """The process is long gone when its last bytes are read; none is lost."""
    size = 6 << 20
    command = await client.open_command(
        pod.exec_url(container, "dd", "if=/dev/zero", "bs=64k", f"count={size >> 16}"),
        stdin=False, stdout=True, stderr=True, tty=False,
    )
    assert command.stdout is not None
    await asyncio.sleep(5)  # longer than any drain time; nothing is waited for here but time itself
    total = 0
    while data := await asyncio.wait_for(command.stdout.read(), PATIENCE):
        total += len(data)
    assert total == size
    assert await asyncio.wait_for(command.wait_status(), PATIENCE) == 0
    await command.session.finish()


async def test_terminal_has_a_size_that_follows_the_clients(pod: Pod, container: str) -> None:
    command = await client.open_command(
        pod.exec_url(container, "sh", "-c", "while read line; do stty size; done; exit 5", stdin=True, tty=True),
        stdin=True, stdout=True, stderr=False, tty=True,
    )
    assert command.stdin is not None
    assert command.stdout is not None
    for width, height in ((81, 25), (132, 43)):
        await command.send_resize(width, height)
        seen = b""
        # The size travels beside the input: ask until it is there.
        async with asyncio.timeout(PATIENCE):
            while f"{height} {width}".encode() not in seen:
                await command.stdin.write(b"\n")
                piece = await command.stdout.read()
                assert piece, seen
                seen += piece
    await command.stdin.write(b"\x04")
    await read_all(command.stdout)
    assert await asyncio.wait_for(command.wait_status(), PATIENCE) == 5
    await command.session.finish()


async def test_terminal_is_typed_into(pod: Pod, container: str) -> None:
    command = await client.open_command(
        pod.exec_url(container, "sh", stdin=True, tty=True), stdin=True, stdout=True, stderr=False, tty=True
    )
    assert command.stdin is not None
    assert command.stdout is not None
    await command.stdin.write(b"echo $((6*7)) $TERM; exit 3\n")
    out = await read_all(command.stdout)
    assert b"42 xterm" in out
    assert await command.wait_status() == 3
    await command.session.finish()


async def test_websocket_v5_with_input_that_closes(pod: Pod, container: str) -> None:
    connection = await WebSocketClient.connect(pod.exec_url(container, "wc", "-c", stdin=True), "v5.channel.k8s.io")
    for _ in range(10):
        connection.send(b"\x00" + os.urandom(100_000))
    connection.send(b"\xff\x00")
    await connection.read_all()
    assert connection.channel(1).strip() == b"1000000"
    assert json.loads(connection.channel(3)) == {"metadata": {}, "status": "Success"}
    assert connection.close_code == 1000
    await connection.close()


async def test_s14_token_of_another_container_or_endpoint_is_refused(pod: Pod, container: str) -> None:
    url = pod.exec_url(container, "true")
    with pytest.raises(Unavailable, match="404"):
        await client.connect(url.replace("/exec/", "/attach/"), client.COMMAND_PROTOCOLS)
    with pytest.raises(Unavailable, match="404"):
        await client.connect(url, client.COMMAND_PROTOCOLS)


async def test_s9_the_process_ends_with_its_client(pod: Pod, container: str) -> None:
    command = await client.open_command(
        pod.exec_url(container, "sh", "-c", "sleep 12345 & sleep 54321"), stdin=False, stdout=True, stderr=True, tty=False
    )
    await wait_until(lambda: len(_named(b"12345")) == 1 and len(_named(b"54321")) == 1, PATIENCE, "exec to run")
    command.session.carrier.abort()
    await wait_until(lambda: not _named(b"54321") and not _named(b"12345"), PATIENCE, "processes to end")


def _named(word: bytes) -> list[str]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{entry}/cmdline").read_bytes() == b"sleep\0" + word + b"\0":
                    found.append(entry)
    return found


async def test_s9_execs_dropped_at_any_moment_leave_nothing(pod: Pod, container: str) -> None:
    rng = random.Random(7)
    assert pod.daemon.process is not None
    fds = Path(f"/proc/{pod.daemon.process.pid}/fd")
    await run(pod, container, "true")
    before = len(os.listdir(fds))
    for _ in range(DROPPED):
        await _drop_somewhere(pod, container, rng)
    folder = pod.daemon.state / "cri" / "exec"
    await wait_until(lambda: not list(folder.iterdir()), PATIENCE, "pipes to be removed")
    await wait_until(lambda: len(os.listdir(fds)) < before + 24, PATIENCE, "descriptors to be closed")
    await wait_until(lambda: not _named(b"777"), PATIENCE, "processes to end")
    assert await run(pod, container, "echo", "alive") == (0, b"alive\n", b"")


async def _drop_somewhere(pod: Pod, container: str, rng: random.Random) -> None:
    argv = rng.choice([("sleep", "777"), ("cat",), ("yes",), ("no-such-command",)])
    url = pod.exec_url(container, *argv, stdin=True)
    stage = rng.randrange(5)
    if stage == 0:
        return
    session, _ = await client.connect(url, client.COMMAND_PROTOCOLS)
    if stage > 1:
        for kind in ("error", "stdin", "stdout", "stderr")[: rng.randrange(5) if stage == 2 else 4]:
            await session.open({"streamtype": kind})
    if stage == 4:
        await asyncio.sleep(rng.random() * 0.1)
    session.carrier.abort()


async def test_execs_side_by_side_keep_their_output_apart(pod: Pod, container: str) -> None:
    results = await asyncio.gather(*(run(pod, container, "echo", f"number {number}") for number in range(12)))
    assert results == [(0, b"number %d\n" % number, b"") for number in range(12)]
