"""OCI runtime conformance: what a container finds inside, and the specification that it was made from.

The first cases look from inside; the last compares the whole specification with the one that
containerd makes for the same request, part by part.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from tests.support.cri import Cri
from tests.support.peers import CONTAINERD, OURS, Peers

Pod = tuple[str, pb.PodSandboxConfig]

DEVICES = {"/dev/null": "1:3", "/dev/zero": "1:5", "/dev/full": "1:7", "/dev/random": "1:8", "/dev/urandom": "1:9",
           "/dev/tty": "5:0"}
LINKS = {"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1",
         "/dev/stderr": "/proc/self/fd/2", "/dev/ptmx": "pts/ptmx"}
MOUNTS = {"/proc": "proc", "/dev": "tmpfs", "/dev/pts": "devpts", "/dev/mqueue": "mqueue", "/dev/shm": "tmpfs",
          "/sys": "sysfs", "/": "overlay"}


@pytest.fixture
def container(cri: Cri, pod: Pod) -> str:
    return cri.run(*pod, "sleep 600")


def run(cri: Cri, container: str, script: str) -> list[str]:
    return cri.exec(container, "/bin/sh", "-c", script).stdout.decode().splitlines()


def test_devices_and_links_of_every_container(cri: Cri, container: str) -> None:
    names = " ".join(DEVICES)
    assert run(cri, container, f"for d in {names}; do stat -c '%n %t:%T %a %u:%g' $d; done") == [
        f"{name} {number} 666 0:0" for name, number in DEVICES.items()]
    assert run(cri, container, f"for l in {' '.join(LINKS)}; do echo $l $(busybox readlink $l); done") == [
        f"{name} {target}" for name, target in LINKS.items()]


def test_mounts_of_every_container(cri: Cri, container: str) -> None:
    table: dict[str, tuple[str, list[str]]] = {}
    for line in run(cri, container, "cat /proc/self/mounts"):
        _, target, kind, options, *_ = line.split()
        table[target] = (kind, options.split(","))
    assert {target: table[target][0] for target in MOUNTS} == MOUNTS
    assert {"nosuid", "noexec", "nodev"} <= set(table["/proc"][1])
    assert {"nosuid", "noexec", "nodev", "ro"} <= set(table["/sys"][1])
    assert "nosuid" in table["/dev"][1]
    assert {options[0] for kind, options in table.values() if kind in ("cgroup", "cgroup2")} == {"ro"}
    for target in ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf"):
        assert target in table


def test_what_of_the_kernel_is_hidden_or_fixed(cri: Cri, pod: Pod) -> None:
    hidden = ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/acpi", "/sys/firmware", "/proc/scsi")
    asked = cri.container_config("sleep 600")
    asked.linux.security_context.masked_paths.extend(hidden)
    asked.linux.security_context.readonly_paths.extend(("/proc/irq", "/proc/sys", "/proc/sysrq-trigger"))
    container = cri.create(*pod, asked)
    cri.start(container)
    assert run(cri, container, f"for p in {' '.join(hidden)}; do test -e $p && busybox cat $p/* $p 2>/dev/null; done"
                               " | wc -c") == ["0"]
    fixed = ("/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity")
    assert run(cri, container, f"for p in {' '.join(fixed)}; do test -e $p && test -w $p && (echo x > $p) 2>/dev/null "
                               "&& echo $p; done") == []


def test_the_first_process(cri: Cri, container: str) -> None:
    assert run(cri, container, "busybox tr '\\0' ' ' < /proc/1/cmdline; echo") == ["/bin/sh -c sleep 600 "] or run(
        cri, container, "busybox tr '\\0' ' ' < /proc/1/cmdline; echo") == ["sleep 600 "]
    assert run(cri, container, "busybox readlink /proc/1/cwd; busybox readlink /proc/1/root") == ["/", "/"]
    assert run(cri, container, "umask") == ["0022"]
    assert run(cri, container, "ls /proc/1/fd | busybox xargs") == ["0 1 2"], "no descriptor of the runtime (S3)"
    assert run(cri, container, "busybox head -n 1 /proc/1/limits > /dev/null && echo $PATH") == [
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]


def test_a_terminal_is_the_console(cri: Cri, pod: Pod) -> None:
    container = cri.run(*pod, "test -c /dev/console && echo console; busybox tty; echo $TERM", tty=True)
    cri.wait_exited(container)
    assert [text.rstrip("\r") for _, _, text in cri.log(pod[1])] == ["console", "/dev/pts/0", "xterm"]


def spec_of(cri: Cri, pod: Pod, config: pb.ContainerConfig) -> dict[str, Any]:
    container = cri.create(*pod, config)
    cri.start(container)
    answer = cri.runtime.ContainerStatus(pb.ContainerStatusRequest(container_id=container, verbose=True), timeout=60)
    found: dict[str, Any] = json.loads(answer.info["info"])["runtimeSpec"]
    return found


def parts(spec: dict[str, Any]) -> dict[str, Any]:
    """What of a specification is comparable: without identifiers, and without the folders of a daemon."""
    linux, process = spec["linux"], spec["process"]
    capabilities = process.get("capabilities") or {}
    return {
        "arguments": process["args"], "cwd": process["cwd"], "environment": sorted(process["env"]),
        "user": process["user"], "rlimits": process.get("rlimits") or [],
        "no_new_privileges": process.get("noNewPrivileges", False),
        "capabilities": {kind: sorted(capabilities.get(kind) or []) for kind in (
            "bounding", "effective", "permitted", "inheritable", "ambient")},
        "mounts": {mount["destination"]: (mount["type"], sorted(mount.get("options") or []))
                   for mount in spec["mounts"]},
        "namespaces": {entry["type"]: bool(entry.get("path")) for entry in linux["namespaces"]},
        "masked": sorted(linux.get("maskedPaths") or []), "read_only": sorted(linux.get("readonlyPaths") or []),
        "read_only_root": spec["root"].get("readonly", False),
        "memory": (linux.get("resources") or {}).get("memory") or {}, "cpu": (linux.get("resources") or {}).get("cpu") or {},
        "seccomp": bool(linux.get("seccomp")),
    }


def plain(_: pb.ContainerConfig) -> None:
    """A container that asks for nothing."""


def limited(config: pb.ContainerConfig) -> None:
    config.linux.resources.memory_limit_in_bytes = 32 << 20
    config.linux.resources.cpu_period, config.linux.resources.cpu_quota = 100_000, 20_000
    config.linux.resources.cpu_shares = 256
    config.linux.security_context.readonly_rootfs = True
    config.linux.security_context.no_new_privs = True
    config.linux.security_context.run_as_user.value = 1000
    config.linux.security_context.capabilities.drop_capabilities.append("ALL")


def privileged(config: pb.ContainerConfig) -> None:
    config.linux.security_context.privileged = True


@pytest.mark.parametrize("change", [plain, limited, privileged])
def test_the_specification_is_the_one_that_containerd_makes(peers: Peers, change: Any) -> None:
    found = {}
    for side in (CONTAINERD, OURS):
        cri = peers.get(side)
        asked = cri.pod_config()
        asked.linux.security_context.privileged = True
        config = cri.container_config("sleep 600")
        change(config)
        found[side] = parts(spec_of(cri, cri.run_pod(asked), config))
        cri.sweep()
    for part, theirs in found[CONTAINERD].items():
        assert found[OURS][part] == theirs, part
