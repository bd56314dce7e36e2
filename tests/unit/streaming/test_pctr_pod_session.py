"""`pctr pod exec|attach|port-forward`: the user's side, against the streaming server in memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import random
import signal
import socket
import sys
import termios
from collections.abc import AsyncIterator

import pytest
from pctr.command import UsageError
from pctr.commands import pod_stream
from pctr.pod_session import DetachKeys

from supervisord_ctr.aio import wait_until
from supervisord_ctr.api.cri.v1 import cri_pb2
from supervisord_ctr.settings import StreamingSettings
from supervisord_ctr.streaming import AttachParams, ExecParams, PortForwardParams
from supervisord_ctr.streaming.server import StreamingServer
from tests.support.streaming import PATIENCE, ScriptedBackend

pytestmark = pytest.mark.slow

_SESSION = """
import sys
from pctr.command import Failed
from pctr.pod_session import run_session
from supervisord_ctr.errors import Error
try:
    sys.exit(run_session(sys.argv[1], stdin="i" in sys.argv[2], tty="t" in sys.argv[2], detachable="d" in sys.argv[2]))
except Error as error:
    print(error, file=sys.stderr)
    sys.exit(99)
"""
# The window changes after the first size was read and before anything else of the session happens.
_RESIZED_WHILE_SENDING = """
import os, signal, termios
from supervisord_ctr.streaming.client import Command
send_resize = Command.send_resize
async def resized(self, width, height):
    await send_resize(self, width, height)
    if (width, height) == (101, 33):
        termios.tcsetwinsize(0, (44, 120))
        os.kill(os.getpid(), signal.SIGWINCH)
Command.send_resize = resized
"""
_FORWARD = """
import sys
from pctr.pod_session import run_forward
urls = sys.argv[1:]
run_forward(lambda: urls.pop(0), "127.0.0.1", [(0, 80)])
"""


@contextlib.asynccontextmanager
async def program(code: str, *words: str, **streams: object) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, *words, **streams)  # type: ignore[arg-type]
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        for pipe in (process.stdin,):
            if pipe is not None:
                pipe.close()


async def run_exec(server: StreamingServer, *argv: str, data: bytes | None = None) -> tuple[int | None, bytes, bytes]:
    params = ExecParams("c", argv, stdin=data is not None, stdout=True, stderr=True)
    pipe = asyncio.subprocess.PIPE
    async with program(
        _SESSION, server.exec_url(params), "i" if data is not None else "-",
        stdin=pipe if data is not None else asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe,
    ) as process:
        out, err = await asyncio.wait_for(process.communicate(data), PATIENCE)
        return process.returncode, out, err


async def test_exec_passes_streams_and_status_through(server: StreamingServer) -> None:
    assert await run_exec(server, "complain", "17") == (17, b"to stdout", b"to stderr")


async def test_exec_passes_large_input_and_its_end_through(server: StreamingServer) -> None:
    data = random.Random(1).randbytes(3 << 20)
    assert await run_exec(server, "cat", data=data) == (0, data, b"")


async def test_exec_of_a_missing_command_prints_why(server: StreamingServer) -> None:
    code, _, err = await run_exec(server, "nonsense")
    assert code == 99
    assert b"executable file not found in $PATH" in err


async def test_exec_ends_when_nobody_reads_its_output(server: StreamingServer, backend: ScriptedBackend) -> None:
    url = server.exec_url(ExecParams("c", ("flood", str(1 << 40)), stdout=True, stderr=True))
    reading, writing = os.pipe()
    async with program(_SESSION, url, "-", stdin=asyncio.subprocess.DEVNULL, stdout=writing,
                       stderr=asyncio.subprocess.DEVNULL) as process:
        os.close(writing)
        await asyncio.get_running_loop().run_in_executor(None, os.read, reading, 10)
        os.close(reading)
        assert await asyncio.wait_for(process.wait(), PATIENCE) != 0
    await wait_until(lambda: backend.active == 0, PATIENCE, "exec to end")


@contextlib.asynccontextmanager
async def on_terminal(
    url: str, flags: str, code: str = _SESSION
) -> AsyncIterator[tuple[asyncio.subprocess.Process, int, int]]:
    """The program with a terminal of its own: (process, our side, its side)."""
    master, slave = pty.openpty()
    try:
        termios.tcsetwinsize(slave, (33, 101))
        async with program(code, url, flags, stdin=slave, stdout=slave, stderr=slave) as process:
            yield process, master, slave
    finally:
        os.close(master)
        os.close(slave)


def is_raw(descriptor: int) -> bool:
    return not termios.tcgetattr(descriptor)[3] & termios.ICANON


async def test_terminal_is_raw_inside_tells_its_size_and_is_put_back(
    server: StreamingServer, backend: ScriptedBackend
) -> None:
    url = server.exec_url(ExecParams("c", ("size", "2"), tty=True, stdin=True, stdout=True))
    async with on_terminal(url, "it") as (process, _, slave):
        before = termios.tcgetattr(slave)
        await wait_until(lambda: backend.sizes == [(101, 33)], PATIENCE, "first size")
        assert is_raw(slave)
        termios.tcsetwinsize(slave, (44, 120))
        process.send_signal(signal.SIGWINCH)
        assert await asyncio.wait_for(process.wait(), PATIENCE) == 0
        assert backend.sizes == [(101, 33), (120, 44)]
        assert termios.tcgetattr(slave) == before


async def test_a_size_that_changes_while_the_first_is_sent_is_sent_too(
    server: StreamingServer, backend: ScriptedBackend
) -> None:
    url = server.exec_url(ExecParams("c", ("size", "2"), tty=True, stdin=True, stdout=True))
    async with on_terminal(url, "it", _RESIZED_WHILE_SENDING + _SESSION) as (process, _, _):
        assert await asyncio.wait_for(process.wait(), PATIENCE) == 0
        assert backend.sizes == [(101, 33), (120, 44)]


async def test_terminal_is_put_back_when_the_connection_is_lost(
    server: StreamingServer, backend: ScriptedBackend
) -> None:
    url = server.exec_url(ExecParams("c", ("sleep",), tty=True, stdin=True, stdout=True))
    async with on_terminal(url, "it") as (process, _, slave):
        before = termios.tcgetattr(slave)
        await wait_until(lambda: is_raw(slave) and backend.active == 1, PATIENCE, "session to stand")
        await server.close()
        assert await asyncio.wait_for(process.wait(), PATIENCE) == 99
        assert termios.tcgetattr(slave) == before


async def test_detach_keys_leave_the_container_running(server: StreamingServer, backend: ScriptedBackend) -> None:
    url = server.attach_url(AttachParams("c", tty=True, stdin=True, stdout=True))
    async with on_terminal(url, "itd") as (process, master, slave):
        await wait_until(lambda: is_raw(slave) and backend.active == 1, PATIENCE, "session to stand")
        os.write(master, b"typed\x10")
        os.write(master, b"\x11")
        assert await asyncio.wait_for(process.wait(), PATIENCE) == 0
        assert not is_raw(slave)


def test_detach_keys_are_found_across_reads() -> None:
    keys = DetachKeys()
    assert keys.filter(b"abc") == (b"abc", False)
    assert keys.filter(b"d\x10") == (b"d", False)
    assert keys.filter(b"e") == (b"\x10e", False)
    assert keys.filter(b"\x10") == (b"", False)
    assert keys.filter(b"\x11rest") == (b"", True)


async def test_port_forward_serves_many_connections_and_comes_back_after_a_loss(
    server: StreamingServer, backend: ScriptedBackend
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read()
        writer.write(data[::-1])
        writer.close()

    pod = await asyncio.start_server(serve, "127.0.0.1", 0)
    backend.ports[80] = pod.sockets[0].getsockname()[1]
    other = StreamingServer(backend, StreamingSettings())
    await other.start()
    urls = [made.port_forward_url(PortForwardParams("p")) for made in (server, other)]
    async with program(_FORWARD, *urls, stdout=asyncio.subprocess.PIPE) as process:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), PATIENCE)
        port = int(line.split(b":")[1].split()[0])

        async def ask(text: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(text)
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), PATIENCE)
            writer.close()
            return answer

        answers = await asyncio.gather(*(ask(b"hello %d" % number) for number in range(20)))
        assert answers == [(b"hello %d" % number)[::-1] for number in range(20)]
        await server.close()
        await wait_until(lambda: server.sessions == 0, PATIENCE, "first session to end")
        for _ in range(50):
            with contextlib.suppress(ConnectionError):
                if await ask(b"again") == b"niaga":
                    break
        else:
            pytest.fail("the session did not come back")
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.wait(), PATIENCE)
    await other.close()
    pod.close()
    await pod.wait_closed()


async def test_port_that_is_taken_is_told(server: StreamingServer) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    code = _FORWARD.replace("(0, 80)", f"({taken.getsockname()[1]}, 80)")
    url = server.port_forward_url(PortForwardParams("p"))
    async with program(code, url, stderr=asyncio.subprocess.PIPE) as process:
        _, err = await asyncio.wait_for(process.communicate(), PATIENCE)
        assert err.splitlines()[-1].startswith(b"pctr.command.Failed: cannot listen on 127.0.0.1:")
    taken.close()


def test_ports_are_read_as_local_and_remote() -> None:
    assert pod_stream.parse_ports(["80", "8080:80", ":443", "0:22"]) == [(80, 80), (8080, 80), (0, 443), (0, 22)]
    for words in ([], ["x"], ["80:"], ["1:2:3"], ["70000"], ["80:0"], ["-1:80"]):
        with pytest.raises(UsageError):
            pod_stream.parse_ports(words)


def test_light_messages_are_those_of_cri() -> None:
    values = {"container_id": "c", "tty": True, "stdin": True, "stdout": True, "stderr": True}
    twin = cri_pb2.ExecRequest(cmd=["sh", "-c"], **values)
    assert pod_stream.ExecRequest(cmd=["sh", "-c"], **values).SerializeToString() == twin.SerializeToString()
    assert pod_stream.AttachRequest(**values).SerializeToString() == cri_pb2.AttachRequest(**values).SerializeToString()
    assert (pod_stream.PortForwardRequest(pod_sandbox_id="p").SerializeToString()
            == cri_pb2.PortForwardRequest(pod_sandbox_id="p").SerializeToString())
    for kind in (cri_pb2.ExecResponse, cri_pb2.AttachResponse, cri_pb2.PortForwardResponse):
        assert pod_stream.UrlResponse.FromString(kind(url="http://x").SerializeToString()).url == "http://x"
