"""Root file systems that need the mount service: their mounts name earlier ones, or make what they mount."""

from __future__ import annotations

import os
from typing import Any

import grpc
import pytest

from supervisord_ctr.api.services.mounts.v1 import mounts_pb2, mounts_pb2_grpc
from supervisord_ctr.api.types import types_pb2
from tests.integration.tasks_support import Client
from tests.support.collecting import collect
from tests.support.daemon import DaemonProcess, mounts_below, wait_until


def info(client: Client, name: str) -> Any:
    stub: Any = mounts_pb2_grpc.MountsStub(client.channel)
    return client.call(stub.Info, mounts_pb2.InfoRequest(name=name)).info


def activated(daemon: DaemonProcess) -> list[str]:
    return mounts_below(daemon.state / "mounts")


def disk(daemon: DaemonProcess, name: str) -> types_pb2.Mount:
    """A file below the daemon's own folder with an empty file system in it."""
    return types_pb2.Mount(type="mkfs/ext4", source=str(daemon.root / f"{name}.img"), options=[
        "X-containerd.mkfs.size=16MiB", "loop",
    ])


def overlay(client: Client, disk_number: int = 1) -> list[types_pb2.Mount]:
    point = f"{{{{ mount {disk_number} }}}}"
    return [types_pb2.Mount(type="format/mkdir/overlay", source="overlay", options=[
        "lowerdir={{ mount 0 }}", f"upperdir={point}/upper", f"workdir={point}/work",
        f"X-containerd.mkdir.path={point}/upper:0755", f"X-containerd.mkdir.path={point}/work:0755",
    ])]


def base(client: Client) -> types_pb2.Mount:
    return types_pb2.Mount(type="bind", source=str(client.root), options=["rbind", "ro"])


def test_a_root_on_a_disk_of_its_own_keeps_what_was_written(client: Client, daemon: DaemonProcess) -> None:
    mounts = [base(client), disk(daemon, "own"), *overlay(client)]
    first = client.container(["sh", "-c", "echo kept > /tmp/file; echo written; sleep 1000"], root={"path": "rootfs"})
    client.create(first, rootfs=mounts)
    client.start(first)
    client.wait_text(first, "written\n")
    found = info(client, first)
    assert (len(found.active), [mount.type for mount in found.system]) == (2, ["overlay"])
    assert dict(found.labels) == {"containerd.io/gc.bref.container": first}
    assert collect(client.channel)["errors"] == []
    assert len(activated(daemon)) == 2, "the container holds its mounts"
    client.kill(first)
    client.wait(first)
    client.delete(first)
    with pytest.raises(grpc.RpcError) as caught:
        info(client, first)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert activated(daemon) == []
    client.remove(first)
    second = client.container(["cat", "/tmp/file"], root={"path": "rootfs"})
    client.create(second, rootfs=mounts)
    client.start(second)
    assert client.wait(second) == 0
    client.wait_text(second, "kept")
    client.delete(second)
    client.remove(second)
    assert activated(daemon) == []
    os.unlink(daemon.root / "own.img")


def test_p5_a_task_that_fails_to_be_made_leaves_no_mount(client: Client, daemon: DaemonProcess) -> None:
    name = client.container(["true"], root={"path": "rootfs"}, process={"cwd": "relative"})
    with pytest.raises(grpc.RpcError):
        client.create(name, rootfs=[base(client), disk(daemon, "failed"), *overlay(client)])
    wait_until(lambda: activated(daemon) == [], "no mount is left")
    with pytest.raises(grpc.RpcError) as caught:
        client.create("nobody", rootfs=[base(client), *overlay(client, 0)])
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    client.remove(name)
    os.unlink(daemon.root / "failed.img")


def test_p5_mounts_of_a_removed_container_are_collected(client: Client, daemon: DaemonProcess) -> None:
    """The client removed the record of a task that runs on, and never deleted the task."""
    name = client.container(["sleep", "1000"], root={"path": "rootfs"})
    client.create(name, rootfs=[base(client), disk(daemon, "removed"), *overlay(client)])
    client.start(name)
    client.kill(name)
    client.wait(name)
    client.remove(name)
    assert collect(client.channel)["errors"] == []
    assert activated(daemon) == []
    client.delete(name)
    os.unlink(daemon.root / "removed.img")
