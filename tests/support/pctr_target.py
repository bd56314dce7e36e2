"""Daemons that `pctr` is tried on: ours and Debian's containerd, each in folders of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pctr.rpc import VERSION, Client

from supervisord_ctr.errors import Error
from tests.support import images
from tests.support.daemon import mounts_below, processes_naming, running_daemon, wait_until
from tests.support.places import SHORT

TIMEOUT = 150


class Target:
    """A daemon and how to run pctr against it."""

    def __init__(self, name: str, base: Path, address: Path) -> None:
        self.name = name
        self.base = base
        self.address = address
        self.image = ""
        self.environment = {
            **os.environ, "PCTR_ADDRESS": str(address), "PCTR_NAMESPACE": "suite", "PCTR_RUNTIME_DIR": str(base / "run"),
            "DOCKER_CONFIG": str(base / "no-docker-config"),
        }

    @property
    def ours(self) -> bool:
        """Whether it is supervisord-ctr."""
        return self.name == "supervisord-ctr"

    def command(self, *words: str) -> list[str]:
        """The command line of pctr."""
        return [sys.executable, "-m", "pctr", *words]

    def pctr(
        self, *words: str, stdin: bytes | None = None, status: int | None = 0, **more: Any,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run pctr to its end; fails unless it exits with `status` (None: with anything)."""
        feed: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        done = subprocess.run(self.command(*words), capture_output=True, env=self.environment, timeout=TIMEOUT,
                              check=False, **{**feed, **more})
        if status is not None and done.returncode != status:
            raise AssertionError(
                f"pctr {' '.join(words)} ended with {done.returncode}, not {status}:\n"
                f"{done.stdout[-2000:].decode(errors='replace')}\n{done.stderr[-2000:].decode(errors='replace')}")
        return done

    def text(self, *words: str, **more: Any) -> str:
        """What pctr prints."""
        return self.pctr(*words, **more).stdout.decode()

    def rows(self, *words: str) -> list[dict[str, Any]]:
        """A list as JSON."""
        found: list[dict[str, Any]] = json.loads(self.text(*words, "--format", "json"))
        return found

    def ids(self) -> set[str]:
        """Ids of containers and keys of active snapshots, and folders of fifos."""
        fifos = self.base / "run" / "fifo"
        return {
            *(row["container"] for row in self.rows("container", "ls")),
            *(row["key"] for row in self.rows("snapshot", "ls") if row["kind"] == "Active"),
            *(os.listdir(fifos) if fifos.exists() else ()),
        }

    def start(self, *words: str, **more: Any) -> subprocess.Popen[bytes]:
        """Start pctr."""
        return subprocess.Popen(self.command(*words), env=self.environment, **more)


def _answers(address: Path) -> bool:
    from google.protobuf.empty_pb2 import Empty

    from supervisord_ctr.api.services.version.v1 import version_pb2

    try:
        with Client(str(address), "suite") as client:
            client.unary(VERSION + "Version", Empty(), version_pb2.VersionResponse, timeout=5)
    except Error:
        return False
    return True


@contextlib.contextmanager
def running_containerd() -> Iterator[Target]:
    """Debian's containerd with the overlayfs snapshotter."""
    base = Path(tempfile.mkdtemp(prefix="pctr-c-", dir=SHORT))
    base.chmod(0o711)  # users of user namespaces pass to their root file systems
    address = base / "c.sock"
    (base / "config.toml").write_text(
        f'version = 2\nroot = "{base}/root"\nstate = "{base}/state"\n'
        'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\naddress = "{address}"\n[ttrpc]\naddress = "{address}.ttrpc"\n')
    with open(base / "log", "ab") as log:
        process = subprocess.Popen(["containerd", "-c", str(base / "config.toml")], stdin=subprocess.DEVNULL,
                                   stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: process.poll() is not None or _answers(address), "containerd answers")
        assert process.poll() is None, (base / "log").read_text()[-4000:]
        yield Target("containerd", base, address)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(60)
        for line in processes_naming(str(base)):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(line.split(":")[0]), signal.SIGKILL)
        for point in sorted(mounts_below(base), reverse=True):
            subprocess.run(["umount", "-l", point], check=False, capture_output=True)
        shutil.rmtree(base, ignore_errors=True)


@contextlib.contextmanager
def running_target(name: str) -> Iterator[Target]:
    """Either daemon by name."""
    if name == "containerd":
        with running_containerd() as target:
            yield target
        return
    with running_daemon() as daemon:
        yield Target(name, daemon.base, daemon.address)


def busybox_image() -> images.BuiltImage:
    """Debian's static busybox with accounts, in two layers."""
    applets = subprocess.run(["/bin/busybox", "--list"], capture_output=True, check=True).stdout.decode().split()
    links = [images.hard_link(f"bin/{name}", "bin/busybox", mode=0o755) for name in applets if name != "busybox"]
    accounts: Sequence[images.Member] = (
        images.folder("etc"),
        images.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home:/bin/sh\n"),
        images.file("etc/group", b"root:x:0:\nalice:x:1000:\nteam:x:2000:alice\n"),
    )
    return images.build(
        [
            images.layer(images.folder("bin"), images.folder("tmp", 0o1777), images.folder("home"), *(
                images.file("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755), *links), *accounts),
            images.layer(images.file("etc/marker", b"second layer\n")),
        ],
        config={"Env": ["PATH=/bin", "FROM=image"], "Cmd": ["sh"], "WorkingDir": "/home", "StopSignal": "SIGQUIT"},
    )
