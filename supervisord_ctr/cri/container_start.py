"""StartContainer: the task of a container is made and started; its end is watched from then on.

A container that could not be started is `exited` with exit code 128 and reason StartError, as a
kubelet expects, and its message tells why.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

from supervisord_ctr import errors, faults
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import checkpoint, exits, id_mapped
from supervisord_ctr.cri.container_report import publish_container
from supervisord_ctr.cri.core import Core
from supervisord_ctr.cri.id_mapped import IdMapped
from supervisord_ctr.cri.state import Container, Pod
from supervisord_ctr.names import CRI_NAMESPACE

log = logging.getLogger(__name__)

#: Seconds after which the OCI runtime is at work.
_MEANWHILE = 0.01
#: Exit code of a container that could not be started.
START_ERROR = 128

CREATED = faults.declare("cri.container.task", "the container's task is made and waits, it is not started")
RUNNING = faults.declare("cri.container.running", "the container runs, its record says created")


async def start_container(core: Core, identity: str) -> None:
    """Start a container; one that runs already is left alone, a retry joins the start under way."""
    container = core.state.container(identity)
    await core.operations.run(("start", container.id), lambda: _start(core, container))


async def _start(core: Core, container: Container) -> None:
    async with core.hold(container.id, "starting"):
        if container.running:
            return
        if container.removing:
            raise errors.FailedPrecondition(
                f"container {container.id!r} is being removed", kind="container", key=container.id
            )
        if container.stage != "created":
            raise errors.FailedPrecondition(
                f"container {container.id!r} is in {pb.ContainerState.Name(container.state)} state",
                kind="container", key=container.id,
            )
        pod = core.state.pod(container.pod_id)
        if not pod.ready:
            raise errors.FailedPrecondition(
                f"sandbox container {pod.id!r} is not running", kind="sandbox", key=pod.id
            )
        try:
            await _run(core, pod, container)
        except errors.Error as error:
            await _failed(core, container, error)
            raise type(error)(
                f"failed to start container {container.id!r}: {error.message}", kind="container", key=container.id
            ) from error
    publish_container(core, container, pb.CONTAINER_STARTED_EVENT)


async def _run(core: Core, pod: Pod, container: Container) -> None:
    streams = await core.executors.run_io(stdio, core, container)
    core.stages.enter(container.id, "making the task")
    # A verbose status is often the next call; the loop has nothing to do while the OCI runtime works.
    asyncio.get_running_loop().call_later(_MEANWHILE, container.config_text)
    async with contextlib.AsyncExitStack() as undo:
        undo.push_async_callback(_undo, core, container)
        images = await checkpoint.unpack(core, container)
        async with _id_mapped(core, pod, container):
            pid = await core.tasks.create(
                CRI_NAMESPACE, container.id, rootfs=None, stdin=streams.stdin, stdout=streams.stdout,
                stderr=streams.stderr, terminal=container.config.tty, checkpoint=images,
            )
        faults.point(CREATED)
        core.stages.enter(container.id, "starting the task")
        await core.tasks.start(CRI_NAMESPACE, container.id)
        undo.pop_all()
    faults.point(RUNNING)
    container.stage, container.started_at, container.pid = "running", time.time_ns(), pid
    container.changed()
    # The record may follow: until it is written, the task itself says that the container runs.
    core.owner.start(core.state.save_container(container), f"record {container.id}")
    exits.watch(core, container)


@contextlib.asynccontextmanager
async def _id_mapped(core: Core, pod: Pod, container: Container) -> AsyncIterator[None]:
    """Volumes with mapped owners are there while the container is made."""
    if not container.id_mapped:
        yield
        return
    folder, wanted = core.id_mapped_folder(container.id), [IdMapped(*entry) for entry in container.id_mapped]
    options = pod.namespaces.userns_options
    own = (id_mapped.map_text(options.uids), id_mapped.map_text(options.gids))
    known = {own: core.environments.namespace(pod.id, "user")} if options.uids else {}
    try:
        await core.executors.run_io(id_mapped.make, folder, wanted, known)
        yield
    finally:
        await core.executors.run_io(id_mapped.drop, folder)


class Streams:
    """Where the standard streams of a container go, in the words of our shim."""

    def __init__(self, stdin: str, stdout: str, stderr: str) -> None:
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr


def stdio(core: Core, container: Container) -> Streams:
    """The log file for output, and a held-open pipe for input when the container asks for it. Blocking."""
    config = container.config
    if config.linux.security_context.namespace_options.userns_options.uids:
        # The OCI runtime reaches the bundle as a user that is nobody on the host: it may pass, not look (S12).
        os.chmod(core.settings.state, 0o711)
    output = "attach://"
    if container.log_path:
        folder = Path(container.log_path).parent
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise errors.from_os_error(error, "failed to make the log folder") from error
        output = f"cri-log://{quote(container.log_path)}?max_line={core.settings.cri.max_log_line}"
    stdin = ""
    if config.stdin:
        stdin = "attach://?once=1" if config.stdin_once and not config.tty else "attach://"
    return Streams(stdin, output, "" if config.tty else output)


async def _undo(core: Core, container: Container) -> None:
    """Take a task away that is made but does not run."""
    for step in (
        core.tasks.kill(CRI_NAMESPACE, container.id, "", 9, True), core.tasks.delete(CRI_NAMESPACE, container.id)
    ):
        try:
            await step
        except errors.NotFound:
            continue
        except errors.Error as error:
            log.warning("task of container %s is left: %s", container.id, error.message)


async def _failed(core: Core, container: Container, error: errors.Error) -> None:
    container.stage, container.exit_code = "exited", START_ERROR
    container.reason, container.message = "StartError", error.message
    container.finished_at = time.time_ns()
    container.pid = 0
    await core.state.save_container(container)
    publish_container(core, container, pb.CONTAINER_STOPPED_EVENT)
