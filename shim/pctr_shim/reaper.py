"""The reaper: starts programs cheaply and learns of every exit, whoever's child it was.

Owns wait(2) of the whole process; nothing else in the shim may wait for a child. Where the shim has a keeper,
containers are that one's children, and it tells of their ends.

The race that matters: a container may exit before the call that started it has told us its pid. While
anybody is inside `expecting()`, exits of unknown processes are kept; `adopt` then finds its own
among them. Programs are started with posix_spawn(3) (vfork underneath), so a start costs no copy of the
shim's page tables and no thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from pctr_shim.keeper import EXIT
from supervisord_ctr.linux import processes
from supervisord_ctr.model import Exit

log = logging.getLogger(__name__)

OnExit = Callable[[Exit, int], None]

#: Ignored or blocked by Python or by us, and wanted by programs as the system has them.
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Reaper:
    """Have `reap` called whenever SIGCHLD comes."""

    def __init__(self) -> None:
        self._helpers: dict[int, asyncio.Future[int]] = {}
        self._adopted: dict[int, OnExit] = {}
        self._early: dict[int, tuple[Exit, int]] = {}
        self._expecting = 0

    def listen(self, keeper: socket.socket) -> None:
        """Hear from the keeper, on the running loop."""
        asyncio.get_running_loop().add_reader(keeper, self._told, keeper)

    def _told(self, keeper: socket.socket) -> None:
        try:
            packet = keeper.recv(EXIT.size, socket.MSG_DONTWAIT)
            if not packet:
                raise ConnectionResetError("the keeper is gone")
            _, pid, status = EXIT.unpack(packet)
            keeper.send(b"A")
            if not keeper.recv(1):  # at once: the keeper does little else
                raise ConnectionResetError("the keeper is gone")
            self._ended(pid, status)
        except BlockingIOError:
            return
        except ConnectionError as error:
            log.error("%s: so the shim ends", error)
            os._exit(1)

    @property
    def busy(self) -> bool:
        """Whether a program runs, or somebody expects to learn of one."""
        return bool(self._helpers or self._expecting)

    def reap(self) -> None:
        """Collect every child that has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._ended(pid, status)

    def _ended(self, pid: int, wait_status: int) -> None:
        helper = self._helpers.pop(pid, None)
        if helper is not None:
            if not helper.done():
                helper.set_result(wait_status)
            return
        status, number = processes.exit_of(wait_status)
        ended = Exit(status, time.time(), pid)
        on_exit = self._adopted.pop(pid, None)
        if on_exit is not None:
            self._tell(on_exit, ended, number)
        elif self._expecting:
            self._early[pid] = (ended, number)

    def _tell(self, on_exit: OnExit, ended: Exit, number: int) -> None:
        try:
            on_exit(ended, number)
        except Exception:
            log.exception("handling the exit of process %d failed", ended.pid)

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """Keep exits of processes that nobody has adopted yet."""
        self._expecting += 1
        try:
            yield
        finally:
            self._expecting -= 1
            if not self._expecting:
                self._early.clear()

    def adopt(self, pid: int, on_exit: OnExit) -> None:
        """Have `on_exit(exit, signal)` called when `pid` ends; at once when it already has."""
        early = self._early.pop(pid, None)
        if early is not None:
            self._tell(on_exit, *early)
        else:
            self._adopted[pid] = on_exit
            self.reap()

    def spawn(
        self, arguments: Sequence[str], environment: Mapping[str, str], descriptors: Mapping[int, int],
        folder: str = "", program: str = "",
    ) -> tuple[int, asyncio.Future[int]]:
        """Start a program; returns its pid and a future of its wait status.

        `descriptors` maps the program's descriptor numbers to ours; nothing else is inherited.
        Missing ones of 0, 1 and 2 are the null device. `folder` is its working folder, "" ours. `program` is
        what to execute instead of the first argument; where that is refused, the argument it is.
        """
        loop = asyncio.get_running_loop()
        null = -1
        actions: list[tuple[int, ...]] = []
        try:
            for number in (0, 1, 2):
                if number not in descriptors:
                    null = null if null >= 0 else os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
                    actions.append((os.POSIX_SPAWN_DUP2, null, number))
            actions += [(os.POSIX_SPAWN_DUP2, ours, number) for number, ours in descriptors.items()]
            with _inside(folder):
                pid = _start(program or arguments[0], arguments, environment, actions)
        finally:
            if null >= 0:
                os.close(null)
        future: asyncio.Future[int] = loop.create_future()
        self._helpers[pid] = future
        return pid, future

    async def run(
        self, arguments: Sequence[str], environment: Mapping[str, str], descriptors: Mapping[int, int],
        folder: str = "", program: str = "",
    ) -> int:
        """Start a program and wait for it: its exit status, 128 + signal after a signal.

        A caller that is cancelled takes the program with it.
        """
        pid, future = self.spawn(arguments, environment, descriptors, folder, program)
        try:
            return processes.exit_of(await future)[0]
        except asyncio.CancelledError:
            if pid in self._helpers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise


def _start(
    program: str, arguments: Sequence[str], environment: Mapping[str, str], actions: list[tuple[int, ...]],
) -> int:
    try:
        return os.posix_spawn(
            program, list(arguments), environment, file_actions=actions, setsigmask=(), setsigdef=_DEFAULT_SIGNALS
        )
    except OSError:
        if program == arguments[0]:
            raise
        return _start(arguments[0], arguments, environment, actions)


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    """Be in `folder` for a moment (posix_spawn has no such option); one that is gone changes nothing."""
    if not folder:
        yield
        return
    before = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.chdir(folder)
        yield
    finally:
        os.fchdir(before)
        os.close(before)
