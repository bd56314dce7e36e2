"""The whole machine: every part built by a plain constructor call, in the order it starts.

Read `Daemon.run` from top to bottom to see what the daemon consists of; each part's undo is pushed
where the part is made, so it stops in the reverse order. Containers are not part of it: they belong
to their shims and run on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import AsyncExitStack
from pathlib import Path

from supervisord_ctr import __version__
from supervisord_ctr.aio import Executors, TaskOwner
from supervisord_ctr.config import Config
from supervisord_ctr.lifecycle import Notifier, exclusive, make_private_folder, stop_signals
from supervisord_ctr.rpc import RpcServer

log = logging.getLogger(__name__)

#: Seconds that running calls get when the daemon stops.
STOP_GRACE = 2.0


class Daemon:
    """One daemon, from its configuration. `run` returns after SIGTERM, SIGINT or `stop`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._settings = config.settings
        self._root = Path(self._settings.root)
        self._state = Path(self._settings.state)
        self._address = Path(self._settings.address)
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Begin the graceful stop."""
        self._stop.set()

    async def run(self) -> None:
        """Start everything, serve until told to stop, stop everything but the containers."""
        started = time.monotonic()
        os.umask(0o077)
        notifier = Notifier()
        async with AsyncExitStack() as stack:
            make_private_folder(self._root)
            make_private_folder(self._state)
            self._address.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(exclusive(self._root))
            stack.enter_context(stop_signals(self._stop))
            server = await self._build(stack)
            await server.start()
            stack.push_async_callback(server.stop, STOP_GRACE)
            notifier.ready(self._address)
            log.info("supervisord-ctr %s ready", __version__, extra={
                "address": str(self._address), "root": str(self._root), "seconds": f"{time.monotonic() - started:.3f}"})
            await self._stop.wait()
            notifier.stopping()
            log.info("stopping; containers keep running")
        log.info("stopped")

    async def _build(self, stack: AsyncExitStack) -> RpcServer:
        """Every part, lower floors first; `stack` undoes them in reverse."""
        executors = Executors.create()
        stack.callback(executors.close)
        owner = TaskOwner("daemon")
        stack.push_async_callback(owner.close)
        raise NotImplementedError
