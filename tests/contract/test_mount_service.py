"""The mount service, through gRPC: what it performs, what it leaves, what it forgets."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from supervisord_ctr.aio import wait_until
from supervisord_ctr.api.services.mounts.v1 import mounts_pb2 as pb
from supervisord_ctr.api.services.mounts.v1 import mounts_pb2_grpc
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.linux.mounts import is_mountpoint, mounts_below, temp_mount
from supervisord_ctr.model import Container, Mount, Runtime, TypedValue
from supervisord_ctr.rpc import RpcServer
from supervisord_ctr.services.mount_steps import FORMATTED
from supervisord_ctr.services.mounts import MountManager, MountsService
from tests.support.stores import open_stores

METADATA = (("containerd-namespace", "ns"),)


class Subject:
    def __init__(self, folder: Path, manager: MountManager, stub: Any, stores: Any) -> None:
        self.folder, self.manager, self.stub, self.stores = folder, manager, stub, stores


@pytest.fixture
async def subject(tmp_path: Path) -> AsyncIterator[Subject]:
    async with open_stores(tmp_path / "stores") as stores:
        folder = tmp_path / "mounts"
        manager = MountManager(folder, stores.database, stores.executors, roots=(stores.root,))
        await manager.open()
        stores.database.gc.parts.append(manager.collect)
        server = RpcServer(tmp_path / "s.sock")
        server.add("containerd.services.mounts.v1.Mounts", mounts_pb2_grpc.add_MountsServicer_to_server,
                   MountsService(manager))
        await server.start()
        async with grpc.aio.insecure_channel(
            f"unix:{tmp_path / 's.sock'}", options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            yield Subject(folder, manager, mounts_pb2_grpc.MountsStub(channel), stores)
        for item in await manager.list("ns"):
            await manager.deactivate("ns", item.name)
        await server.stop(1.0)
        await manager.close()
        assert mounts_below(folder) == []


def bind(source: Path, *options: str, kind: str = "bind") -> types_pb2.Mount:
    return types_pb2.Mount(type=kind, source=str(source), options=["rbind", *options])


async def code(work: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await work
    found: grpc.StatusCode = caught.value.code()
    return found


async def activate(subject: Subject, name: str, *mounts: types_pb2.Mount, **fields: Any) -> types_pb2.ActivationInfo:
    metadata = fields.pop("metadata", METADATA)
    request = pb.ActivateRequest(name=name, mounts=mounts, **fields)
    answer: types_pb2.ActivationInfo = (await subject.stub.Activate(request, metadata=metadata)).info
    return answer


async def test_a_temporary_activation_performs_all(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    info = await activate(subject, "m", bind(tmp_path / "a"), temporary=True, labels={"k": "v"})
    assert (info.name, dict(info.labels), len(info.active)) == ("m", {"k": "v"}, 1)
    assert info.active[0].mounted_at.seconds > 0
    assert [(mount.type, list(mount.options)) for mount in info.system] == [("bind", ["rbind"])]
    assert (Path(info.system[0].source) / "file").read_text() == "x"
    assert await code(activate(subject, "m", bind(tmp_path / "a"), temporary=True)) == grpc.StatusCode.ALREADY_EXISTS
    found = (await subject.stub.Info(pb.InfoRequest(name="m"), metadata=METADATA)).info
    assert found == info
    listed = [item.info.name async for item in subject.stub.List(
        pb.ListRequest(filters=["labels.k==v"]), metadata=METADATA
    )]
    assert listed == ["m"]
    assert [item async for item in subject.stub.List(pb.ListRequest(filters=["name==x"]), metadata=METADATA)] == []
    await subject.stub.Deactivate(pb.DeactivateRequest(name="m"), metadata=METADATA)
    assert list(subject.folder.iterdir()) == []
    for work in (subject.stub.Info(pb.InfoRequest(name="m"), metadata=METADATA),
                 subject.stub.Deactivate(pb.DeactivateRequest(name="m"), metadata=METADATA)):
        assert await code(work) == grpc.StatusCode.NOT_FOUND


async def test_what_the_client_can_mount_is_left_to_it(subject: Subject, tmp_path: Path) -> None:
    assert await code(activate(subject, "m", bind(tmp_path))) == grpc.StatusCode.UNIMPLEMENTED
    assert await code(activate(subject, "m", temporary=True)) == grpc.StatusCode.UNIMPLEMENTED
    assert await code(activate(subject, "", bind(tmp_path), temporary=True)) == grpc.StatusCode.INVALID_ARGUMENT


async def test_formats_name_earlier_mounts(subject: Subject, tmp_path: Path) -> None:
    for name in ("a", "b", "up", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "one").write_text("1")
    (tmp_path / "b" / "two").write_text("2")
    overlay = types_pb2.Mount(type="format/overlay", source="overlay", options=[
        "lowerdir={{ overlay 0 1 }}", f"upperdir={tmp_path / 'up'}", f"workdir={tmp_path / 'work'}",
    ])
    info = await activate(subject, "m", bind(tmp_path / "a"), bind(tmp_path / "b"), overlay)
    assert len(info.active) == 2
    assert [mount.type for mount in info.system] == ["overlay"]
    points = [item.mount_point for item in info.active]
    assert f"lowerdir={points[0]}:{points[1]}" in info.system[0].options
    await subject.stub.Deactivate(pb.DeactivateRequest(name="m"), metadata=METADATA)
    info = await activate(subject, "m", bind(tmp_path / "a"), bind(tmp_path / "b"), overlay, temporary=True)
    merged = Path(info.system[-1].source)
    assert sorted(path.name for path in merged.iterdir()) == ["one", "two"]
    bad = types_pb2.Mount(type="format/bind", source="{{ mount 5 }}")
    assert await code(activate(subject, "n", bind(tmp_path / "a"), bad)) == grpc.StatusCode.INVALID_ARGUMENT


async def test_folders_are_made_below_the_roots_only(subject: Subject, tmp_path: Path) -> None:
    made = subject.folder / "made"
    good = types_pb2.Mount(type="mkdir/bind", source=str(made), options=["rbind", f"X-containerd.mkdir.path={made}:0750"])
    info = await activate(subject, "m", good, temporary=True)
    assert list(info.active[0].mount.options) == ["rbind"]
    assert made.stat().st_mode & 0o777 == 0o750
    await subject.stub.Deactivate(pb.DeactivateRequest(name="m"), metadata=METADATA)
    made.rmdir()
    outside = types_pb2.Mount(type="mkdir/bind", options=[f"X-containerd.mkdir.path={subject.folder}/../x"])
    assert await code(activate(subject, "m", outside, temporary=True)) == grpc.StatusCode.UNIMPLEMENTED
    assert not (tmp_path / "x").exists()


async def test_a_failed_mount_leaves_nothing(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    failing = bind(tmp_path / "nowhere")
    assert await code(activate(subject, "m", bind(tmp_path / "a"), failing, temporary=True)) == grpc.StatusCode.NOT_FOUND
    assert list(subject.folder.iterdir()) == []
    assert mounts_below(subject.folder) == []


async def test_update_labels(subject: Subject, tmp_path: Path) -> None:
    await activate(subject, "m", bind(tmp_path), temporary=True, labels={"a": "1"})

    async def update(labels: dict[str, str], *paths: str) -> dict[str, str]:
        request = pb.UpdateRequest(info=types_pb2.ActivationInfo(name="m", labels=labels))
        request.update_mask.paths.extend(paths)
        return dict((await subject.stub.Update(request, metadata=METADATA)).info.labels)

    assert await update({"b": "2"}, "labels.b") == {"a": "1", "b": "2"}
    assert await update({"c": "3"}) == {"c": "3"}
    assert await code(update({}, "active")) == grpc.StatusCode.INVALID_ARGUMENT


async def test_p5_activations_go_with_what_refers_to_them(subject: Subject, tmp_path: Path) -> None:
    database = subject.stores.database
    source = tmp_path / "source"
    source.mkdir()
    await database.leases.create("ns", "l")
    await database.containers.create("ns", Container("c", {}, "", Runtime("r"), TypedValue("s", b"")))
    await database.containers.create("ns", Container(
        "d", {"containerd.io/gc.ref.mount.root": "referred"}, "", Runtime("r"), TypedValue("s", b"")
    ))
    await activate(subject, "leased", bind(source), temporary=True, metadata=(*METADATA, ("containerd-lease", "l")))
    await activate(subject, "tied", bind(source), temporary=True, labels={"containerd.io/gc.bref.container": "c"})
    await activate(subject, "referred", bind(source), temporary=True)
    await activate(subject, "free", bind(source), temporary=True)

    async def left() -> list[str]:
        report = await database.gc.collect()
        assert report.errors == ()
        found = [item.name for item in await subject.manager.list("ns")]
        assert len(list(subject.folder.iterdir())) == len(mounts_below(subject.folder)) == len(found)
        return found

    assert ("ns", "mount", "free") in (await database.gc.collect(dry_run=True)).removed
    assert await left() == ["leased", "referred", "tied"]
    await database.leases.delete("ns", "l")
    assert await left() == ["referred", "tied"]
    await database.containers.delete("ns", "c")
    assert await left() == ["referred"]
    await database.containers.delete("ns", "d")
    assert await left() == []


async def test_what_is_performed_for_a_while_is_not_collected_and_goes(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    mounts = [Mount("bind", str(tmp_path / "a"), ("rbind",)), Mount("format/bind", "{{ mount 0 }}", ("rbind",))]
    async with subject.manager.performed(mounts) as left:
        assert [mount.type for mount in left] == ["bind"]
        assert is_mountpoint(left[0].source)
        await subject.stores.database.gc.collect()
        assert is_mountpoint(left[0].source)
    assert list(subject.folder.iterdir()) == []


@pytest.mark.parametrize("point", ["perform", "record"])
async def test_p5_a_client_that_leaves_while_mounts_are_made_leaves_no_mount(
    subject: Subject, tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call is cancelled in the middle: it is finished all the same, or nothing is left."""
    reached, go = threading.Event(), threading.Event()
    perform = subject.manager._perform

    def slow(*arguments: Any) -> Any:
        made = perform(*arguments)
        reached.set()
        assert go.wait(60)
        return made

    monkeypatch.setattr(subject.manager, "_perform", slow)
    work = asyncio.get_running_loop().create_task(
        subject.manager.activate("ns", "m", [Mount("bind", str(tmp_path), ("rbind",))], temporary=True)
    )
    await asyncio.to_thread(reached.wait, 60)
    if point == "record":
        go.set()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    go.set()

    async def recorded() -> bool:
        return [item.name for item in await subject.manager.list("ns")] == ["m"]

    await wait_until(recorded, 60, "the activation is finished")
    assert len(mounts_below(subject.folder)) == 1
    await subject.manager.deactivate("ns", "m")
    assert list(subject.folder.iterdir()) == []


async def test_a_file_system_is_made_and_mounted(subject: Subject, tmp_path: Path) -> None:
    image = subject.stores.root / "disk.img"
    made = types_pb2.Mount(type="mkfs/ext4", source=str(image), options=[
        "X-containerd.mkfs.size=8 MiB", "X-containerd.mkfs.uuid=01234567-89ab-cdef-0123-456789abcdef", "loop",
    ])
    metadata = (*METADATA, ("containerd-lease", "l"))
    await subject.stores.database.leases.create("ns", "l")
    info = await activate(subject, "m", made, temporary=True, metadata=metadata)
    point = Path(info.active[0].mount_point)
    assert (list(info.active[0].mount.options), info.active[0].mount.type) == (["loop"], "ext4")
    assert image.stat().st_size == 8 << 20
    (point / "file").write_text("kept")
    await subject.stub.Deactivate(pb.DeactivateRequest(name="m"), metadata=METADATA)
    info = await activate(subject, "m", made, temporary=True, metadata=metadata)
    assert (Path(info.active[0].mount_point) / "file").read_text() == "kept"
    await subject.stub.Deactivate(pb.DeactivateRequest(name="m"), metadata=METADATA)
    image.unlink()


def test_p5_a_file_system_that_was_not_finished_does_not_count_as_made(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    program = (
        "import sys; from pathlib import Path; from supervisord_ctr.model import Mount\n"
        "from supervisord_ctr.services.mount_steps import Steps\n"
        "image = Path(sys.argv[1])\n"
        "Steps([image.parent]).apply(Mount('mkfs/ext4', str(image), ('X-containerd.mkfs.size=8MiB',)), ())\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(image)], check=False, timeout=60,
                            env={**os.environ, "PCTR_FAULTS": f"{FORMATTED}=kill"})
    assert (killed.returncode, image.exists()) == (-signal.SIGKILL, False)
    subprocess.run([sys.executable, "-c", program, str(image)], check=True, timeout=60)
    assert list(tmp_path.iterdir()) == [image]
    with temp_mount([Mount("ext4", str(image), ("loop",))]) as mounted:
        assert "lost+found" in os.listdir(mounted)


@pytest.mark.parametrize(("options", "expected"), [
    ([], "mkfs requires mkfs.size option"),
    (["X-containerd.mkfs.size=x"], "invalid size"),
    (["X-containerd.mkfs.size=1MiB", "X-containerd.mkfs.bad=1"], "unknown mount option bad"),
    (["X-containerd.mkfs.size=1MiB", "X-containerd.mkfs.fs=ntfs"], "unsupported filesystem"),
])
async def test_bad_options_of_mkfs(subject: Subject, options: list[str], expected: str) -> None:
    image = subject.stores.root / "disk.img"
    with pytest.raises(grpc.aio.AioRpcError, match=expected) as caught:
        await activate(subject, "m", types_pb2.Mount(type="mkfs/ext4", source=str(image), options=options),
                       temporary=True)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert not image.exists()
    outside = types_pb2.Mount(type="mkfs/ext4", source="/disk.img", options=["X-containerd.mkfs.size=1MiB"])
    assert await code(activate(subject, "m", outside, temporary=True)) == grpc.StatusCode.UNIMPLEMENTED


async def test_p5_the_next_daemon_keeps_what_is_mounted_and_forgets_the_rest(subject: Subject, tmp_path: Path) -> None:
    await activate(subject, "kept", bind(tmp_path), temporary=True)
    await activate(subject, "lost", bind(tmp_path), temporary=True)
    lost = await subject.manager.info("ns", "lost")
    subject.manager._unmount(lost.folder)
    (subject.folder / "stray" / "0").mkdir(parents=True)
    await subject.manager.open()
    assert [item.name for item in await subject.manager.list("ns")] == ["kept"]
    assert len(list(subject.folder.iterdir())) == 1
