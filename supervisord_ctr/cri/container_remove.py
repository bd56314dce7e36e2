"""RemoveContainer: a container, its task, its layer and its volumes, gone. The log stays: it is the kubelet's."""

from __future__ import annotations

from supervisord_ctr import errors, faults
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import exits
from supervisord_ctr.cri.container_create import remove_files, remove_stored
from supervisord_ctr.cri.container_report import publish_container
from supervisord_ctr.cri.container_stop import stop_now
from supervisord_ctr.cri.core import Core, all_of
from supervisord_ctr.cri.state import Container
from supervisord_ctr.names import CRI_NAMESPACE

TRACES = faults.declare("cri.container.remove", "the container's volumes are gone, its layer and its record are there")


async def remove_container(core: Core, identity: str) -> None:
    """Remove a container, stopping it first; an unknown one is no error, a retry joins."""
    container = core.state.container_or_none(identity)
    if container is None:
        return
    await core.operations.run(("remove", container.id), lambda: _remove(core, container))


async def _remove(core: Core, container: Container) -> None:
    await stop_now(core, container, "remove")
    async with core.hold(container.id, "removing"):
        if core.state.container_or_none(container.id) is not container:
            return
        container.removing = True
        await exits.wait_exited(core, container, core.settings.cri.stop_timeout_slack)
        try:
            await core.tasks.delete(CRI_NAMESPACE, container.id)
        except errors.NotFound:
            pass
        await remove_files(core, container)
        faults.point(TRACES)
        # One write for all of it; what a crash leaves of it the recovery takes away.
        await all_of(remove_stored(core, container), core.state.forget_container(container))
        core.stats.forget(container.id)
    publish_container(core, container, pb.CONTAINER_DELETED_EVENT)
