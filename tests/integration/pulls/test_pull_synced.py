"""A daemon that is told to bring unpacked files to disk pulls the same image."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.daemon import running_daemon
from tests.support.images import small_image
from tests.support.registry import running_registry


def test_a_pull_that_waits_for_the_disk() -> None:
    with running_registry() as registry, running_daemon("[snapshots]\nsync = true\n") as daemon:
        made = small_image("synced")
        name = registry.push("synced/small", "v1", made)
        pctr = [sys.executable, "-m", "pctr", "--address", str(daemon.address), "-n", daemon.namespace]
        subprocess.run([*pctr, "image", "pull", "--plain-http", name], check=True, capture_output=True, timeout=120)
        rows = subprocess.run([*pctr, "snapshot", "ls", "--format", "json"], check=True, capture_output=True, timeout=120)
        assert [row["kind"] for row in json.loads(rows.stdout)] == ["Committed", "Committed"]
        subprocess.run([*pctr, "image", "rm", "--sync", name], check=True, capture_output=True, timeout=120)
