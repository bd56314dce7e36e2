"""The process that holds a pod's shared PID namespace: made when first needed, ended with the pod.

Owns the interface to whoever makes it: a stripped fork of the zygote (design D7). The process is
known by PID and start time, so that a reused PID is never taken for it.
"""

from __future__ import annotations

import signal
from typing import Protocol

from supervisord_ctr.linux import processes


class Forker(Protocol):
    """Makes the process."""

    async def fork_pause(
        self, *, netns: str = "", ipcns: str = "", utsns: str = "", userns: str = "", hostname: str = "",
        label: str = "", mount_label: str = "",
    ) -> tuple[int, int]:
        """A process that is number 1 of a new PID namespace; returns its PID and start time (ticks).

        SELinux labels are of the process and of its root.
        """
        ...


def alive(pid: int, started: int) -> bool:
    """Whether the process is there and is the one that started at `started`."""
    return bool(pid) and processes.is_alive(pid, started)


def end(pid: int, started: int) -> None:
    """Kill the process, and with it everything in its PID namespace; no error when it is gone."""
    if pid:
        processes.send_signal(pid, started, signal.SIGKILL)
