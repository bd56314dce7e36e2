"""What `pctr` tells of the daemon's insides: why a pod or container is as it is, what it died of, what is being
pulled, and that a namespace's cgroups go with it (P10, P22, P23)."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.linux import cgroups
from tests.integration.tasks_support import Client, busybox_root
from tests.support.cri import Cri
from tests.support.daemon import wait_until
from tests.support.fake_registry import FakeRegistry, Handler, Seen, fake_registry
from tests.support.pctr_target import busybox_image

TIMEOUT = 150


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
def pod(cri: Cri) -> Iterator[tuple[str, pb.PodSandboxConfig]]:
    made = cri.run_pod()
    yield made
    cri.remove_pod(made[0])


def pctr(cri: Cri, *words: str, status: int = 0) -> str:
    """What a command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "pctr", *words], capture_output=True, timeout=TIMEOUT, check=False,
        env={**os.environ, "PCTR_ADDRESS": str(cri.daemon.address), "PCTR_NAMESPACE": cri.daemon.namespace})
    assert done.returncode == status, done.stderr.decode()
    return (done.stdout if status == 0 else done.stderr).decode()


def explain(cri: Cri, name: str) -> dict[str, Any]:
    """`pctr explain` as JSON."""
    facts: dict[str, Any] = json.loads(pctr(cri, "explain", "--format", "json", name))[0]
    return facts


def name_of(config: pb.PodSandboxConfig) -> str:
    return f"{config.metadata.namespace}/{config.metadata.name}"


def test_p22_a_pod_is_explained_with_its_containers(cri: Cri, pod: tuple[str, pb.PodSandboxConfig]) -> None:
    cri.run(*pod, "sleep 1000", name="runs")
    ended = cri.run(*pod, "exit 3", name="ends")
    cri.wait_exited(ended)
    facts = explain(cri, name_of(pod[1]))
    assert facts["state"] == "Ready"
    assert facts["stage"] == "ready"
    assert facts["doing_now"] == "nothing"
    assert facts["addresses"] != "none"
    assert "state: Running" in facts["container_runs"]
    assert "exit: 3" in facts["container_ends"]
    assert "reason: Error" in facts["container_ends"]
    text = pctr(cri, "explain", name_of(pod[1]))
    assert "container runs" in text


def test_p22_a_running_container_is_explained(cri: Cri, pod: tuple[str, pb.PodSandboxConfig]) -> None:
    container = cri.run(*pod, "sleep 1000")
    facts = explain(cri, container[:13])
    assert (facts["id"], facts["state"], facts["doing_now"]) == (container, "Running", "nothing")
    assert facts["shim"] > 1
    assert "ago" in facts["started"]


def test_p23_who_asked_for_the_end_is_told(cri: Cri, pod: tuple[str, pb.PodSandboxConfig]) -> None:
    container = cri.run(*pod, "trap 'exit 7' TERM; echo ready; while true; do sleep 0.1; done", log_path="asked.log")
    log = Path(pod[1].log_directory) / "asked.log"
    wait_until(lambda: log.exists() and "ready" in log.read_text(), "the trap is set")
    cri.stop(container, 120)
    facts = explain(cri, container)
    assert facts["exit"] == "7"
    assert facts["end_asked_by"].startswith("stop, last with SIGTERM")
    alone = cri.run(*pod, "sleep 1000", name="alone")
    status = cri.runtime.ContainerStatus(pb.ContainerStatusRequest(container_id=alone, verbose=True), timeout=60)
    os.kill(json.loads(status.info["info"])["pid"], signal.SIGKILL)
    cri.wait_exited(alone)
    facts = explain(cri, alone)
    assert "137" in facts["exit"]
    assert "SIGKILL" in facts["exit"]
    assert facts["end_asked_by"].startswith("nobody here")


def test_p23_the_level_that_ran_out_of_memory_is_told(cri: Cri, pod: tuple[str, pb.PodSandboxConfig]) -> None:
    wanted = cri.container_config("dd if=/dev/zero of=/dev/null bs=200M count=1; exit 9", name="hungry")
    wanted.linux.resources.memory_limit_in_bytes = 20 << 20
    container = cri.create(*pod, wanted)
    cri.start(container)
    cri.wait_exited(container)
    assert explain(cri, container)["out_of_memory"].startswith("the limit of the container was reached")


def test_p22_a_container_that_could_not_be_made_is_explained_by_its_pod(
    cri: Cri, pod: tuple[str, pb.PodSandboxConfig]
) -> None:
    wanted = cri.container_config("true", name="nobody")
    wanted.linux.security_context.run_as_username = "no-such-user"
    with pytest.raises(grpc.RpcError):
        cri.create(*pod, wanted)
    for name in (name_of(pod[1]), f"{name_of(pod[1])}/nobody"):
        assert "no-such-user" in explain(cri, name)["error"]


def test_p22_a_pod_that_could_not_be_made_is_explained_by_its_name(cri: Cri) -> None:
    config = cri.pod_config()
    plugins = cri.daemon.base / "plugins"
    plugins.mkdir(exist_ok=True)
    broken = plugins / "bridge"
    broken.write_text("#!/bin/sh\n[ \"$CNI_COMMAND\" = DEL ] && exit 0\n"
                      "echo '{\"code\": 11, \"msg\": \"no cable is plugged in\"}'; exit 1\n")
    broken.chmod(0o755)
    try:
        with pytest.raises(grpc.RpcError):
            cri.run_pod(config)
    finally:
        broken.unlink()
    facts = explain(cri, name_of(config))
    assert facts["state"] == "is not there"
    assert "no cable is plugged in" in facts["error"]
    assert "network" in facts["error"]


def test_unknown_names_are_an_error(cri: Cri) -> None:
    assert "not found" in pctr(cri, "explain", "nobody-knows-it", status=1)


def test_p23_the_end_of_a_task_is_explained(cri: Cri, client: Client) -> None:
    name = client.run("sleep", "1000")
    facts = explain(cri, name)
    assert facts["state"] == "running"
    assert facts["shim"] > 1
    client.kill(name, 9)
    client.wait(name)
    wait_until(lambda: explain(cri, name)["state"] == "exited", "the exit is told")
    facts = explain(cri, name)
    assert facts["exit"] == "137, killed by SIGKILL"
    assert facts["end_asked_by"].startswith("a client, last with SIGKILL, ")
    client.delete(name)
    assert explain(cri, name)["state"].startswith("no task")
    client.remove(name)


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as made:
        yield made


def test_p10_the_pulls_of_a_kubelet_are_shown_while_they_run(cri: Cri, registry: FakeRegistry) -> None:
    image = busybox_image()
    reference = registry.add("suite/slow", "1", image)
    held, go = threading.Event(), threading.Event()

    def hold(handler: Handler, seen: Seen) -> bool:
        """Blobs wait until the test has looked."""
        if "/blobs/" in seen.path and seen.method == "GET":
            held.set()
            go.wait(TIMEOUT)
        return False

    registry.rules.append(hold)
    puller = threading.Thread(target=cri.pull, args=(reference,))
    puller.start()
    try:
        assert held.wait(TIMEOUT)
        row = wait_until(
            lambda: next((row for row in json.loads(pctr(cri, "image", "pulls", "--format", "json"))
                          if row["image"] == reference and row["blobs"]["total"] > 1), None), "the pull is listed")
        assert row["namespace"] == "k8s.io"
        assert row["total"] > 0
        assert 0 <= row["percent"] <= 100
        assert reference in pctr(cri, "-n", "k8s.io", "image", "pulls")
        assert reference not in pctr(cri, "-n", "other", "image", "pulls")
    finally:
        go.set()
        puller.join(TIMEOUT)
    wait_until(lambda: json.loads(pctr(cri, "image", "pulls", "--format", "json")) == [], "no pull is left")
    cri.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=reference)), timeout=60)


def test_p5_a_namespaces_cgroups_go_with_it(cri: Cri) -> None:
    name = f"ns{secrets.token_hex(4)}"
    pctr(cri, "namespace", "create", name)
    folders = [Path(folder) for folder in cgroups.create(f"/{name}/inner").folders.values()]
    assert all(folder.is_dir() for folder in folders)
    assert pctr(cri, "namespace", "rm", "--cgroup", name).strip() == name
    assert cgroups.everywhere(f"/{name}") == []


def test_cgroups_with_processes_stay(cri: Cri) -> None:
    name = f"ns{secrets.token_hex(4)}"
    pctr(cri, "namespace", "create", name)
    group = cgroups.create(f"/{name}/inner")
    process = subprocess.Popen(["sleep", "1000"])
    try:
        group.add(process.pid)
        assert "processes are in the control group" in pctr(cri, "namespace", "rm", "--cgroup", name, status=1)
        assert group.populated()
    finally:
        process.kill()
        process.wait()
        wait_until(lambda: not group.populated(), "the group is empty")
        cgroups.remove_empty(f"/{name}")
