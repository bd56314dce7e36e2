"""Recovery: what a new daemon does about the tasks that a former one left.

For each bundle: a shim that answers is adopted with its task, whatever the task's state, so that an
exit of the meantime is given to whoever asks next. A shim that is dead is cleaned up after, and its
task's exit told. A shim that lives but does not answer keeps its task listed as unknown and is
tried again (P6). A bundle whose task was never made is removed. No container that runs and whose
shim lives is ever killed here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from supervisord_ctr import errors
from supervisord_ctr.model import TaskStatus
from supervisord_ctr.runtime import bundle as bundles
from supervisord_ctr.runtime.bundle import Bundle, Record
from supervisord_ctr.runtime.values import TaskState

if TYPE_CHECKING:
    from supervisord_ctr.runtime.shims import Shim
    from supervisord_ctr.runtime.task import Task
    from supervisord_ctr.runtime.tasks import Tasks

log = logging.getLogger(__name__)

#: Bundles looked at side by side.
_AT_ONCE = 32
#: Seconds that start-up waits for clean-ups; what takes longer goes on in the background.
_PATIENCE = 15.0
_FIRST_RETRY = 0.5
_LONGEST_RETRY = 30.0


async def recover(tasks: Tasks) -> None:
    """Look at every bundle; returns when all are adopted, removed or being worked on."""
    found = await tasks.run_io(bundles.find_all, tasks.state_folder)
    places = asyncio.Semaphore(_AT_ONCE)
    clean_ups: list[asyncio.Task[None]] = []

    async def look(bundle: Bundle) -> None:
        async with places:
            try:
                job = await _look(tasks, bundle)
            except errors.Error as error:
                log.error("recovering task %s in %s: %s", bundle.id, bundle.namespace, error)
                return
        if job is not None:
            clean_ups.append(job)

    await asyncio.gather(*(look(bundle) for bundle in found))
    if clean_ups:
        await asyncio.wait(clean_ups, timeout=_PATIENCE)
    await _dismiss_strays(tasks)
    await tasks.run_io(bundles.sweep_work, tasks.state_folder, tasks.root_folder)
    if found:
        log.info("found %d tasks of a former daemon, %d of them run on", len(found), len(tasks))


async def reconsider(tasks: Tasks, bundle: Bundle) -> None:
    """Do about one bundle without a task what a start does: adopt what runs, remove what does not."""
    async with tasks.lock(bundle):
        if (bundle.namespace, bundle.id) in tasks.known():
            return
        record = await tasks.run_io(bundle.read_record)
        if record is None:
            await _look(tasks, bundle)
            return
        task = tasks.adopt(bundle, record)
    job = await _attend(tasks, task)
    if job is not None:
        await asyncio.wait((job,), timeout=_PATIENCE)


async def _look(tasks: Tasks, bundle: Bundle) -> asyncio.Task[None] | None:
    """One bundle; returns the clean-up that it started, if any."""
    record = await tasks.run_io(bundle.read_record)
    if record is None:
        record = await _unrecorded(tasks, bundle)
        if record is None:
            await tasks.run_io(bundle.delete)
        else:
            await tasks.discard(bundle, record)
        return None
    return await _attend(tasks, tasks.adopt(bundle, record))


async def _unrecorded(tasks: Tasks, bundle: Bundle) -> Record | None:
    """A record for a bundle whose daemon died before it wrote one; None when no shim can exist.

    A foreign shim writes its address itself. One of ours that nobody recorded is found by its
    socket (`_dismiss_strays`).
    """
    try:
        address = await tasks.run_io((bundle.path / "address").read_text)
        container = await tasks.container(bundle.namespace, bundle.id)
        binary = tasks.shims.resolve(container.runtime.name)
    except (OSError, ValueError, errors.Error):
        return None
    return Record(container.runtime.name, binary, address.strip(), "ttrpc", 2)


async def _attend(tasks: Tasks, task: Task) -> asyncio.Task[None] | None:
    """Bring an adopted task to life, or start what it needs."""
    try:
        await settle(tasks, task)
    except errors.NotFound:
        log.warning("task %s in %s: its shim is dead, cleaning up", task.id, task.namespace)
        return tasks.own(tasks.bury_until_done(task), f"bury {task.id}")
    except errors.Error as error:
        task.trouble = error.message
        log.error("task %s in %s is listed as unknown: %s", task.id, task.namespace, error)
        tasks.own(_keep_trying(tasks, task), f"recover {task.id}")
    return None


async def attend_again(tasks: Tasks, task: Task, lost: Shim) -> None:
    """A connection ended while its task was in use: connect again if the shim lives, else clean up.

    Whoever holds the task's lock meanwhile (a delete that was under way) cleans up itself.
    """
    async with tasks.lock(task):
        if not tasks.holds(task) or task.shim is not lost:
            return
        task.attach_shim(None, "the connection to its shim ended")
    await _attend(tasks, task)


async def settle(tasks: Tasks, task: Task) -> None:
    """Connect to the shim of `task` and ask for its state.

    Raises NotFound when the shim is dead, other errors when it may live. A task that its shim
    never made is removed with the shim.
    """
    # First the reader of its log: a foreign shim may be waiting for one before it serves.
    tasks.shims.watch_log(task.bundle, task.record)
    shim = await tasks.shims.connect(task.bundle, task.record, timeout=tasks.config.load_timeout)
    try:
        state = await _state(tasks, task, shim)
    except errors.NotFound:
        if task.record.sandbox:
            raise errors.Unavailable(f"sandbox {task.id} has no task") from None
        log.warning("task %s in %s was never made, removing what is left", task.id, task.namespace)
        task.created = False
        task.shim = shim
        await tasks.drop(task)
        return
    except errors.Unavailable:
        raise errors.NotFound(f"the shim of task {task.id} ended") from None
    if shim.lost:
        raise errors.NotFound(f"the shim of task {task.id} ended")
    shim.tasks.add(task.id)
    task.pid = state.pid or task.pid
    task.attach_shim(shim)
    if state.status is TaskStatus.STOPPED:
        log.info("task %s in %s exited with %d meanwhile", task.id, task.namespace, state.exit_status)


async def _state(tasks: Tasks, task: Task, shim: Shim) -> TaskState:
    """The state of a task. A create that was under way when its daemon died may still be going on in the shim."""
    deadline = asyncio.get_running_loop().time() + tasks.config.create_grace
    while True:
        try:
            return await shim.service.state(task.id, "", timeout=tasks.config.load_timeout)
        except errors.NotFound:
            if asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(0.05)


async def _keep_trying(tasks: Tasks, task: Task) -> None:
    """Try a shim that does not answer until it does or is dead."""
    pause = _FIRST_RETRY
    while tasks.holds(task) and task.shim is None:
        await asyncio.sleep(pause)
        pause = min(pause * 2, _LONGEST_RETRY)
        try:
            await settle(tasks, task)
        except errors.NotFound:
            await tasks.bury_until_done(task)
            return
        except errors.Error as error:
            task.trouble = error.message
        else:
            log.info("task %s in %s answers again", task.id, task.namespace)
            return


async def _dismiss_strays(tasks: Tasks) -> None:
    """End shims of ours that no bundle tells of: their daemon died before it could write that down."""
    known = tasks.known_sockets()
    for path in await tasks.run_io(_sockets, tasks.shims.sockets):
        if str(path) not in known:
            with contextlib.suppress(errors.Error):
                if serves := await tasks.shims.containers_at(str(path)):
                    log.error("a shim at %s serves %s, but no bundle tells of it", path, ", ".join(serves))
                    continue
            log.warning("a shim at %s belongs to no task, ending it", path)
            await tasks.shims.dismiss("default", str(path))


def _sockets(folder: Path) -> Iterable[Path]:
    with contextlib.suppress(FileNotFoundError):
        return [Path(entry.path) for entry in os.scandir(folder)]
    return []
