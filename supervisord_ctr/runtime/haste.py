"""Haste: what an OCI runtime would wait for begins before the runtime does.

Owns nothing but whether it is under way; why it helps is told in `linux.cgroups.pass_grace`.
"""

from __future__ import annotations

import logging

from supervisord_ctr.aio import Executors, TaskOwner
from supervisord_ctr.linux import cgroups

log = logging.getLogger(__name__)


class Haste:
    """`ahead` when an OCI runtime is about to move a process between control groups."""

    def __init__(self, owner: TaskOwner, executors: Executors) -> None:
        self._owner = owner
        self._executors = executors
        #: It is under way, or cannot be done.
        self.busy = False

    def ahead(self) -> None:
        """Returns at once. Calls of a moment share the effect, and where it cannot be had nothing is tried again."""
        if not self.busy:
            self.busy = True
            self._owner.start(self._pass(), "grace period")

    async def _pass(self) -> None:
        if await self._executors.run_io(cgroups.pass_grace):
            self.busy = False
        else:
            log.debug("processes are moved between control groups without haste: our own group cannot be told")
