"""Labels of SELinux: given with a pod, shared by its containers, unlike those of every other pod."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import container_mounts, selinux_labels
from supervisord_ctr.cri.state import Container, Pod, State
from supervisord_ctr.oci import selinux
from supervisord_ctr.oci.spec import SpecBuilder
from supervisord_ctr.sandbox.files import PodFiles
from supervisord_ctr.settings import CriSettings
from tests.unit.cri.memory import MemoryRecords

T = TypeVar("T")
DEFAULTS = selinux.Defaults(
    selinux.Context("system_u", "system_r", "container_t", "s0"),
    selinux.Context("system_u", "object_r", "container_file_t", "s0"),
)


class Executors:
    """Calls at once, after letting others go first, as a thread would."""

    async def run_io(self, call: Callable[..., T], *arguments: Any) -> T:
        await asyncio.sleep(0)
        return call(*arguments)


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(selinux, "enabled", lambda: True)
    monkeypatch.setattr(selinux, "defaults", lambda: DEFAULTS)
    monkeypatch.setattr(selinux, "known", lambda label: "nope_t" not in label)
    selinux_labels._tell_of_ignored.cache_clear()
    yield
    selinux_labels._tell_of_ignored.cache_clear()


def core(**settings: Any) -> Any:
    return SimpleNamespace(
        settings=SimpleNamespace(cri=CriSettings(**settings)), state=State(MemoryRecords()), executors=Executors(),
        levels=[],
    )


def pod(name: str = "a", **options: str) -> Pod:
    config = pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name=name))
    config.linux.security_context.selinux_options.CopyFrom(pb.SELinuxOption(**options))
    return Pod(name, name, config)


async def label(core: Any, pod: Pod) -> str:
    async with selinux_labels.labelled(core, pod):
        await asyncio.sleep(0)
        core.state.add_pod(pod)
    return pod.selinux


def level_of(text: str) -> str:
    return selinux.Context.parse(text).level


async def test_no_two_pods_have_the_same_categories() -> None:
    # Five categories make ten pairs.
    made = core(selinux_category_range=5)
    labels = await asyncio.gather(*(label(made, pod(str(number))) for number in range(10)))
    assert len(set(labels)) == 10
    assert made.levels == []
    with pytest.raises(errors.ResourceExhausted):
        await label(made, pod("more"))
    gone = made.state.pod("3")
    made.state.drop_pod(gone)
    assert await label(made, pod("more")) == gone.selinux


async def test_categories_that_a_container_asked_for_are_not_drawn() -> None:
    made = core(selinux_category_range=2)
    config = pb.ContainerConfig()
    config.linux.security_context.selinux_options.level = "s0:c0,c1"
    made.state.add_container(Container("c", "c", "elsewhere", config))
    with pytest.raises(errors.ResourceExhausted):
        await label(made, pod())


async def test_a_pod_that_asks_for_a_level_gets_it() -> None:
    made = core()
    assert await label(made, pod("a", level="s0:c4,c5")) == "system_u:system_r:container_t:s0:c4,c5"
    assert await label(made, pod("b", level="s0:c4,c5", type="x_t")) == "system_u:system_r:x_t:s0:c4,c5"
    assert made.levels == []


async def test_a_label_that_the_policy_lacks_is_refused() -> None:
    made, wrong = core(), pod("a", type="nope_t")
    with pytest.raises(errors.InvalidArgument, match="nope_t"):
        await label(made, wrong)
    assert (wrong.selinux, made.levels) == ("", [])
    right = pod("b")
    await label(made, right)
    context = pb.LinuxContainerSecurityContext(selinux_options=pb.SELinuxOption(type="nope_t"))
    with pytest.raises(errors.InvalidArgument, match="nope_t"):
        await selinux_labels.of_container(made, right, context)


@pytest.mark.parametrize("where", ["pod", "container"])
async def test_a_malformed_level_is_refused(where: str) -> None:
    made, mine = core(), pod("a", level="s0,c4" if where == "pod" else "")
    context = pb.LinuxContainerSecurityContext(selinux_options=pb.SELinuxOption(level="s0,c4"))
    with pytest.raises(errors.InvalidArgument, match="selinux level 's0,c4' is malformed"):
        if where == "pod":
            await label(made, mine)
        else:
            await selinux_labels.of_container(made, mine, context)


async def test_containers_share_the_label_of_their_pod() -> None:
    made, mine = core(), pod("a", type="pod_t")
    await label(made, mine)
    plain = await selinux_labels.of_container(made, mine, pb.LinuxContainerSecurityContext())
    other = await selinux_labels.of_container(
        made, mine, pb.LinuxContainerSecurityContext(selinux_options=pb.SELinuxOption(type="x_t"))
    )
    assert plain is not None
    assert other is not None
    assert plain.process == mine.selinux
    assert plain.mount == other.mount == f"system_u:object_r:container_file_t:{level_of(mine.selinux)}"
    assert other.process == f"system_u:system_r:x_t:{level_of(mine.selinux)}"


@pytest.mark.parametrize("kind", ["pid", "ipc"])
async def test_the_hosts_processes_and_ipc_change_no_label(kind: str) -> None:
    made, mine = core(), pod()
    await label(made, mine)
    context = pb.LinuxContainerSecurityContext(namespace_options=pb.NamespaceOption(**{kind: pb.NODE}))
    labels = await selinux_labels.of_container(made, mine, context)
    assert labels is not None
    assert labels.process == mine.selinux


async def test_privileged_containers_have_labelled_files_only() -> None:
    made, mine = core(), pod()
    await label(made, mine)
    context = pb.LinuxContainerSecurityContext(privileged=True, selinux_options=pb.SELinuxOption(type="nope_t"))
    assert await selinux_labels.of_container(made, mine, context) == selinux.Labels(
        "", f"system_u:object_r:container_file_t:{level_of(mine.selinux)}"
    )


@pytest.mark.parametrize("privileged", [False, True])
async def test_the_process_of_the_pod_is_labelled_as_its_containers_are(privileged: bool) -> None:
    made, mine = core(), pod("a", type="pod_t")
    assert await selinux_labels.of_pause(made, mine) == selinux.Labels("", "")
    mine.config.linux.security_context.privileged = privileged
    await label(made, mine)
    context = pb.LinuxContainerSecurityContext(privileged=privileged)
    labels = await selinux_labels.of_pause(made, mine)
    assert labels == await selinux_labels.of_container(made, mine, context)
    assert bool(labels.process) is not privileged


async def test_a_pod_from_before_is_labelled_with_its_next_container() -> None:
    made, old = core(), pod()
    made.state.add_pod(old)
    first, second = await asyncio.gather(*(
        selinux_labels.of_container(made, old, pb.LinuxContainerSecurityContext()) for _ in range(2)
    ))
    assert first == second
    assert first is not None
    assert first.process == old.selinux != ""
    read = State(made.state._records)
    await read.load()
    assert read.pod("a").selinux == old.selinux


@pytest.mark.parametrize("why", ["kernel", "setting", "policy"])
async def test_without_selinux_nothing_is_labelled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    made, mine = core(enable_selinux=why != "setting"), pod("a", type="x_t", level="nonsense" if why != "policy" else "")
    monkeypatch.setattr(selinux, "enabled", lambda: why != "kernel")
    monkeypatch.setattr(selinux, "defaults", lambda: None)
    with caplog.at_level(logging.WARNING):
        assert await label(made, mine) == ""
        context = pb.LinuxContainerSecurityContext(selinux_options=mine.config.linux.security_context.selinux_options)
        assert await selinux_labels.of_container(made, mine, context) is None
    told = {"kernel": ["this kernel runs without selinux"], "setting": ["cri.enable_selinux is false"], "policy": []}
    assert [message.rpartition(": ")[2] for message in caplog.messages] == told[why]


# -- mounts ------------------------------------------------------------------------------------------------


def test_what_is_relabelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    monkeypatch.setattr(selinux, "relabel", lambda path, label: done.append((Path(path).name, label)))
    files = PodFiles(tmp_path / "pod")
    files.shm.mkdir(parents=True)
    for path in (files.hosts, files.hostname, files.resolv):
        path.touch()
    config = pb.ContainerConfig(mounts=[
        pb.Mount(container_path="/mine", host_path=str(tmp_path / "mine"), selinux_relabel=True),
        pb.Mount(container_path="/hosts-own", host_path=str(tmp_path / "plain")),
        pb.Mount(container_path="/image", host_path=str(tmp_path / "image"), selinux_relabel=True,
                 image=pb.ImageSpec(image="i")),
    ])

    def mount(label: str) -> list[str]:
        done.clear()
        builder = SpecBuilder("k8s.io", "c")
        container_mounts.apply(
            builder, config.mounts, container_mounts.pod_mounts(files, config), features=container_mounts.Features(),
            host_cgroup_namespace=False, id_mapped=tmp_path, label=label,
        )
        assert {told for _, told in done} <= {label}
        return sorted(name for name, _ in done)

    assert mount("") == []
    own = sorted(path.name for path in (files.hosts, files.hostname, files.resolv, files.shm))
    assert mount("u:r:t") == sorted([*own, "mine"])
    config.linux.security_context.namespace_options.ipc = pb.NODE
    assert mount("u:r:t") == sorted({*own, "mine"} - {"shm"})
