"""A further process in a running container: made, started, watched and, when it must, killed with its tree.

Used by ExecSync and by the streaming backend. Owns the process specification and the end (P7): when
the caller goes away or the time is up, everything that descends from the process is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import ids, pipes
from supervisord_ctr.cri.core import Core
from supervisord_ctr.cri.state import Container
from supervisord_ctr.linux import processes
from supervisord_ctr.model import Exit, TaskStatus, TypedValue
from supervisord_ctr.names import CRI_NAMESPACE
from supervisord_ctr.oci.spec import PROCESS_TYPE_URL, merge_env

log = logging.getLogger(__name__)

#: How often a tree is looked at again, for children born while it was killed.
_ROUNDS = 20
#: File beside an exec's pipes that says whose it is, for the daemon after a killed one.
_OWNER = "container"


@dataclass
class Running:
    """A started exec."""

    core: Core
    container_id: str
    exec_id: str
    pid: int
    pipes: pipes.Pipes
    ended: bool = False

    async def wait(self) -> Exit:
        """How the process itself ended."""
        found = await self.core.tasks.wait(CRI_NAMESPACE, self.container_id, self.exec_id)
        self.ended = True
        return found

    async def kill_tree(self) -> None:
        """Kill the process and all that came from it: children, and those of its session that moved to init."""
        for _ in range(_ROUNDS):
            victims = await self._tree()
            if not victims:
                return
            for pid, started in victims:
                processes.send_signal(pid, started, signal.SIGKILL)
            await asyncio.sleep(0.01)

    async def _tree(self) -> list[tuple[int, int]]:
        try:
            listed = [entry.pid for entry in await self.core.tasks.pids(CRI_NAMESPACE, self.container_id)]
        except errors.Error:
            listed = []
        wanted = {self.pid, *processes.children_of(listed, self.pid)}
        for pid in listed:
            with contextlib.suppress(ProcessLookupError):
                if int(processes.stat_fields(pid)[3]) == self.pid:
                    wanted.add(pid)
        return [(pid, processes.read_start_time(pid)) for pid in wanted if processes.is_alive(pid)]

    async def resize(self, width: int, height: int) -> None:
        """Tell the terminal its size."""
        await self.core.tasks.resize(CRI_NAMESPACE, self.container_id, self.exec_id, width, height)

    async def close_stdin(self) -> None:
        """No more input comes."""
        self.pipes.close_stdin()
        with contextlib.suppress(errors.Error):
            await self.core.tasks.close_io(CRI_NAMESPACE, self.container_id, self.exec_id)


def running_container(core: Core, identity: str) -> Container:
    """The container, which must run; raises `NotFound` or `FailedPrecondition`."""
    container = core.state.container(identity)
    if not container.running:
        raise errors.FailedPrecondition(
            f"container is in {pb.ContainerState.Name(container.state)} state", kind="container", key=container.id
        )
    return container


async def _process(core: Core, container: Container, argv: Sequence[str], tty: bool) -> TypedValue:
    stored = await core.database.containers.get(CRI_NAMESPACE, container.id)
    if stored.spec is None:
        raise errors.Internal(f"container {container.id!r} has no specification", kind="container")
    process: dict[str, Any] = json.loads(stored.spec.value)["process"]
    process["args"] = list(argv)
    process["terminal"] = tty
    process.pop("consoleSize", None)
    if tty:
        process["env"] = merge_env(process.get("env") or (), ["TERM=xterm"])
    return TypedValue(PROCESS_TYPE_URL, json.dumps(process).encode())


@contextlib.asynccontextmanager
async def started(
    core: Core, container: Container, argv: Sequence[str], *, tty: bool, stdin: bool, stdout: bool = True,
    stderr: bool = True,
) -> AsyncIterator[Running]:
    """A started exec for the length of the block; afterwards its process, tree and record are gone."""
    if not argv or any("\0" in word for word in argv):
        raise errors.InvalidArgument("exec needs a command without null bytes", kind="exec")
    spec = await _process(core, container, argv, tty)
    exec_id = ids.new_id()
    folder = core.run / "exec" / exec_id
    async with pipes.opened(folder, stdin=stdin, stdout=stdout, stderr=stderr and not tty) as made:
        (folder / _OWNER).write_text(container.id)
        running = Running(core, container.id, exec_id, 0, made)
        # Beginning is not cancelled half-way: a caller that leaves waits for no process that nobody knows of.
        beginning = core.owner.start(_begin(running, spec, tty), f"start of exec {exec_id}")
        try:
            await asyncio.shield(beginning)
            yield running
        finally:
            await asyncio.shield(core.owner.start(_end(running, beginning), f"end of exec {exec_id}"))


async def _begin(running: Running, spec: TypedValue, tty: bool) -> None:
    core, exec_id, made = running.core, running.exec_id, running.pipes
    try:
        await core.tasks.exec(
            CRI_NAMESPACE, running.container_id, exec_id, spec=spec, stdin=made.stdin, stdout=made.stdout,
            stderr=made.stderr, terminal=tty,
        )
    except errors.Error as error:
        raise type(error)(f"failed to exec in container: {error.message}", kind="exec", key=exec_id) from error
    try:
        running.pid = await core.tasks.start(CRI_NAMESPACE, running.container_id, exec_id)
    except errors.Error as error:
        raise type(error)(
            f"failed to exec in container: failed to start exec \"{exec_id}\": {error.message}",
            kind="exec", key=exec_id,
        ) from error


async def _end(running: Running, beginning: asyncio.Task[None]) -> None:
    """Kill what still runs and take the exec away."""
    await asyncio.wait([beginning])
    await _remove(running)


async def _remove(running: Running) -> None:
    if running.pid and not running.ended:
        await running.kill_tree()
        with contextlib.suppress(errors.Error, TimeoutError):
            async with asyncio.timeout(10):
                await running.wait()
    try:
        await running.core.tasks.delete(CRI_NAMESPACE, running.container_id, running.exec_id)
    except errors.NotFound:
        return
    except errors.Error as error:
        log.warning("exec %s of container %s is left: %s", running.exec_id, running.container_id, error.message)


def leftovers(folder: Path) -> list[tuple[str, str]]:
    """(container, exec) of the execs that a killed daemon left; `folder` is where their pipes are. Blocks."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for entry in folder.iterdir():
            with contextlib.suppress(OSError):
                found.append(((entry / _OWNER).read_text(), entry.name))
    return found


async def end_leftovers(core: Core, found: Sequence[tuple[str, str]]) -> None:
    """End execs whose clients went with the daemon that served them (S9)."""
    for container_id, exec_id in found:
        try:
            state = await core.tasks.state(CRI_NAMESPACE, container_id, exec_id)
        except errors.Error:
            continue
        ended = state.status == TaskStatus.STOPPED
        unused = pipes.Pipes(core.run / "exec" / exec_id, stdin=False, stdout=False, stderr=False)
        await _remove(Running(core, container_id, exec_id, state.pid, unused, ended))
