"""CRI conformance: security contexts, mounts and resources seen from inside, on our daemon and on containerd alike."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.oci import apparmor
from tests.support.cri import Cri
from tests.support.peers import beyond_containerd

Pod = tuple[str, pb.PodSandboxConfig]

_numbers = itertools.count()

#: Capabilities of a container that asks for none: those of the OCI engines, as bits of capabilities(7).
DEFAULT_CAPABILITIES = sum(1 << bit for bit in (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31))
NET_ADMIN, NET_RAW, SYS_ADMIN, CHOWN = 1 << 12, 1 << 13, 1 << 21, 1 << 0


def output(cri: Cri, pod: Pod, config: pb.ContainerConfig) -> list[str]:
    """Lines that a container wrote to its standard output until it ended."""
    config.metadata.name = f"c{next(_numbers)}"
    config.log_path = f"{config.metadata.name}.log"
    container = cri.create(*pod, config)
    cri.start(container)
    cri.wait_exited(container)
    return [text for stream, _, text in cri.log(pod[1], config.metadata.name) if stream == "stdout"]


def status_words(lines: list[str]) -> dict[str, str]:
    """/proc/PID/status by name."""
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize(("fields", "groups", "expected"), [
    ({}, (), "uid=0(root) gid=0(root) groups=0(root)"),
    ({"run_as_user": 1000}, (), "uid=1000(user) gid=1000(user) groups=1000(user),50000(extra)"),
    ({"run_as_username": "user"}, (), "uid=1000(user) gid=1000(user) groups=1000(user),50000(extra)"),
    ({"run_as_user": 1000}, (1234,), "uid=1000(user) gid=1000(user) groups=1000(user),1234,50000(extra)"),
    ({"run_as_user": 4711}, (), "uid=4711 gid=0(root) groups=0(root)"),
    ({"run_as_user": 1000, "run_as_group": 7}, (), "uid=1000(user) gid=7 groups=7,50000(extra)"),
    ({"run_as_user": 4711, "run_as_group": 7}, (8, 9), "uid=4711 gid=7 groups=7,8,9"),
])
def test_s7_users_and_groups(
    cri: Cri, pod: Pod, fields: dict[str, int | str], groups: tuple[int, ...], expected: str
) -> None:
    config = cri.container_config("id")
    context = config.linux.security_context
    for name, value in fields.items():
        if isinstance(value, int):
            getattr(context, name).value = value
        else:
            setattr(context, name, value)
    context.supplemental_groups.extend(groups)
    [line] = output(cri, pod, config)
    head, _, tail = line.partition(" groups=")
    wanted_head, _, wanted_tail = expected.partition(" groups=")
    assert (head, set(tail.split(","))) == (wanted_head, set(wanted_tail.split(",")))


@pytest.mark.parametrize(("user", "expected"), [
    ("1000", "uid=1000(user) gid=1000(user)"), ("user:extra", "uid=1000(user) gid=50000(extra)"),
    ("4711:12", "uid=4711 gid=12"),
])
def test_the_user_of_the_image(cri: Cri, pod: Pod, user: str, expected: str) -> None:
    config = cri.container_config("id")
    config.image.image = cri.registry.add(f"test/user:{user.replace(':', '-')}", {"User": user})
    cri.pull(config.image.image)
    [line] = output(cri, pod, config)
    assert line.startswith(expected + " ")


def test_a_group_without_a_user_is_refused(cri: Cri, pod: Pod) -> None:
    config = cri.container_config("id")
    config.linux.security_context.run_as_group.value = 7
    with pytest.raises(grpc.RpcError):
        cri.create(*pod, config)


@pytest.mark.parametrize(("add", "drop", "user", "expected"), [
    ((), (), 0, DEFAULT_CAPABILITIES),
    (("NET_ADMIN",), (), 0, DEFAULT_CAPABILITIES | NET_ADMIN),
    ((), ("NET_RAW", "CHOWN"), 0, DEFAULT_CAPABILITIES & ~(NET_RAW | CHOWN)),
    ((), ("ALL",), 0, 0),
    (("SYS_ADMIN",), ("ALL",), 0, SYS_ADMIN),
    (("CHOWN",), (), 1000, 0),
])
def test_s7_capabilities(
    cri: Cri, pod: Pod, add: tuple[str, ...], drop: tuple[str, ...], user: int, expected: int
) -> None:
    config = cri.container_config("cat /proc/self/status")
    context = config.linux.security_context
    context.capabilities.add_capabilities.extend(add)
    context.capabilities.drop_capabilities.extend(drop)
    context.run_as_user.value = user
    found = status_words(output(cri, pod, config))
    assert int(found["CapEff"], 16) == expected
    if not user:
        assert int(found["CapBnd"], 16) == expected
    assert (int(found["CapInh"], 16), int(found["CapAmb"], 16)) == (0, 0)


def test_a_privileged_container(cri: Cri, pod: Pod) -> None:
    config = cri.container_config("cat /proc/self/status; test -e /dev/kmsg && echo devices: yes; "
                                  "mkdir /tmp/a && busybox mount -t tmpfs none /tmp/a && echo mounting: yes")
    config.linux.security_context.privileged = True
    found = status_words(output(cri, pod, config))
    assert int(found["CapEff"], 16) & SYS_ADMIN
    assert (found["Seccomp"], found.get("devices"), found.get("mounting")) == ("0", "yes", "yes")
    plain = cri.run_pod()
    with pytest.raises(grpc.RpcError, match="no privileged container allowed in sandbox"):
        cri.create(*plain, config)


def test_a_read_only_root(cri: Cri, pod: Pod) -> None:
    config = cri.container_config("touch /x 2>/dev/null || echo refused; touch /dev/shm/x && echo shm")
    config.linux.security_context.readonly_rootfs = True
    assert output(cri, pod, config) == ["refused", "shm"]


def test_no_new_privileges_and_seccomp_by_default_and_when_asked(cri: Cri, pod: Pod) -> None:
    words = []
    for asked in (False, True):
        config = cri.container_config("cat /proc/self/status")
        config.linux.security_context.no_new_privs = asked
        config.linux.security_context.seccomp.profile_type = (
            pb.SecurityProfile.RuntimeDefault if asked else pb.SecurityProfile.Unconfined)
        words.append(status_words(output(cri, pod, config)))
    assert [(found["NoNewPrivs"], found["Seccomp"]) for found in words] == [("0", "0"), ("1", "2")]


def test_a_seccomp_profile_of_the_node(cri: Cri, pod: Pod, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EOPNOTSUPP}],
    }))
    config = cri.container_config("touch /tmp/x && echo touched; mkdir /tmp/y 2>&1")
    config.linux.security_context.seccomp.profile_type = pb.SecurityProfile.Localhost
    config.linux.security_context.seccomp.localhost_ref = str(profile)
    found = output(cri, pod, config)
    assert found[0] == "touched"
    assert "not supported" in found[1].lower()


def test_masked_and_read_only_paths_of_the_request(cri: Cri, pod: Pod) -> None:
    config = cri.container_config("cat /proc/version | wc -c; touch /data/x 2>/dev/null || echo refused")
    config.linux.security_context.masked_paths.append("/proc/version")
    config.linux.security_context.readonly_paths.append("/data")
    assert output(cri, pod, config) == ["0", "refused"]


def test_devices_of_the_request(cri: Cri, pod: Pod) -> None:
    config = cri.container_config("stat -c '%F %t:%T' /dev/mine; head -c 4 /dev/mine | wc -c; echo x 2>/dev/null > /dev/mine"
                                  " || echo refused")
    config.devices.add(host_path="/dev/zero", container_path="/dev/mine", permissions="rm")
    found = output(cri, pod, config)
    assert found[0] == "character special file 1:5"
    assert found[1:] in (["4"], ["4", "refused"])


def test_mounts_of_the_request(cri: Cri, pod: Pod, tmp_path: Path) -> None:
    folder, single, missing = tmp_path / "folder", tmp_path / "file", tmp_path / "made" / "for you"
    folder.mkdir()
    (folder / "word").write_text("from the node\n")
    single.write_text("single\n")
    os.chmod(tmp_path, 0o755)
    config = cri.container_config(
        "cat /rw/word /etc/single; echo back > /rw/back; touch /ro/x 2>/dev/null || echo refused; touch /missing/x; "
        "grep -c ' /rw ' /proc/self/mountinfo")
    for path, target, read_only in (
        (folder, "/rw", False), (folder, "/ro", True), (single, "/etc/single", True), (missing, "/missing", False),
    ):
        config.mounts.add(host_path=str(path), container_path=target, readonly=read_only)
    assert output(cri, pod, config) == ["from the node", "single", "refused", "1"]
    assert (folder / "back").read_text() == "back\n"
    assert (missing / "x").exists()


def test_a_mount_of_the_request_stands_for_one_of_ours(cri: Cri, pod: Pod, tmp_path: Path) -> None:
    (tmp_path / "resolv").write_text("nameserver 192.0.2.9\n")
    (tmp_path / "hosts").write_text("192.0.2.7 somewhere\n")
    os.chmod(tmp_path, 0o755)
    config = cri.container_config("cat /etc/resolv.conf /etc/hosts; grep -c ' /etc/hosts ' /proc/self/mountinfo")
    for name, target in (("resolv", "/etc/resolv.conf"), ("hosts", "/etc/hosts")):
        config.mounts.add(host_path=str(tmp_path / name), container_path=target)
    assert output(cri, pod, config) == ["nameserver 192.0.2.9", "192.0.2.7 somewhere", "1"]


def test_volumes_of_the_image_begin_with_its_content(cri: Cri, pod: Pod) -> None:
    config = cri.container_config(
        "stat -c '%u %a' /data/sub; cat /data/sub/file; touch /data/sub/new && echo written; "
        "grep -q ' /data/sub ' /proc/self/mountinfo && echo mounted; ls /nothing | wc -l")
    config.image.image = cri.registry.add("test/volumes:1", {"Volumes": {"/data/sub": {}, "/nothing": {}}})
    cri.pull(config.image.image)
    assert output(cri, pod, config) == ["1000 750", "content of the image", "written", "mounted", "0"]


def test_resources_are_set_and_changed(cri: Cri, pod: Pod) -> None:
    show = ("cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null; "
            "cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null || busybox cut -d' ' -f1 /sys/fs/cgroup/cpu.max; "
            "cat /proc/1/oom_score_adj")
    config = cri.container_config("sleep 600")
    asked = config.linux.resources
    asked.memory_limit_in_bytes, asked.cpu_period, asked.cpu_quota = 64 << 20, 100_000, 50_000
    asked.cpu_shares, asked.oom_score_adj = 512, 500
    container = cri.create(*pod, config)
    cri.start(container)

    def seen() -> list[str]:
        return cri.exec(container, "/bin/sh", "-c", show).stdout.decode().split()

    assert seen() == [str(64 << 20), "50000", "500"]
    change = pb.LinuxContainerResources(memory_limit_in_bytes=96 << 20, cpu_period=100_000, cpu_quota=70_000)
    cri.runtime.UpdateContainerResources(
        pb.UpdateContainerResourcesRequest(container_id=container, linux=change), timeout=60)
    assert seen() == [str(96 << 20), "70000", "500"]
    told = cri.status(container).resources.linux
    assert (told.memory_limit_in_bytes, told.cpu_quota, told.cpu_period) == (96 << 20, 70_000, 100_000)


def test_p13_running_out_of_memory_is_told(cri: Cri, pod: Pod) -> None:
    config = cri.container_config("dd if=/dev/zero of=/dev/null bs=200M count=4")
    config.linux.resources.memory_limit_in_bytes = 20 << 20
    container = cri.create(*pod, config)
    cri.start(container)
    status = cri.wait_exited(container)
    assert status.exit_code in (1, 137)
    assert status.reason == "OOMKilled"


@beyond_containerd("policies of supplementary groups")
def test_groups_of_the_image_only_where_the_policy_merges(cri: Cri, pod: Pod) -> None:
    config = cri.container_config("id")
    config.linux.security_context.run_as_user.value = 1000
    config.linux.security_context.supplemental_groups.append(1234)
    config.linux.security_context.supplemental_groups_policy = pb.Strict
    [line] = output(cri, pod, config)
    assert set(line.partition(" groups=")[2].split(",")) == {"1000(user)", "1234"}


# -- AppArmor ----------------------------------------------------------------------------------------

needs_apparmor = pytest.mark.skipif(not apparmor.enabled(), reason="this kernel runs without AppArmor")

PROFILE = """
profile {name} flags=(attach_disconnected,mediate_deleted) {{
  file,
  signal,
  deny /tmp/secret w,
}}
"""


@pytest.fixture(scope="module")
def profile() -> Iterator[str]:
    """A profile of this host."""
    name = "supervisord-ctr-test"
    subprocess.run(["apparmor_parser", "-Kr"], input=PROFILE.format(name=name), text=True, check=True)
    yield name
    subprocess.run(["apparmor_parser", "-KR"], input=PROFILE.format(name=name), text=True, check=True)


@needs_apparmor
@pytest.mark.parametrize(("kind", "old"), [(None, ""), (None, "runtime/default"), (pb.SecurityProfile.RuntimeDefault, "")])
def test_the_default_profile_of_apparmor(
    cri: Cri, pod: Pod, kind: pb.SecurityProfile.ProfileType.ValueType | None, old: str
) -> None:
    """With all capabilities and nothing read-only, it is the profile alone that denies."""
    config = cri.container_config(
        "cat /proc/self/attr/current; echo 0 > /proc/self/oom_score_adj && echo open;"
        "cat /proc/sys/kernel/domainname > /tmp/domainname; cp /tmp/domainname /proc/sys/kernel/domainname || echo denied;"
        "echo 0 > /proc/sys/vm/drop_caches || echo denied; mount -t tmpfs tmpfs /mnt || echo denied;"
        "echo 0 > /sys/kernel/profiling || echo denied; cat /sys/kernel/security/apparmor/profiles || echo denied"
    )
    context = config.linux.security_context
    context.capabilities.add_capabilities.append("ALL")
    context.masked_paths.append("/nonexistent")
    context.readonly_paths.append("/nonexistent")
    if kind is not None:
        context.apparmor.profile_type = kind
    context.apparmor_profile = old
    assert output(cri, pod, config) == ["cri-containerd.apparmor.d (enforce)", "open", *["denied"] * 5]


@needs_apparmor
@pytest.mark.parametrize("form", ["field", "old", "prefixed field"])
def test_a_profile_of_apparmor_by_name(cri: Cri, pod: Pod, profile: str, form: str) -> None:
    config = cri.container_config("cat /proc/self/attr/current; echo x > /tmp/open; echo x > /tmp/secret || echo denied")
    context = config.linux.security_context
    if form == "old":
        context.apparmor_profile = f"localhost/{profile}"
    else:
        context.apparmor.profile_type = pb.SecurityProfile.Localhost
        context.apparmor.localhost_ref = profile if form == "field" else f"localhost/{profile}"
    assert output(cri, pod, config) == [f"{profile} (enforce)", "denied"]


@needs_apparmor
def test_a_profile_of_apparmor_that_is_not_loaded_is_refused(cri: Cri, pod: Pod) -> None:
    config = cri.container_config("true")
    config.linux.security_context.apparmor_profile = "localhost/no-such-profile"
    with pytest.raises(grpc.RpcError) as caught:
        cri.create(*pod, config)
    assert "apparmor profile not found no-such-profile" in caught.value.details()


@needs_apparmor
@pytest.mark.parametrize("how", ["unconfined", "old unconfined", "privileged"])
def test_containers_that_apparmor_does_not_confine(cri: Cri, pod: Pod, how: str) -> None:
    config = cri.container_config("cat /proc/self/attr/current")
    context = config.linux.security_context
    if how == "unconfined":
        context.apparmor.profile_type = pb.SecurityProfile.Unconfined
    elif how == "old unconfined":
        context.apparmor_profile = "unconfined"
    else:
        context.privileged = True
    assert output(cri, pod, config) == ["unconfined"]


@needs_apparmor
def test_commands_in_a_container_are_confined_as_it_is(cri: Cri, pod: Pod, profile: str) -> None:
    config = cri.container_config("exec sleep 600")
    config.linux.security_context.apparmor_profile = f"localhost/{profile}"
    container = cri.create(*pod, config)
    cri.start(container)
    assert cri.exec(container, "cat", "/proc/self/attr/current").stdout == f"{profile} (enforce)\n".encode()
    assert cri.exec(container, "sh", "-c", "echo x > /tmp/secret").exit_code != 0
    cri.stop(container)
    assert cri.status(container).exit_code == 137
