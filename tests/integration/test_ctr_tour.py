"""The real `ctr` on our socket, through the commands that its users type every day."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DaemonProcess, wait_until
from tests.support.images import build, file, folder, layer, symlink
from tests.support.registry import RunningRegistry, running_registry

BUSYBOX = Path("/bin/busybox")


@pytest.fixture(scope="module")
def registry() -> Iterator[RunningRegistry]:
    with running_registry() as made:
        yield made


@pytest.fixture(scope="module")
def image(registry: RunningRegistry) -> str:
    """A reference of a small image that can run."""
    applets = [symlink(f"bin/{name}", "busybox") for name in ("sh", "echo", "sleep", "cat", "true", "id")]
    root = layer(folder("bin"), folder("etc"), folder("proc"), folder("dev"), folder("sys"),
                 file("bin/busybox", BUSYBOX.read_bytes(), mode=0o755), *applets,
                 file("etc/passwd", b"root:x:0:0:root:/:/bin/sh\n"))
    return registry.push("tour/busybox", "latest", build([root], config={"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]}))


class Ctr:
    """Runs `ctr` in the suite's namespace."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.base = ["ctr", "--address", str(daemon.address), "--namespace", daemon.namespace]

    def run(self, *arguments: str, status: int = 0) -> str:
        done = subprocess.run([*self.base, *arguments], capture_output=True, text=True, timeout=120, check=False,
                              stdin=subprocess.DEVNULL)
        assert done.returncode == status, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def fails(self, *arguments: str) -> str:
        done = subprocess.run([*self.base, *arguments], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode != 0, f"{arguments} succeeded: {done.stdout}"
        return done.stderr


@pytest.fixture
def ctr(daemon: DaemonProcess, image: str) -> Iterator[Ctr]:
    made = Ctr(daemon)
    made.run("images", "pull", "--plain-http", image)
    yield made
    for name in made.run("tasks", "ls", "-q").split():
        with contextlib.suppress(AssertionError):
            made.run("tasks", "rm", "-f", name)
    for name in made.run("containers", "ls", "-q").split():
        made.run("containers", "rm", name)
    made.run("images", "rm", "--sync", *made.run("images", "ls", "-q").split())


def test_foreground_runs_pass_output_and_status_on(ctr: Ctr, image: str) -> None:
    assert ctr.run("run", "--rm", image, "hello", "echo", "hi") == "hi\n"
    ctr.run("run", "--rm", image, "seven", "sh", "-c", "exit 7", status=7)
    assert ctr.run("containers", "ls", "-q") == ""


def test_the_life_of_a_detached_container(ctr: Ctr, image: str) -> None:
    ctr.run("run", "-d", image, "sleeper", "sleep", "1000")
    assert "RUNNING" in ctr.run("tasks", "ls")
    assert ctr.run("tasks", "exec", "--exec-id", "e1", "sleeper", "echo", "inside") == "inside\n"
    ctr.run("tasks", "exec", "--exec-id", "e2", "sleeper", "sh", "-c", "exit 3", status=3)
    pid = ctr.run("tasks", "ls").split()[4]
    assert os.path.exists(f"/proc/{pid}")
    assert pid in ctr.run("tasks", "ps", "sleeper")
    ctr.run("tasks", "pause", "sleeper")
    assert "PAUSED" in ctr.run("tasks", "ls")
    ctr.run("tasks", "resume", "sleeper")
    assert "sleeper" in ctr.run("tasks", "metrics", "sleeper")
    info = json.loads(ctr.run("containers", "info", "sleeper"))
    assert info["Image"] == image
    assert info["Snapshotter"] == "overlayfs"
    assert "sleeper" in ctr.run("snapshots", "ls")
    assert "containerd.io/uncompressed" in ctr.run("content", "ls")
    assert "must be stopped" in ctr.fails("tasks", "rm", "sleeper")
    ctr.run("tasks", "kill", "-s", "KILL", "sleeper")
    wait_until(lambda: "STOPPED" in ctr.run("tasks", "ls"), "the task is stopped")
    ctr.run("tasks", "rm", "sleeper")
    ctr.run("containers", "rm", "sleeper")
    assert ctr.run("snapshots", "ls").count("Active") == 0


def test_events_are_told_in_order(ctr: Ctr, image: str, tmp_path: Path) -> None:
    heard = tmp_path / "events"
    with open(heard, "wb") as output:
        listener = subprocess.Popen([*ctr.base, "events"], stdout=output)
    try:
        # A listener tells nobody when it is ready: run until it heard of a whole run.
        for number in range(20):
            ctr.run("run", "--rm", image, f"told-{number}", "true")
            with contextlib.suppress(AssertionError):
                wait_until(lambda: "/tasks/delete" in heard.read_text(), "the run was told of", 5)
            if "/tasks/create" in heard.read_text():
                break
        name = f'"told-{number}"'
        wait_until(lambda: any("/tasks/delete" in line and name in line for line in heard.read_text().splitlines()),
                   "the end was told of")
    finally:
        listener.terminate()
        listener.wait(30)
    lines = [line for line in heard.read_text().splitlines() if name in line]
    topics = [word for line in lines for word in line.split() if word.startswith("/tasks/")]
    assert topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


def test_what_is_not_there_is_an_error(ctr: Ctr, image: str) -> None:
    assert "not found" in ctr.fails("tasks", "kill", "nobody")
    assert "not found" in ctr.fails("containers", "info", "nobody")
    assert "not found" in ctr.fails("run", "--rm", "127.0.0.1:1/none:latest", "x", "true")
    ctr.run("run", "-d", image, "twice", "sleep", "1000")
    assert "already exists" in ctr.fails("run", "-d", image, "twice", "sleep", "1000")
    assert "must match" in ctr.fails("run", "-d", image, "a/b", "true") or "a/b" in ctr.fails(
        "run", "-d", image, "a/b", "true")
