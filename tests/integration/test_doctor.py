"""`pctr doctor` on a daemon with a running pod and a running container: every kind of orphan is listed, a repair
takes it away, and nothing of what runs is touched (P5, P6)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supervisord_ctr.api.types.task import task_pb2
from supervisord_ctr.linux import cgroups, mounts, namespaces, processes
from tests.integration.tasks_support import Client, busybox_root
from tests.support.cri import Cri, running_cri
from tests.support.daemon import DaemonProcess, mounts_below, wait_until
from tests.support.shim import Zygote, laboratory, rested

TIMEOUT = 150


def pctr(daemon: DaemonProcess, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end."""
    return subprocess.run([sys.executable, "-m", "pctr", *words], capture_output=True,
                          env={**os.environ, "PCTR_ADDRESS": str(daemon.address)}, timeout=TIMEOUT, check=False)


def doctor(daemon: DaemonProcess, *words: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What `pctr doctor` finds, by kind and id."""
    done = pctr(daemon, "doctor", "--format", "json", *words)
    assert done.returncode in (0, 1), done.stderr.decode()
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert done.returncode == int(any(row["state"] != "removed" for row in rows))
    # Cgroups of namespaces that daemons share ("k8s.io") may be another's.
    shared = [row for row in rows if row["kind"] == "cgroup" and not row["id"].startswith(f"/{daemon.namespace}/")]
    return {(row["kind"], row["id"]): row for row in rows if row not in shared}


@pytest.fixture(scope="module")
def cri() -> Iterator[Cri]:
    # Nothing is collected unless somebody asks.
    gc = "[gc]\ninterval = 0\nstartup_delay = 3600\nmutation_threshold = 0\ndeletion_threshold = 1000000"
    with running_cri(extra=gc) as made:
        made.pull()
        yield made


@pytest.fixture(scope="module")
def client(cri: Cri) -> Iterator[Client]:
    root = busybox_root()
    made = Client(cri.daemon, root)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(root)


@pytest.fixture
def busy(cri: Cri, client: Client) -> Iterator[tuple[str, str]]:
    """A container of a pod and one of the native API, both running."""
    pod, config = cri.run_pod()
    container = cri.run(pod, config, "trap 'exit 0' TERM; while true; do sleep 0.1; done")
    native = client.run("sleep", "1000")
    # Ordinary garbage of other tests is not what they are about.
    assert pctr(cri.daemon, "gc").returncode == 0
    yield container, native
    if native in client.made:
        client.finish(native)
    cri.remove_pod(pod)


def still_runs(cri: Cri, client: Client, busy: tuple[str, str]) -> None:
    """Both containers run and can be entered."""
    assert cri.exec(busy[0], "echo", "alive").stdout == b"alive\n"
    assert client.status(busy[1]) == task_pb2.RUNNING
    name = f"e{secrets.token_hex(4)}"
    client.exec(busy[1], name, ["true"])
    client.start(busy[1], name)
    assert client.wait(busy[1], name) == 0


def test_p5_nothing_is_found_while_all_is_well(cri: Cri, client: Client, busy: tuple[str, str]) -> None:
    assert doctor(cri.daemon, "--verify") == {}
    still_runs(cri, client, busy)


def tmpfs(path: Path) -> Path:
    """A mount that nobody explains."""
    path.mkdir(parents=True, exist_ok=True)
    mounts.mount("tmpfs", str(path), "tmpfs", 0, "size=64k")
    return path


def make_orphans(daemon: DaemonProcess) -> dict[tuple[str, str], Path]:
    """One of each kind, and the path that must be gone afterwards."""
    root, state, space = daemon.root, daemon.state, daemon.namespace
    identity = secrets.token_hex(32)
    made: dict[tuple[str, str], Path] = {}

    def add(kind: str, path: Path, name: str = "") -> None:
        made[kind, name or str(path)] = path

    folder = root / "snapshots" / "overlayfs" / "snapshots" / "999999"
    (folder / "fs").mkdir(parents=True)
    (folder / "fs" / "file").write_bytes(bytes(10_000))
    add("snapshot-directory", folder)

    data = secrets.token_bytes(5000)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    blob = root / "content" / "blobs" / "sha256" / digest[7:]
    blob.write_bytes(data)
    add("blob", blob, digest)
    ingest = root / "content" / "ingest" / ("0" * 64)
    ingest.mkdir()
    (ingest / "data").write_bytes(b"part")
    add("ingest-data", ingest)

    bundle = state / "tasks" / space / "ghost-bundle"
    (bundle / "rootfs").mkdir(parents=True)
    (bundle / "config.json").write_text("{}")
    tmpfs(bundle / "rootfs")
    add("bundle", bundle)
    hidden = state / "tasks" / space / ".ghost-0badcafe"
    (hidden / "rootfs").mkdir(parents=True)
    add("bundle", hidden)
    sandbox = state / "sandboxes" / space / "ghost-sandbox"
    sandbox.mkdir(parents=True)
    add("sandbox-bundle", sandbox)
    work = root / "tasks" / space / "ghost-work"
    work.mkdir(parents=True)
    add("work-folder", work)

    path = state / "s" / "ghost"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
    add("shim", path)
    runtime = state / "runc" / space / "ghost-state"
    runtime.mkdir(parents=True)
    (runtime / "state.json").write_text(json.dumps({"init_process_pid": 1, "init_process_start": 1}))
    os.mkfifo(runtime / "exec.fifo")
    add("runtime-state", runtime)
    group = cgroups.create(f"/{space}/ghost-group")
    add("cgroup", Path(next(iter(group.folders.values()))), f"/{space}/ghost-group")

    pod = state / "cri" / "sandboxes" / identity
    (pod / "ns").mkdir(parents=True)
    for kind in ("net", "ipc", "uts"):
        namespaces.pin(kind, pod / "ns" / kind)
        add(f"{kind}ns", pod / "ns" / kind)
    add("shm", tmpfs(pod / "shm"))
    add("sandbox-folder", pod)

    add("mount", tmpfs(state / "left"))
    activation = state / "mounts" / "ghost"
    tmpfs(activation / "0")
    add("mount-folder", activation)

    pipes = state / "cri" / "exec" / "ghost-exec"
    pipes.mkdir(parents=True)
    os.mkfifo(pipes / "stdout")
    (pipes / "container").write_text(identity)
    add("exec-pipes", pipes)
    volume = state / "cri" / "image-volumes" / identity
    tmpfs(volume / "0")
    add("volume-folder", volume)
    kept = root / "cri" / "containers" / identity
    kept.mkdir(parents=True)
    add("container-folder", kept)
    return made


def test_p5_every_kind_of_orphan_is_listed_and_repaired(cri: Cri, client: Client, busy: tuple[str, str]) -> None:
    daemon = cri.daemon
    made = make_orphans(daemon)
    try:
        # An empty cgroup counts when it has been there for a while.
        wait_until(lambda: ("cgroup", f"/{daemon.namespace}/ghost-group") in doctor(daemon), "the cgroup is listed")
        found = doctor(daemon)
        assert set(found) == set(made)
        assert all(row["state"] == "found" for row in found.values())
        assert found["snapshot-directory", str(daemon.root / "snapshots/overlayfs/snapshots/999999")]["size"] >= 10_000
        # The dry run is the default and changes nothing.
        assert set(doctor(daemon, "--repair", "--dry-run")) == set(made)
        assert all(os.path.lexists(path) for path in made.values())
        repaired = doctor(daemon, "--repair")
        assert {name: row["state"] for name, row in repaired.items()} == dict.fromkeys(made, "removed")
        left = [path for (kind, _), path in made.items() if kind != "mount" and os.path.lexists(path)]
        assert left == []
        assert not any("left" in point or "ghost" in point for point in mounts_below(daemon.base))
        assert doctor(daemon) == {}
        still_runs(cri, client, busy)
    finally:
        doctor(daemon, "--repair")
        for point in sorted(mounts_below(daemon.base), reverse=True):
            if "ghost" in point or point.endswith("/left"):
                with contextlib.suppress(OSError):
                    mounts.unmount_all(point)
        shutil.rmtree(daemon.state / "left", ignore_errors=True)


def test_p6_a_running_container_without_a_bundle_is_told_of_and_left_alone(
    cri: Cri, client: Client, busy: tuple[str, str]
) -> None:
    daemon, name = cri.daemon, busy[1]
    pid = client.process(name).pid
    bundle, aside = daemon.state / "tasks" / daemon.namespace / name, daemon.base / "aside"
    daemon.kill()
    bundle.rename(aside)
    daemon.start()
    cri.connect()
    client.connect()
    assert name not in client.listed()
    for words in ((), ("--repair",)):
        found = doctor(daemon, *words)
        assert {kind: row["state"] for (kind, _), row in found.items()} == {"shim": "found", "runtime-state": "found"}
        assert all(row["remedy"] == "hand" and (name in row["problem"] or str(pid) in row["problem"])
                   for row in found.values())
    assert Path(f"/proc/{pid}").exists()
    # With its bundle back, a repair lists the task again: it was never anybody's rubbish.
    aside.rename(bundle)
    found = doctor(daemon)
    assert ("bundle", str(bundle)) in found
    assert doctor(daemon, "--repair")["bundle", str(bundle)]["state"] == "removed"
    wait_until(lambda: client.listed().get(name) == task_pb2.RUNNING, "the task is listed again")
    assert client.process(name).pid == pid
    still_runs(cri, client, busy)
    assert doctor(daemon) == {}


def test_p5_a_bundle_whose_shim_died_goes_with_its_container(cri: Cri, client: Client) -> None:
    daemon, name = cri.daemon, client.run("sleep", "1000")
    pid = client.process(name).pid
    bundle = daemon.state / "tasks" / daemon.namespace / name
    daemon.kill()
    shim = json.loads((bundle / "runtime.json").read_text())
    aside = daemon.base / "aside-dead"
    bundle.rename(aside)
    os.kill(shim["pid"], 9)
    daemon.start()
    cri.connect()
    client.connect()
    aside.rename(bundle)
    assert doctor(daemon, "--repair")["bundle", str(bundle)]["state"] == "removed"
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the container of the dead shim is gone")
    assert not bundle.exists()
    assert doctor(daemon) == {}
    client.remove(name)


@pytest.mark.parametrize("rest", [0.0, 0.1], ids=["that never rests", "that may rest"])
def test_p5_a_shim_that_nobody_can_reach_is_ended_unless_it_serves_something(
    cri: Cri, client: Client, rest: float
) -> None:
    """Its socket file is gone: an idle one is ended by a repair, one with a container is only told of."""
    daemon, zygote = cri.daemon, Zygote(rest=rest)
    idle = daemon.base / "idle"
    idle.mkdir()
    try:
        reply = zygote.ask("fork-shim", namespace="ghost", id="g", bundle=str(idle), socket=str(daemon.state / "s" / "ghost"))
        (daemon.state / "s" / "ghost").unlink()
        name = f"pid {reply['pid']}"
        wait_until(lambda: ("shim", name) in doctor(daemon), "the shim is found")
        assert doctor(daemon)["shim", name]["remedy"] == "remove"
        assert doctor(daemon, "--repair")["shim", name]["state"] == "removed"
        wait_until(lambda: not processes.is_alive(reply["pid"], reply["start_time"]), "the shim has ended")
        assert doctor(daemon) == {}
        asyncio.run(_with_a_container(daemon, zygote, rest))
    finally:
        zygote.process.kill()
        zygote.close()
        if processes.is_alive(reply["pid"], reply["start_time"]):
            os.kill(reply["pid"], 9)
        idle.rmdir()


async def _with_a_container(daemon: DaemonProcess, zygote: Zygote, rest: float) -> None:
    async with laboratory("zygote", zygote) as lab:
        lab.sockets = daemon.state / "s"
        shim = await lab.run("c", ["sleep", "1000"])
        pid = (await shim.state("c")).pid
        if rest:
            await rested(shim)
        os.unlink(shim.path)
        found = await asyncio.to_thread(doctor, daemon)
        told = found["shim", f"pid {shim.pid}"]
        assert (told["problem"], told["remedy"]) == (
            f"a shim whose socket is gone, with the processes {pid}", "hand"
        )
        await asyncio.to_thread(doctor, daemon, "--repair")
        assert (await shim.state("c")).pid == pid
        await lab.finish(shim, "c")
