"""Restarts: containers whose labels say that their task is to run, or to be stopped.

Owns the labels that containerd's restart monitor has made known (`nerdctl run --restart` sets them):

    containerd.io/restart.status                running or stopped: what is wanted; without it nothing is done
    containerd.io/restart.policy                always (the default), no, on-failure[:TIMES], unless-stopped
    containerd.io/restart.explicitly-stopped    true: the client stopped it, `unless-stopped` leaves it alone
    containerd.io/restart.count                 how often it was started again, kept here
    containerd.io/restart.loguri                where output goes

Looks at all of them every so often; each container is seen to by itself, so that one that hangs delays
no other (P15).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from supervisord_ctr.aio import TaskOwner
from supervisord_ctr.errors import Error, InvalidArgument, NotFound
from supervisord_ctr.metadata import Database
from supervisord_ctr.model import Container, Exit, TaskStatus
from supervisord_ctr.runtime import TaskState

log = logging.getLogger(__name__)

STATUS = "containerd.io/restart.status"
POLICY = "containerd.io/restart.policy"
COUNT = "containerd.io/restart.count"
STOPPED = "containerd.io/restart.explicitly-stopped"
LOG = "containerd.io/restart.loguri"
#: What clients ask for before they set a policy.
POLICIES = ("no", "always", "on-failure", "unless-stopped")

#: Seconds for a killed task to be gone.
_KILL_LIMIT = 60.0


class Tasks(Protocol):
    """What this needs of `runtime.Tasks`."""

    async def state(self, namespace: str, container_id: str) -> TaskState:
        """NotFound."""

    async def create(
        self, namespace: str, container_id: str, *, rootfs: None, stdout: str, stderr: str, terminal: bool
    ) -> int:
        """The task on the container's own snapshot."""

    async def start(self, namespace: str, container_id: str) -> int:
        """Run it."""

    async def kill(self, namespace: str, container_id: str, *, signal: int, all_: bool) -> None:
        """NotFound for one that is gone."""

    async def wait(self, namespace: str, container_id: str) -> Exit:
        """Its end."""

    async def delete(self, namespace: str, container_id: str) -> Exit:
        """Take a stopped one away."""


def parse_policy(text: str) -> tuple[str, int]:
    """Name and most restarts (0: no limit) of a policy; InvalidArgument."""
    name, colon, times = text.partition(":")
    name = name or "always"
    if name not in POLICIES:
        raise InvalidArgument(f'restart policy "{text}" not supported', kind="container")
    if colon and name != "on-failure":
        raise InvalidArgument(f'restart policy "{name}" does not take a number', kind="container")
    if colon and not times.isdigit():
        raise InvalidArgument(f"invalid number of restarts: {times}", kind="container")
    return name, int(times or 0)


def wants_restart(labels: Mapping[str, str], exit_status: int) -> bool:
    """Whether a task that does not run is to be started again; 0 stands for an exit that is not known."""
    name, limit = parse_policy(labels.get(POLICY, ""))
    if name == "on-failure":
        return exit_status != 0 and (limit == 0 or _count(labels) < limit)
    if name == "unless-stopped":
        return labels.get(STOPPED, "").lower() not in ("1", "t", "true")
    return name == "always"


def _count(labels: Mapping[str, str]) -> int:
    text = labels.get(COUNT, "")
    return int(text) if text.isdigit() else 0


class RestartMonitor:
    """Looks every `interval` seconds, from `start` to `close`."""

    def __init__(self, database: Database, tasks: Tasks, interval: float) -> None:
        self._database = database
        self._tasks = tasks
        self._interval = interval
        self._owner = TaskOwner("restarts")
        self._busy: dict[tuple[str, str], asyncio.Task[None]] = {}
        #: Made and not started at the last look.
        self._created: set[tuple[str, str]] = set()

    def start(self) -> None:
        """Begin to look."""
        self._owner.start(self._run(), "monitor")

    async def close(self) -> None:
        """Look no more; what is being started is given up in the middle, the next daemon sees to it."""
        await self._owner.close()

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Error as error:
                log.warning("restarts: %s", error)
            await asyncio.sleep(self._interval)

    async def look(self) -> None:
        """See to every container that is labelled and not as it should be; returns once all of it is under way."""
        for namespace, container in await self._database.containers.labelled(STATUS):
            key = (namespace, container.id)
            if key not in self._busy:
                task = self._busy[key] = self._owner.start(self._see_to(namespace, container), container.id)
                task.add_done_callback(lambda _, key=key: self._busy.pop(key, None))  # type: ignore[misc]

    async def settled(self) -> None:
        """Return when nothing is under way."""
        while self._busy:
            await asyncio.wait(list(self._busy.values()))

    async def _see_to(self, namespace: str, container: Container) -> None:
        try:
            await self._reconcile(namespace, container)
        except Error as error:
            log.warning("restart of %s in %s: %s", container.id, namespace, error)

    async def _reconcile(self, namespace: str, container: Container) -> None:
        wanted = container.labels.get(STATUS, "")
        state: TaskState | None = None
        with contextlib.suppress(NotFound):
            state = await self._tasks.state(namespace, container.id)
        status = state.status if state is not None else None
        if status is not None and status.name.lower() == wanted:
            return
        if wanted == "stopped" and state is not None:
            await self._end(namespace, container.id)
        if wanted != "running" or status in (TaskStatus.PAUSED, TaskStatus.PAUSING, TaskStatus.UNKNOWN):
            return  # one whose shim does not answer yet may well run (P6)
        if self._is_fresh((namespace, container.id), status):
            return
        if wants_restart(container.labels, state.exit_status if state is not None else 0):
            await self._again(namespace, container, state)

    def _is_fresh(self, key: tuple[str, str], status: TaskStatus | None) -> bool:
        """Whether a task was made and was not there at the last look: its client is about to start it."""
        if status != TaskStatus.CREATED:
            self._created.discard(key)
            return False
        if key in self._created:
            return False
        self._created.add(key)
        return True

    async def _again(self, namespace: str, container: Container, state: TaskState | None) -> None:
        log.info("restarting %s in %s", container.id, namespace)
        count = str(_count(container.labels) + 1)
        await self._database.containers.update(
            namespace, replace(container, labels={**container.labels, COUNT: count}), [f"labels.{COUNT}"]
        )
        if state is not None:
            await self._end(namespace, container.id)
            # Its client may have changed its mind meanwhile, or removed it.
            container = await self._database.containers.get(namespace, container.id)
            if container.labels.get(STATUS) != "running":
                return
        terminal, where = _terminal(container), container.labels.get(LOG, "")
        await self._tasks.create(
            namespace, container.id, rootfs=None, stdout=where, stderr="" if terminal else where, terminal=terminal
        )
        try:
            await self._database.containers.get(namespace, container.id)
        except NotFound:
            # Removed by its client before there was a task to see; nobody else would take this one away.
            await self._end(namespace, container.id)
            return
        await self._tasks.start(namespace, container.id)

    async def _end(self, namespace: str, container: str) -> None:
        """Kill what runs and take the task away."""
        with contextlib.suppress(NotFound):
            try:
                await self._tasks.kill(namespace, container, signal=9, all_=True)
            except Error as error:
                log.debug("kill of %s in %s: %s", container, namespace, error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_KILL_LIMIT):
                    await self._tasks.wait(namespace, container)
            await self._tasks.delete(namespace, container)


def _terminal(container: Container) -> bool:
    """Whether the container's first process has a terminal."""
    try:
        process = json.loads(container.spec.value).get("process") if container.spec is not None else None
    except (ValueError, AttributeError):
        return False
    return isinstance(process, dict) and process.get("terminal") is True
