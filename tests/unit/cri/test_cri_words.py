"""Small translations of the CRI room: names, signals, quantities, mappings, command lines, log paths."""

from __future__ import annotations

import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import (
    bandwidth,
    container_create,
    container_rootfs,
    container_spec,
    ids,
    signals,
    stats,
    userns,
)
from supervisord_ctr.cri.container_spec import ImageConfig
from supervisord_ctr.cri.pods_run import port_mappings, wanted_environment
from supervisord_ctr.cri.state import Pod
from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.linux import cgroups


def test_every_signal_of_cri_has_a_number_and_comes_back() -> None:
    for value in pb.Signal.values():
        name = signals.name_of(value)
        if name:
            assert 1 <= signals.number_of(name) <= 64
            assert signals.number_of(signals.name_of(signals.value_of(name))) == signals.number_of(name)
    assert signals.name_of(pb.SIGNAL_RUNTIME_DEFAULT) == ""
    assert signals.number_of("SIGRTMIN+3") == 37
    assert signals.number_of("rtmax-2") == 62
    assert signals.number_of("15") == signals.number_of("term") == 15
    assert signals.value_of("SIGQUIT") == pb.SIGNAL_SIGQUIT


@pytest.mark.parametrize("text", ["", "SIGNOPE", "0", "65", "RTMIN+99"])
def test_what_is_no_signal_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        signals.number_of(text)


@pytest.mark.parametrize(("text", "value"), [("10M", 10**7), ("1.5Ki", 1536), ("2e3", 2000), ("100k", 100_000), ("5", 5)])
def test_quantities(text: str, value: int) -> None:
    assert bandwidth.parse_quantity(text) == value


@pytest.mark.parametrize("text", ["", "M", "1..2", "10X", "ten"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(InvalidArgument):
        bandwidth.parse_quantity(text)


def test_bandwidth_of_annotations() -> None:
    assert bandwidth.of_annotations({}) == {}
    found = bandwidth.of_annotations({"kubernetes.io/ingress-bandwidth": "1M"})
    assert found["ingressRate"] == 10**6
    with pytest.raises(InvalidArgument):
        bandwidth.of_annotations({"kubernetes.io/egress-bandwidth": "1"})


def mapped(*lengths: int) -> pb.NamespaceOption:
    mappings = [pb.IDMapping(host_id=1000 * (i + 1), container_id=0, length=length) for i, length in enumerate(lengths)]
    return pb.NamespaceOption(userns_options=pb.UserNamespace(mode=pb.POD, uids=mappings, gids=mappings))


def test_user_namespaces_are_checked() -> None:
    assert userns.mappings(pb.NamespaceOption()) == ((), ())
    uids, gids = userns.mappings(mapped(10))
    assert uids == gids
    assert uids[0].outside == 1000
    for wrong in (mapped(), mapped(1, 2), mapped(0), pb.NamespaceOption(userns_options=pb.UserNamespace(mode=pb.TARGET))):
        with pytest.raises(InvalidArgument):
            userns.mappings(wrong)
    with pytest.raises(InvalidArgument, match="different"):
        userns.check_same(mapped(10), pb.NamespaceOption())


@pytest.mark.parametrize(("command", "args", "expected"), [
    ([], [], ["entry", "cmd"]), (["c"], [], ["c"]), ([], ["a"], ["entry", "a"]), (["c"], ["a"], ["c", "a"]),
])
def test_command_lines_as_kubernetes_defines_them(command: list[str], args: list[str], expected: list[str]) -> None:
    config = pb.ContainerConfig(command=command, args=args)
    assert container_spec.arguments(config, ImageConfig(entrypoint=("entry",), cmd=("cmd",))) == expected


def test_no_command_at_all_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no command specified"):
        container_spec.arguments(pb.ContainerConfig(), ImageConfig())


@pytest.mark.parametrize(("parent", "systemd", "expected"), [
    ("/kubepods/pod1", False, "/kubepods/pod1/id"), ("", False, "/k8s.io/id"),
    ("/kubepods.slice/kubepods-pod1.slice", True, "kubepods-pod1.slice:cri-containerd:id"),
    ("kubepods-pod1.slice", True, "kubepods-pod1.slice:cri-containerd:id"), ("", True, "system.slice:cri-containerd:id"),
    ("/", False, "/id"), ("/", True, "system.slice:cri-containerd:id"),
])
def test_cgroup_paths(parent: str, systemd: bool, expected: str) -> None:
    assert container_spec.cgroup_path(parent, "id", "k8s.io", systemd) == expected


@pytest.mark.parametrize(("parent", "systemd", "word"), [
    ("/kubepods/pod1", True, "systemd"), ("/a.slice/b", True, "systemd"), ("/kubepods.slice", False, "cgroupfs"),
])
def test_a_cgroup_parent_of_the_other_driver_is_refused(parent: str, systemd: bool, word: str) -> None:
    with pytest.raises(InvalidArgument, match=f"use the {word} driver"):
        container_spec.cgroup_path(parent, "id", "k8s.io", systemd)


@pytest.mark.parametrize(("path", "ends"), [
    ("kubepods-pod1.slice:cri-containerd:id", "/kubepods.slice/kubepods-pod1.slice/cri-containerd-id.scope"),
    ("system.slice:cri-containerd:id", "/system.slice/cri-containerd-id.scope"), ("/kubepods/pod1/id", "/kubepods/pod1/id"),
])
def test_stats_find_the_cgroup_that_the_runtime_made(path: str, ends: str) -> None:
    folders = cgroups.of_runtime_path(path).folders
    assert folders
    assert all(folder.endswith(ends) for folder in folders.values())


@pytest.mark.parametrize(("parent", "ends"), [
    ("kubepods-burstable-pod1.slice", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice"),
    ("/kubepods.slice/kubepods-pod1.slice", "/kubepods.slice/kubepods-pod1.slice"), ("/kubepods/pod1", "/kubepods/pod1"),
])
def test_stats_find_the_cgroup_of_a_pod(parent: str, ends: str) -> None:
    config = pb.PodSandboxConfig()
    config.linux.cgroup_parent = parent
    group = stats.pod_group(Pod("id", "name", config))
    assert group is not None
    assert all(folder.endswith(ends) and not folder.endswith(ends + ends) for folder in group.folders.values())


def test_cgroup_paths_do_not_climb() -> None:
    with pytest.raises(InvalidArgument):
        container_spec.cgroup_path("/a/../../b", "id", "k8s.io", False)


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "a/../../b", "a\nb"])
def test_s11_log_paths_stay_below_their_folder(path: str) -> None:
    with pytest.raises(InvalidArgument):
        container_create.log_path(pb.PodSandboxConfig(log_directory="/var/log/pods"), pb.ContainerConfig(log_path=path))


def test_log_paths() -> None:
    pod = pb.PodSandboxConfig(log_directory="/var/log/pods/p")
    assert container_create.log_path(pod, pb.ContainerConfig(log_path="c/0.log")) == "/var/log/pods/p/c/0.log"
    assert container_create.log_path(pod, pb.ContainerConfig()) == ""
    assert container_create.log_path(pb.PodSandboxConfig(), pb.ContainerConfig(log_path="0.log")) == ""


@pytest.mark.parametrize("name", ["../../etc", "a/../b", "/abs", "line\nbreak", "nul\0", "x" * 300])
def test_s11_names_are_checked(name: str) -> None:
    with pytest.raises(InvalidArgument):
        ids.pod_name(pb.PodSandboxMetadata(name=name, namespace="n", uid="u"))


def test_s4_reserved_labels_of_images_are_dropped() -> None:
    labels = ids.build_labels(
        {"mine": "1"}, {"io.cri-containerd.kind": "evil", "containerd.io/gc.root": "x", "free": "y", "big": "x" * 5000},
        ids.KIND_CONTAINER,
    )
    assert labels == {"mine": "1", "free": "y", "io.cri-containerd.kind": "container"}


def test_s4_annotations_pass_by_exact_name_or_prefix_only() -> None:
    found = ids.passed_through({"a.b/c": "1", "a.b/cd": "2", "x.y/z": "3"}, ["a.b/c", "x.y/*"])
    assert found == {"a.b/c": "1", "x.y/z": "3"}


def test_users_asked_for() -> None:
    context = pb.LinuxContainerSecurityContext()
    assert container_rootfs.asked_user(context, "image:user").user == "image:user"
    context.run_as_user.value = 5
    context.run_as_group.value = 6
    assert container_rootfs.asked_user(context, "image").user == "5:6"
    context.run_as_username = "name"
    assert container_rootfs.asked_user(context, "image").user == "name:6"
    with pytest.raises(InvalidArgument, match="without a user"):
        container_rootfs.asked_user(pb.LinuxContainerSecurityContext(run_as_group=pb.Int64Value(value=1)), "")
    with pytest.raises(InvalidArgument, match="out of range"):
        container_rootfs.asked_user(pb.LinuxContainerSecurityContext(supplemental_groups=[-1]), "")


def test_port_mappings() -> None:
    config = pb.PodSandboxConfig(port_mappings=[
        pb.PortMapping(protocol=pb.UDP, container_port=53, host_port=5353, host_ip="127.0.0.1"),
        pb.PortMapping(container_port=80),
    ])
    assert port_mappings(config) == [
        {"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"}]
    config.port_mappings[0].host_port = 70000
    with pytest.raises(InvalidArgument):
        port_mappings(config)


def test_environments_follow_the_namespace_options() -> None:
    config = pb.PodSandboxConfig()
    wanted = wanted_environment("a" * 64, config)
    assert (wanted.own_network, wanted.own_ipc, wanted.own_uts) == (True, True, True)
    assert wanted.sysctls["net.ipv4.ip_unprivileged_port_start"] == "0"
    config.linux.security_context.namespace_options.network = pb.NODE
    wanted = wanted_environment("a" * 64, config)
    assert (wanted.own_network, wanted.own_uts, wanted.sysctls) == (False, False, {})
    config.linux.sysctls["net.ipv4.ip_forward"] = "1"
    with pytest.raises(InvalidArgument, match="host's network namespace"):
        wanted_environment("a" * 64, config)


@pytest.mark.parametrize("field", ["cpuset_cpus", "cpuset_mems"])
def test_resources_are_checked(field: str) -> None:
    with pytest.raises(InvalidArgument):
        container_spec.check_resources(pb.LinuxContainerResources(**{field: "0; rm -rf /"}))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        container_spec.check_resources(pb.LinuxContainerResources(unified={"../escape": "1"}))
    container_spec.check_resources(pb.LinuxContainerResources(cpuset_cpus="0-3,5", unified={"memory.high": "1"}))
