"""The shim's main: a loop, a socket, the services, and an orderly end.

Runs in a process of its own, which the zygote or `__main__` has made: this module turns it into a shim
(subreaper, name, working directory, environment) and returns when it is done.

A `Shim` and its loop are made before it is known for whom: the zygote does so before it forks, so that what
this takes, in memory and in time, is taken once. The fork calls `Loop.renew`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import selectors
import signal
import socket
import time
from collections.abc import Callable

from pctr_shim import runc
from pctr_shim.config import ShimConfig
from pctr_shim.keeper import SHIM_NAME
from pctr_shim.private import SERVICE as PRIVATE
from pctr_shim.private import PrivateService
from pctr_shim.publisher import Publisher
from pctr_shim.reaper import Reaper
from pctr_shim.service import SERVICES, TaskService
from pctr_shim.signals import Signals
from supervisord_ctr.linux import processes
from supervisord_ctr.ttrpc.server import Server

log = logging.getLogger(__name__)

_FAREWELL = 2.0
#: What a service manager told the daemon: an OCI runtime that saw it would take it for the container's.
_NOT_OURS = ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID")


class _Selector(selectors.EpollSelector):
    """Makes a call when nothing has happened, and no timer runs, for a while; once, until something happens."""

    def __init__(self) -> None:
        super().__init__()
        self._patience = 0.0
        self._quiet: Callable[[], None] | None = None
        self._called = False

    def when_quiet(self, patience: float, call: Callable[[], None]) -> None:
        """`patience` in seconds; `call` is made between two rounds of the loop."""
        self._patience, self._quiet, self._called = patience, call, False

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As the base class does."""
        if self._quiet is None or timeout is not None or self._called:
            self._called = self._called and timeout is None
            ready = super().select(timeout)
            self._called = self._called and not ready
            return ready
        ready = super().select(self._patience)
        if not ready:
            self._called = True
            self._quiet()
        return ready


class Loop(asyncio.SelectorEventLoop):
    """An event loop that a fork of its process can go on with, even from inside a coroutine."""

    def __init__(self) -> None:
        self._polled = _Selector()
        super().__init__(self._polled)
        self.signals = Signals()
        self._descriptors: tuple[int, ...] = ()

    def _write_to_self(self) -> None:
        """Wake the loop from another thread: by our pipe, since asyncio's own would be the parent's as well."""
        self.signals.wake()

    def when_quiet(self, patience: float, call: Callable[[], None]) -> None:
        """Make the call when nothing has happened for `patience` seconds and no timer runs."""
        self._polled.when_quiet(patience, call)

    def watched(self) -> list[tuple[int, int]]:
        """The descriptors that are watched for somebody, each with its events (`selectors`)."""
        return [(key.fd, key.events) for key in self._polled.get_map().values() if key.fd not in self._descriptors]

    def before_fork(self) -> None:
        """Note what a fork will have to watch for itself."""
        self._descriptors = tuple(key.fd for key in self._polled.get_map().values())

    def renew(self) -> None:
        """In a fork, before anything is awaited: let nothing that happens here be seen by the parent, or vice versa."""
        self.signals.renew()
        with select.epoll() as fresh:
            for fd in self._descriptors:
                fresh.register(fd, select.EPOLLIN)
            os.dup2(fresh.fileno(), self._polled.fileno(), inheritable=False)
        asyncio._set_running_loop(self)  # which counts for one process only


class Shim:
    """One shim. Make it on the loop that serves; `serve` gives it its configuration."""

    def __init__(self, signals: Signals) -> None:
        self.config = ShimConfig()
        self.reaper = Reaper()
        self.publisher = Publisher(self.config, self.reaper)
        self._stopped = asyncio.Event()
        self.tasks = TaskService(self.config, self.reaper, self.publisher, self._stopped.set)
        methods = self.tasks.methods()
        self.server = Server({
            **dict.fromkeys(SERVICES, methods),
            PRIVATE: PrivateService(self.config, self.tasks, self.publisher).methods(),
        })
        signals.calls.update({
            signal.SIGCHLD: self.reaper.reap, signal.SIGTERM: self._asked_to_end, signal.SIGINT: self._asked_to_end
        })

    def _asked_to_end(self) -> None:
        """SIGTERM and SIGINT end a shim without containers; one with containers outlives them."""
        if self.tasks.containers:
            log.warning("asked to end, but %d containers need this shim", len(self.tasks.containers))
        else:
            self._stopped.set()

    async def serve(self, config: ShimConfig, listener: socket.socket) -> None:
        """Be the whole shim: serve until a Shutdown finds nothing left to serve."""
        processes.set_name(SHIM_NAME)
        processes.set_title(*title(config))
        processes.set_child_subreaper()
        enter(config)
        self.become(config)
        await self.server.serve(listener)
        await self.until_stopped()

    def become(self, config: ShimConfig) -> None:
        """The shim of this configuration, which does not listen yet."""
        if config.env:
            os.environ.update(config.env)
            runc.environment.cache_clear()
        config.pid = config.pid or os.getpid()
        self.config.become(config)
        self.tasks.started_at = time.time()
        self.publisher.start()

    async def until_stopped(self) -> None:
        """Until a Shutdown finds nothing left to serve; then come to an orderly end."""
        config = self.config
        await self._stopped.wait()
        await self.server.wait_idle(_FAREWELL)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(config.socket)
        await self.publisher.close()
        await self.server.close()
        await self.tasks.tasks.close()


def enter(config: ShimConfig) -> None:
    """Be in a folder that lasts: bundles come and go."""
    os.chdir(os.path.dirname(config.socket) or "/")


def title(config: ShimConfig) -> tuple[str, ...]:
    """What ps shows of a shim."""
    return (
        "containerd-shim-pctr-v1", "-namespace", config.namespace, "-id", config.group,
        "-address", config.address or config.socket,
    )


def prepare() -> None:
    """What a shim wants of its process and a fork inherits: signals, environment, what is looked up once."""
    processes.argument_area()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    os.environ.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    for name in _NOT_OURS:
        os.environ.pop(name, None)
    runc.environment.cache_clear()


def run(config: ShimConfig, listener: socket.socket) -> None:
    """Be a shim on a loop of its own. Never returns an error: it logs it."""
    prepare()
    loop = Loop()
    try:
        loop.run_until_complete(_run(loop, config, listener))
    except Exception:
        log.exception("shim %s failed", config.group)
    finally:
        loop.close()


async def _run(loop: Loop, config: ShimConfig, listener: socket.socket) -> None:
    loop.signals.watch()
    shim = Shim(loop.signals)
    loop.signals.install(list(loop.signals.calls))
    await shim.serve(config, listener)
