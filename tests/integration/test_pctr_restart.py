"""P4: a `pctr run` in the foreground outlives the daemon it was started through."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support.daemon import running_daemon, wait_until
from tests.support.fake_registry import fake_registry
from tests.support.pctr_target import TIMEOUT, Target, busybox_image


def test_p4_output_and_exit_status_come_although_the_daemon_was_killed(tmp_path: Path) -> None:
    with fake_registry() as registry, running_daemon() as daemon:
        target = Target("supervisord-ctr", daemon.base, daemon.address)
        target.image = registry.add("suite/busybox", "1", busybox_image())
        target.pctr("image", "pull", target.image)
        script = "echo before; read a; echo between; read b; echo after; exit 5"
        process = target.start("run", "--rm", "-i", target.image, "survivor", "sh", "-c", script,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin, process.stdout:
            assert _line(process.stdout.fileno()) == b"before\n"
            daemon.kill()
            process.stdin.write(b"one\n")
            assert _line(process.stdout.fileno()) == b"between\n"
            process.stdin.write(b"two\n")
            assert _line(process.stdout.fileno()) == b"after\n"
            daemon.start()
            assert process.wait(TIMEOUT) == 5
        wait_until(lambda: "survivor" not in target.ids(), "nothing of it is left")


def _line(descriptor: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(descriptor, 1)
        assert part, line
        line += part
    return line
