"""Many pulls of images that share layers while collections run without a pause (P16).

`PCTR_PULLS` is how many pulls begin at the same time; 100 take a few minutes on two cores.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.message import Message

from supervisord_ctr.api.services.containers.v1 import containers_pb2, containers_pb2_grpc
from supervisord_ctr.api.services.content.v1 import content_pb2, content_pb2_grpc
from supervisord_ctr.api.services.images.v1 import images_pb2, images_pb2_grpc
from supervisord_ctr.api.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from supervisord_ctr.api.services.tasks.v1 import tasks_pb2, tasks_pb2_grpc
from supervisord_ctr.api.services.transfer.v1 import transfer_pb2, transfer_pb2_grpc
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.api.types.transfer import transfer_pb2 as types
from supervisord_ctr.images.config import chain_ids
from supervisord_ctr.metadata.schema import TABLES
from supervisord_ctr.oci.spec import TYPE_URL, SpecBuilder
from tests.support.collecting import Collecting, collect
from tests.support.daemon import DaemonProcess, running_daemon
from tests.support.images import ARCHITECTURE, Member, build, digest_of, file, folder, layer, symlink
from tests.support.registry import RunningRegistry, running_registry

PULLS = int(os.environ.get("PCTR_PULLS", "16"))
#: Seconds that one call may take while all of them compete for the machine.
PATIENCE = 60.0 + 6 * PULLS
#: Containers that run at the same time.
RUNNING = 8


@dataclass(frozen=True)
class Wanted:
    """An image in the registry, and what a container of it must print."""

    name: str
    tars: tuple[bytes, ...]
    says: str


def _base() -> bytes:
    busybox = shutil.which("busybox")
    assert busybox, "busybox is not installed (apt-get install busybox-static)"
    places: list[Member] = [folder(name) for name in ("bin", "dev", "etc", "parts", "proc", "sys", "tmp")]
    return layer(
        *places, file("bin/busybox", Path(busybox).read_bytes(), mode=0o755),
        *(symlink(f"bin/{name}", "busybox") for name in ("sh", "cat", "sha256sum")),
    )


@pytest.fixture(scope="module")
def registry() -> Iterator[RunningRegistry]:
    with running_registry() as made:
        yield made


def fill(registry: RunningRegistry) -> list[Wanted]:
    """So many images; each is the base, three of twelve shared layers in any order, and a layer of its own."""
    chance = random.Random(7)
    base = _base()
    shared, files = [], []
    for number in range(12):
        parts = {f"parts/{number}/{count}": chance.randbytes(chance.randrange(100, 4000)) for count in range(60)}
        shared.append(layer(folder(f"parts/{number}"), *(file(path, data) for path, data in parts.items())))
        files.append(parts)
    wanted = []
    for number in range(PULLS):
        chosen = chance.sample(range(len(shared)), 3)
        own = layer(file("etc/own", b"image %d\n" % number))
        tars = (base, *(shared[part] for part in chosen), own)
        reference = registry.push(f"app/{number % 7}", f"v{number}", build(tars))
        everything = {path: data for part in chosen for path, data in files[part].items()}
        whole = hashlib.sha256(b"".join(everything[path] for path in sorted(everything)))
        wanted.append(Wanted(reference, tars, f"image {number}\n{whole.hexdigest()}  -\n"))
    return wanted


def pack(message: Message) -> any_pb2.Any:
    return any_pb2.Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


class Client:
    """The calls of this module, in the daemon's test namespace."""

    def __init__(self, daemon: DaemonProcess, channel: grpc.Channel) -> None:
        self.daemon = daemon
        self.images: Any = images_pb2_grpc.ImagesStub(channel)
        self.content: Any = content_pb2_grpc.ContentStub(channel)
        self.snapshots: Any = snapshots_pb2_grpc.SnapshotsStub(channel)
        self.containers: Any = containers_pb2_grpc.ContainersStub(channel)
        self.tasks: Any = tasks_pb2_grpc.TasksStub(channel)
        self._transfer: Any = transfer_pb2_grpc.TransferStub(channel)

    def call(self, method: Any, request: Message) -> Any:
        return method(request, metadata=self.daemon.metadata(), timeout=PATIENCE)

    def pull(self, name: str) -> None:
        platform = types_pb2.Platform(os="linux", architecture=ARCHITECTURE)
        target = types.ImageStore(
            name=name, platforms=[platform],
            unpacks=[types.UnpackConfiguration(platform=platform, snapshotter="overlayfs")],
        )
        self.call(self._transfer.Transfer, transfer_pb2.TransferRequest(
            source=pack(types.OCIRegistry(reference=name)), destination=pack(target)
        ))

    def remove(self, name: str, *, sync: bool = False) -> None:
        self.call(self.images.Delete, images_pb2.DeleteImageRequest(name=name, sync=sync))

    def run(self, number: int, wanted: Wanted) -> str:
        """What a container of the image prints; the container is gone afterwards, its snapshot is not."""
        name, key = f"c{number}", f"run-{number}"
        chain = chain_ids([digest_of(tar) for tar in wanted.tars])[-1]
        container = containers_pb2.Container(id=name, snapshotter="overlayfs", snapshot_key=key)
        container.runtime.name = "io.containerd.runc.v2"
        builder = SpecBuilder(self.daemon.namespace, name).with_env(["PATH=/bin"]).with_default_devices()
        builder.with_args(["/bin/sh", "-c", "cat /etc/own && cat /parts/*/* | sha256sum"])
        container.spec.type_url, container.spec.value = TYPE_URL, builder.to_json()
        self.call(self.containers.Create, containers_pb2.CreateContainerRequest(container=container))
        mounts = self.call(self.snapshots.Prepare, snapshots_pb2.PrepareSnapshotRequest(
            snapshotter="overlayfs", key=key, parent=chain
        )).mounts
        output = self.daemon.base / name
        self.call(self.tasks.Create, tasks_pb2.CreateTaskRequest(
            container_id=name, rootfs=mounts, stdout=f"file://{output}", stderr=f"file://{output}"
        ))
        self.call(self.tasks.Start, tasks_pb2.StartRequest(container_id=name))
        self.call(self.tasks.Wait, tasks_pb2.WaitRequest(container_id=name))
        status = self.call(self.tasks.Delete, tasks_pb2.DeleteTaskRequest(container_id=name)).exit_status
        self.call(self.containers.Delete, containers_pb2.DeleteContainerRequest(id=name))
        said = output.read_text()
        assert status == 0, said
        return said


def left_over(root: Path) -> dict[str, list[str]]:
    """Entries of content and snapshot folders that should be empty, and rows of the tables of objects."""
    found = {}
    for place in ("blobs/sha256", "ingest", "trash"):
        found[place] = os.listdir(root / "content" / place)
    for snapshotter in ("overlayfs", "native"):
        for place in ("snapshots", "trash"):
            path = root / "snapshots" / snapshotter / place
            found[f"{snapshotter}/{place}"] = os.listdir(path) if path.is_dir() else []
    with sqlite3.connect(root / "metadata.db") as connection:
        for table in TABLES:
            if table not in ("facts", "namespaces"):
                found[table] = [json.dumps(row, default=str) for row in connection.execute(f"SELECT * FROM {table}")]
    connection.close()
    return {place: entries for place, entries in found.items() if entries}


@pytest.mark.slow
@pytest.mark.timeout(180 + 20 * PULLS)
def test_p16_pulls_of_overlapping_images_while_collections_run(registry: RunningRegistry) -> None:
    """Every image runs afterwards; when all are removed, one collection leaves nothing of them."""
    wanted = fill(registry)
    with running_daemon() as daemon, daemon.channel() as channel:
        client = Client(daemon, channel)

        def pulled(number: int, image: Wanted) -> None:
            client.pull(image.name)
            if number % 3 == 0:
                # What its neighbours need must stay, what nobody needs goes and is fetched anew.
                client.remove(image.name, sync=number % 2 == 0)
                client.pull(image.name)

        with Collecting(channel, PATIENCE) as collecting, ThreadPoolExecutor(PULLS) as pool:
            list(pool.map(pulled, range(PULLS), wanted))
        assert collecting.errors == []
        assert collecting.passes > 2
        names = [image.name for image in client.call(client.images.List, images_pb2.ListImagesRequest()).images]
        assert sorted(names) == sorted(image.name for image in wanted)

        with Collecting(channel, PATIENCE) as collecting, ThreadPoolExecutor(RUNNING) as pool:
            said = list(pool.map(client.run, range(PULLS), wanted))
        assert collecting.errors == []
        assert said == [image.says for image in wanted]

        with ThreadPoolExecutor(PULLS) as pool:
            list(pool.map(client.remove, names))
        assert collect(channel, PATIENCE)["errors"] == []
        listed = client.content.List(content_pb2.ListContentRequest(), metadata=daemon.metadata())
        assert [info.digest for part in listed for info in part.info] == []
        assert left_over(daemon.root) == {}
