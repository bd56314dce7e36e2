"""CRI conformance: pods, their namespaces, files and lists, on our daemon and on containerd alike."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path

import grpc
import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from tests.support.cri import Cri
from tests.support.peers import beyond_containerd, own_namespace

KINDS = ("net", "ipc", "uts", "pid", "mnt")
SHOW = "; ".join(f"readlink /proc/self/ns/{kind}" for kind in KINDS)


def namespaces_of(cri: Cri, container: str) -> dict[str, str]:
    """Namespaces of a container by kind, as its processes see them."""
    lines = cri.exec(container, "/bin/sh", "-c", SHOW.replace("readlink", "busybox readlink")).stdout.decode().split()
    return dict(zip(KINDS, lines, strict=True))


def read(cri: Cri, container: str, path: str) -> str:
    return cri.exec(container, "cat", path).stdout.decode()


def code(caught: pytest.ExceptionInfo[grpc.RpcError]) -> grpc.StatusCode:
    found: grpc.StatusCode = caught.value.code()
    return found


def test_a_pod_is_told_as_it_was_asked_for(cri: Cri) -> None:
    before = time.time_ns()
    asked = cri.pod_config(
        labels={"app": "web", "empty": ""}, annotations={"example.com/words": "one, zwei, 三", "example.com/json": '{"a":1}'}
    )
    pod, _ = cri.run_pod(asked)
    status = cri.pod_status(pod)
    assert (status.id, status.state) == (pod, pb.SANDBOX_READY)
    assert status.metadata == asked.metadata
    assert dict(status.labels) == dict(asked.labels)
    assert dict(status.annotations) == dict(asked.annotations)
    assert before <= status.created_at <= time.time_ns()
    assert re.fullmatch(r"10\.\d+\.\d+\.\d+", status.network.ip)
    assert not status.network.additional_ips
    options = status.linux.namespaces.options
    assert (options.network, options.pid, options.ipc) == (pb.POD, pb.CONTAINER, pb.POD)
    [listed] = cri.runtime.ListPodSandbox(
        pb.ListPodSandboxRequest(filter=pb.PodSandboxFilter(id=pod)), timeout=60).items
    assert listed.metadata == asked.metadata
    assert (listed.state, listed.created_at) == (status.state, status.created_at)
    assert dict(listed.labels) == dict(asked.labels)
    assert dict(listed.annotations) == dict(asked.annotations)


def test_containers_of_a_pod_share_what_is_the_pods(cri: Cri) -> None:
    pod, config = cri.run_pod()
    one, two = (namespaces_of(cri, cri.run(pod, config, "sleep 600", name=name)) for name in ("one", "two"))
    assert {kind for kind in KINDS if one[kind] == two[kind]} == {"net", "ipc", "uts"}
    assert not {kind for kind in KINDS if one[kind] == own_namespace(kind)}


def test_a_shared_pid_namespace_and_one_of_a_target(cri: Cri) -> None:
    pod, config = cri.run_pod(cri.pod_config(pid=pb.POD))
    one, two = (cri.run(pod, config, "sleep 600", name=name, pid=pb.POD) for name in ("one", "two"))
    assert namespaces_of(cri, one)["pid"] == namespaces_of(cri, two)["pid"] != own_namespace("pid")
    listed = cri.exec(one, "ps").stdout.decode()
    assert listed.count("sleep 600") >= 2
    alone = cri.run(pod, config, "sleep 600", name="alone", pid=pb.CONTAINER)
    assert namespaces_of(cri, alone)["pid"] != namespaces_of(cri, one)["pid"]
    wanted = cri.container_config("sleep 600", name="beside", pid=pb.TARGET)
    wanted.linux.security_context.namespace_options.target_id = alone
    beside = cri.create(pod, config, wanted)
    cri.start(beside)
    assert namespaces_of(cri, beside)["pid"] == namespaces_of(cri, alone)["pid"]


def test_namespaces_of_the_node(cri: Cri) -> None:
    asked = cri.pod_config(pid=pb.NODE, hostname="")
    asked.hostname = ""
    options = asked.linux.security_context.namespace_options
    options.network = options.ipc = pb.NODE
    pod, config = cri.run_pod(asked)
    wanted = cri.container_config("sleep 600", pid=pb.NODE)
    wanted.linux.security_context.namespace_options.MergeFrom(options)
    container = cri.create(pod, config, wanted)
    cri.start(container)
    found = namespaces_of(cri, container)
    assert {kind for kind in KINDS if found[kind] == own_namespace(kind)} == {"net", "ipc", "uts", "pid"}
    assert cri.exec(container, "hostname").stdout.decode().strip() == socket.gethostname()
    status = cri.pod_status(pod)
    assert status.network.ip == ""
    told = status.linux.namespaces.options
    assert (told.network, told.pid, told.ipc) == (pb.NODE, pb.NODE, pb.NODE)


def test_host_name_and_resolver(cri: Cri) -> None:
    asked = cri.pod_config(hostname="a-name-of-its-own", dns_config=pb.DNSConfig(
        servers=["192.0.2.1", "192.0.2.2"], searches=["a.example", "b.example"], options=["ndots:5", "rotate"]))
    pod, config = cri.run_pod(asked)
    container = cri.run(pod, config, "sleep 600")
    assert cri.exec(container, "hostname").stdout == b"a-name-of-its-own\n"
    assert read(cri, container, "/etc/hostname").strip() == "a-name-of-its-own"
    assert "HOSTNAME=a-name-of-its-own" in cri.exec(container, "env").stdout.decode().split()
    assert read(cri, container, "/etc/resolv.conf").splitlines() == [
        "search a.example b.example", "nameserver 192.0.2.1", "nameserver 192.0.2.2", "options ndots:5 rotate"]
    pod, config = cri.run_pod()
    container = cri.run(pod, config, "sleep 600")
    assert read(cri, container, "/etc/resolv.conf") == Path("/etc/resolv.conf").read_text()
    assert read(cri, container, "/etc/hosts") == Path("/etc/hosts").read_text()


def test_the_network_inside_is_the_one_that_is_told(cri: Cri) -> None:
    pod, config = cri.run_pod()
    container = cri.run(pod, config, "sleep 600")
    assert cri.pod_status(pod).network.ip in read(cri, container, "/proc/net/fib_trie")
    assert sorted(cri.exec(container, "ls", "/sys/class/net").stdout.decode().split()) == ["eth0", "lo"]
    assert int(read(cri, container, "/sys/class/net/lo/flags"), 16) & 1, "the loopback interface is up"


def test_sysctls_are_the_pods_own(cri: Cri) -> None:
    asked = cri.pod_config()
    values = {"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "20000 20100", "kernel.msgmax": "9000"}
    asked.linux.sysctls.update(values)
    pod, config = cri.run_pod(asked)
    container = cri.run(pod, config, "sleep 600")
    for name, value in values.items():
        path = "/proc/sys/" + name.replace(".", "/")
        assert read(cri, container, path).split() == value.split(), name
        assert Path(path).read_text().split() != value.split(), name


def test_shared_memory_is_the_pods(cri: Cri) -> None:
    pod, config = cri.run_pod()
    one, two = (cri.run(pod, config, "sleep 600", name=name) for name in ("one", "two"))
    cri.exec(one, "/bin/sh", "-c", "echo shared > /dev/shm/word; echo private > /tmp/word")
    assert read(cri, two, "/dev/shm/word") == "shared\n"
    assert cri.exec(two, "cat", "/tmp/word").exit_code == 1
    assert int(cri.exec(one, "/bin/sh", "-c", "busybox df -k /dev/shm | busybox tail -n 1 | busybox awk '{print $2}'"
                        ).stdout) == 64 << 10


def test_stopping_and_removing_may_be_repeated(cri: Cri) -> None:
    pod, config = cri.run_pod()
    container = cri.run(pod, config, "sleep 600")
    for _ in range(2):
        cri.stop_pod(pod)
        assert cri.pod_status(pod).state == pb.SANDBOX_NOTREADY
        assert cri.status(container).state == pb.CONTAINER_EXITED
    with pytest.raises(grpc.RpcError):
        cri.create(pod, config, cri.container_config("true", name="late"))
    for _ in range(2):
        cri.remove_pod(pod)
    for ask in (lambda: cri.pod_status(pod), lambda: cri.status(container)):
        with pytest.raises(grpc.RpcError) as caught:
            ask()
        assert code(caught) == grpc.StatusCode.NOT_FOUND


def test_removing_a_pod_that_runs_takes_everything(cri: Cri) -> None:
    pod, config = cri.run_pod()
    containers = [cri.run(pod, config, "sleep 600", name="runs"),
                  cri.create(pod, config, cri.container_config("true", name="waits"))]
    cri.remove_pod(pod)
    assert not cri.runtime.ListPodSandbox(pb.ListPodSandboxRequest()).items
    assert not {item.id for item in cri.runtime.ListContainers(pb.ListContainersRequest()).containers} & set(containers)
    assert not cri.network.leased()


def test_filters_of_the_list_of_pods(cri: Cri) -> None:
    one, _ = cri.run_pod(cri.pod_config(labels={"tier": "front", "zone": "a"}))
    two, _ = cri.run_pod(cri.pod_config(labels={"tier": "back", "zone": "a"}))
    cri.stop_pod(two)

    def found(**fields: object) -> set[str]:
        chosen = pb.PodSandboxFilter(**fields)  # type: ignore[arg-type]
        return {item.id for item in cri.runtime.ListPodSandbox(pb.ListPodSandboxRequest(filter=chosen)).items}

    ready, gone = (pb.PodSandboxStateValue(state=state) for state in (pb.SANDBOX_READY, pb.SANDBOX_NOTREADY))
    assert found() == {one, two}
    assert found(id=one) == {one}
    assert found(id=one[:12]) == {one}
    assert found(id="0" * 64) == set()
    assert found(state=ready) == {one}
    assert found(state=gone) == {two}
    assert found(label_selector={"zone": "a"}) == {one, two}
    assert found(label_selector={"zone": "a", "tier": "back"}) == {two}
    assert found(label_selector={"zone": "b"}) == set()
    assert found(id=one, state=gone) == set()


@pytest.mark.parametrize("handler", ["runc", "second"])
def test_a_pod_runs_by_its_handler(cri: Cri, handler: str) -> None:
    pod, config = cri.run_pod(handler=handler)
    status = cri.wait_exited(cri.run(pod, config, "echo done"))
    assert (status.exit_code, status.reason) == (0, "Completed")
    assert cri.pod_status(pod).runtime_handler == handler
    assert cri.log(config) == [("stdout", "F", "done")]


def test_half_broken_requests_are_refused_and_leave_nothing(cri: Cri) -> None:
    with pytest.raises(grpc.RpcError):
        cri.runtime.RunPodSandbox(pb.RunPodSandboxRequest(config=pb.PodSandboxConfig()), timeout=60)
    with pytest.raises(grpc.RpcError):
        cri.runtime.RunPodSandbox(pb.RunPodSandboxRequest(), timeout=60)
    with pytest.raises(grpc.RpcError, match="no-such-handler"):
        cri.run_pod(handler="no-such-handler")
    asked = cri.pod_config()
    asked.linux.sysctls["net.ipv4.no_such_name"] = "1"
    with pytest.raises(grpc.RpcError):
        cri.run_pod(asked)
    assert not cri.runtime.ListPodSandbox(pb.ListPodSandboxRequest()).items
    assert not cri.network.leased()
    for call, request in (
        (cri.runtime.PodSandboxStatus, pb.PodSandboxStatusRequest(pod_sandbox_id="f" * 64)),
        (cri.runtime.PodSandboxStats, pb.PodSandboxStatsRequest(pod_sandbox_id="f" * 64)),
        (cri.runtime.PortForward, pb.PortForwardRequest(pod_sandbox_id="f" * 64, port=[80])),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=60)  # type: ignore[operator]
        assert code(caught) == grpc.StatusCode.NOT_FOUND, request
    cri.remove_pod("f" * 64)


def test_the_same_pod_again_with_another_attempt(cri: Cri) -> None:
    asked = cri.pod_config()
    first, _ = cri.run_pod(asked)
    cri.stop_pod(first)
    asked.metadata.attempt = 1
    second, _ = cri.run_pod(asked)
    assert first != second
    told = {item.id: item.metadata.attempt for item in cri.runtime.ListPodSandbox(pb.ListPodSandboxRequest()).items}
    assert told == {first: 0, second: 1}


@beyond_containerd("joining of a repeated request; it says that the name is reserved")
def test_d9_the_same_pod_twice_is_one_pod(cri: Cri) -> None:
    asked = cri.pod_config()
    assert cri.run_pod(asked)[0] == cri.run_pod(asked)[0]


@beyond_containerd("success for stopping what is gone already; it says NOT_FOUND")
def test_d9_stopping_a_pod_that_is_gone_is_no_failure(cri: Cri) -> None:
    pod, config = cri.run_pod()
    container = cri.run(pod, config, "sleep 600")
    cri.remove_pod(pod)
    cri.stop(container)
    cri.stop_pod(pod)


@beyond_containerd("GetContainerEvents")
def test_p14_events_follow_what_status_tells(cri: Cri) -> None:
    stream = cri.runtime.GetContainerEvents(pb.GetEventsRequest(), timeout=120)
    stream.initial_metadata()
    pod, config = cri.run_pod()
    container = cri.run(pod, config, "exit 4")
    seen = []
    for event in stream:
        if event.container_id == container:
            seen.append(event.container_event_type)
            [told] = [status for status in event.containers_statuses if status.id == container] or [None]
            if event.container_event_type == pb.CONTAINER_STARTED_EVENT:
                assert cri.status(container).state in (pb.CONTAINER_RUNNING, pb.CONTAINER_EXITED)
            if event.container_event_type == pb.CONTAINER_STOPPED_EVENT:
                assert told is not None
                assert (told.state, told.exit_code) == (pb.CONTAINER_EXITED, 4)
                assert cri.status(container).exit_code == 4
                break
    stream.cancel()
    assert seen == [pb.CONTAINER_CREATED_EVENT, pb.CONTAINER_STARTED_EVENT, pb.CONTAINER_STOPPED_EVENT]


def test_the_daemon_tells_that_it_is_ready(cri: Cri) -> None:
    status = cri.runtime.Status(pb.StatusRequest(verbose=True), timeout=60)
    assert {condition.type: condition.status for condition in status.status.conditions} == {
        "RuntimeReady": True, "NetworkReady": True}
    assert "config" in status.info
    version = cri.runtime.Version(pb.VersionRequest(), timeout=60)
    assert (version.version, version.runtime_api_version) == ("0.1.0", "v1")
    assert version.runtime_name
    assert version.runtime_version
    cri.runtime.UpdateRuntimeConfig(pb.UpdateRuntimeConfigRequest(), timeout=60)
    assert os.path.exists(cri.daemon.address)
