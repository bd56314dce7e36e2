"""What a kernel or a host cannot do, what several callers ask at once, and what happened while nobody listened."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Iterator

import grpc
import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.linux import cgroups
from supervisord_ctr.oci import apparmor, selinux
from tests.support.cri import Cri, running_cri
from tests.support.daemon import wait_until

DEAF = "trap 'echo asked' TERM; echo ready; while true; do sleep 1; done"


@pytest.fixture(scope="module")
def cri() -> Iterator[Cri]:
    with running_cri(extra='[runtime.classes.slices]\nbinary = "runc"\nsystemd_cgroup = true') as made:
        made.pull()
        yield made


def lines(cri: Cri, config: pb.PodSandboxConfig, name: str = "main") -> list[str]:
    return [text for _, _, text in cri.log(config, name)]


# -- what cannot be done -----------------------------------------------------------------------------


@pytest.mark.skipif(apparmor.enabled(), reason="this kernel has AppArmor")
def test_a_profile_of_apparmor_is_refused_by_name_where_the_kernel_has_none(cri: Cri) -> None:
    pod, config = cri.run_pod()
    wanted = cri.container_config("true")
    wanted.linux.security_context.apparmor.profile_type = pb.SecurityProfile.Localhost
    wanted.linux.security_context.apparmor.localhost_ref = "localhost/my-profile"
    with pytest.raises(grpc.RpcError) as caught:
        cri.create(pod, config, wanted)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "my-profile" in caught.value.details()
    assert "apparmor is not supported by this kernel" in caught.value.details()
    for kind in (pb.SecurityProfile.RuntimeDefault, pb.SecurityProfile.Unconfined):
        wanted.linux.security_context.apparmor.profile_type = kind
        wanted.linux.security_context.apparmor.localhost_ref = ""
        wanted.metadata.name = f"kind-{kind}"
        container = cri.create(pod, config, wanted)
        cri.start(container)
        assert cri.wait_exited(container).exit_code == 0


@pytest.mark.skipif(selinux.enabled(), reason="this kernel has SELinux")
def test_options_of_selinux_mean_nothing_where_the_kernel_has_none(cri: Cri) -> None:
    pod, config = cri.run_pod()
    wanted = cri.container_config("true")
    wanted.linux.security_context.selinux_options.CopyFrom(pb.SELinuxOption(type="container_t", level="s0:c1,c2"))
    container = cri.create(pod, config, wanted)
    cri.start(container)
    assert cri.wait_exited(container).exit_code == 0
    assert "this kernel runs without selinux" in cri.daemon.log_tail(100_000)


@pytest.mark.parametrize("call", ["CheckpointPod", "RestorePod"])
def test_checkpoints_of_whole_pods_are_not_offered(cri: Cri, call: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        getattr(cri.runtime, call)(getattr(pb, f"{call}Request")(), timeout=60)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert caught.value.details().startswith("pods cannot be")


@pytest.mark.skipif(os.path.isdir("/run/systemd/system"), reason="systemd runs on this host")
def test_a_handler_that_needs_systemd_says_that_it_is_missing(cri: Cri) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        cri.run_pod(handler="slices")
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "systemd does not run on this host" in caught.value.details()


def test_a_slice_is_no_parent_for_the_cgroupfs_driver(cri: Cri) -> None:
    config = cri.pod_config()
    config.linux.cgroup_parent = "/kubepods.slice/kubepods-pod1.slice"
    with pytest.raises(grpc.RpcError) as caught:
        cri.run_pod(config)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "use the cgroupfs driver" in caught.value.details()


def test_containers_are_below_the_cgroup_of_their_pod(cri: Cri) -> None:
    config = cri.pod_config()
    parent = f"/{cri.network.name}/pod"
    config.linux.cgroup_parent = parent
    pod, _ = cri.run_pod(config)
    container = cri.run(pod, config, "exec sleep 600")
    group = cgroups.at(f"{parent}/{container}")
    assert len(group.pids()) == 1
    assert cri.runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=pod), timeout=60).stats.linux.cpu.timestamp
    cri.remove_pod(pod)
    assert not group.exists()
    for folder in sorted(set(cgroups.at(parent).folders.values()) | set(cgroups.at(f"/{cri.network.name}").folders.values()),
                         reverse=True):
        if os.path.isdir(folder):
            os.rmdir(folder)


# -- several at once ---------------------------------------------------------------------------------


def test_the_shorter_of_two_stops_decides(cri: Cri) -> None:
    pod, config = cri.run_pod()
    container = cri.run(pod, config, DEAF)
    wait_until(lambda: "ready" in lines(cri, config), "the container runs", 60)
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        patient = other.submit(cri.stop, container, 100_000)
        wait_until(lambda: "asked" in lines(cri, config), "the container was asked to end", 60)
        assert cri.exec(container, "echo", "still here").stdout == b"still here\n"
        cri.stop(container, 1)
        patient.result(60)
    assert cri.status(container).exit_code == 137
    with pytest.raises(grpc.RpcError) as caught:
        cri.exec(container, "true")
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_d9_an_update_goes_on_when_its_caller_leaves(cri: Cri) -> None:
    pod, config = cri.run_pod()
    container = cri.run(pod, config, "exec sleep 600")
    request = pb.UpdateContainerResourcesRequest(container_id=container)
    request.linux.cpu_shares = 333
    call = cri.runtime.UpdateContainerResources.future(request, timeout=60)
    call.cancel()
    request.linux.cpu_shares = 444
    cri.runtime.UpdateContainerResources(request, timeout=60)
    assert cri.status(container).resources.linux.cpu_shares == 444


# -- events ------------------------------------------------------------------------------------------


def test_p14_what_happened_while_nobody_listened_is_told_to_the_next_who_does(cri: Cri) -> None:
    """No other test of this file listens."""
    pod, config = cri.run_pod()
    before = cri.run(pod, config, "exit 3", name="before")
    assert cri.wait_exited(before).exit_code == 3
    stream = cri.runtime.GetContainerEvents(pb.GetEventsRequest(), timeout=120)
    stream.initial_metadata()
    after = cri.run(pod, config, "exit 4", name="after")
    told: list[tuple[str, int]] = []
    for event in stream:
        told.append((event.container_id, event.container_event_type))
        if {(name, int(pb.CONTAINER_STOPPED_EVENT)) for name in (before, after)} <= set(told):
            break
    stream.cancel()
    kinds = [int(kind) for kind in (pb.CONTAINER_CREATED_EVENT, pb.CONTAINER_STARTED_EVENT, pb.CONTAINER_STOPPED_EVENT)]
    for container in (before, after):
        assert [kind for name, kind in told if name == container] == kinds
