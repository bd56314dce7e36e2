"""A real daemon as a process, in folders of its own.

Owns starting, stopping, killing and restarting it, and the check that it left nothing behind. Every
check looks only below the daemon's own folders and names, so that suites may run side by side.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from supervisord_ctr.api.services.version.v1.version_pb2_grpc import VersionStub
from tests.support.places import SHORT

START_TIMEOUT = 60.0
STOP_TIMEOUT = 60.0


def wait_until(condition: Callable[[], Any], what: str, timeout: float = 60.0) -> Any:
    """Poll until `condition` returns something true, and return that; fail naming `what`."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}")
        pause.wait(0.02)


def mounts_below(folder: Path) -> list[str]:
    """Mount points at or below `folder`."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].encode().decode("unicode_escape")
        if point == str(folder) or point.startswith(f"{folder}/"):
            found.append(point)
    return found


def processes_naming(text: str) -> list[str]:
    """Command lines of living processes that contain `text`, this one excepted."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if text in line and "pytest" not in line:
                found.append(f"{entry}: {line.strip()}")
    return found


def cgroups_of(namespace: str) -> list[str]:
    """Cgroup folders of containers in the API namespace `namespace`."""
    found: set[str] = set()
    for controller in Path("/sys/fs/cgroup").iterdir():
        base = controller / namespace
        if base.is_dir():
            found.update(str(path) for path in base.iterdir() if path.is_dir())
    direct = Path("/sys/fs/cgroup") / namespace
    if direct.is_dir():
        found.update(str(path) for path in direct.iterdir() if path.is_dir())
    return sorted(found)


def remove_cgroups(namespace: str) -> None:
    """Remove the namespace's own cgroup and what is left below it; runc leaves it, empty, as with any daemon."""
    mounted = Path("/sys/fs/cgroup")
    for base in [mounted / namespace, *(controller / namespace for controller in mounted.iterdir())]:
        for folder, _, _ in os.walk(base, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


#: A test that leaves something unprotected fails at once and not on one slow day.
EAGER = "[gc]\nmutation_threshold = 1\nschedule_delay = 0.0\ninterval = 0.5\n"


class DaemonProcess:
    """`supervisord-ctr` below a private folder: `base`/{root,state,s.sock,config.toml,daemon.log}.

    Unless `config` says something of it, garbage is collected after every change.
    """

    def __init__(self, base: Path, config: str = "", environment: dict[str, str] | None = None) -> None:
        self.base = base
        self.root = base / "root"
        self.state = base / "state"
        self.address = base / "s.sock"
        self.log = base / "daemon.log"
        self.namespace = f"t{secrets.token_hex(4)}"
        self.environment = environment or {}
        self.process: subprocess.Popen[bytes] | None = None
        self._config = base / "config.toml"
        self._config.write_text(config if "[gc]" in config else f"{config}\n{EAGER}")

    def command(self) -> list[str]:
        """The command line that `start` runs."""
        return [sys.executable, "-m", "supervisord_ctr", "--config", str(self._config), "--root", str(self.root),
                "--state", str(self.state), "--address", str(self.address), "--log-level", "debug"]

    def start(self) -> DaemonProcess:
        """Start it and wait until it answers."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env={**os.environ, **self.environment}, start_new_session=True)
        self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Wait until the socket answers; fail with the end of the log when the process ends first."""
        process = self.process
        assert process is not None

        def answers() -> bool:
            if process.poll() is not None:
                raise AssertionError(f"the daemon ended with {process.returncode}:\n{self.log_tail()}")
            if not self.address.exists():
                return False
            with grpc.insecure_channel(f"unix:{self.address}") as channel:
                try:
                    VersionStub(channel).Version(Empty(), timeout=2)
                except grpc.RpcError:
                    return False
            return True

        try:
            wait_until(answers, "daemon ready", START_TIMEOUT)
        except AssertionError as error:
            error.add_note(self.log_tail())
            raise

    def log_tail(self, size: int = 6000) -> str:
        """The end of the daemon's log."""
        return self.log.read_text(errors="replace")[-size:] if self.log.exists() else ""

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the daemon did not stop within {STOP_TIMEOUT:g} s:\n{self.log_tail()}") from None

    def kill(self) -> None:
        """SIGKILL, as a machine that runs out of memory would."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(STOP_TIMEOUT)

    def restart(self, *, kill: bool = False) -> None:
        """Another daemon on the same folders, after a graceful stop or a SIGKILL."""
        if kill:
            self.kill()
        else:
            assert self.stop() == 0, self.log_tail()
        self.start()

    @contextlib.contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        """A gRPC channel to it."""
        with grpc.insecure_channel(f"unix:{self.address}", options=[("grpc.max_receive_message_length", -1)]) as made:
            yield made

    def metadata(self, lease: str = "") -> tuple[tuple[str, str], ...]:
        """Request headers: the suite's own namespace, and a lease."""
        made: tuple[tuple[str, str], ...] = (("containerd-namespace", self.namespace),)
        return (*made, ("containerd-lease", lease)) if lease else made

    def leaks(self) -> list[str]:
        """What is still there of this daemon after it stopped: mounts, processes, cgroups."""
        return [
            *(f"mount {point}" for point in mounts_below(self.base)),
            *(f"process {line}" for line in processes_naming(str(self.base))),
            *(f"cgroup {path}" for path in cgroups_of(self.namespace)),
        ]

    def clean(self) -> None:
        """Make room for the next suite whatever happened in this one (not a check)."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        for line in processes_naming(str(self.base)):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(line.split(":")[0]), signal.SIGKILL)
        for point in sorted(mounts_below(self.base), reverse=True):
            subprocess.run(["umount", "-l", point], check=False, capture_output=True)
        remove_cgroups(self.namespace)
        shutil.rmtree(self.base, ignore_errors=True)


@contextlib.contextmanager
def running_daemon(config: str = "", environment: dict[str, str] | None = None, *,
                   check_leaks: bool = True) -> Iterator[DaemonProcess]:
    """A started daemon that is stopped at the end and must leave nothing behind.

    The folder is directly below /tmp: socket paths may hold 107 bytes only.
    """
    base = Path(tempfile.mkdtemp(prefix="pctr-t-", dir=SHORT))
    base.chmod(0o711)  # users of user namespaces pass to their root file systems
    daemon = DaemonProcess(base, config, environment)
    try:
        daemon.start()
        yield daemon
        assert daemon.stop() == 0, daemon.log_tail()
        if check_leaks:
            with contextlib.suppress(AssertionError):
                wait_until(lambda: not daemon.leaks(), "nothing left behind", 30)
            left = daemon.leaks()
            assert left == [], f"left behind: {left}\n{daemon.log_tail()}"
    finally:
        daemon.clean()
