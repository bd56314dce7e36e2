"""Attach through CRI: several clients, the end of input, the end of the process (P9)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import pytest

from supervisord_ctr.aio import wait_until
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.streaming import client
from tests.support.streaming import PATIENCE, WebSocketClient, read_all
from tests.support.streaming_pod import Pod, running_pod

pytestmark = pytest.mark.slow

ECHO = ("sh", "-c", "while read line; do echo got $line; done; echo end of input")


@pytest.fixture(scope="module")
def pod() -> Iterator[Pod]:
    with running_pod() as made:
        yield made


async def attach(pod: Pod, container: str, *, stdin: bool = True, tty: bool = False) -> client.Command:
    return await client.open_command(
        pod.attach_url(container, stdin=stdin, tty=tty), stdin=stdin, stdout=True, stderr=not tty, tty=tty
    )


async def read_until(stream, text: bytes) -> bytes:  # type: ignore[no-untyped-def]
    seen = b""
    while text not in seen:
        piece = await asyncio.wait_for(stream.read(), PATIENCE)
        assert piece, seen
        seen += piece
    return seen


async def test_several_clients_see_the_output_and_any_may_type(pod: Pod) -> None:
    container = pod.run(*ECHO, stdin=True)
    clients = [await attach(pod, container) for _ in range(3)]
    for joined in clients:  # what it typed itself shows that it sees what comes from now on
        assert joined.stdin is not None
        await joined.stdin.write(b"here\n")
        await read_until(joined.stdout, b"got here\n")
    for number, typist in enumerate(clients):
        assert typist.stdin is not None
        await typist.stdin.write(b"line %d\n" % number)
        for watcher in clients:
            await read_until(watcher.stdout, b"got line %d\n" % number)
    clients[0].session.carrier.abort()
    assert clients[1].stdin is not None
    await clients[1].stdin.write(b"still\n")
    await read_until(clients[2].stdout, b"got still\n")
    pod.stop(container)
    for left in clients[1:]:
        assert left.stdout is not None
        await read_all(left.stdout)
        assert await asyncio.wait_for(left.wait_status(), PATIENCE) == 0
        await left.session.finish()


async def test_stdin_once_ends_the_process_input_with_its_first_client(pod: Pod) -> None:
    container = pod.run(*ECHO, stdin=True, stdin_once=True)
    command = await attach(pod, container)
    assert command.stdin is not None
    assert command.stdout is not None
    await command.stdin.write(b"hello\n")
    await command.stdin.close()
    assert await read_all(command.stdout) == b"got hello\nend of input\n"
    assert await asyncio.wait_for(command.wait_status(), PATIENCE) == 0
    await command.session.finish()
    await wait_until(lambda: pod.state(container) == pb.CONTAINER_EXITED, PATIENCE, "container to end")


async def test_without_stdin_once_the_end_of_input_is_a_detach(pod: Pod) -> None:
    container = pod.run(*ECHO, stdin=True)
    command = await attach(pod, container)
    assert command.stdin is not None
    await command.stdin.write(b"one\n")
    await read_until(command.stdout, b"got one\n")
    await command.stdin.close()
    assert await asyncio.wait_for(command.wait_status(), PATIENCE) == 0
    await command.session.finish()
    assert pod.state(container) == pb.CONTAINER_RUNNING
    again = await attach(pod, container)
    assert again.stdin is not None
    await again.stdin.write(b"two\n")
    await read_until(again.stdout, b"got two\n")
    again.session.carrier.abort()
    pod.stop(container)


async def test_attach_without_input_watches_until_the_end(pod: Pod) -> None:
    container = pod.run(*ECHO, stdin=True, stdin_once=True)
    watcher = await attach(pod, container, stdin=False)
    typist = await attach(pod, container)
    assert typist.stdin is not None
    assert watcher.stdout is not None
    async with asyncio.TaskGroup() as group:
        found = group.create_task(read_until(watcher.stdout, b"got seen\n"))
        while not found.done():  # until the watcher has joined, nobody shows it anything
            await typist.stdin.write(b"seen\n")
            await asyncio.wait((found,), timeout=0.2)
    await typist.stdin.close()
    assert b"end of input\n" in await read_all(watcher.stdout)
    assert await asyncio.wait_for(watcher.wait_status(), PATIENCE) == 0
    await watcher.session.finish()
    await typist.session.finish()


async def test_attach_to_a_container_that_has_ended_fails_at_once(pod: Pod) -> None:
    container = pod.run("true")
    await wait_until(lambda: pod.state(container) == pb.CONTAINER_EXITED, PATIENCE, "container to end")
    with pytest.raises(grpc.RpcError, match="CONTAINER_EXITED"):
        pod.attach_url(container)


async def test_terminal_is_shared_and_resized(pod: Pod) -> None:
    container = pod.run("sh", "-c", "while read line; do stty size; done", stdin=True, tty=True)
    command = await attach(pod, container, tty=True)
    assert command.stdin is not None
    assert command.stdout is not None
    await command.send_resize(99, 31)
    seen = b""
    async with asyncio.timeout(PATIENCE):
        while b"31 99" not in seen:
            await command.stdin.write(b"\n")
            piece = await command.stdout.read()
            assert piece, seen
            seen += piece
    pod.stop(container)
    await read_all(command.stdout)
    assert await asyncio.wait_for(command.wait_status(), PATIENCE) == 0
    await command.session.finish()


async def test_websocket_attach(pod: Pod) -> None:
    container = pod.run(*ECHO, stdin=True, stdin_once=True)
    connection = await WebSocketClient.connect(pod.attach_url(container, stdin=True), "v5.channel.k8s.io")
    connection.send(b"\x00over websocket\n")
    await connection.wait_for(lambda: b"got over websocket\n" in connection.channel(1))
    connection.send(b"\xff\x00")
    await connection.read_all()
    assert connection.channel(1).endswith(b"end of input\n")
    assert b"Success" in connection.channel(3)
    await connection.close()
