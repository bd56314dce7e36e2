"""`pctr pod` and `pctr sandbox` on a real daemon: pods as a kubelet makes them, sandboxes as a client of the API does."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from tests.support.cri import Cri
from tests.support.daemon import wait_until
from tests.support.pctr_target import TIMEOUT, Target


@pytest.fixture(scope="module")
def target(cri: Cri) -> Target:
    return Target("supervisord-ctr", cri.daemon.base, cri.daemon.address)


class Pod(NamedTuple):
    """A pod with one container that counts to 5 on stdout, says one word on stderr, and goes on."""

    id: str
    name: str
    container: str
    label: str


@pytest.fixture
def pod(cri: Cri) -> Iterator[Pod]:
    name, label = f"pod-{secrets.token_hex(4)}", f"main-{secrets.token_hex(3)}"
    made, config = cri.run_pod(cri.pod_config(name))
    script = "for i in 1 2 3 4 5; do echo line $i; done; echo wrong >&2; while true; do sleep 0.1; done"
    container = cri.run(made, config, script, name=label)
    wait_until(lambda: len(cri.log(config, label)) == 6, "the container has spoken")
    yield Pod(made, name, container, label)
    cri.remove_pod(made)


def test_pods_and_their_containers_are_listed(target: Target, pod: Pod) -> None:
    (row,) = [row for row in target.rows("pod", "ls") if row["pod"] == pod.id]
    assert (row["namespace"], row["name"], row["state"], row["attempt"]) == ("tests", pod.name, "Ready", 0)
    assert pod.id in target.text("pod", "ls", "-q").split()
    assert pod.name in target.text("pod", "ls")
    (row,) = [row for row in target.rows("pod", "ls", "--containers") if row["container"] == pod.container]
    assert (row["name"], row["state"], row["pod"]) == (pod.label, "Running", f"tests/{pod.name}")
    assert pod.container in target.text("pod", "ls", "--containers", "-q").split()


@pytest.mark.parametrize("word", ["id", "start", "name", "both"])
def test_a_pod_is_found_by_what_names_it(target: Target, pod: Pod, word: str) -> None:
    words = {"id": pod.id, "start": pod.id[:12], "name": pod.name, "both": f"tests/{pod.name}"}
    (document,) = _documents(target, "pod", "inspect", words[word])
    assert document["status"]["id"] == pod.id
    assert document["status"]["labels"] == {"suite": "cri"}
    assert document["info"]["netNamespace"]


def test_a_container_of_a_pod_is_described(target: Target, pod: Pod) -> None:
    first, second = _documents(target, "pod", "inspect", pod.name, pod.label)
    assert first["status"]["id"] == pod.id
    assert second["status"]["id"] == pod.container
    assert second["status"]["state"] == "CONTAINER_RUNNING"
    assert second["info"]["pid"] > 1


def test_logs(target: Target, pod: Pod) -> None:
    done = target.pctr("pod", "logs", pod.label)
    assert done.stdout.decode().splitlines() == [f"line {number}" for number in range(1, 6)]
    assert done.stderr == b"wrong\n"
    # How the two streams lie in the file is the kernel's choice, but the last two lines are two.
    last = target.pctr("pod", "logs", "--tail", "2", pod.container)
    assert len((last.stdout + last.stderr).splitlines()) == 2
    stamped = target.text("pod", "logs", "--timestamps", pod.container[:13]).splitlines()
    assert all(line.partition(" ")[0].endswith("Z") for line in stamped)
    assert target.text("pod", "logs", "--since", "1h", pod.label) == done.stdout.decode()
    assert target.text("pod", "logs", "--tail", "0", pod.label) == ""


def test_logs_are_followed_over_a_rotation_to_the_end(target: Target, cri: Cri, pod: Pod) -> None:
    config = cri.pod_config(pod.name)
    script = "echo before; while ! test -e /tmp/go; do sleep 0.1; done; echo after; exit 3"
    talker = f"talker-{secrets.token_hex(3)}"
    container = cri.run(pod.id, config, script, name=talker)
    process = target.start("pod", "logs", "--follow", talker, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"before\n"
        log = cri.logs / pod.name / f"{talker}.log"
        log.rename(f"{log}.1")
        cri.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=container), timeout=60)
        cri.exec(container, "touch", "/tmp/go")
        assert process.stdout.read() == b"after\n"
        assert process.wait(TIMEOUT) == 0
    cri.remove(container)


def test_stats(target: Target, pod: Pod) -> None:
    rows = target.rows("pod", "stats", pod.name)
    assert [row["container"] for row in rows] == [None, pod.label]
    assert {row["pod"] for row in rows} == {pod.id}
    assert rows[0]["processes"] >= 1
    assert rows[0]["memory"] > 0
    assert rows[0]["rx"] >= 0
    assert pod.name in target.text("pod", "stats")


def test_a_pod_is_stopped_and_removed(target: Target, cri: Cri, pod: Pod) -> None:
    done = target.pctr("pod", "rm", pod.name, status=1)
    assert b"is ready" in done.stderr
    assert target.text("pod", "stop", pod.name).strip() == pod.id
    (row,) = [row for row in target.rows("pod", "ls") if row["pod"] == pod.id]
    assert row["state"] == "NotReady"
    assert cri.status(pod.container).state == pb.CONTAINER_EXITED
    # What was said stays readable until the pod goes.
    assert target.text("pod", "logs", pod.label).startswith("line 1\n")
    assert target.text("pod", "stop", pod.name).strip() == pod.id
    assert target.text("pod", "rm", pod.name).strip() == pod.id
    assert pod.id not in target.text("pod", "ls", "-q").split()


def test_force_removes_what_runs_and_one_mistake_does_not_keep_the_rest(target: Target, pod: Pod) -> None:
    done = target.pctr("pod", "rm", "--force", "nobody", pod.name, status=1)
    assert done.stderr == b"pctr: pod nobody: not found\n"
    assert done.stdout.decode().strip() == pod.id


def test_names_that_mean_nothing_or_too_much(target: Target, cri: Cri, pod: Pod) -> None:
    for words in (("inspect", "nobody"), ("stop", "nobody"), ("rm", "nobody"), ("logs", "nobody"), ("stats", "nobody")):
        done = target.pctr("pod", *words, status=1)
        assert done.stderr.startswith(b"pctr: ")
        assert done.stderr.endswith(b"nobody: not found\n")
        assert done.stderr.count(b"\n") == 1
    config = cri.pod_config(pod.name)
    config.metadata.namespace = "elsewhere"
    other, _ = cri.run_pod(config)
    assert b"means more than one" in target.pctr("pod", "inspect", pod.name, status=1).stderr
    (document,) = _documents(target, "pod", "inspect", f"elsewhere/{pod.name}")
    assert document["status"]["id"] == other
    cri.remove_pod(other)


def test_images_of_pods_are_not_pruned(target: Target, cri: Cri, pod: Pod) -> None:
    unused = cri.pull(cri.registry.add(f"test/unused-{secrets.token_hex(3)}:1", {"Labels": {"of": pod.id}}))
    named = target.text("-n", "k8s.io", "image", "prune", "--all", "--dry-run").split()
    assert unused in named
    used = cri.status(pod.container)
    assert not {used.image.image, used.image_ref, used.image_id} & set(named)
    assert target.text("-n", "k8s.io", "image", "prune", "--all").split() == named
    assert cri.images.ImageStatus(pb.ImageStatusRequest(image=pb.ImageSpec(image=unused))).image.id == ""
    assert cri.images.ImageStatus(pb.ImageStatusRequest(image=pb.ImageSpec(image=cri.image))).image.id


# -- sandboxes -------------------------------------------------------------------------------------------


def test_a_sandbox_from_start_to_removal(target: Target) -> None:
    name = f"sb-{secrets.token_hex(4)}"
    assert target.text("sandbox", "run", "--label", "team=web", name).strip() == name
    (row,) = target.rows("sandbox", "ls", f"id=={name}")
    assert (row["id"], row["sandboxer"], row["labels"]) == (name, "shim", {"team": "web"})
    assert name in target.text("sandbox", "ls", "-q").split()
    document = _documents(target, "sandbox", "info", name)
    assert document["state"] == "SANDBOX_READY"
    assert document["pid"] > 1
    assert b"already exists" in target.pctr("sandbox", "run", name, status=1).stderr
    assert target.text("sandbox", "rm", name).strip() == name
    assert name not in target.text("sandbox", "ls", "-q").split()


def test_sandboxes_that_cannot_be(target: Target) -> None:
    name = f"sb-{secrets.token_hex(4)}"
    for words in (
        ("info", "nobody"), ("rm", "nobody"), ("run", "a/b"), ("run", ""), ("run", "--runtime", "io.example.none.v1", name),
        ("run", "--sandboxer", "nobody", name), ("ls", "id=="),
    ):
        done = target.pctr("sandbox", *words, status=1)
        assert done.stderr.startswith(b"pctr: ")
        assert done.stderr.count(b"\n") == 1
    assert name not in target.text("sandbox", "ls", "-q").split()


def _documents(target: Target, *words: str) -> Any:
    return json.loads(target.text(*words))
