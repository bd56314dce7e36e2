"""CRI conformance: the life of containers, their logs, execs and lists, on our daemon and on containerd alike."""

from __future__ import annotations

import re
import time
from pathlib import Path

import grpc
import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from tests.support.cri import Cri
from tests.support.daemon import wait_until
from tests.support.peers import beyond_containerd

Pod = tuple[str, pb.PodSandboxConfig]

RECORD = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,9}(?:Z|[+-]\d\d:\d\d)) (stdout|stderr) ([FP]) (.*)")


def code(caught: pytest.ExceptionInfo[grpc.RpcError]) -> grpc.StatusCode:
    found: grpc.StatusCode = caught.value.code()
    return found


def test_a_container_is_told_at_every_stage_of_its_life(cri: Cri, pod: Pod) -> None:
    asked = cri.container_config("trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done", labels={"a": "b"},
                                 annotations={"note": "größer"})
    asked.metadata.attempt = 3
    before = time.time_ns()
    container = cri.create(*pod, asked)
    created = cri.status(container)
    assert created.state == pb.CONTAINER_CREATED
    assert created.metadata == asked.metadata
    assert (dict(created.labels), dict(created.annotations)) == ({"a": "b"}, {"note": "größer"})
    assert created.image.image == cri.image
    assert created.image_ref.startswith(cri.image.rpartition(":")[0] + "@sha256:")
    assert created.log_path == f"{pod[1].log_directory}/main.log"
    assert before <= created.created_at <= time.time_ns()
    assert (created.started_at, created.finished_at, created.exit_code) == (0, 0, 0)
    cri.start(container)
    running = cri.status(container)
    assert running.state == pb.CONTAINER_RUNNING
    assert created.created_at == running.created_at <= running.started_at <= time.time_ns()
    assert running.finished_at == 0
    wait_until(lambda: cri.log(pod[1]), "it is up")
    cri.stop(container, grace=60)
    ended = cri.status(container)
    assert (ended.state, ended.exit_code, ended.reason) == (pb.CONTAINER_EXITED, 7, "Error")
    assert running.started_at == ended.started_at < ended.finished_at <= time.time_ns()
    cri.stop(container)
    assert cri.status(container) == ended
    cri.remove(container)
    cri.remove(container)
    with pytest.raises(grpc.RpcError) as caught:
        cri.status(container)
    assert code(caught) == grpc.StatusCode.NOT_FOUND


def test_exit_codes_and_reasons(cri: Cri, pod: Pod) -> None:
    cases = {
        "true": ("exit 0", 0, "Completed"), "three": ("exit 3", 3, "Error"), "most": ("exit 255", 255, "Error"),
        "inner": ("sh -c 'kill -9 $$'; exit $?", 137, "Error"), "missing": ("/no/such/program", 127, "Error"),
    }
    ids = {name: cri.run(*pod, script, name=name) for name, (script, _, _) in cases.items()}
    for name, (_, exit_code, reason) in cases.items():
        status = cri.wait_exited(ids[name])
        assert (status.exit_code, status.reason) == (exit_code, reason), name


def test_stopping_with_grace_without_and_by_the_images_signal(cri: Cri, pod: Pod) -> None:
    deaf = cri.run(*pod, "trap '' TERM; echo up; while :; do sleep 0.05; done", name="deaf")
    image = cri.registry.add("test/signal:1", {"StopSignal": "SIGUSR1"})
    cri.pull(image)
    wanted = cri.container_config("trap 'exit 5' USR1; echo up; while :; do sleep 0.05; done", name="signal")
    wanted.image.image = image
    own = cri.create(*pod, wanted)
    cri.start(own)
    wait_until(lambda: cri.log(pod[1], "deaf") and cri.log(pod[1], "signal"), "both are up")
    cri.stop(deaf, grace=1)
    cri.stop(own, grace=60)
    assert (cri.status(deaf).exit_code, cri.status(own).exit_code) == (137, 5)


def test_a_container_that_cannot_start_is_exited_and_says_why(cri: Cri, pod: Pod) -> None:
    asked = cri.container_config("")
    asked.command[:] = ["/no/such/program"]
    container = cri.create(*pod, asked)
    with pytest.raises(grpc.RpcError, match="no such file"):
        cri.start(container)
    status = cri.status(container)
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 128, "StartError")
    assert "no such file" in status.message


def test_removing_a_container_that_runs_ends_it(cri: Cri, pod: Pod) -> None:
    container = cri.run(*pod, "sleep 600")
    cri.remove(container)
    with pytest.raises(grpc.RpcError) as caught:
        cri.status(container)
    assert code(caught) == grpc.StatusCode.NOT_FOUND


def test_a_failed_attempt_is_followed_by_another_of_the_same_name(cri: Cri, pod: Pod) -> None:
    first = cri.run(*pod, "exit 1")
    cri.wait_exited(first)
    asked = cri.container_config("exit 0")
    with pytest.raises(grpc.RpcError):
        cri.create(*pod, asked)
    asked.metadata.attempt = 1
    second = cri.create(*pod, asked)
    cri.start(second)
    assert cri.wait_exited(second).exit_code == 0


def test_starting_what_has_ended_is_refused(cri: Cri, pod: Pod) -> None:
    container = cri.run(*pod, "exit 0")
    cri.wait_exited(container)
    with pytest.raises(grpc.RpcError):
        cri.start(container)
    assert cri.status(container).exit_code == 0


def test_a_log_has_the_format_of_kubernetes(cri: Cri, pod: Pod) -> None:
    script = ("echo first; echo to the other side >&2; sleep 0.3; echo; printf 'a\\r\\n'; "
              "busybox head -c 40000 /dev/zero | busybox tr '\\0' x; echo; printf 'no end'")
    cri.wait_exited(cri.run(*pod, script))
    path = Path(pod[1].log_directory) / "main.log"
    records = [RECORD.fullmatch(line) for line in path.read_bytes().decode().split("\n")[:-1]]
    assert all(records), path.read_text()[:2000]
    found = [(match[2], match[3], match[4]) for match in records if match]
    assert ("stderr", "F", "to the other side") in found
    output = [(tag, text) for stream, tag, text in found if stream == "stdout"]
    # containerd takes a carriage return at the end of a line away, our log keeps every byte.
    assert [(tag, text.rstrip("\r")) for tag, text in output[:3]] == [("F", "first"), ("F", ""), ("F", "a")]
    parts = output[3:-1]
    assert "".join(text for _, text in parts) == "x" * 40000
    assert [tag for tag, _ in parts] == ["P"] * (len(parts) - 1) + ["F"]
    assert max(len(text) for _, text in parts) <= 16 << 10
    assert output[-1][1] == "no end"
    moments = [match[1] for match in records if match]
    assert len(moments) == len(found)


def test_a_terminal_is_one_stream(cri: Cri, pod: Pod) -> None:
    cri.wait_exited(cri.run(*pod, "echo out; echo err >&2; test -t 0 && test -t 1 && echo terminal", tty=True))
    assert cri.log(pod[1]) == [("stdout", "F", text) for text in ("out", "err", "terminal")] or [
        text.rstrip("\r") for _, _, text in cri.log(pod[1])] == ["out", "err", "terminal"]


def test_a_log_is_opened_anew(cri: Cri, pod: Pod) -> None:
    container = cri.run(*pod, "while :; do echo line; sleep 0.05; done")
    path = Path(pod[1].log_directory) / "main.log"
    wait_until(lambda: path.exists() and path.stat().st_size, "something is logged")
    path.rename(path.with_name("main.log.1"))
    cri.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=container), timeout=60)
    wait_until(lambda: path.exists() and path.stat().st_size, "the new file is written")
    cri.stop(container)
    with pytest.raises(grpc.RpcError):
        cri.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=container), timeout=60)


def test_exec_sync(cri: Cri, pod: Pod) -> None:
    container = cri.run(*pod, "sleep 600", envs=[pb.KeyValue(key="WORD", value=b"of the container")])
    done = cri.exec(container, "/bin/sh", "-c", "echo out $WORD; echo err >&2; exit 9")
    assert (done.stdout, done.stderr, done.exit_code) == (b"out of the container\n", b"err\n", 9)
    assert cri.exec(container, "true") == pb.ExecSyncResponse()
    assert len(cri.exec(container, "dd", "if=/dev/zero", "bs=1024", "count=1024").stdout) == 1 << 20
    with pytest.raises(grpc.RpcError) as caught:
        cri.exec(container, "/bin/sh", "-c", "echo begun; sleep 600", timeout=1)
    assert code(caught) in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNKNOWN)
    assert "timeout" in (caught.value.details() or "")
    wait_until(lambda: b"sleep 600" not in cri.exec(
        container, "/bin/sh", "-c", "ps | grep -v grep | grep 'begun'; true").stdout, "the command is killed")
    with pytest.raises(grpc.RpcError):
        cri.exec(container, "/no/such/program")
    cri.stop(container)
    for identity in (container, "f" * 64):
        with pytest.raises(grpc.RpcError):
            cri.exec(identity, "true")


def test_filters_of_the_list_of_containers(cri: Cri, pod: Pod) -> None:
    other, other_config = cri.run_pod()
    waits = cri.create(*pod, cri.container_config("true", name="waits", labels={"role": "a", "both": "1"}))
    runs = cri.run(*pod, "sleep 600", name="runs", labels={"role": "b", "both": "1"})
    ended = cri.run(other, other_config, "true", name="ended", labels={"role": "a"})
    cri.wait_exited(ended)

    def found(**fields: object) -> set[str]:
        chosen = pb.ContainerFilter(**fields)  # type: ignore[arg-type]
        return {item.id for item in cri.runtime.ListContainers(pb.ListContainersRequest(filter=chosen)).containers}

    def state(value: pb.ContainerState.ValueType) -> pb.ContainerStateValue:
        return pb.ContainerStateValue(state=value)

    assert found() == {waits, runs, ended}
    assert found(id=runs) == found(id=runs[:12]) == {runs}
    assert found(id="f" * 64) == set()
    assert found(pod_sandbox_id=pod[0]) == {waits, runs}
    assert found(pod_sandbox_id=other, state=state(pb.CONTAINER_EXITED)) == {ended}
    assert found(state=state(pb.CONTAINER_CREATED)) == {waits}
    assert found(state=state(pb.CONTAINER_RUNNING)) == {runs}
    assert found(label_selector={"role": "a"}) == {waits, ended}
    assert found(label_selector={"role": "a", "both": "1"}) == {waits}
    assert found(label_selector={"role": ""}) == set()
    assert found(id=runs, pod_sandbox_id=other) == set()
    [listed] = cri.runtime.ListContainers(
        pb.ListContainersRequest(filter=pb.ContainerFilter(id=runs)), timeout=60).containers
    told = cri.status(runs)
    assert (listed.metadata, listed.created_at, dict(listed.labels)) == (
        told.metadata, told.created_at, dict(told.labels))
    assert listed.image_ref == cri.pull(), "the list tells the image by its ID, the status by its digest"
    assert listed.pod_sandbox_id == pod[0]

    def measured(**fields: object) -> set[str]:
        chosen = pb.ContainerStatsFilter(**fields)  # type: ignore[arg-type]
        answer = cri.runtime.ListContainerStats(pb.ListContainerStatsRequest(filter=chosen), timeout=60)
        return {item.attributes.id for item in answer.stats}

    assert measured(id=runs) == measured(pod_sandbox_id=pod[0], label_selector={"role": "b"}) == {runs}
    assert measured(label_selector={"role": "none"}) == set()


def test_stats_of_a_container(cri: Cri, pod: Pod) -> None:
    container = cri.run(*pod, "dd if=/dev/zero of=/big bs=1024 count=100; echo up; sleep 600", labels={"a": "b"})
    wait_until(lambda: cri.log(pod[1]), "it is up")
    request = pb.ContainerStatsRequest(container_id=container)

    def told() -> pb.ContainerStats | None:
        found = cri.runtime.ContainerStats(request, timeout=60).stats
        return found if found.writable_layer.used_bytes.value >= 100 << 10 else None

    stats = wait_until(told, "the writable layer is measured")
    assert stats.attributes.metadata.name == "main"
    assert dict(stats.attributes.labels) == {"a": "b"}
    assert stats.cpu.usage_core_nano_seconds.value > 0
    assert stats.cpu.timestamp > 0
    assert 0 < stats.memory.working_set_bytes.value < 64 << 20
    assert stats.writable_layer.inodes_used.value > 0
    with pytest.raises(grpc.RpcError) as caught:
        cri.runtime.ContainerStats(pb.ContainerStatsRequest(container_id="f" * 64), timeout=60)
    assert code(caught) == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(("command", "arguments", "expected"), [
    ([], [], ["image-entry image-arg"]),
    ([], ["mine"], ["image-entry mine"]),
    (["/bin/echo", "own"], [], ["own"]),
    (["/bin/echo", "own"], ["mine"], ["own mine"]),
])
def test_command_and_arguments_over_those_of_the_image(
    cri: Cri, pod: Pod, command: list[str], arguments: list[str], expected: list[str]
) -> None:
    image = cri.registry.add("test/command:1", {"Entrypoint": ["/bin/echo", "image-entry"], "Cmd": ["image-arg"]})
    cri.pull(image)
    asked = cri.container_config("")
    asked.image.image = image
    asked.command[:], asked.args[:] = command, arguments
    container = cri.create(*pod, asked)
    cri.start(container)
    assert cri.wait_exited(container).exit_code == 0
    assert [text for _, _, text in cri.log(pod[1])] == expected


def test_environment_and_directory_over_those_of_the_image(cri: Cri, pod: Pod) -> None:
    image = cri.registry.add("test/place:1", {"Env": ["PATH=/bin", "A=image", "B=image"], "WorkingDir": "/made/by/us"})
    cri.pull(image)
    show = "pwd; echo $A $B $C; stat -c %a /made/by/us"
    lines = []
    for name, more in (("one", {}), ("two", {"working_dir": "/data"})):
        asked = cri.container_config(show, name=name, envs=[
            pb.KeyValue(key="B", value=b"request"), pb.KeyValue(key="C", value=b"$A is not expanded")], **more)
        asked.image.image = image
        container = cri.create(*pod, asked)
        cri.start(container)
        cri.wait_exited(container)
        lines.append([text for stream, _, text in cri.log(pod[1], name) if stream == "stdout"])
    assert lines[0] == ["/made/by/us", "image request $A is not expanded", "755"]
    assert lines[1][:2] == ["/data", "image request $A is not expanded"]


def test_half_broken_requests_are_refused_and_leave_nothing(cri: Cri, pod: Pod) -> None:
    def change(kind: str) -> pb.CreateContainerRequest:
        asked = cri.container_config("true", name=kind)
        if kind == "metadata":
            asked.ClearField("metadata")
        elif kind == "image":
            asked.image.image = "localhost:1/no/such:image"
        elif kind == "user":
            asked.linux.security_context.run_as_username = "nobody-here"
        elif kind == "profile":
            asked.linux.security_context.seccomp.profile_type = pb.SecurityProfile.Localhost
            asked.linux.security_context.seccomp.localhost_ref = "/no/such/profile.json"
        elif kind == "device":
            asked.devices.add(host_path="/dev/no-such-device", container_path="/dev/x", permissions="rwm")
        identity = "f" * 64 if kind == "sandbox" else pod[0]
        return pb.CreateContainerRequest(pod_sandbox_id=identity, config=asked, sandbox_config=pod[1])

    for kind in ("metadata", "image", "user", "profile", "device", "sandbox"):
        with pytest.raises(grpc.RpcError):
            cri.runtime.CreateContainer(change(kind), timeout=60)
    assert not cri.runtime.ListContainers(pb.ListContainersRequest()).containers
    for call, request in (
        (cri.runtime.StartContainer, pb.StartContainerRequest(container_id="f" * 64)),
        (cri.runtime.ContainerStatus, pb.ContainerStatusRequest(container_id="f" * 64)),
        (cri.runtime.UpdateContainerResources, pb.UpdateContainerResourcesRequest(
            container_id="f" * 64, linux=pb.LinuxContainerResources(cpu_shares=100))),
        (cri.runtime.Exec, pb.ExecRequest(container_id="f" * 64, cmd=["true"], stdout=True)),
        (cri.runtime.Attach, pb.AttachRequest(container_id="f" * 64, stdout=True)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=60)  # type: ignore[operator]
        assert code(caught) == grpc.StatusCode.NOT_FOUND, request
    cri.remove("f" * 64)


@beyond_containerd("joining of a repeated request; it says that the name is reserved")
def test_d9_creating_twice_is_creating_once(cri: Cri, pod: Pod) -> None:
    asked = cri.container_config("true")
    assert cri.create(*pod, asked) == cri.create(*pod, asked)


@beyond_containerd("check of the names of capabilities; unknown ones are left out")
def test_d10_a_capability_that_does_not_exist_is_refused(cri: Cri, pod: Pod) -> None:
    asked = cri.container_config("true")
    asked.linux.security_context.capabilities.add_capabilities.append("NO_SUCH_THING")
    with pytest.raises(grpc.RpcError) as caught:
        cri.create(*pod, asked)
    assert code(caught) == grpc.StatusCode.INVALID_ARGUMENT


@beyond_containerd("Stream calls")
def test_p12_streams_tell_what_lists_tell(cri: Cri, pod: Pod) -> None:
    container = cri.run(*pod, "sleep 600")
    assert [item.id for page in cri.runtime.StreamContainers(pb.StreamContainersRequest(), timeout=60)
            for item in page.containers] == [container]
    assert [item.id for page in cri.runtime.StreamPodSandboxes(pb.StreamPodSandboxesRequest(), timeout=60)
            for item in page.pod_sandboxes] == [pod[0]]
