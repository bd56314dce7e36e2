"""Pods and containers through CRI against the real daemon, runc, overlayfs and CNI plugins."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from tests.support.cri import Cri, running_cri
from tests.support.daemon import wait_until


@pytest.fixture(scope="module")
def cri() -> Iterator[Cri]:
    with running_cri(extra='[runtime.classes.second]\nbinary = "runc"') as made:
        made.pull()
        yield made


def code(error: pytest.ExceptionInfo[grpc.RpcError]) -> grpc.StatusCode:
    return error.value.code()  # type: ignore[no-any-return]


def test_a_pod_from_start_to_end(cri: Cri) -> None:
    pod, config = cri.run_pod()
    status = cri.pod_status(pod)
    assert status.state == pb.SANDBOX_READY
    assert status.network.ip.startswith("10.")
    assert status.metadata == config.metadata
    assert [item.id for item in cri.runtime.ListPodSandbox(
        pb.ListPodSandboxRequest(filter=pb.PodSandboxFilter(id=pod[:13]))).items] == [pod]
    cri.stop_pod(pod)
    cri.stop_pod(pod)
    assert cri.pod_status(pod).state == pb.SANDBOX_NOTREADY
    assert cri.pod_status(pod).network.ip == ""
    cri.remove_pod(pod)
    cri.remove_pod(pod)
    with pytest.raises(grpc.RpcError) as caught:
        cri.pod_status(pod)
    assert code(caught) == grpc.StatusCode.NOT_FOUND


def test_a_container_from_start_to_end(cri: Cri) -> None:
    pod, config = cri.run_pod()
    container = cri.create(pod, config, cri.container_config("echo out; echo err >&2; hostname; exit 3"))
    assert cri.status(container).state == pb.CONTAINER_CREATED
    cri.start(container)
    status = cri.wait_exited(container)
    assert (status.exit_code, status.reason) == (3, "Error")
    assert 0 < status.created_at <= status.started_at <= status.finished_at
    assert sorted(cri.log(config)) == [("stderr", "F", "err"), ("stdout", "F", "out"), ("stdout", "F", "pod-host")]
    with pytest.raises(grpc.RpcError) as caught:
        cri.start(container)
    assert code(caught) == grpc.StatusCode.FAILED_PRECONDITION
    cri.remove(container)
    cri.remove(container)
    cri.remove_pod(pod)


def test_exit_zero_is_completed(cri: Cri) -> None:
    pod, config = cri.run_pod()
    container = cri.run(pod, config, "true")
    status = cri.wait_exited(container)
    assert (status.exit_code, status.reason) == (0, "Completed")
    cri.remove_pod(pod)


def test_d9_creating_twice_is_creating_once(cri: Cri) -> None:
    config = cri.pod_config()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        pods = {future.result()[0] for future in [pool.submit(cri.run_pod, config) for _ in range(4)]}
    assert len(pods) == 1
    pod = pods.pop()
    wanted = cri.container_config("sleep 60")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        made = {future.result() for future in [pool.submit(cri.create, pod, config, wanted) for _ in range(4)]}
    assert len(made) == 1
    other = cri.pod_config(config.metadata.name)
    other.hostname = "elsewhere"
    with pytest.raises(grpc.RpcError) as caught:
        cri.run_pod(other)
    assert code(caught) == grpc.StatusCode.ALREADY_EXISTS
    cri.remove_pod(pod)


def test_p3_a_caller_who_went_away_finds_what_it_asked_for(cri: Cri) -> None:
    config = cri.pod_config()
    call = cri.runtime.RunPodSandbox.future(pb.RunPodSandboxRequest(config=config), timeout=120)
    call.cancel()
    pod, _ = cri.run_pod(config)
    assert cri.pod_status(pod).state == pb.SANDBOX_READY
    listed = [item for item in cri.runtime.ListPodSandbox(pb.ListPodSandboxRequest()).items
              if item.metadata.name == config.metadata.name]
    assert len(listed) == 1
    cri.remove_pod(pod)


def test_a_container_that_cannot_start_says_why(cri: Cri) -> None:
    pod, config = cri.run_pod()
    wanted = cri.container_config("")
    del wanted.command[:]
    wanted.command.append("/no/such/program")
    container = cri.create(pod, config, wanted)
    with pytest.raises(grpc.RpcError, match="no such file or directory"):
        cri.start(container)
    status = cri.status(container)
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 128, "StartError")
    assert "/no/such/program" in status.message
    cri.remove_pod(pod)


def test_stop_gives_the_process_its_time(cri: Cri) -> None:
    pod, config = cri.run_pod()
    script = "trap 'echo ended; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    container = cri.run(pod, config, script)
    wait_until(lambda: ("stdout", "F", "ready") in cri.log(config), "the trap is set", 60)
    cri.stop(container, 60)
    status = cri.status(container)
    assert (status.state, status.exit_code) == (pb.CONTAINER_EXITED, 7)
    assert ("stdout", "F", "ended") in cri.log(config)
    stubborn = cri.run(pod, config, "trap '' TERM; while :; do sleep 0.05; done", name="stubborn")
    cri.stop(stubborn, 0)
    assert cri.status(stubborn).exit_code == 137
    cri.remove_pod(pod)


def test_removing_a_pod_ends_what_runs_in_it(cri: Cri) -> None:
    pod, config = cri.run_pod()
    containers = [cri.run(pod, config, "sleep 600", name=f"c{index}") for index in range(3)]
    cri.remove_pod(pod)
    left = cri.runtime.ListContainers(pb.ListContainersRequest()).containers
    assert not set(containers) & {container.id for container in left}


def test_a_shared_pid_namespace_shows_the_others(cri: Cri) -> None:
    pod, config = cri.run_pod(cri.pod_config(pid=pb.POD))
    cri.run(pod, config, "sleep 4321", name="one", pid=pb.POD)
    two = cri.run(pod, config, "sleep 600", name="two", pid=pb.POD)
    wait_until(lambda: b"sleep 4321" in cri.exec(two, "ps").stdout, "the other container is seen", 60)
    cri.remove_pod(pod)


def test_the_end_of_the_pause_process_is_noticed(cri: Cri) -> None:
    import json
    import signal

    pod, _ = cri.run_pod(cri.pod_config(pid=pb.POD))
    verbose = cri.runtime.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True))
    os.kill(json.loads(verbose.info["info"])["pid"], signal.SIGKILL)
    wait_until(lambda: cri.pod_status(pod).state == pb.SANDBOX_NOTREADY, "the pod is not ready", 60)
    cri.remove_pod(pod)


def test_two_containers_share_network_and_ipc(cri: Cri) -> None:
    pod, config = cri.run_pod()
    cri.run(pod, config, "echo told > /dev/shm/note; while :; do echo served | nc -l -p 8080; done", name="one")
    two = cri.run(pod, config, "sleep 600", name="two")
    wait_until(lambda: cri.exec(two, "cat", "/dev/shm/note").stdout == b"told\n", "the note is there", 60)
    wait_until(lambda: b"served" in cri.exec(two, "sh", "-c", "nc -w 5 127.0.0.1 8080 < /dev/null").stdout,
               "the other container serves on the pod's loopback", 60)
    cri.remove_pod(pod)


def test_sysctls_are_the_pods_own(cri: Cri) -> None:
    config = cri.pod_config()
    config.linux.sysctls["net.ipv4.ip_local_port_range"] = "20000 30000"
    config.linux.sysctls["kernel.msgmax"] = "16384"
    pod, _ = cri.run_pod(config)
    container = cri.run(pod, config, "sleep 600")
    read = cri.exec(container, "cat", "/proc/sys/net/ipv4/ip_local_port_range", "/proc/sys/kernel/msgmax").stdout
    assert read.split() == [b"20000", b"30000", b"16384"]
    assert Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split() != ["20000", "30000"]
    cri.remove_pod(pod)


@pytest.mark.parametrize(("name", "value"), [
    ("vm.swappiness", "1"), ("kernel.hostname", "a\nb"), ("net..ipv4", "1"), ("net/../../kernel/panic", "1"),
])
def test_s10_sysctls_of_the_host_and_odd_values_are_refused(cri: Cri, name: str, value: str) -> None:
    config = cri.pod_config()
    config.linux.sysctls[name] = value
    with pytest.raises(grpc.RpcError) as caught:
        cri.run_pod(config)
    assert code(caught) == grpc.StatusCode.INVALID_ARGUMENT


def test_events_tell_what_happened_in_order(cri: Cri) -> None:
    stream = cri.runtime.GetContainerEvents(pb.GetEventsRequest())
    pod, config = cri.run_pod()
    container = cri.run(pod, config, "exit 4")
    cri.wait_exited(container)
    cri.remove_pod(pod)
    seen: list[tuple[str, int]] = []
    for event in stream:
        if event.container_id in (pod, container):
            seen.append((event.container_id, event.container_event_type))
            if event.container_event_type == pb.CONTAINER_STOPPED_EVENT and event.container_id == container:
                assert [status.exit_code for status in event.containers_statuses] == [4]
            if (pod, pb.CONTAINER_DELETED_EVENT) in seen:
                break
    stream.cancel()
    if (pod, int(pb.CONTAINER_CREATED_EVENT)) in seen:
        assert seen == [
            (pod, pb.CONTAINER_CREATED_EVENT), (pod, pb.CONTAINER_STARTED_EVENT),
            (container, pb.CONTAINER_CREATED_EVENT), (container, pb.CONTAINER_STARTED_EVENT),
            (container, pb.CONTAINER_STOPPED_EVENT), (pod, pb.CONTAINER_STOPPED_EVENT),
            (container, pb.CONTAINER_DELETED_EVENT), (pod, pb.CONTAINER_DELETED_EVENT),
        ]


def test_p12_lists_stream_in_pages(cri: Cri) -> None:
    pod, _ = cri.run_pod()
    pages = list(cri.runtime.StreamPodSandboxes(pb.StreamPodSandboxesRequest()))
    assert pod in {item.id for page in pages for item in page.pod_sandboxes}
    assert len(list(cri.runtime.StreamContainers(pb.StreamContainersRequest()))) >= 1
    cri.remove_pod(pod)


def test_filters_choose(cri: Cri) -> None:
    pod, config = cri.run_pod()
    one = cri.create(pod, config, cri.container_config("sleep 60", labels={"role": "a"}))
    two = cri.run(pod, config, "sleep 600", name="two", labels={"role": "b"})

    def ids(**fields: object) -> set[str]:
        chosen = pb.ContainerFilter(pod_sandbox_id=pod, **fields)  # type: ignore[arg-type]
        return {item.id for item in cri.runtime.ListContainers(pb.ListContainersRequest(filter=chosen)).containers}

    assert ids() == {one, two}
    assert ids(state=pb.ContainerStateValue(state=pb.CONTAINER_RUNNING)) == {two}
    assert ids(label_selector={"role": "a"}) == {one}
    assert ids(id=two[:10]) == {two}
    assert ids(id="nothing") == set()
    cri.remove_pod(pod)


def test_stats_and_metrics_of_a_running_container(cri: Cri) -> None:
    pod, config = cri.run_pod()
    container = cri.run(pod, config, "sleep 600")
    stats = cri.runtime.ContainerStats(pb.ContainerStatsRequest(container_id=container)).stats
    assert stats.cpu.usage_core_nano_seconds.value > 0
    assert stats.memory.working_set_bytes.value > 0
    assert stats.writable_layer.inodes_used.value > 0
    pods = cri.runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=pod)).stats
    assert pods.linux.network.default_interface.name == "eth0"
    assert pods.linux.process.process_count.value >= 1
    described = {item.name: len(item.label_keys) for item in cri.runtime.ListMetricDescriptors(
        pb.ListMetricDescriptorsRequest()).descriptors}
    found = [item for item in cri.runtime.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest()).pod_metrics
             if item.pod_sandbox_id == pod]
    metrics = [*found[0].metrics, *found[0].container_metrics[0].metrics]
    assert {"container_threads", "container_processes", "container_network_receive_bytes_total"} <= {
        metric.name for metric in metrics}
    assert all(len(metric.label_values) == described[metric.name] for metric in metrics)
    cri.remove_pod(pod)


def test_resources_are_set_told_and_changed(cri: Cri) -> None:
    pod, config = cri.run_pod()
    wanted = cri.container_config("sleep 600")
    wanted.linux.resources.memory_limit_in_bytes = 64 << 20
    container = cri.create(pod, config, wanted)
    cri.start(container)
    assert cri.status(container).resources.linux.memory_limit_in_bytes == 64 << 20
    change = pb.LinuxContainerResources(memory_limit_in_bytes=96 << 20)
    cri.runtime.UpdateContainerResources(pb.UpdateContainerResourcesRequest(container_id=container, linux=change))
    assert cri.status(container).resources.linux.memory_limit_in_bytes == 96 << 20
    cri.remove_pod(pod)


def test_p13_running_out_of_memory_is_told(cri: Cri) -> None:
    pod, config = cri.run_pod()
    wanted = cri.container_config("dd if=/dev/zero of=/dev/null bs=200M count=4")
    wanted.linux.resources.memory_limit_in_bytes = 20 << 20
    container = cri.create(pod, config, wanted)
    cri.start(container)
    status = cri.wait_exited(container)
    assert status.exit_code != 0
    assert status.reason == "OOMKilled"
    assert "the limit of the container was reached" in status.message
    cri.remove_pod(pod)


def test_status_and_versions(cri: Cri) -> None:
    status = cri.runtime.Status(pb.StatusRequest(verbose=True))
    assert {condition.type: condition.status for condition in status.status.conditions} == {
        "RuntimeReady": True, "NetworkReady": True}
    assert "config" in status.info
    assert {"runc", "crun", "second"} <= {handler.name for handler in status.runtime_handlers}
    assert cri.runtime.Version(pb.VersionRequest()).runtime_api_version == "v1"
    assert cri.runtime.RuntimeConfig(pb.RuntimeConfigRequest()).linux.cgroup_driver == pb.CGROUPFS
    cri.runtime.UpdateRuntimeConfig(pb.UpdateRuntimeConfigRequest())


def test_a_log_is_opened_anew(cri: Cri) -> None:
    pod, config = cri.run_pod()
    container = cri.run(pod, config, "while :; do echo line; sleep 0.05; done")
    path = Path(config.log_directory) / "main.log"
    wait_until(lambda: path.exists() and path.stat().st_size, "something is logged", 60)
    path.rename(path.with_name("main.log.1"))
    cri.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=container))
    wait_until(lambda: path.exists() and path.stat().st_size, "the new file is written", 60)
    cri.remove_pod(pod)


@pytest.mark.parametrize("handler", ["runc", "second"])
def test_runtime_handlers_run_containers(cri: Cri, handler: str) -> None:
    pod, config = cri.run_pod(cri.pod_config(), handler)
    container = cri.run(pod, config, "echo by handler")
    assert cri.wait_exited(container).exit_code == 0
    assert cri.log(config) == [("stdout", "F", "by handler")]
    cri.remove_pod(pod)


def test_wrong_requests_get_the_right_code(cri: Cri) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        cri.runtime.RunPodSandbox(pb.RunPodSandboxRequest(config=pb.PodSandboxConfig()))
    assert code(caught) == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as caught:
        cri.run_pod(cri.pod_config(), "no-such-handler")
    assert code(caught) == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as caught:
        cri.create("0" * 64, cri.pod_config(), cri.container_config("true"))
    assert code(caught) == grpc.StatusCode.NOT_FOUND
    pod, config = cri.run_pod()
    for change, wanted in (
        ("image", grpc.StatusCode.NOT_FOUND), ("user", grpc.StatusCode.INVALID_ARGUMENT),
        ("seccomp", grpc.StatusCode.INVALID_ARGUMENT), ("metadata", grpc.StatusCode.INVALID_ARGUMENT),
        ("log", grpc.StatusCode.INVALID_ARGUMENT), ("cwd", grpc.StatusCode.INVALID_ARGUMENT),
    ):
        asked = cri.container_config("true")
        context = asked.linux.security_context
        if change == "image":
            asked.image.image = "localhost:1/no/such:image"
        elif change == "user":
            context.run_as_username = "nobody-here"
        elif change == "seccomp":
            context.seccomp.profile_type = pb.SecurityProfile.Localhost
            context.seccomp.localhost_ref = "/no/such/profile.json"
        elif change == "metadata":
            asked.ClearField("metadata")
        elif change == "log":
            asked.log_path = "../../etc/cron.d/evil"
        else:
            asked.working_dir = "/proc/self/fd/8"
        with pytest.raises(grpc.RpcError) as caught:
            cri.create(pod, config, asked)
        assert code(caught) == wanted, (change, caught.value.details())
    assert not cri.runtime.ListContainers(
        pb.ListContainersRequest(filter=pb.ContainerFilter(pod_sandbox_id=pod))).containers
    cri.remove_pod(pod)
