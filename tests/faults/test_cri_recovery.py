"""The daemon killed at every trace point of the CRI room: what runs goes on, what was half made goes away."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import (  # noqa: F401  loading them declares their trace points
    container_create,
    container_remove,
    container_start,
    exits,
    pods_run,
    pods_stop,
)
from supervisord_ctr.faults import POINTS
from supervisord_ctr.sandbox import network  # noqa: F401
from tests.support.cri import Cri, running_cri
from tests.support.daemon import wait_until

CRI_POINTS = sorted(name for name in POINTS if name.startswith(("cri.", "sandbox.")))


@pytest.fixture(scope="module")
def cri() -> Iterator[Cri]:
    with running_cri() as made:
        made.pull()
        yield made


def restart_armed(cri: Cri, faults: str) -> None:
    """Another daemon on the same folders, with trace points armed."""
    cri.daemon.kill() if cri.daemon.process and cri.daemon.process.poll() is None else None
    cri.daemon.environment["PCTR_FAULTS"] = faults
    cri.daemon.start()
    cri.connect()


def drive(cri: Cri) -> None:
    """The whole life of a pod; ends where the daemon dies."""
    pod, config = cri.run_pod()
    container = cri.run(pod, config, "exit 5")
    cri.wait_exited(container)
    cri.run(pod, config, "sleep 600", name="long")
    cri.remove(container)
    cri.stop_pod(pod)
    cri.remove_pod(pod)


@pytest.mark.parametrize("point", CRI_POINTS)
def test_p5_killed_at_a_trace_point_nothing_is_left(cri: Cri, point: str) -> None:
    restart_armed(cri, f"{point}=kill")
    with pytest.raises((grpc.RpcError, AssertionError)) as failed:
        drive(cri)
    process = cri.daemon.process
    assert process is not None
    wait_until(lambda: process.poll() is not None, f"killed at {point}, but for {failed.value}\n{cri.daemon.log_tail()}", 60)
    restart_armed(cri, "")
    for container in cri.runtime.ListContainers(pb.ListContainersRequest()).containers:
        status = cri.status(container.id)
        assert status.state != pb.CONTAINER_UNKNOWN
        if status.state == pb.CONTAINER_EXITED and status.metadata.name == "main":
            assert status.exit_code == 5
    cri.sweep()
    wait_until(lambda: not cri.leaks(), f"nothing left after {point}: {cri.leaks()}", 60)
    assert cri.daemon.process is not None
    listed = [key for key in _snapshot_keys(cri) if len(key) == 64]
    wait_until(lambda: not [key for key in _snapshot_keys(cri) if len(key) == 64], f"no layers left: {listed}", 60)


def _snapshot_keys(cri: Cri) -> list[str]:
    """Keys of snapshots in the namespace of Kubernetes, those of images apart."""
    from supervisord_ctr.api.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc

    with cri.daemon.channel() as channel:
        stub = snapshots_pb2_grpc.SnapshotsStub(channel)
        request = snapshots_pb2.ListSnapshotsRequest(snapshotter="overlayfs")
        metadata = (("containerd-namespace", "k8s.io"),)
        return [info.name for page in stub.List(request, metadata=metadata) for info in page.info]


def test_p6_what_runs_is_listed_after_a_kill_and_its_exit_is_not_lost(cri: Cri) -> None:
    restart_armed(cri, "")
    pod, config = cri.run_pod()
    script = "echo begun; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo ended; exit 9"
    container = cri.run(pod, config, script)
    short = cri.run(pod, config, "while [ ! -e /dev/shm/end ]; do sleep 0.05; done; exit 6", name="short")
    started = cri.status(container).started_at
    cri.exec(container, "touch", "/dev/shm/soon")
    cri.daemon.kill()
    cri.daemon.start()
    cri.connect()
    assert cri.pod_status(pod).state == pb.SANDBOX_READY
    status = cri.status(container)
    assert (status.state, status.started_at) == (pb.CONTAINER_RUNNING, started)
    cri.exec(container, "touch", "/dev/shm/end")
    assert cri.wait_exited(short).exit_code == 6
    cri.exec(container, "touch", "/tmp/go")
    status = cri.wait_exited(container)
    assert (status.exit_code, status.reason) == (9, "Error")
    assert [text for _, _, text in cri.log(config)] == ["begun", "ended"]
    cri.remove_pod(pod)


def test_p4_an_exit_while_no_daemon_runs_is_found_by_the_next(cri: Cri) -> None:
    restart_armed(cri, "")
    pod, config = cri.run_pod()
    container = cri.run(pod, config, "sleep 1; echo late; exit 11")
    cri.daemon.kill()
    wait_until(lambda: ("stdout", "F", "late") in cri.log(config), "the shim wrote on alone", 60)
    cri.daemon.start()
    cri.connect()
    status = cri.wait_exited(container)
    assert status.exit_code == 11
    assert status.finished_at > status.started_at
    cri.remove_pod(pod)


def test_p5_a_failing_plugin_leaves_nothing_and_the_pod_can_be_made_later(cri: Cri) -> None:
    restart_armed(cri, "sandbox.network.added=error:EIO@1")
    config = cri.pod_config()
    with pytest.raises(grpc.RpcError):
        cri.run_pod(config)
    wait_until(lambda: not cri.network.leased(), "the address went back", 60)
    pod, _ = cri.run_pod(config)
    cri.remove_pod(pod)
