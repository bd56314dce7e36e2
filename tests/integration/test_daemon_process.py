"""The daemon as a process: one on a root, restarts, metrics, the socket's permissions, what it says of itself."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.support.daemon import DaemonProcess, running_daemon, wait_until


def test_s12_nobody_else_may_look_in(daemon: DaemonProcess) -> None:
    assert daemon.address.stat().st_mode & 0o777 == 0o600
    assert daemon.root.stat().st_mode & 0o077 == 0
    assert daemon.state.stat().st_mode & 0o077 == 0


def test_a_second_daemon_on_the_root_is_refused(daemon: DaemonProcess) -> None:
    command = [sys.executable, "-m", "supervisord_ctr", "--root", str(daemon.root), "--state", str(daemon.base / "other"),
               "--address", str(daemon.base / "other.sock")]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1
    assert f"pid {daemon.process.pid if daemon.process else 0}" in second.stderr
    assert str(daemon.root) in second.stderr


def test_a_killed_daemon_stops_nobody(daemon: DaemonProcess) -> None:
    daemon.restart(kill=True)
    daemon.restart()


def test_the_real_ctr_is_told_versions_and_parts(daemon: DaemonProcess) -> None:
    version = subprocess.run(["ctr", "-a", str(daemon.address), "version"], capture_output=True, text=True, check=True)
    assert "Server:" in version.stdout
    plugins = subprocess.run(["ctr", "-a", str(daemon.address), "plugins", "ls"], capture_output=True, text=True, check=True)
    rows = [line.split() for line in plugins.stdout.splitlines()[1:]]
    assert ["io.containerd.snapshotter.v1", "overlayfs"] in [row[:2] for row in rows]
    assert {row[-1] for row in rows} == {"ok"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_metrics_where_an_address_is_configured() -> None:
    port = free_port()
    with running_daemon(f'[metrics]\naddress = "127.0.0.1:{port}"\n') as daemon:
        subprocess.run(["ctr", "-a", str(daemon.address), "version"], capture_output=True, check=True)

        def counted() -> bool:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
            return "Version/Version" in text and "supervisord_ctr_tasks 0.0" in text

        wait_until(counted, "the call is counted")


@pytest.mark.parametrize(("text", "words"), [("nonsense = 1", "unknown key nonsense"), ("[metrics]\naddress = 'x'", "HOST:PORT")])
def test_a_daemon_that_cannot_run_says_why_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    command = [sys.executable, "-m", "supervisord_ctr", "--config", str(tmp_path / "config.toml"), "--root",
               str(tmp_path / "root"), "--state", str(tmp_path / "state"), "--log-level", "error"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
