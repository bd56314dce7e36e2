"""The streaming server over real sockets: every protocol, every way to end (S9, S14, P8, P9)."""

from __future__ import annotations

import asyncio
import json
import os
import random
import ssl
import subprocess
from pathlib import Path

import pytest

from supervisord_ctr.aio import wait_until
from supervisord_ctr.errors import InvalidArgument, Unavailable, Unknown
from supervisord_ctr.settings import StreamingSettings
from supervisord_ctr.streaming import AttachParams, ExecParams, PortForwardParams, client, spdy_session, wire
from supervisord_ctr.streaming.server import StreamingServer
from tests.support.streaming import PATIENCE, ScriptedBackend, WebSocketClient, read_all
from tests.support.streaming_calls import exec_params, quiet, raw, run

pytestmark = pytest.mark.slow

#: Connections that talk nonsense; a thorough run has 10000.
GARBAGE = int(os.environ.get("PCTR_TEST_GARBAGE", "600"))


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
    for _ in range(GARBAGE // 20):
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
