"""Ends of containers: waited for, recorded, then told (P13, P14).

Order matters: memory first, then our record, then the task is deleted (which takes the shim's own
exit record away), then the event. A daemon that dies in between finds either the shim's record or
its own.
"""

from __future__ import annotations

import asyncio
import logging
import time

from supervisord_ctr import errors, faults
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri.container_report import publish_container
from supervisord_ctr.cri.core import Core
from supervisord_ctr.cri.state import Container
from supervisord_ctr.model import Exit
from supervisord_ctr.names import CRI_NAMESPACE

log = logging.getLogger(__name__)

#: Exit code when nobody knows: never 0 (P13).
UNKNOWN_EXIT = 255
_RETRY = 0.2

EXITED = faults.declare("cri.container.exited", "the container's exit is recorded, its task is still there")


def watch(core: Core, container: Container) -> None:
    """Wait for the end of a running container in the background."""
    core.exits.setdefault(container.id, asyncio.Event())
    core.owner.start(_watch(core, container), f"exit {container.id}")


async def wait_exited(core: Core, container: Container, timeout: float) -> bool:
    """Whether the container ended, and its task is gone, within `timeout` seconds."""
    event = core.exits.get(container.id)
    if event is None:
        return not container.running
    try:
        async with asyncio.timeout(timeout):
            await event.wait()
    except TimeoutError:
        return False
    return True


async def _watch(core: Core, container: Container) -> None:
    try:
        found = await _wait(core, container)
        await finish(core, container, found)
    finally:
        event = core.exits.pop(container.id, None)
        if event is not None and not core.closing:
            event.set()
    publish_container(core, container, pb.CONTAINER_STOPPED_EVENT)


async def _wait(core: Core, container: Container) -> Exit:
    """The exit; a shim that does not answer is asked again, a task that is gone has an unknown one."""
    while True:
        try:
            return await core.tasks.wait(CRI_NAMESPACE, container.id)
        except errors.NotFound:
            return Exit(UNKNOWN_EXIT, time.time(), container.pid)
        except errors.Error as error:
            log.warning("waiting for container %s: %s", container.id, error.message)
            await asyncio.sleep(_RETRY)


async def finish(core: Core, container: Container, found: Exit) -> None:
    """Record an exit and delete the task."""
    kills, level = 0, ""
    try:
        for record in await core.tasks.exit_records(CRI_NAMESPACE, container.id):
            if not record.exec_id:
                kills, level = record.oom_kills, record.oom_level
                container.signal, container.asked_signal = record.signal, record.asked_signal
    except errors.Error as error:
        log.debug("exit record of container %s: %s", container.id, error.message)
    container.oom = container.oom or (kills > 0 and found.status != 0)
    container.oom_level = (level or "container") if container.oom else ""
    if container.oom and not container.message:
        where = level or "container"
        container.message = f"a process was killed for lack of memory: the limit of the {where} was reached"
    container.exit_code = found.status
    container.finished_at = int(found.at * 1e9) or time.time_ns()
    container.stage, container.pid = "exited", 0
    if container.started_at > container.finished_at:
        container.finished_at = container.started_at
    await core.state.save_container(container)
    faults.point(EXITED)
    await delete_task(core, container)


async def delete_task(core: Core, container: Container) -> None:
    """Delete the task of an ended container; failures are repeated when the container is removed."""
    try:
        await core.tasks.delete(CRI_NAMESPACE, container.id)
    except errors.NotFound:
        return
    except errors.Error as error:
        log.warning("task of container %s is not deleted: %s", container.id, error.message)
