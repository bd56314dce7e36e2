"""ExecSync: a command's output and exit code, within a time and a size (P7, S8)."""

from __future__ import annotations

import asyncio

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import exec_process
from supervisord_ctr.cri.core import Core


async def exec_sync(core: Core, request: pb.ExecSyncRequest) -> pb.ExecSyncResponse:
    """Run the command; raises `DeadlineExceeded` when the request's time is up, with the whole tree killed.

    Output beyond the limit is dropped, as is what background children write later than the drain
    time after the command's end.
    """
    container = exec_process.running_container(core, request.container_id)
    limit = core.settings.cri.exec_sync_limit
    timeout = request.timeout if request.timeout > 0 else None
    try:
        async with asyncio.timeout(timeout):
            async with exec_process.started(core, container, list(request.cmd), tty=False, stdin=False) as running:
                return await _collect(core, running, limit)
    except TimeoutError:
        raise errors.DeadlineExceeded(
            f"failed to exec in container: timeout {request.timeout}s exceeded: context deadline exceeded",
            kind="container", key=container.id,
        ) from None


async def _collect(core: Core, running: exec_process.Running, limit: int) -> pb.ExecSyncResponse:
    output, complaints = bytearray(), bytearray()
    readers = [
        core.owner.start(_read(running, running.pipes.stdout, output, limit), "exec stdout"),
        core.owner.start(_read(running, running.pipes.stderr, complaints, limit), "exec stderr"),
    ]
    try:
        found = await running.wait()
        await asyncio.wait(readers, timeout=core.settings.cri.drain_exec_io_timeout)
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    return pb.ExecSyncResponse(stdout=bytes(output), stderr=bytes(complaints), exit_code=found.status)


async def _read(running: exec_process.Running, path: str, into: bytearray, limit: int) -> None:
    """Read to the end, keeping `limit` bytes: a command that writes more must not block on a full pipe."""
    while data := await running.pipes.read(path):
        room = limit - len(into)
        if room > 0:
            into += data[:room]
