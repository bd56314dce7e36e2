"""The user's side of a streaming session: our standard streams and terminal, or listening ports.

Owns the threads that read and write the user's descriptors (which may be terminals that other
programs share, so they are never made non-blocking) and the terminal's mode, which is always put back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from typing import Any

from pctr import terminal
from pctr.command import Failed, UsageError
from pctr.output import warn
from supervisord_ctr import errors
from supervisord_ctr.aio import TaskOwner
from supervisord_ctr.streaming import client
from supervisord_ctr.streaming.portforward import join
from supervisord_ctr.streaming.spdy_session import SpdySession, SpdyStream
from supervisord_ctr.streaming.wire import keep_alive

#: Bytes read from the user's descriptors at once.
_CHUNK = 256 << 10
#: Keys that leave an attached terminal: ctrl-p ctrl-q, as everywhere.
_DETACH = b"\x10\x11"


class DetachKeys:
    """Takes the detaching keys out of what is typed."""

    def __init__(self) -> None:
        self._held = b""

    def filter(self, data: bytes) -> tuple[bytes, bool]:
        """What goes on to the process, and whether the keys were typed."""
        data = self._held + data
        place = data.find(_DETACH)
        if place >= 0:
            return data[:place], True
        self._held = data[-1:] if data.endswith(_DETACH[:1]) else b""
        return data[: len(data) - len(self._held)], False


def run_session(url: str, *, stdin: bool, tty: bool, detachable: bool) -> int:
    """Be the client of an exec or attach; its exit status. Raises `Failed` and the errors of the client."""
    if tty and not (os.isatty(0) and stdin):
        raise UsageError("--tty needs --interactive and a terminal as standard input")
    with terminal.raw(0) if tty else contextlib.nullcontext():
        return asyncio.run(_session(url, stdin=stdin, tty=tty, detachable=detachable))


async def _session(url: str, *, stdin: bool, tty: bool, detachable: bool) -> int:
    command = await client.open_command(url, stdin=stdin, stdout=True, stderr=not tty, tty=tty)
    owner = TaskOwner("session")
    left = asyncio.Event()
    try:
        if tty:
            changed = asyncio.Event()  # listened for before the size is read: a change in between is not lost
            asyncio.get_running_loop().add_signal_handler(signal.SIGWINCH, changed.set)
            await _send_size(command)  # before any input: what is typed ahead meets a terminal of the right size
            owner.start(_send_sizes(command, changed), "resize")
        if command.stdin is not None:
            owner.start(_send_input(command.stdin, DetachKeys() if detachable else None, left), "stdin")
        outputs = [
            owner.start(_write_output(stream, descriptor), "output")
            for stream, descriptor in ((command.stdout, 1), (command.stderr, 2)) if stream is not None
        ]
        ended = owner.start(_end(command, outputs), "status")
        leaving = owner.start(left.wait(), "detach")
        waiting: set[asyncio.Task[Any]] = {ended, leaving, *outputs}
        while not ended.done() and not leaving.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for output in done.intersection(outputs):
                output.result()  # our own reader is gone: so are we
        return ended.result() if ended.done() else 0
    finally:
        await owner.close()
        await _quickly(command.session.finish())


async def _end(command: client.Command, outputs: list[asyncio.Task[None]]) -> int:
    code = await command.wait_status()
    await asyncio.gather(*outputs)
    return code


async def _quickly(work: Awaitable[None]) -> None:
    """The session is over; a server that does not close in time is left alone."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            await work


async def _send_input(stream: SpdyStream, keys: DetachKeys | None, left: asyncio.Event) -> None:
    queue: asyncio.Queue[bytes] = asyncio.Queue(4)
    _start_reader(asyncio.get_running_loop(), queue)
    with contextlib.suppress(BrokenPipeError):
        while data := await queue.get():
            if keys is not None:
                data, detach = keys.filter(data)
                if detach:
                    left.set()
                    return
            if data:
                await stream.write(data)
    await stream.close()


def _start_reader(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[bytes]) -> None:
    """Read standard input on a thread that may stay in read(2) when the session is over."""

    def put(data: bytes) -> None:
        waiting: Future[None] = asyncio.run_coroutine_threadsafe(queue.put(data), loop)
        waiting.result()

    def work() -> None:
        with contextlib.suppress(RuntimeError, CancelledError):
            while True:
                try:
                    data = os.read(0, _CHUNK)
                except OSError:
                    data = b""
                put(data)
                if not data:
                    return

    threading.Thread(target=work, name="stdin", daemon=True).start()


async def _write_output(stream: SpdyStream, descriptor: int) -> None:
    """Everything that comes goes out; when nobody reads our output any more, the session ends."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionResetError):
        while data := await stream.read():
            await loop.run_in_executor(None, _write_all, descriptor, data)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]


async def _send_size(command: client.Command) -> None:
    width, height = terminal.size(0)
    if width and height:
        await command.send_resize(width, height)


async def _send_sizes(command: client.Command, changed: asyncio.Event) -> None:
    while True:
        await changed.wait()
        changed.clear()
        await _send_size(command)


# -- port-forward --------------------------------------------------------------------------------


class Forwarder:
    """Listening ports and the session behind them, which is made anew when it was lost."""

    def __init__(self, ask_url: Callable[[], str]) -> None:
        self._ask_url = ask_url
        self._session: SpdySession | None = None
        self._lock = asyncio.Lock()
        self._requests = 0
        self._owner = TaskOwner("port-forward")

    async def session(self) -> SpdySession:
        """A session that stands."""
        async with self._lock:
            if self._session is None or self._session.carrier.lost.is_set() or self._session.machine.gone_away:
                url = await asyncio.get_running_loop().run_in_executor(None, self._ask_url)
                self._session, _ = await client.connect(url, [client.PORT_FORWARD_PROTOCOL])
            return self._session

    async def listen(self, address: str, local: int, remote: int) -> None:
        """Accept and forward until cancelled."""
        loop = asyncio.get_running_loop()
        with _listening(address, local) as listener:
            listener.setblocking(False)
            host, port = listener.getsockname()[:2]
            print(f"forwarding from {f'[{host}]' if ':' in host else host}:{port} to port {remote}", flush=True)
            while True:
                connection, _ = await loop.sock_accept(listener)
                connection.setblocking(False)
                self._owner.start(self._forward(connection, remote), f"connection to port {remote}")

    async def _forward(self, connection: socket.socket, remote: int) -> None:
        with connection:
            keep_alive(connection)
            try:
                session = await self.session()
                self._requests += 1
                data, error = await client.open_forward(session, remote, self._requests)
            except (errors.Error, OSError, TimeoutError, ValueError) as failure:
                warn(f"port {remote}: {failure}")
                return
            try:
                await join(connection, data)
            finally:
                data.reset()
            await _report(error, remote)

    async def close(self) -> None:
        """End every connection and the session."""
        await self._owner.close()
        if self._session is not None:
            await _quickly(self._session.finish())


def _listening(address: str, port: int) -> socket.socket:
    try:
        return socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                                    backlog=256)
    except OSError as error:
        raise Failed(f"cannot listen on {address}:{port}: {(error.strerror or str(error)).lower()}") from error


async def _report(error: SpdyStream, remote: int) -> None:
    """Print what the server says of a connection that failed."""
    text = b""
    with contextlib.suppress(ConnectionResetError, TimeoutError):
        async with asyncio.timeout(5):
            while data := await error.read():
                text += data
    if text:
        warn(text.decode("utf-8", "replace"))
    else:
        error.reset()


def run_forward(ask_url: Callable[[], str], address: str, ports: list[tuple[int, int]]) -> None:
    """Forward until interrupted. The first session is made before anything listens, so that mistakes show."""

    async def forward() -> None:
        forwarder = Forwarder(ask_url)
        try:
            await forwarder.session()
            async with asyncio.TaskGroup() as group:
                for local, remote in ports:
                    group.create_task(forwarder.listen(address, local, remote))
        finally:
            await forwarder.close()

    try:
        asyncio.run(forward())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
