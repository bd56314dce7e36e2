"""SELinux as containers meet it: labels of processes, of their root and of what is mounted in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.oci import selinux
from tests.support.cri import Cri, running_cri

if not selinux.enabled():
    pytest.skip("this kernel runs without SELinux", allow_module_level=True)
DEFAULTS = selinux.defaults()
if DEFAULTS is None:
    pytest.skip("this host's policy has no labels for containers", allow_module_level=True)

Pod = tuple[str, pb.PodSandboxConfig]


@pytest.fixture(scope="module")
def pod(cri: Cri) -> Iterator[Pod]:
    config = cri.pod_config()
    config.linux.security_context.privileged = True
    made = cri.run_pod(config)
    yield made
    cri.remove_pod(made[0])


_count = iter(range(10_000))


class Running:
    """A container that sleeps, looked at from the host."""

    def __init__(self, cri: Cri, pod: Pod, config: pb.ContainerConfig | None = None) -> None:
        config = config or cri.container_config("")
        config.metadata.name = f"c{next(_count)}"
        config.command[:] = ["/bin/sh", "-c", "exec sleep 1000"]
        self.cri = cri
        self.id = cri.create(*pod, config)
        cri.start(self.id)
        status = cri.runtime.ContainerStatus(pb.ContainerStatusRequest(container_id=self.id, verbose=True), timeout=60)
        self.pid = int(re.search(r'"pid": ?(\d+)', status.info["info"])[1])  # type: ignore[index]

    @property
    def process(self) -> str:
        """The label of the container's process."""
        return Path(f"/proc/{self.pid}/attr/current").read_text().strip("\0\n")

    def file(self, path: str) -> str:
        """The label of a file that the container sees."""
        label = os.getxattr(f"/proc/{self.pid}/root{path}", "security.selinux")
        return label.rstrip(b"\0").decode()

    def exec(self) -> str:
        """The label of a command run in the container."""
        return self.cri.exec(self.id, "cat", "/proc/self/attr/current").stdout.decode().strip("\0\n")


def file_label(process: str) -> str:
    assert DEFAULTS is not None
    return f"{DEFAULTS.file.user}:{DEFAULTS.file.role}:{DEFAULTS.file.type}:{process.split(':', 3)[3]}"


def with_options(cri: Cri, **options: str) -> pb.ContainerConfig:
    config = cri.container_config("")
    config.linux.security_context.selinux_options.CopyFrom(pb.SELinuxOption(**options))
    return config


def test_processes_and_files_have_the_categories_of_the_pod(cri: Cri, pod: Pod) -> None:
    first, second = Running(cri, pod), Running(cri, pod)
    assert re.fullmatch(rf"system_u:system_r:{DEFAULTS.process.type}:s0:c\d+,c\d+", first.process)  # type: ignore[union-attr]
    assert first.process == second.process == first.exec()
    for path in ("/", "/etc/passwd", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/shm", "/dev"):
        assert first.file(path) == file_label(first.process), path
    other = cri.run_pod()
    elsewhere = Running(cri, other)
    assert elsewhere.process != first.process
    cri.remove_pod(other[0])


def test_a_restart_keeps_the_categories_of_a_pod(cri: Cri, pod: Pod) -> None:
    before = Running(cri, pod)
    cri.daemon.restart(kill=True)
    cri.connect()
    assert Running(cri, pod).process == before.process
    assert before.exec() == before.process


def test_options_of_the_pod_and_of_the_container(cri: Cri, pod: Pod) -> None:
    config = cri.pod_config()
    config.linux.security_context.selinux_options.level = "s0:c4,c5"
    mine = cri.run_pod(config)
    assert Running(cri, mine).process.endswith(":s0:c4,c5")
    assert Running(cri, mine, with_options(cri, level="s0:c6")).process.endswith(":s0:c6")
    cri.remove_pod(mine[0])
    plain, typed = Running(cri, pod), Running(cri, pod, with_options(cri, type="spc_t"))
    assert typed.process == plain.process.replace(DEFAULTS.process.type, "spc_t")  # type: ignore[union-attr]
    assert typed.file("/") == plain.file("/")


@pytest.mark.parametrize(("options", "message"), [
    ({"level": "s0,c4,c5"}, "selinux level 's0,c4,c5' is malformed"),
    ({"type": "no_such_t"}, "does not exist in the policy of this host"),
])
def test_options_that_cannot_be_are_refused(cri: Cri, pod: Pod, options: dict[str, str], message: str) -> None:
    config = with_options(cri, **options)
    with pytest.raises(grpc.RpcError, match=message) as caught:
        cri.create(*pod, config)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    broken = cri.pod_config()
    broken.linux.security_context.selinux_options.CopyFrom(pb.SELinuxOption(**options))
    with pytest.raises(grpc.RpcError, match=message):
        cri.run_pod(broken)


def test_only_the_files_of_a_privileged_container_are_labelled(cri: Cri, pod: Pod) -> None:
    plain = Running(cri, pod)
    config = cri.container_config("")
    config.linux.security_context.privileged = True
    made = Running(cri, pod, config)
    assert made.file("/") == plain.file("/")
    assert f":{DEFAULTS.process.type}:" not in made.process  # type: ignore[union-attr]
    assert made.exec() == made.process


def test_the_hosts_processes_are_seen_under_the_label_of_the_pod(cri: Cri, pod: Pod) -> None:
    config = cri.container_config("", pid=pb.NODE)
    assert Running(cri, pod, config).process == Running(cri, pod).process


def test_number_one_of_a_shared_pid_namespace_has_the_label_of_the_pod(cri: Cri) -> None:
    mine = cri.run_pod(cri.pod_config(pid=pb.POD))
    made = Running(cri, mine, cri.container_config("", pid=pb.POD))
    assert cri.exec(made.id, "cat", "/proc/1/attr/current").stdout.decode().strip("\0\n") == made.process
    assert f'context="{file_label(made.process)}"' in cri.exec(made.id, "cat", "/proc/1/mountinfo").stdout.decode()
    cri.remove_pod(mine[0])


def test_volumes_are_relabelled_where_that_is_asked_for(cri: Cri, pod: Pod, tmp_path: Path) -> None:
    config = cri.container_config("")
    for name in ("mine", "plain"):
        (tmp_path / name / "folder").mkdir(parents=True)
        (tmp_path / name / "folder" / "file").touch()
        config.mounts.append(pb.Mount(
            container_path=f"/{name}", host_path=str(tmp_path / name), selinux_relabel=name == "mine"
        ))
    made = Running(cri, pod, config)
    for path in ("/mine", "/mine/folder", "/mine/folder/file"):
        assert made.file(path) == file_label(made.process)
        assert made.file(path.replace("mine", "plain")) != file_label(made.process)
    config.mounts[0].host_path = "/etc"
    config.metadata.name = f"c{next(_count)}"
    with pytest.raises(grpc.RpcError, match="'/etc' is a folder of the host"):
        cri.create(*pod, config)


@pytest.mark.parametrize("sub_path", ["", "data/sub"])
def test_image_volumes_bear_the_label_of_the_container(cri: Cri, pod: Pod, sub_path: str) -> None:
    config = cri.container_config("")
    config.mounts.append(pb.Mount(
        container_path="/image", readonly=True, image=pb.ImageSpec(image=cri.image), image_sub_path=sub_path,
        selinux_relabel=True,
    ))
    made = Running(cri, pod, config)
    path = "/image/file" if sub_path else "/image/data/sub/file"
    assert made.file(path) == file_label(made.process)
    assert cri.exec(made.id, "cat", path).stdout.strip() == b"content of the image"
    assert cri.exec(made.id, "touch", "/image/new").exit_code != 0
    cri.remove(made.id)


def test_selinux_can_be_left_out() -> None:
    with running_cri("enable_selinux = false") as cri:
        cri.pull()
        mine = cri.run_pod()
        made = Running(cri, mine, with_options(cri, level="s0:c4,c5"))
        assert not made.process.endswith(":c4,c5")
        assert made.file("/") != file_label("a:b:c:s0:c4,c5")
        assert "selinux options of containers mean nothing here: cri.enable_selinux is false" in cri.daemon.log_tail(100_000)
        cri.remove_pod(mine[0])
