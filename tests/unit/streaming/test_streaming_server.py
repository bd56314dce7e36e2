"""The streaming server over real sockets: every protocol, every way to end (S9, S14, P8, P9)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from supervisord_ctr.aio import wait_until
from supervisord_ctr.errors import InvalidArgument, Unavailable, Unknown
from supervisord_ctr.settings import StreamingSettings
from supervisord_ctr.streaming import AttachParams, ExecParams, PortForwardParams, client, spdy_session, wire
from supervisord_ctr.streaming.server import StreamingServer
from tests.support.streaming import PATIENCE, ScriptedBackend, WebSocketClient, read_all

pytestmark = pytest.mark.slow


@pytest.fixture
async def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
async def server(backend: ScriptedBackend) -> AsyncIterator[StreamingServer]:
    made = StreamingServer(backend, StreamingSettings())
    await made.start()
    yield made
    await made.close()
    assert backend.active == 0
    assert made.sessions == 0


def exec_params(*argv: str, tty: bool = False, stdin: bool = False, stderr: bool = True) -> ExecParams:
    return ExecParams("c1", argv, tty=tty, stdin=stdin, stdout=True, stderr=stderr and not tty)


async def run(server: StreamingServer, *argv: str, data: bytes | None = None) -> tuple[int, bytes, bytes]:
    """Exec over SPDY: (exit code, stdout, stderr)."""
    params = exec_params(*argv, stdin=data is not None)
    command = await client.open_command(
        server.exec_url(params), stdin=params.stdin, stdout=True, stderr=True, tty=False
    )

    async def feed() -> None:
        if command.stdin is not None and data is not None:
            with contextlib.suppress(BrokenPipeError):
                await command.stdin.write(data)
            await command.stdin.close()

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(feed())
        out = group.create_task(read_all(command.stdout))
        err = group.create_task(read_all(command.stderr))
    code = await asyncio.wait_for(command.wait_status(), PATIENCE)
    await command.session.finish()
    return code, out.result(), err.result()


async def quiet(server: StreamingServer, backend: ScriptedBackend) -> None:
    """Everything that was started has ended."""
    await wait_until(lambda: backend.active == 0 and server.sessions == 0, PATIENCE, "sessions to end")


async def raw(server: StreamingServer, data: bytes) -> bytes:
    """Send bytes, return all that comes back until the server closes."""
    address = server.base_url.removeprefix("http://")
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(), PATIENCE)
    except ConnectionError:
        return b""
    finally:
        writer.transport.abort()


# -- exec over SPDY ------------------------------------------------------------------------------


async def test_exec_gives_output_and_success(server: StreamingServer) -> None:
    assert await run(server, "echo", "hello") == (0, b"hello\n", b"")


async def test_exec_gives_both_streams_and_the_exit_code(server: StreamingServer) -> None:
    assert await run(server, "complain", "137") == (137, b"to stdout", b"to stderr")


async def test_stdin_ends_with_the_clients_half(server: StreamingServer) -> None:
    data = os.urandom(3 << 20)
    assert await run(server, "cat", data=data) == (0, data, b"")


async def test_a_missing_command_says_so(server: StreamingServer) -> None:
    with pytest.raises(Unknown, match=r"^Internal error occurred: error executing command in container: failed to exec "
                                      r"in container: .*executable file not found in \$PATH: unknown$"):
        await run(server, "nonsense")


async def test_large_output_arrives_whole(server: StreamingServer) -> None:
    code, out, _ = await run(server, "flood", str(8 << 20))
    assert (code, len(out)) == (0, 8 << 20)


@pytest.mark.parametrize("protocol", ["v5.channel.k8s.io", "v4.channel.k8s.io"])
async def test_status_is_json_from_v4_on(server: StreamingServer, protocol: str) -> None:
    text = await _error_text(server, protocol, "complain", "3")
    assert json.loads(text) == {
        "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
        "message": "command terminated with non-zero exit code: error executing command [complain 3], exit code 3",
        "details": {"causes": [{"reason": "ExitCode", "message": "3"}]},
    }
    assert json.loads(await _error_text(server, protocol, "echo")) == {"metadata": {}, "status": "Success"}


@pytest.mark.parametrize("protocol", ["v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"])
async def test_status_is_text_before_v4(server: StreamingServer, protocol: str) -> None:
    assert (await _error_text(server, protocol, "complain", "3")).startswith(b"command terminated with non-zero")
    assert await _error_text(server, protocol, "echo") == b""


async def _error_text(server: StreamingServer, protocol: str, *argv: str) -> bytes:
    session, chosen = await client.connect(server.exec_url(exec_params(*argv)), [protocol])
    assert chosen == protocol
    streams = {kind: await session.open({"streamtype": kind}) for kind in ("error", "stdout", "stderr")}
    text = await read_all(streams["error"])
    await session.finish()
    return text


async def test_resize_reaches_the_backend(server: StreamingServer, backend: ScriptedBackend) -> None:
    command = await client.open_command(
        server.exec_url(exec_params("size", "3", tty=True, stdin=True)), stdin=True, stdout=True, stderr=False, tty=True
    )
    assert command.resize is not None
    await command.send_resize(80, 24)
    await command.resize.write(b'{"Width":0,"Height":9}{"Wid')
    await command.resize.write(b'th":100,"Height":40} [1] {"Width":120,"Height":50}')
    assert await command.wait_status() == 0
    assert backend.sizes == [(80, 24), (100, 40), (120, 50)]
    await command.session.finish()


async def test_client_that_opens_no_streams_is_dropped(backend: ScriptedBackend) -> None:
    made = StreamingServer(backend, StreamingSettings(creation_timeout=0.1))
    await made.start()
    session, _ = await client.connect(made.exec_url(exec_params("echo")), client.COMMAND_PROTOCOLS)
    await asyncio.wait_for(session.carrier.lost.wait(), PATIENCE)
    assert backend.started == 0
    await quiet(made, backend)
    await made.close()


async def test_strange_streams_are_refused_and_unasked_ones_ignored(server: StreamingServer) -> None:
    session, _ = await client.connect(server.exec_url(exec_params("echo", "x", stderr=False)), client.COMMAND_PROTOCOLS)
    with pytest.raises(ConnectionRefusedError):
        await session.open({"streamtype": "nonsense"})
    stdin = await session.open({"streamtype": "stdin"})
    await stdin.write(b"nobody reads this")
    error = await session.open({"streamtype": "error"})
    with pytest.raises(ConnectionRefusedError):
        await session.open({"streamtype": "error"})
    stdout = await session.open({"streamtype": "stdout"})
    assert await read_all(stdout) == b"x\n"
    assert b"Success" in await read_all(error)
    await session.finish()


async def test_s9_a_client_that_leaves_ends_its_exec(server: StreamingServer, backend: ScriptedBackend) -> None:
    command = await client.open_command(
        server.exec_url(exec_params("sleep")), stdin=False, stdout=True, stderr=True, tty=False
    )
    await wait_until(lambda: backend.active == 1, PATIENCE, "exec to start")
    command.session.carrier.abort()
    await quiet(server, backend)
    assert backend.cancelled == 1


async def test_s9_leaving_is_noticed_while_stdin_is_stuck(
    server: StreamingServer, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full stdin stops reading; the connection is looked at all the same."""
    monkeypatch.setattr(wire, "PROBE_INTERVAL", 0.05)
    monkeypatch.setattr(spdy_session, "WINDOW", 4096)
    command = await client.open_command(
        server.exec_url(exec_params("sleep", stdin=True)), stdin=True, stdout=True, stderr=True, tty=False
    )
    assert command.stdin is not None
    # A peer without windows, as in the field: fill the stream, then leave.
    command.session.machine._peer_keeps_windows = command.session.machine._peer_keeps_session_window = False
    await command.stdin.write(b"x" * 20_000)
    await wait_until(lambda: backend.active == 1, PATIENCE, "exec to start")
    command.session.carrier.abort()
    await quiet(server, backend)


async def test_s9_execs_dropped_at_any_moment_leave_nothing(server: StreamingServer, backend: ScriptedBackend) -> None:
    rng = random.Random(5)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(120):
        await _drop_somewhere(server, rng)
    await quiet(server, backend)
    await wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 2, PATIENCE, "descriptors to be closed")


async def test_s9_a_client_that_leaves_with_its_upgrade_leaves_nothing(
    server: StreamingServer, backend: ScriptedBackend
) -> None:
    """Request and end arrive together: the session's task is called off before its first step."""
    for protocol in ("SPDY/3.1", "websocket"):
        for url in (server.exec_url(exec_params("echo")), server.port_forward_url(PortForwardParams("p", (80,)))):
            name = "portforward.k8s.io" if "portforward" in url else "v4.channel.k8s.io"
            head = (
                f"GET /{url.split('/', 3)[3]} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n"
                f"X-Stream-Protocol-Version: {name}\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
                "dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            )
            assert b"101" in await raw(server, head.encode() + b"\x80\x02garbage that ends the session")
    await quiet(server, backend)


async def _drop_somewhere(server: StreamingServer, rng: random.Random) -> None:
    url = server.exec_url(exec_params(rng.choice(["sleep", "cat", "echo", "nonsense"]), stdin=True))
    stage = rng.randrange(5)
    if stage == 0:
        return
    host, port = url.removeprefix("http://").split("/")[0].rsplit(":", 1)
    if stage == 1:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {url[url.index('/exec'):]} HTTP/1.1\r\nHost: x\r\n".encode()[: rng.randrange(60)])
        writer.transport.abort()
        return
    session, _ = await client.connect(url, client.COMMAND_PROTOCOLS)
    for kind in ("error", "stdin", "stdout", "stderr")[: rng.randrange(5)]:
        if stage == 2:
            session.begin({"streamtype": kind})
        else:
            stream = await session.open({"streamtype": kind})
            if stage == 4 and kind == "stdin":
                session.machine.send_data(stream.id, b"some input")
                session.flush()
    session.carrier.abort()


async def test_p9_a_slow_reader_stops_only_its_own_exec(server: StreamingServer, backend: ScriptedBackend) -> None:
    slow = await client.open_command(
        server.exec_url(exec_params("flood", str(1 << 30))), stdin=False, stdout=True, stderr=True, tty=False
    )
    assert await run(server, "echo", "fast") == (0, b"fast\n", b"")
    assert slow.stdout is not None
    assert len(slow.stdout.inbox) <= 4 << 20
    assert backend.active == 1
    slow.session.carrier.abort()
    await quiet(server, backend)


async def test_idle_sessions_end(backend: ScriptedBackend) -> None:
    made = StreamingServer(backend, StreamingSettings(idle_timeout=0.2))
    await made.start()
    command = await client.open_command(
        made.exec_url(exec_params("sleep")), stdin=False, stdout=True, stderr=True, tty=False
    )
    await asyncio.wait_for(command.session.carrier.lost.wait(), PATIENCE)
    await quiet(made, backend)
    await made.close()


async def test_closing_the_server_ends_everything(backend: ScriptedBackend) -> None:
    made = StreamingServer(backend, StreamingSettings())
    await made.start()
    commands = [
        await client.open_command(made.exec_url(exec_params("sleep")), stdin=False, stdout=True, stderr=True, tty=False)
        for _ in range(5)
    ]
    await wait_until(lambda: backend.active == 5, PATIENCE, "execs to start")
    watcher = await WebSocketClient.connect(made.exec_url(exec_params("sleep")), "v5.channel.k8s.io")
    await wait_until(lambda: backend.active == 6, PATIENCE, "last exec to start")
    await made.close()
    assert backend.active == 0
    for command in commands:
        with pytest.raises(Unknown, match="the daemon is stopping"):
            await command.wait_status()
        await asyncio.wait_for(command.session.carrier.lost.wait(), PATIENCE)
    await watcher.read_all()
    assert b"the daemon is stopping" in watcher.channel(3)
    assert watcher.close_code == 1001
    await watcher.close()


# -- attach --------------------------------------------------------------------------------------


async def test_several_clients_attach_and_all_see_the_output(server: StreamingServer, backend: ScriptedBackend) -> None:
    params = AttachParams("c1", stdin=True, stdout=True)
    watchers = [
        await client.open_command(server.attach_url(params), stdin=True, stdout=True, stderr=False, tty=False)
        for _ in range(3)
    ]
    await wait_until(lambda: len(backend.listeners) == 3, PATIENCE, "clients to attach")
    assert watchers[0].stdin is not None
    await watchers[0].stdin.write(b"for all")
    for watcher in watchers:
        assert watcher.stdout is not None
        assert await asyncio.wait_for(watcher.stdout.read(), PATIENCE) == b"for all"
    watchers[0].session.carrier.abort()
    await wait_until(lambda: len(backend.listeners) == 2, PATIENCE, "client to leave")
    backend.release.set()
    for watcher in watchers[1:]:
        assert watcher.stdin is not None
        await watcher.stdin.close()
        assert await watcher.wait_status() == 0
        await watcher.session.finish()
    await quiet(server, backend)


async def test_attach_to_a_missing_container_says_so(server: StreamingServer) -> None:
    command = await client.open_command(
        server.attach_url(AttachParams("missing", stdout=True)), stdin=False, stdout=True, stderr=False, tty=False
    )
    with pytest.raises(Unknown, match="error attaching to container: container missing not found"):
        await command.wait_status()
    await command.session.finish()


# -- S14 -----------------------------------------------------------------------------------------


async def test_s14_listens_on_loopback_at_a_random_port(server: StreamingServer) -> None:
    assert server.base_url.startswith("http://127.0.0.1:")
    assert not server.base_url.endswith(":0")


async def test_s14_a_token_is_good_once(server: StreamingServer) -> None:
    url = server.exec_url(exec_params("echo"))
    command = await client.open_command(url, stdin=False, stdout=True, stderr=True, tty=False)
    assert await command.wait_status() == 0
    await command.session.finish()
    with pytest.raises(Unavailable, match="404"):
        await client.connect(url, client.COMMAND_PROTOCOLS)


async def test_s14_a_token_is_bound_to_its_endpoint(server: StreamingServer) -> None:
    url = server.exec_url(exec_params("echo"))
    with pytest.raises(Unavailable, match="404"):
        await client.connect(url.replace("/exec/", "/attach/"), client.COMMAND_PROTOCOLS)
    with pytest.raises(Unavailable, match="404"):
        await client.connect(url, client.COMMAND_PROTOCOLS)


async def test_s14_a_token_expires(backend: ScriptedBackend) -> None:
    made = StreamingServer(backend, StreamingSettings(token_lifetime=0.0))
    await made.start()
    with pytest.raises(Unavailable, match="404"):
        await client.connect(made.exec_url(exec_params("echo")), client.COMMAND_PROTOCOLS)
    await made.close()


async def test_s14_tokens_are_not_logged(server: StreamingServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    url = server.exec_url(exec_params("echo", "hi"))
    token = url.rsplit("/", 1)[1]
    command = await client.open_command(url, stdin=False, stdout=True, stderr=True, tty=False)
    assert await command.wait_status() == 0
    await command.session.finish()
    await raw(server, f"GET /exec/{token} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert token not in caplog.text


async def test_requests_are_checked_as_cri_says(server: StreamingServer) -> None:
    with pytest.raises(InvalidArgument, match="tty and stderr"):
        server.exec_url(ExecParams("c", ("sh",), tty=True, stderr=True))
    with pytest.raises(InvalidArgument, match="one of stdin, stdout, or stderr"):
        server.attach_url(AttachParams("c"))
    with pytest.raises(InvalidArgument, match="container_id"):
        server.exec_url(ExecParams("", ("sh",), stdout=True))
    with pytest.raises(InvalidArgument, match="pod_sandbox_id"):
        server.port_forward_url(PortForwardParams(""))


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (b"GET /exec/ HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (b"GET /exec/../../etc HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (b"GET /exec/nonsense HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (b"PUT /exec/nonsense HTTP/1.1\r\nHost: x\r\n\r\n", b"405"),
        (b"POST /exec/nonsense HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", b"413"),
        (b"POST /exec/n HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n", b"417"),
        (b"GET /exec/nonsense HTTP/1.1\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"GET /exec/x HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (128 << 10) + b"\r\n\r\n", b"431"),
        (b"GET /exec/x HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 20000 + b"\r\n", b"431"),
    ],
)
async def test_s14_bad_requests_are_refused(server: StreamingServer, request_text: bytes, status: bytes) -> None:
    answer = await raw(server, request_text)
    assert answer.startswith(b"HTTP/1.1 " + status), answer[:200]
    assert await run(server, "echo", "alive") == (0, b"alive\n", b"")


async def test_plain_request_with_a_good_token_is_told_what_is_missing(server: StreamingServer) -> None:
    path = "/" + server.exec_url(exec_params("echo")).split("/", 3)[3]
    answer = await raw(server, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400")
    path = "/" + server.exec_url(exec_params("echo")).split("/", 3)[3]
    answer = await raw(
        server, f"GET {path} HTTP/1.1\r\nHost: x\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n".encode()
    )
    assert b"missing upgrade headers" in answer
    path = "/" + server.exec_url(exec_params("echo")).split("/", 3)[3]
    answer = await raw(server, f"GET {path} HTTP/1.1\r\nHost: x\r\nX-Stream-Protocol-Version: v9\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 403")
    assert answer.lower().count(b"x-accepted-stream-protocol-versions") == 5


async def test_s14_garbage_connections_do_not_hurt(server: StreamingServer, backend: ScriptedBackend) -> None:
    rng = random.Random(1)
    for _ in range(30):
        await asyncio.gather(*(raw(server, rng.randbytes(rng.randrange(1, 300)) + b"\r\n\r\n") for _ in range(20)))
    assert await run(server, "echo", "alive") == (0, b"alive\n", b"")
    await quiet(server, backend)


async def test_garbage_after_the_upgrade_ends_that_session_only(
    server: StreamingServer, backend: ScriptedBackend
) -> None:
    rng = random.Random(2)
    for _ in range(30):
        session, _ = await client.connect(server.exec_url(exec_params("sleep")), client.COMMAND_PROTOCOLS)
        session.carrier.send([b"\x80\x02" + rng.randbytes(rng.randrange(6, 200))])
        session.carrier.abort()
    assert await run(server, "echo", "alive") == (0, b"alive\n", b"")
    await quiet(server, backend)


async def test_s14_tls(backend: ScriptedBackend, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate),
         "-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )
    made = StreamingServer(backend, StreamingSettings(
        tls_certificate=str(certificate), tls_key=str(key), tls_client_ca=str(certificate),
    ))
    await made.start()
    assert made.base_url.startswith("https://")
    context = ssl.create_default_context(cafile=str(certificate))
    with pytest.raises(Unavailable):
        await client.connect(made.exec_url(exec_params("echo")), client.COMMAND_PROTOCOLS, context=context)
    context.load_cert_chain(certificate, key)
    command = await client.open_command(
        made.exec_url(exec_params("flood", str(2 << 20))), stdin=False, stdout=True, stderr=True, tty=False,
        context=context,
    )
    assert command.stdout is not None
    assert len(await read_all(command.stdout)) == 2 << 20
    assert await command.wait_status() == 0
    await command.session.finish()
    await quiet(made, backend)
    await made.close()


# -- port-forward --------------------------------------------------------------------------------


@pytest.fixture
async def echo_port(backend: ScriptedBackend) -> AsyncIterator[int]:
    """A pod's port 80 that sends back what it gets and closes after the client's end."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                if data.startswith(b"RESET"):
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
                    return
                writer.write(data)
                await writer.drain()
            writer.write(b"-end")
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    backend.ports[80] = listener.sockets[0].getsockname()[1]
    yield 80
    listener.close()
    await listener.wait_closed()


async def forward_session(server: StreamingServer):  # type: ignore[no-untyped-def]
    session, chosen = await client.connect(
        server.port_forward_url(PortForwardParams("p1")), [client.PORT_FORWARD_PROTOCOL]
    )
    assert chosen == client.PORT_FORWARD_PROTOCOL
    return session


async def test_p8_each_direction_closes_by_itself(server: StreamingServer, echo_port: int) -> None:
    session = await forward_session(server)
    data, error = await client.open_forward(session, echo_port, 0)
    await data.write(b"ping")
    assert await data.read() == b"ping"
    await data.close()
    assert await read_all(data) == b"-end"
    assert await read_all(error) == b""
    await session.finish()


async def test_p8_many_connections_and_random_resets_lose_nothing_on_the_others(
    server: StreamingServer, backend: ScriptedBackend, echo_port: int
) -> None:
    session = await forward_session(server)
    rng = random.Random(3)

    async def one(number: int) -> bool:
        data, _ = await client.open_forward(session, echo_port, number)
        payload = random.Random(number).randbytes(rng.randrange(1, 200_000))
        if number % 4 == 0:
            await data.write(payload[:1000])
            data.reset()
            return True
        if number % 4 == 1:
            await data.write(b"RESET")
            with contextlib.suppress(ConnectionResetError):
                assert await read_all(data) == b""
            return True
        await data.write(payload)
        await data.close()
        return await read_all(data) == payload + b"-end"

    async with asyncio.timeout(PATIENCE):
        assert all(await asyncio.gather(*(one(number) for number in range(200))))
    await session.finish()
    await quiet(server, backend)


async def test_p8_a_refused_port_says_why_and_spares_running_connections(
    server: StreamingServer, echo_port: int
) -> None:
    session = await forward_session(server)
    _, error = await client.open_forward(session, 81, 1)
    assert await read_all(error) == (
        b'error forwarding port 81 to pod p1, uid : failed to connect to localhost:81 inside namespace "p1"'
    )
    data, _ = await client.open_forward(session, echo_port, 2)
    refused, error = await client.open_forward(session, 81, 3)
    assert await read_all(error) == b""
    with pytest.raises(ConnectionResetError):
        await refused.read()
    await data.write(b"x")
    assert await data.read() == b"x"
    await session.finish()


async def test_bad_forward_streams_are_refused(server: StreamingServer, echo_port: int) -> None:
    session = await forward_session(server)
    for headers in (
        {"streamtype": "data"}, {"streamtype": "data", "port": "0"}, {"streamtype": "data", "port": "70000"},
        {"streamtype": "data", "port": "x"}, {"streamtype": "stdin", "port": "80"}, {"port": "80"},
    ):
        with pytest.raises(ConnectionRefusedError):
            await session.open(headers)
    error = await session.open({"streamtype": "error", "port": str(echo_port)})
    data = await session.open({"streamtype": "data", "port": str(echo_port)})
    await data.write(b"without request numbers")
    assert await data.read() == b"without request numbers"
    await error.close()
    await session.finish()


async def test_half_a_pair_is_given_up(backend: ScriptedBackend) -> None:
    made = StreamingServer(backend, StreamingSettings(creation_timeout=0.1))
    await made.start()
    session = await forward_session(made)
    error = await session.open({"streamtype": "error", "port": "80", "requestid": "1"})
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(error.read(), PATIENCE)
    await session.finish()
    await quiet(made, backend)
    await made.close()


async def test_p9_a_connection_that_is_not_read_does_not_stop_the_others(
    server: StreamingServer, backend: ScriptedBackend, echo_port: int
) -> None:
    """With windows on both sides, the stuck stream waits alone."""
    stuck = socket.create_server(("127.0.0.1", 0))
    backend.ports[90] = stuck.getsockname()[1]
    session = await forward_session(server)
    blocked, _ = await client.open_forward(session, 90, 1)
    filling = asyncio.get_running_loop().create_task(blocked.write(b"x" * (64 << 20)))
    data, _ = await client.open_forward(session, echo_port, 2)
    await data.write(b"y" * 100_000)
    await data.close()
    assert await read_all(data) == b"y" * 100_000 + b"-end"
    blocked.reset()
    with pytest.raises(BrokenPipeError):
        await filling
    await session.finish()
    await quiet(server, backend)
    stuck.close()


async def test_p9_streams_that_nobody_reads_are_reset_when_they_are_in_the_way(
    server: StreamingServer, backend: ScriptedBackend, echo_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer without windows fills one stream, which stops the connection, until that stream is given up."""
    monkeypatch.setattr(spdy_session, "STALL_TIMEOUT", 0.2)
    stuck = socket.create_server(("127.0.0.1", 0))
    backend.ports[90] = stuck.getsockname()[1]
    session = await forward_session(server)
    session.machine._peer_keeps_windows = session.machine._peer_keeps_session_window = False
    blocked, _ = await client.open_forward(session, 90, 1)
    data, _ = await client.open_forward(session, echo_port, 2)
    filling = asyncio.get_running_loop().create_task(blocked.write(b"x" * (16 << 20)))
    with contextlib.suppress(BrokenPipeError):
        await asyncio.wait_for(filling, PATIENCE)
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(blocked.read(), PATIENCE)
    await data.write(b"y")
    assert await asyncio.wait_for(data.read(), PATIENCE) == b"y"
    await session.finish()
    await quiet(server, backend)
    stuck.close()


async def test_p9_a_session_is_bounded_whatever_the_number_of_its_streams(
    server: StreamingServer, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spdy_session, "SESSION_WINDOW", 256 << 10)
    stuck = socket.create_server(("127.0.0.1", 0), backlog=100)
    backend.ports[90] = stuck.getsockname()[1]
    held: list[object] = []
    hold = wire.Wire.hold
    monkeypatch.setattr(wire.Wire, "hold", lambda self, reason: (held.append(reason), hold(self, reason))[1])
    session = await forward_session(server)
    session.machine._peer_keeps_windows = session.machine._peer_keeps_session_window = False
    streams = [(await client.open_forward(session, 90, number))[0] for number in range(20)]
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(stream.write(b"x" * (8 << 20))) for stream in streams]
    await wait_until(lambda: "session" in held, PATIENCE, "connection to be held")
    session.carrier.abort()
    await asyncio.gather(*tasks, return_exceptions=True)
    await quiet(server, backend)
    stuck.close()


# -- WebSocket -----------------------------------------------------------------------------------


async def websocket_exec(server: StreamingServer, protocol: str, *argv: str, stdin: bool = False) -> WebSocketClient:
    url = server.exec_url(exec_params(*argv, stdin=stdin))
    return await WebSocketClient.connect(url, *([protocol] if protocol else []))


@pytest.mark.parametrize(
    "protocol", ["v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io", ""]
)
async def test_websocket_exec(server: StreamingServer, protocol: str) -> None:
    connection = await websocket_exec(server, protocol, "complain", "7")
    assert connection.subprotocol == protocol
    await connection.read_all()
    assert connection.messages[0] == b"\x01"
    assert connection.channel(1) == b"to stdout"
    assert connection.channel(2) == b"to stderr"
    if protocol[:3] in ("v5.", "v4."):
        assert json.loads(connection.channel(3))["details"]["causes"][0] == {"reason": "ExitCode", "message": "7"}
    else:
        assert connection.channel(3).startswith(b"command terminated")
    assert connection.close_code == 1000
    await connection.close()


@pytest.mark.parametrize("protocol", ["v4.base64.channel.k8s.io", "base64.channel.k8s.io"])
async def test_websocket_base64(server: StreamingServer, protocol: str) -> None:
    connection = await websocket_exec(server, protocol, "cat", stdin=True)
    connection.send("0" + base64.b64encode(b"hello \xff\x00").decode())
    await connection.wait_for(lambda: len(connection.messages) >= 2)
    assert connection.messages[0] == "1"
    assert connection.messages[1] == "1" + base64.b64encode(b"hello \xff\x00").decode()
    connection.send("0!!!")
    await connection.read_all()
    assert connection.close_code == 1007
    await connection.close()


async def test_websocket_v5_closes_stdin_by_signal(server: StreamingServer) -> None:
    connection = await websocket_exec(server, "v5.channel.k8s.io", "count", stdin=True)
    payload = b"\x00" + os.urandom(300_000)
    connection.send(payload)
    connection.send(b"\xff\x00")
    await connection.read_all()
    assert connection.channel(1) == b"300000"
    assert connection.close_code == 1000
    await connection.close()


async def test_websocket_v4_has_no_close_signal(server: StreamingServer) -> None:
    connection = await websocket_exec(server, "v4.channel.k8s.io", "cat", stdin=True)
    connection.send(b"\xff\x00")
    connection.send(b"\x00on")
    await connection.wait_for(lambda: connection.channel(1) == b"on")
    await connection.close()


@pytest.mark.parametrize("signal", [b"\xff", b"\xff\x09", b"\xff\x00\x00"])
async def test_websocket_bad_close_signal_ends_the_session(server: StreamingServer, signal: bytes) -> None:
    connection = await websocket_exec(server, "v5.channel.k8s.io", "cat", stdin=True)
    connection.send(signal)
    await connection.read_all()
    assert connection.close_code == 1002
    await connection.close()


async def test_websocket_resize_ping_and_unknown_channels(server: StreamingServer, backend: ScriptedBackend) -> None:
    url = server.exec_url(exec_params("size", "1", tty=True, stdin=True))
    connection = await WebSocketClient.connect(url, "v5.channel.k8s.io")
    connection.ping()
    connection.send(b"\x09dropped")
    connection.send(b"")
    connection.send(b'\x04{"Width":132,"Height":43}')
    await connection.read_all()
    assert backend.sizes == [(132, 43)]
    assert connection.pongs == 1
    await connection.close()


async def test_websocket_unknown_protocol_is_refused(server: StreamingServer) -> None:
    connection = await WebSocketClient.connect(server.exec_url(exec_params("echo")), "v9.channel.k8s.io")
    assert connection.rejected is not None
    assert connection.rejected[0] == 403
    await connection.close()


async def test_websocket_garbage_ends_the_session(server: StreamingServer, backend: ScriptedBackend) -> None:
    rng = random.Random(4)
    for _ in range(20):
        connection = await websocket_exec(server, "v5.channel.k8s.io", "sleep")
        connection.send_raw(b"\xf3" + rng.randbytes(50))
        await connection.read_all()
        assert connection.close_code == 1002
        await connection.close()
    await quiet(server, backend)


async def test_s9_websocket_client_that_leaves_ends_its_exec(server: StreamingServer, backend: ScriptedBackend) -> None:
    connection = await websocket_exec(server, "v5.channel.k8s.io", "sleep")
    await wait_until(lambda: backend.active == 1, PATIENCE, "exec to start")
    await connection.close()
    await quiet(server, backend)


async def test_websocket_port_forward_channels(server: StreamingServer, echo_port: int) -> None:
    url = server.port_forward_url(PortForwardParams("p1", (echo_port, 81)))
    connection = await WebSocketClient.connect(url, "v4.channel.k8s.io")
    await connection.wait_for(lambda: len(connection.channel(3)) > 2)
    assert connection.channel(0) == struct.pack("<H", echo_port)
    assert connection.channel(1) == struct.pack("<H", echo_port)
    assert connection.channel(2) == struct.pack("<H", 81)
    assert connection.channel(3).startswith(struct.pack("<H", 81) + b"error forwarding port 81 to pod p1")
    connection.send(b"\x00hello")
    await connection.wait_for(lambda: connection.channel(0)[2:] == b"hello")
    await connection.close()


async def test_spdy_tunnelled_through_websocket(server: StreamingServer, echo_port: int) -> None:
    url = server.port_forward_url(PortForwardParams("p1"))
    connection = await WebSocketClient.connect(url, "SPDY/3.1+portforward.k8s.io")
    assert connection.subprotocol == "SPDY/3.1+portforward.k8s.io"
    from supervisord_ctr.streaming import spdy

    machine = spdy.Session(client=True)
    error = machine.open_stream({"streamtype": "error", "port": "80", "requestid": "0"}, fin=True)
    data = machine.open_stream({"streamtype": "data", "port": "80", "requestid": "0"})
    machine.send_data(data, b"through the tunnel", fin=True)
    rng = random.Random(6)
    stream = b"".join(machine.take_output())
    while stream:
        size = rng.randrange(1, 20)
        connection.send(stream[:size])
        stream = stream[size:]
    seen: list[spdy.Event] = []

    def ended() -> bool:
        for message in connection.messages:
            assert isinstance(message, bytes)
            seen.extend(machine.receive(message))
        connection.messages.clear()
        return {event.stream_id for event in seen if isinstance(event, spdy.StreamEnded)} == {error, data}

    await connection.wait_for(ended)
    received = b"".join(bytes(event.data) for event in seen if isinstance(event, spdy.DataReceived))
    assert received == b"through the tunnel-end"
    await connection.close()
