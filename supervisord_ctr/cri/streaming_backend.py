"""What carries out exec, attach and port-forward for the streaming server.

Owns moving bytes between a client's streams and a container's. Backpressure goes all the way: an
exec whose client does not read fills its own pipe and waits; an attached client that does not read
is cut off by the shim (P9).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from supervisord_ctr import errors
from supervisord_ctr.cri import exec_process
from supervisord_ctr.cri.core import Core
from supervisord_ctr.cri.state import Pod
from supervisord_ctr.linux import namespaces
from supervisord_ctr.names import CRI_NAMESPACE
from supervisord_ctr.runtime.attach import AttachConnection
from supervisord_ctr.streaming import ByteReader, ByteWriter

_STDOUT, _STDERR = 1, 2


class StreamingBackend:
    """`streaming.Backend` over the CRI room."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def exec(
        self, container_id: str, argv: Sequence[str], *, tty: bool, stdin: ByteReader | None,
        stdout: ByteWriter | None, stderr: ByteWriter | None, resize: AsyncIterator[tuple[int, int]],
    ) -> int:
        """Run a command with the client's streams; returns its exit code."""
        container = exec_process.running_container(self._core, container_id)
        async with exec_process.started(
            self._core, container, argv, tty=tty, stdin=stdin is not None, stdout=stdout is not None,
            stderr=stderr is not None,
        ) as running:
            owner = self._core.owner
            outputs = {}
            for path, writer in ((running.pipes.stdout, stdout), (running.pipes.stderr, stderr)):
                if path and writer is not None:
                    output = _Output(running, path, writer)
                    outputs[owner.start(output.copy(), "exec output")] = output
            helpers = []
            if stdin is not None:
                helpers.append(owner.start(_copy_in(running, stdin), "exec stdin"))
            if tty:
                helpers.append(owner.start(_resize_exec(running, resize), "exec resize"))
            try:
                found = await running.wait()
                await _drain(outputs, self._core.settings.cri.drain_exec_io_timeout)
                return found.status
            finally:
                await _end_tasks([*outputs, *helpers])

    async def attach(
        self, container_id: str, *, tty: bool, stdin: ByteReader | None, stdout: ByteWriter | None,
        stderr: ByteWriter | None, resize: AsyncIterator[tuple[int, int]],
    ) -> None:
        """Join a running container's streams until its process ends or the client leaves."""
        container = exec_process.running_container(self._core, container_id)
        connection: AttachConnection = await self._core.tasks.attach(
            CRI_NAMESPACE, container.id, stdin=stdin is not None, stdout=stdout is not None, stderr=stderr is not None
        )
        owner = self._core.owner
        once = container.config.stdin_once and not container.config.tty
        shown = owner.start(_show(connection, {_STDOUT: stdout, _STDERR: stderr}), "attach output")
        helpers = [shown]
        ends = [shown]
        if stdin is not None:
            helpers.append(owner.start(_feed(connection, stdin, once, shown), "attach stdin"))
            if not once:
                # Nothing more to say to a container that goes on: the client has detached.
                ends.append(helpers[-1])
        if tty:
            helpers.append(owner.start(_resize_attached(connection, resize), "attach resize"))
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            try:
                await _end_tasks(helpers)
            finally:
                await connection.close()

    async def port_forward(self, sandbox_id: str, port: int) -> socket.socket:
        """A connection to `port` on the loopback of the pod, IPv4 first, then IPv6."""
        pod = self._core.state.pod(sandbox_id)
        if not pod.ready:
            raise errors.FailedPrecondition(
                f"sandbox container {pod.id!r} is not running", kind="sandbox", key=pod.id
            )
        failures = []
        for name, family, address in (("IPv4", socket.AF_INET, "127.0.0.1"), ("IPv6", socket.AF_INET6, "::1")):
            try:
                connection = await self._core.executors.run_io(self._socket, pod, family)
                try:
                    await asyncio.get_running_loop().sock_connect(connection, (address, port))
                except BaseException:
                    connection.close()
                    raise
                return connection
            except OSError as error:
                failures.append(f"{name}: {os.strerror(error.errno or 0).lower()}")
        raise errors.Unavailable(
            f'failed to connect to localhost:{port} inside namespace "{pod.id}", {", ".join(failures)}', kind="sandbox",
            key=pod.id,
        )

    def _socket(self, pod: Pod, family: socket.AddressFamily) -> socket.socket:
        def make() -> socket.socket:
            return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)

        if pod.host_network:
            return make()
        path: Path = self._core.environments.namespace(pod.id, "net")
        return namespaces.in_netns(path, make)


async def _end_tasks(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Output:
    """One output of an exec on its way to the client."""

    def __init__(self, running: exec_process.Running, path: str, writer: ByteWriter) -> None:
        self._running = running
        self._path = path
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._reading_since: float | None = self._loop.time()

    @property
    def quiet(self) -> float:
        """Seconds for which nothing came; 0 while the client is waited for."""
        return 0.0 if self._reading_since is None else self._loop.time() - self._reading_since

    async def copy(self) -> None:
        """Process to client; a client that closed this stream leaves the process a reader all the same."""
        broken = False
        while data := await self._running.pipes.read(self._path):
            self._reading_since = None
            if not broken:
                try:
                    await self._writer.write(data)
                except BrokenPipeError:
                    broken = True
            self._reading_since = self._loop.time()
            await asyncio.sleep(0)  # a pipe that is always full must not keep the loop to itself
        with contextlib.suppress(BrokenPipeError):
            await self._writer.close()


async def _drain(outputs: dict[asyncio.Task[None], _Output], patience: float) -> None:
    """Wait for what an ended process left in its pipes.

    A child in the background may hold a pipe open for ever, so silence ends the wait; a client that
    reads slowly does not, because what it has not read yet was written by the process itself.
    """
    pending = set(outputs)
    while pending:
        left = patience - min(outputs[task].quiet for task in pending)
        if left <= 0:
            return
        _, pending = await asyncio.wait(pending, timeout=left)


async def _copy_in(running: exec_process.Running, reader: ByteReader) -> None:
    """Client to process, to the end of either."""
    with contextlib.suppress(BrokenPipeError):
        while data := await reader.read():
            await running.pipes.write_stdin(data)
    await running.close_stdin()


async def _resize_exec(running: exec_process.Running, sizes: AsyncIterator[tuple[int, int]]) -> None:
    async for width, height in sizes:
        with contextlib.suppress(errors.Error):
            await running.resize(width, height)


async def _resize_attached(connection: AttachConnection, sizes: AsyncIterator[tuple[int, int]]) -> None:
    async for width, height in sizes:
        await connection.resize(width, height)


async def _feed(
    connection: AttachConnection, reader: ByteReader, once: bool, shown: asyncio.Task[None]
) -> None:
    """Client to container; the end closes the container's input only where it asked for that."""
    try:
        while data := await reader.read():
            await connection.write(data)
        if once:
            await connection.close_stdin()
    except errors.Unavailable:
        await asyncio.wait([shown])  # the process has ended; the other direction tells how


async def _show(connection: AttachConnection, writers: dict[int, ByteWriter | None]) -> None:
    """Container to client until the process ends or the client has closed every output."""
    while (frame := await connection.read()) is not None:
        if frame.control is not None:
            if "error" in frame.control:
                raise errors.Unavailable(str(frame.control["error"]), kind="attach")
            if "exit" in frame.control:
                return
            continue
        writer = writers.get(frame.channel)
        if writer is None:
            continue
        try:
            await writer.write(frame.data)
        except BrokenPipeError:
            writers[frame.channel] = None
            if not any(writers.values()):
                return
    raise errors.Unavailable("the connection to the container's streams was cut off", kind="attach")
