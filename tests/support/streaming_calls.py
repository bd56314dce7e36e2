"""Calls on a streaming server that several suites make."""

from __future__ import annotations

import asyncio
import contextlib

from supervisord_ctr.aio import wait_until
from supervisord_ctr.streaming import ExecParams, PortForwardParams, client
from supervisord_ctr.streaming.server import StreamingServer
from tests.support.streaming import PATIENCE, ScriptedBackend, read_all


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


async def forward_session(server: StreamingServer):  # type: ignore[no-untyped-def]
    session, chosen = await client.connect(
        server.port_forward_url(PortForwardParams("p1")), [client.PORT_FORWARD_PROTOCOL]
    )
    assert chosen == client.PORT_FORWARD_PROTOCOL
    return session
