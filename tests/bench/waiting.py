"""Waiting for conditions, with a deadline and without a fixed pause that a number could depend on."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], what: str, *, timeout: float = 60.0, pause: float = 0.002) -> None:
    """Return when `condition` holds; TimeoutError naming `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:.0f} s in vain for {what}")
        time.sleep(pause)


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Return when something listens on the loopback port; RuntimeError when the process ends first."""

    def listening() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listening, f"port {port}")
