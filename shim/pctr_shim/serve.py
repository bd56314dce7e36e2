"""The shim's main: a loop, a socket, the services, and an orderly end.

Runs in a process of its own, which the zygote or `__main__` has made: this module turns it into a shim
(subreaper, name, working directory, environment) and returns when it is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket

from pctr_shim.config import ShimConfig
from pctr_shim.private import SERVICE as PRIVATE
from pctr_shim.private import PrivateService
from pctr_shim.publisher import Publisher
from pctr_shim.reaper import Reaper, on_signal
from pctr_shim.service import SERVICES, TaskService
from supervisord_ctr.linux import processes
from supervisord_ctr.ttrpc.server import Server

log = logging.getLogger(__name__)

_FAREWELL = 2.0
#: What a service manager told the daemon: an OCI runtime that saw it would take it for the container's.
_NOT_OURS = ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID")


def prepare() -> asyncio.AbstractEventLoop:
    """What needs no configuration: the process's place in the system, and its loop."""
    processes.set_child_subreaper()
    os.chdir("/")  # bundles come and go
    os.environ.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    for name in _NOT_OURS:
        os.environ.pop(name, None)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    return loop


def run(config: ShimConfig, listener: socket.socket, loop: asyncio.AbstractEventLoop | None = None) -> None:
    """Serve until a Shutdown finds nothing left to serve. Never returns an error: it logs it."""
    processes.set_name("pctr-shim")
    loop = loop or prepare()
    os.environ.update(config.env)
    try:
        loop.run_until_complete(_serve(config, listener))
    except Exception:
        log.exception("shim %s failed", config.group)
    finally:
        loop.close()


async def _serve(config: ShimConfig, listener: socket.socket) -> None:
    stopped = asyncio.Event()
    reaper = Reaper()
    reaper.start()
    publisher = Publisher(config, reaper)
    publisher.start()
    tasks = TaskService(config, reaper, publisher, stopped.set)
    methods = tasks.methods()
    server = Server({
        **dict.fromkeys(SERVICES, methods), PRIVATE: PrivateService(config, tasks, publisher).methods(),
    })
    await server.serve(listener)
    _take_signals(tasks, stopped)
    await stopped.wait()
    await server.wait_idle(_FAREWELL)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(config.socket)
    await publisher.close()
    await server.close()
    await tasks.tasks.close()


def _take_signals(tasks: TaskService, stopped: asyncio.Event) -> None:
    """SIGTERM and SIGINT end a shim without containers; one with containers outlives them."""
    def ask() -> None:
        if tasks.containers:
            log.warning("asked to end, but %d containers need this shim", len(tasks.containers))
        else:
            stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        on_signal(number, ask)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
