"""Security contexts, mounts and volumes of containers, seen from inside."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from tests.support.cri import Cri
from tests.support.daemon import wait_until


@pytest.fixture(scope="module")
def pod(cri: Cri) -> Iterator[tuple[str, pb.PodSandboxConfig]]:
    config = cri.pod_config()
    config.linux.security_context.privileged = True
    made = cri.run_pod(config)
    yield made
    cri.remove_pod(made[0])


_count = iter(range(10_000))


def output(cri: Cri, pod: tuple[str, pb.PodSandboxConfig], config: pb.ContainerConfig) -> list[str]:
    """Lines that a container wrote to its standard output until it ended."""
    config.metadata.name = f"c{next(_count)}"
    config.log_path = f"{config.metadata.name}.log"
    container = cri.create(*pod, config)
    cri.start(container)
    cri.wait_exited(container)
    lines = [text for stream, _, text in cri.log(pod[1], config.metadata.name) if stream == "stdout"]
    cri.remove(container)
    return lines


def context_of(config: pb.ContainerConfig) -> pb.LinuxContainerSecurityContext:
    return config.linux.security_context


@pytest.mark.parametrize(("fields", "groups", "policy", "expected"), [
    ({}, (), pb.Merge, "uid=0(root) gid=0(root) groups=0(root)"),
    ({"run_as_user": 1000}, (), pb.Merge, "uid=1000(user) gid=1000(user) groups=1000(user),50000(extra)"),
    ({"run_as_user": 1000}, (1234,), pb.Merge, "uid=1000(user) gid=1000(user) groups=1000(user),1234,50000(extra)"),
    ({"run_as_user": 1000}, (1234,), pb.Strict, "uid=1000(user) gid=1000(user) groups=1000(user),1234"),
    ({"run_as_username": "user"}, (), pb.Merge, "uid=1000(user) gid=1000(user) groups=1000(user),50000(extra)"),
    ({"run_as_user": 4711}, (), pb.Merge, "uid=4711 gid=0(root) groups=0(root)"),
    ({"run_as_user": 1000, "run_as_group": 7}, (), pb.Strict, "uid=1000(user) gid=7 groups=7"),
])
def test_s7_users_and_groups(
    cri: Cri, pod: tuple[str, pb.PodSandboxConfig], fields: dict[str, object], groups: tuple[int, ...], policy: int,
    expected: str,
) -> None:
    config = cri.container_config("id")
    context = context_of(config)
    for name, value in fields.items():
        if isinstance(value, int):
            getattr(context, name).value = value
        else:
            setattr(context, name, value)
    context.supplemental_groups.extend(groups)
    context.supplemental_groups_policy = pb.SupplementalGroupsPolicy.ValueType(policy)
    [line] = output(cri, pod, config)
    head, _, tail = line.partition(" groups=")
    wanted_head, _, wanted_tail = expected.partition(" groups=")
    assert head == wanted_head
    assert set(tail.split(",")) == set(wanted_tail.split(","))


@pytest.mark.parametrize("user", ["2147483648", "4294967296", "99999999999999999999", "-1"])
def test_s6_users_beyond_the_range_are_refused(cri: Cri, pod: tuple[str, pb.PodSandboxConfig], user: str) -> None:
    config = cri.container_config("id")
    context_of(config).run_as_username = user
    with pytest.raises(grpc.RpcError) as caught:
        cri.create(*pod, config)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def capabilities(lines: list[str], name: str) -> int:
    return next(int(line.split()[1], 16) for line in lines if line.startswith(name))


def test_s7_capabilities_are_those_asked_for_and_none_is_inheritable(
    cri: Cri, pod: tuple[str, pb.PodSandboxConfig]
) -> None:
    config = cri.container_config("cat /proc/self/status")
    context_of(config).capabilities.drop_capabilities.append("ALL")
    context_of(config).capabilities.add_capabilities.append("NET_BIND_SERVICE")
    lines = output(cri, pod, config)
    assert capabilities(lines, "CapEff") == 1 << 10
    assert capabilities(lines, "CapBnd") == 1 << 10
    assert capabilities(lines, "CapInh") == 0
    assert capabilities(lines, "CapAmb") == 0


def test_privileged_needs_a_privileged_pod(cri: Cri, pod: tuple[str, pb.PodSandboxConfig]) -> None:
    config = cri.container_config("cat /proc/self/status; test -e /dev/kmsg && echo devices; touch /sys/kernel/x")
    context_of(config).privileged = True
    lines = output(cri, pod, config)
    assert "devices" in lines
    assert capabilities(lines, "CapEff") & (1 << 21)
    plain = cri.run_pod()
    with pytest.raises(grpc.RpcError, match="no privileged container allowed in sandbox"):
        cri.create(*plain, config)
    cri.remove_pod(plain[0])


def test_read_only_root_no_new_privileges_and_seccomp(cri: Cri, pod: tuple[str, pb.PodSandboxConfig]) -> None:
    config = cri.container_config("touch /x 2>&1 || echo refused; cat /proc/self/status")
    context = context_of(config)
    context.readonly_rootfs = context.no_new_privs = True
    context.seccomp.profile_type = pb.SecurityProfile.RuntimeDefault
    lines = output(cri, pod, config)
    assert "refused" in lines
    assert next(line.split()[1] for line in lines if line.startswith("NoNewPrivs")) == "1"
    assert next(line.split()[1] for line in lines if line.startswith("Seccomp:")) == "2"


def test_a_seccomp_profile_from_a_file_is_used(
    cri: Cri, pod: tuple[str, pb.PodSandboxConfig], tmp_path: Path
) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["sethostname"], "action": "SCMP_ACT_ERRNO"}, {
            "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
    }))
    config = cri.container_config("mkdir /tmp/made || echo blocked")
    context_of(config).seccomp.profile_type = pb.SecurityProfile.Localhost
    context_of(config).seccomp.localhost_ref = str(profile)
    assert "blocked" in output(cri, pod, config)


def test_masked_and_read_only_paths(cri: Cri, pod: tuple[str, pb.PodSandboxConfig]) -> None:
    config = cri.container_config("cat /etc/passwd | wc -c; echo x > /tmp/readonly/y || echo refused")
    config.command[2] = "wc -c < /etc/passwd; touch /data/sub/new 2>/dev/null || echo refused"
    context_of(config).masked_paths.append("/etc/passwd")
    context_of(config).readonly_paths.append("/data/sub")
    assert output(cri, pod, config) == ["0", "refused"]


def test_mounts_bind_read_only_and_make_missing_folders(
    cri: Cri, pod: tuple[str, pb.PodSandboxConfig], tmp_path: Path
) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("from the host\n")
    missing = tmp_path / "missing" / "folder"
    config = cri.container_config("cat /m/file; touch /m/new || echo refused; touch /n/made && echo made")
    config.mounts.append(pb.Mount(container_path="/m", host_path=str(tmp_path / "inner"), readonly=True))
    config.mounts.append(pb.Mount(container_path="/n", host_path=str(missing)))
    lines = output(cri, pod, config)
    assert lines[0] == "from the host"
    assert lines[-2:] == ["refused", "made"]
    assert (missing / "made").exists()


def test_p24_recursive_read_only_reaches_what_is_mounted_below(
    cri: Cri, pod: tuple[str, pb.PodSandboxConfig], tmp_path: Path
) -> None:
    import subprocess

    (tmp_path / "sub").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "sub")], check=True)
    try:
        config = cri.container_config("touch /m/sub/new || echo refused")
        config.mounts.append(pb.Mount(
            container_path="/m", host_path=str(tmp_path), readonly=True, recursive_read_only=True))
        assert "refused" in output(cri, pod, config)
        config.mounts[0].readonly = False
        with pytest.raises(grpc.RpcError, match="conflicts with RW mount"):
            cri.create(*pod, config)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "sub")], check=True)


def test_volumes_of_the_image_begin_with_its_content_and_owners(
    cri: Cri, pod: tuple[str, pb.PodSandboxConfig]
) -> None:
    image = cri.registry.add("test/volumes:1", {"Volumes": {"/data": {}, "/empty": {}}})
    cri.pull(image)
    config = cri.container_config("cat /data/sub/file; stat -c '%u %a' /data/sub; touch /data/x /empty/y && echo writable")
    config.image.image = image
    assert output(cri, pod, config) == ["content of the image", "1000 750", "writable"]


def test_s2_a_volume_that_is_a_link_stays_in_the_image(cri: Cri, pod: tuple[str, pb.PodSandboxConfig]) -> None:
    marker = Path("/etc/hostname").read_text().strip()
    image = cri.registry.add("test/hostile:1", {"Volumes": {"/data/../../../etc": {}}})
    cri.pull(image)
    config = cri.container_config("cat /data/../../../etc/hostname /etc/shadow 2>/dev/null; true")
    config.image.image = image
    lines = output(cri, pod, config)
    assert marker not in lines or marker == pod[1].hostname


def test_s4_labels_of_an_image_do_not_speak_for_the_daemon(cri: Cri, pod: tuple[str, pb.PodSandboxConfig]) -> None:
    image = cri.registry.add("test/labels:1", {"Labels": {
        "io.cri-containerd.kind": "sandbox", "containerd.io/gc.root": "x", "plain": "kept", "long": "x" * 5000}})
    cri.pull(image)
    config = cri.container_config("true")
    config.image.image = image
    config.metadata.name = "labelled"
    container = cri.create(*pod, config)
    from supervisord_ctr.api.services.containers.v1 import containers_pb2, containers_pb2_grpc

    with cri.daemon.channel() as channel:
        stub = containers_pb2_grpc.ContainersStub(channel)
        stored = stub.Get(containers_pb2.GetContainerRequest(id=container),
                          metadata=(("containerd-namespace", "k8s.io"),)).container
    assert stored.labels["io.cri-containerd.kind"] == "container"
    assert stored.labels["plain"] == "kept"
    assert "containerd.io/gc.root" not in stored.labels
    cri.remove(container)


def test_image_volumes_are_read_only_and_have_sub_paths(cri: Cri, pod: tuple[str, pb.PodSandboxConfig]) -> None:
    config = cri.container_config("cat /v/file; touch /v/new || echo refused; ls /whole")
    for place, sub_path in (("/v", "data/sub"), ("/whole", "")):
        config.mounts.append(pb.Mount(
            container_path=place, readonly=True, image=pb.ImageSpec(image=cri.image), image_sub_path=sub_path))
    lines = output(cri, pod, config)
    assert lines[0] == "content of the image"
    assert "refused" in lines
    assert "bin" in lines
    for sub_path in ("../etc", "no/such", "etc/passwd"):
        config.mounts[0].image_sub_path = sub_path
        config.metadata.name = f"bad{next(_count)}"
        with pytest.raises(grpc.RpcError, match="ImageVolumeMountFailed"):
            cri.create(*pod, config)


def test_devices_are_given_with_their_permissions(cri: Cri, pod: tuple[str, pb.PodSandboxConfig]) -> None:
    config = cri.container_config("head -c 4 /dev/mine | wc -c")
    config.devices.append(pb.Device(host_path="/dev/zero", container_path="/dev/mine", permissions="r"))
    assert output(cri, pod, config) == ["4"]
    config.devices[0].host_path = "/dev/no-such-device"
    with pytest.raises(grpc.RpcError) as caught:
        cri.create(*pod, config)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_d10_a_low_oom_score_does_not_keep_a_container_from_starting(
    cri: Cri, pod: tuple[str, pb.PodSandboxConfig]
) -> None:
    config = cri.container_config("cat /proc/self/oom_score_adj")
    config.linux.resources.oom_score_adj = -999
    [line] = output(cri, pod, config)
    assert -999 <= int(line) <= 0
    config.command[2], config.metadata.name = "sleep 600", f"c{next(_count)}"
    container = cri.create(*pod, config)
    cri.start(container)
    assert cri.exec(container, "cat", "/proc/self/oom_score_adj").exit_code == 0
    cri.remove(container)


def test_environment_arguments_and_directory(cri: Cri, pod: tuple[str, pb.PodSandboxConfig]) -> None:
    image = cri.registry.add("test/config:1", {
        "Env": ["FROM_IMAGE=1", "BOTH=image"], "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["env; cat /etc/hostname"],
        "WorkingDir": "/data", "User": "1000:1000",
    })
    cri.pull(image)
    config = cri.container_config("")
    del config.command[:]
    config.image.image = image
    config.envs.append(pb.KeyValue(key="BOTH", value=b"request"))
    config.envs.append(pb.KeyValue(key="ODD", value="ü=\n".encode()))
    lines = output(cri, pod, config)
    assert {"FROM_IMAGE=1", "BOTH=request", "PWD=/data", "HOSTNAME=pod-host", "pod-host"} <= set(lines)


def test_user_namespaces_map_root_to_nobody_outside(cri: Cri) -> None:
    mapping = pb.IDMapping(host_id=1_000_000, container_id=0, length=65536)
    options = pb.UserNamespace(mode=pb.POD, uids=[mapping], gids=[mapping])
    config = cri.pod_config()
    config.linux.security_context.namespace_options.userns_options.CopyFrom(options)
    made = cri.run_pod(config)
    wanted = cri.container_config("id -u; cat /proc/self/uid_map; touch /made && echo writable; sleep 600")
    wanted.linux.security_context.namespace_options.userns_options.CopyFrom(options)
    container = cri.create(*made, wanted)
    cri.start(container)
    verbose = cri.runtime.ContainerStatus(pb.ContainerStatusRequest(container_id=container, verbose=True))
    pid = json.loads(verbose.info["info"])["pid"]
    assert os.stat(f"/proc/{pid}").st_uid == 1_000_000
    assert cri.exec(container, "id", "-u").stdout == b"0\n"
    cri.remove_pod(made[0])
    wanted.linux.security_context.namespace_options.ClearField("userns_options")
    again = cri.run_pod(config)
    with pytest.raises(grpc.RpcError, match="user namespace config for sandbox is different"):
        cri.create(*again, wanted)
    cri.remove_pod(again[0])


@pytest.mark.parametrize("user", [0, 1000])
def test_streams_can_be_opened_in_a_user_namespace(cri: Cri, user: int) -> None:
    """As servers do whose log files are links to /dev/stdout."""
    mapping = pb.IDMapping(host_id=1_000_000, container_id=0, length=65536)
    options = pb.UserNamespace(mode=pb.POD, uids=[mapping], gids=[mapping])
    config = cri.pod_config()
    config.linux.security_context.namespace_options.userns_options.CopyFrom(options)
    made = cri.run_pod(config)
    script = "echo out >/dev/stdout; echo err >/dev/stderr"
    wanted = cri.container_config(f"{script}; sleep 600")
    wanted.linux.security_context.namespace_options.userns_options.CopyFrom(options)
    wanted.linux.security_context.run_as_user.value = user
    wanted.log_path = "main.log"
    container = cri.create(*made, wanted)
    cri.start(container)
    answer = cri.exec(container, "sh", "-c", script)
    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"out\n", b"err\n", 0)
    wait_until(lambda: len(cri.log(made[1])) == 2, "the container has written")
    assert sorted(cri.log(made[1])) == [("stderr", "F", "err"), ("stdout", "F", "out")]
    cri.remove_pod(made[0])


def test_p24_volumes_of_a_user_namespace_keep_their_owners(cri: Cri, tmp_path: Path) -> None:
    """Folders, files, image volumes and volumes that the image declares: root inside is root on the disk."""
    image = cri.registry.add("test/declares:1", {"Volumes": {"/data/sub": {}}})
    cri.pull(image)
    volume = tmp_path / "volume"
    (volume / "below").mkdir(parents=True)
    (volume / "of-root").write_text("root's")
    (volume / "of-1000").write_text("user's")
    os.chown(volume / "of-1000", 1000, 1000)
    mapping = [pb.IDMapping(host_id=2_000_000, container_id=0, length=65536)]
    options = pb.UserNamespace(mode=pb.POD, uids=mapping, gids=mapping)
    config = cri.pod_config()
    config.linux.security_context.namespace_options.userns_options.CopyFrom(options)
    pod, _ = cri.run_pod(config)

    def mapped(**fields: Any) -> pb.Mount:
        return pb.Mount(uidMappings=mapping, gidMappings=mapping, **fields)

    wanted = cri.container_config(
        "stat -c '%u:%g' /volume/of-root /volume/of-1000 /file /image/etc/passwd /image/data/sub /data/sub/file;"
        "echo made > /volume/made; echo more >> /file; echo in > /data/sub/new; stat -c %u /volume/made /data/sub/new;"
        "(echo x > /image/x) 2>/dev/null || echo read-only; cat /etc/hosts > /dev/null && echo readable; sleep 600",
        mounts=[
            mapped(container_path="/volume", host_path=str(volume)),
            mapped(container_path="/file", host_path=str(volume / "of-root")),
            mapped(container_path="/image", image=pb.ImageSpec(image=cri.image), readonly=True),
        ],
    )
    wanted.image.image = image
    wanted.linux.security_context.namespace_options.userns_options.CopyFrom(options)
    container = cri.create(pod, config, wanted)
    assert cri.create(pod, config, wanted) == container
    cri.start(container)
    wait_until(lambda: len(cri.log(config)) >= 10, "the container has looked", 60)
    assert [text for _, _, text in cri.log(config)] == [
        "0:0", "1000:1000", "0:0", "0:0", "1000:1000", "1000:1000", "0", "0", "read-only", "readable",
    ]
    assert (volume / "made").stat().st_uid == 0
    assert (volume / "of-root").read_text() == "root'smore\n"
    left = cri.daemon.state / "cri" / "id-mapped"
    assert not left.exists() or not list(left.iterdir())
    cri.remove_pod(pod)


def test_p24_what_is_mounted_below_a_volume_comes_along_with_its_own_owners(cri: Cri, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    (volume / "below").mkdir(parents=True)
    (volume / "of-root").write_text("")
    mapping = [pb.IDMapping(host_id=4_000_000, container_id=0, length=65536)]
    options = pb.UserNamespace(mode=pb.POD, uids=mapping, gids=mapping)
    config = cri.pod_config()
    config.linux.security_context.namespace_options.userns_options.CopyFrom(options)
    pod, _ = cri.run_pod(config)
    wanted = cri.container_config("stat -c %u /volume/of-root /volume/below/drivers", mounts=[
        pb.Mount(container_path="/volume", host_path=str(volume), uidMappings=mapping, gidMappings=mapping)
    ])
    wanted.linux.security_context.namespace_options.userns_options.CopyFrom(options)
    # procfs cannot map owners: a volume is not refused for what happens to be mounted in it.
    subprocess.run(["mount", "--bind", "/proc/tty", str(volume / "below")], check=True)
    try:
        container = cri.create(pod, config, wanted)
        cri.start(container)
        cri.wait_exited(container)
        assert [text for _, _, text in cri.log(config)] == ["0", "65534"]
        cri.remove_pod(pod)
    finally:
        subprocess.run(["umount", str(volume / "below")], check=True)


def test_p24_a_volume_whose_owners_cannot_be_mapped_is_refused(cri: Cri, pod: tuple[str, pb.PodSandboxConfig]) -> None:
    mapping = [pb.IDMapping(host_id=3_000_000, container_id=0, length=65536)]
    volume = pb.Mount(container_path="/version", host_path="/proc/version", uidMappings=mapping, gidMappings=mapping)
    container = cri.create(*pod, cri.container_config("true", name="unmappable", mounts=[volume]))
    with pytest.raises(grpc.RpcError, match="owners of '/proc/version' cannot be mapped"):
        cri.start(container)
    assert cri.status(container).reason == "StartError"
    left = cri.daemon.state / "cri" / "id-mapped"
    assert not left.exists() or not list(left.iterdir())
    volume.ClearField("gidMappings")
    with pytest.raises(grpc.RpcError, match="without the other"):
        cri.create(*pod, cri.container_config("true", name="half", mounts=[volume]))


def test_s3_no_descriptor_of_the_daemon_reaches_a_container(cri: Cri, pod: tuple[str, pb.PodSandboxConfig]) -> None:
    config = cri.container_config("ls /proc/self/fd | wc -l; ls -l /proc/1/fd")
    lines = output(cri, pod, config)
    assert int(lines[0]) <= 5
    assert not [line for line in lines if str(cri.daemon.base) in line]
