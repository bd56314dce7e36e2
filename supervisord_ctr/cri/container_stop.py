"""StopContainer: the stop signal, the grace period, then SIGKILL for everything in it.

Several calls for one container run side by side: the one with the shortest grace decides.
"""

from __future__ import annotations

import logging
import signal

from supervisord_ctr import errors
from supervisord_ctr.cri import exits, signals
from supervisord_ctr.cri.core import Core
from supervisord_ctr.cri.state import Container
from supervisord_ctr.names import CRI_NAMESPACE

log = logging.getLogger(__name__)


async def stop_container(core: Core, identity: str, grace: float, asked: str = "stop") -> None:
    """Stop a container; one that is unknown or does not run is stopped already. `grace` is in seconds."""
    container = core.state.container_or_none(identity)
    if container is None:
        return
    if core.operations.running(("start", container.id)):
        await core.operations.run(("start", container.id), _nothing)
    if container.stage != "running":
        return
    container.asked = container.asked or asked
    if grace > 0:
        await _signal(core, container, _stop_signal(container), everything=False)
        if await exits.wait_exited(core, container, grace):
            return
    await _kill(core, container)


async def _nothing() -> None:
    """Stands in when the operation that is joined has just ended."""


async def stop_now(core: Core, container: Container, asked: str) -> None:
    """Stop without grace."""
    await stop_container(core, container.id, 0, asked)


def _stop_signal(container: Container) -> int:
    """The request's signal, else the image's, else SIGTERM; a word of the image that is no signal counts as none."""
    if not container.stop_signal:
        return signal.SIGTERM
    try:
        return signals.number_of(container.stop_signal)
    except errors.InvalidArgument:
        log.warning("image of container %s names %r as stop signal", container.id, container.stop_signal)
        return signal.SIGTERM


async def _kill(core: Core, container: Container) -> None:
    slack = core.settings.cri.stop_timeout_slack
    await _signal(core, container, signal.SIGKILL, everything=True)
    if not await exits.wait_exited(core, container, slack):
        raise errors.DeadlineExceeded(
            f"an error occurs during waiting for container {container.id!r} to be killed: "
            f"it still runs {slack:g} s after SIGKILL", kind="container", key=container.id,
        )


async def _signal(core: Core, container: Container, number: int, *, everything: bool) -> None:
    try:
        await core.tasks.kill(CRI_NAMESPACE, container.id, "", number, everything)
    except (errors.NotFound, errors.FailedPrecondition) as error:
        log.debug("signal %d for container %s: %s", number, container.id, error.message)
