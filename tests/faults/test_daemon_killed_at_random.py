"""A daemon killed at random moments while clients write, commit, unpack, remove and collect (P5, P6).

Each round ends with SIGKILL and the next daemon on the same folders: what was acknowledged is there,
whole, and after one collection nothing lies on disk or is mounted that no record names.
`PCTR_CRASH_ROUNDS` sets the number of rounds, `PCTR_START_LIMIT` the seconds that a start may take.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from supervisord_ctr.api.services.containers.v1 import containers_pb2, containers_pb2_grpc
from supervisord_ctr.api.services.content.v1 import content_pb2, content_pb2_grpc
from supervisord_ctr.api.services.images.v1 import images_pb2, images_pb2_grpc
from supervisord_ctr.api.services.leases.v1 import leases_pb2, leases_pb2_grpc
from supervisord_ctr.api.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from tests.support.collecting import collect
from tests.support.daemon import DaemonProcess, mounts_below, running_daemon, wait_until

ROUNDS = int(os.environ.get("PCTR_CRASH_ROUNDS", "4"))
START_LIMIT = float(os.environ.get("PCTR_START_LIMIT", "60"))
#: The longest time from the first acknowledged call to the kill, seconds.
LIFE = 0.8
#: So many images, layers and containers are kept; older ones are removed.
KEPT = 20
ROOT_LABEL = {"containerd.io/gc.root": "2024-01-01T00:00:00Z"}


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Api:
    """The calls of this module, in the daemon's test namespace."""

    def __init__(self, daemon: DaemonProcess, channel: grpc.Channel) -> None:
        self._daemon = daemon
        self.content: Any = content_pb2_grpc.ContentStub(channel)
        self.images: Any = images_pb2_grpc.ImagesStub(channel)
        self.leases: Any = leases_pb2_grpc.LeasesStub(channel)
        self.snapshots: Any = snapshots_pb2_grpc.SnapshotsStub(channel)
        self.containers: Any = containers_pb2_grpc.ContainersStub(channel)
        self._channel = channel

    def call(self, method: Any, request: Any, lease: str = "") -> Any:
        return method(request, metadata=self._daemon.metadata(lease), timeout=60)

    def put(self, data: bytes, labels: dict[str, str], lease: str) -> str:
        """A blob, written in three pieces."""
        third = len(data) // 3 + 1
        ref = f"put-{sha256(data)}"

        def messages() -> Iterator[content_pb2.WriteContentRequest]:
            for offset in range(0, len(data), third):
                yield content_pb2.WriteContentRequest(
                    action=content_pb2.WRITE, ref=ref, offset=offset, data=data[offset:offset + third]
                )
            yield content_pb2.WriteContentRequest(
                action=content_pb2.COMMIT, ref=ref, offset=len(data), total=len(data), expected=sha256(data),
                labels=labels,
            )

        return str(list(self.call(self.content.Write, messages(), lease))[-1].digest)

    def read(self, digest: str) -> bytes:
        return b"".join(
            part.data for part in self.call(self.content.Read, content_pb2.ReadContentRequest(digest=digest))
        )

    def mounts(self, key: str) -> Any:
        return self.call(self.snapshots.Mounts, snapshots_pb2.MountsRequest(snapshotter="overlayfs", key=key)).mounts

    def collect(self) -> list[Any]:
        """One whole collection; its errors."""
        return list(collect(self._channel)["errors"])


@dataclass
class Truth:
    """What was acknowledged, by kind and key, with what it must hold; and what may be gone."""

    images: dict[str, str] = field(default_factory=dict)
    layers: dict[str, bytes] = field(default_factory=dict)
    containers: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def oldest(self, kind: dict[str, Any]) -> str | None:
        """One that is about to be removed, if there are enough; it is true of it no longer."""
        with self.lock:
            if len(kind) <= KEPT:
                return None
            key = next(iter(kind))
            del kind[key]
            return key


def images(api: Api, truth: Truth, number: int, chance: random.Random) -> None:
    """An image of two blobs under a lease; an old one goes."""
    lease, name = f"lease-i{number}", f"image-{number}"
    api.call(api.leases.Create, leases_pb2.CreateRequest(id=lease))
    layer = api.put(chance.randbytes(chance.randrange(1000, 200_000)), {}, lease)
    manifest = api.put(b"%d" % number + layer.encode(), {"containerd.io/gc.ref.content.0": layer}, lease)
    image = images_pb2.Image(name=name)
    image.target.media_type, image.target.digest, image.target.size = "m", manifest, len(layer)
    api.call(api.images.Create, images_pb2.CreateImageRequest(image=image))
    truth.images[name] = manifest
    api.call(api.leases.Delete, leases_pb2.DeleteRequest(id=lease))
    if (old := truth.oldest(truth.images)) is not None:
        api.call(api.images.Delete, images_pb2.DeleteImageRequest(name=old, sync=number % 3 == 0))


def layers(api: Api, truth: Truth, number: int, chance: random.Random) -> None:
    """A layer with a file, committed; a container on top of it. Old ones go."""
    key, name, top = f"extract-{number}", f"layer-{number}", f"top-{number}"
    made = api.call(api.snapshots.Prepare, snapshots_pb2.PrepareSnapshotRequest(
        snapshotter="overlayfs", key=key, labels=ROOT_LABEL
    )).mounts
    data = chance.randbytes(2000)
    (Path(made[0].source) / "file").write_bytes(data)
    api.call(api.snapshots.Commit, snapshots_pb2.CommitSnapshotRequest(
        snapshotter="overlayfs", name=name, key=key, labels=ROOT_LABEL
    ))
    truth.layers[name] = data
    container = containers_pb2.Container(id=f"c{number}", snapshotter="overlayfs", snapshot_key=top)
    container.runtime.name, container.spec.type_url = "r", "s"
    api.call(api.containers.Create, containers_pb2.CreateContainerRequest(container=container))
    api.call(api.snapshots.Prepare, snapshots_pb2.PrepareSnapshotRequest(
        snapshotter="overlayfs", key=top, parent=name
    ))
    truth.containers[f"c{number}"] = top
    if (old := truth.oldest(truth.containers)) is not None:
        api.call(api.containers.Delete, containers_pb2.DeleteContainerRequest(id=old))
        gone = f"layer-{old.removeprefix('c')}"
        with truth.lock:
            truth.layers.pop(gone, None)
        unlabelled = snapshots_pb2.Info(name=gone)
        api.call(api.snapshots.Update, snapshots_pb2.UpdateSnapshotRequest(snapshotter="overlayfs", info=unlabelled))


def ingests(api: Api, truth: Truth, number: int, chance: random.Random) -> None:
    """An ingest that is left unfinished under a lease, one that is aborted, and a collection."""
    lease = f"lease-n{number}"
    api.call(api.leases.Create, leases_pb2.CreateRequest(id=lease))
    for ref in (f"left-{number}", f"aborted-{number}"):
        request = content_pb2.WriteContentRequest(action=content_pb2.WRITE, ref=ref, data=chance.randbytes(5000))
        list(api.call(api.content.Write, iter([request]), lease))
    api.call(api.content.Abort, content_pb2.AbortRequest(ref=f"aborted-{number}"), lease)
    if number % 2:
        api.call(api.leases.Delete, leases_pb2.DeleteRequest(id=lease))
    assert api.collect() == []


def lives(daemon: DaemonProcess, truth: Truth, start: int, chance: random.Random) -> list[BaseException]:
    """Clients work until the daemon is killed at a random moment; errors that are not that one."""
    first, wrong = threading.Event(), list[BaseException]()

    def loop(work: Any, seed: int) -> None:
        mine = random.Random(seed)
        try:
            with daemon.channel() as channel:
                api = Api(daemon, channel)
                for number in range(start, start + 100_000):
                    work(api, truth, number, mine)
                    first.set()
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                wrong.append(error)
        except FileNotFoundError as error:
            wrong.append(error)
        finally:
            first.set()

    threads = [
        threading.Thread(target=loop, args=(work, chance.randrange(1 << 30))) for work in (images, layers, ingests)
    ]
    for thread in threads:
        thread.start()
    assert first.wait(60)
    threading.Event().wait(chance.uniform(0, LIFE))
    daemon.kill()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return wrong


def is_true(api: Api, truth: Truth) -> None:
    """Everything acknowledged is there and holds what was written."""
    for name, manifest in truth.images.items():
        image = api.call(api.images.Get, images_pb2.GetImageRequest(name=name)).image
        assert image.target.digest == manifest
        body = api.read(manifest)
        assert sha256(body) == manifest
        layer = body[body.index(b"sha256:"):].decode()
        assert sha256(api.read(layer)) == layer
    for name, data in truth.layers.items():
        found = api.call(api.snapshots.Stat, snapshots_pb2.StatSnapshotRequest(snapshotter="overlayfs", key=name))
        assert found.info.kind == snapshots_pb2.COMMITTED
        assert data
    for name, top in truth.containers.items():
        found = api.call(api.containers.Get, containers_pb2.GetContainerRequest(id=name)).container
        assert found.snapshot_key == top
        lower = next(option for option in api.mounts(top)[0].options if option.startswith("lowerdir="))
        expected = truth.layers.get(f"layer-{name.removeprefix('c')}")
        if expected is not None:
            assert (Path(lower.removeprefix("lowerdir=")) / "file").read_bytes() == expected


def nothing_unexplained(api: Api, daemon: DaemonProcess) -> None:
    """After one collection, disk and records agree in both directions."""
    content, overlay = daemon.root / "content", daemon.root / "snapshots" / "overlayfs"
    with contextlib.closing(sqlite3.connect(f"file:{daemon.root}/metadata.db?mode=ro", uri=True)) as database:
        def column(statement: str) -> set[str]:
            return {str(row[0]) for row in database.execute(statement)}

        assert {f"sha256:{name}" for name in os.listdir(content / "blobs" / "sha256")} == column(
            "SELECT digest FROM blobs")
        assert len(os.listdir(content / "ingest")) == len(column("SELECT backend FROM ingests"))
        assert set(os.listdir(overlay / "snapshots")) == column("SELECT id FROM snapshot_records")
        assert column("SELECT key FROM snapshot_records") == column("SELECT backend FROM snapshots")
    listed = api.call(api.content.ListStatuses, content_pb2.ListStatusesRequest()).statuses
    assert len(listed) == len(os.listdir(content / "ingest"))
    for trash in (content / "trash", overlay / "trash"):
        assert not trash.is_dir() or os.listdir(trash) == []
    assert mounts_below(daemon.base) == []


@pytest.mark.slow
@pytest.mark.timeout(180 + 60 * ROUNDS)
def test_p6_a_daemon_killed_at_random_loses_and_leaks_nothing() -> None:
    chance = random.Random(20250727)
    truth = Truth()
    slowest = 0.0
    with running_daemon() as daemon:
        for number in range(ROUNDS):
            wrong = lives(daemon, truth, number * 100_000, chance)
            assert wrong == []
            daemon.address.unlink()  # a client that finds the dead one's socket waits a second before it tries again
            begin = time.monotonic()
            daemon.start()
            slowest = max(slowest, time.monotonic() - begin)
            with daemon.channel() as channel:
                api = Api(daemon, channel)
                is_true(api, truth)
                for lease in api.call(api.leases.List, leases_pb2.ListRequest()).leases:
                    api.call(api.leases.Delete, leases_pb2.DeleteRequest(id=lease.id))
                assert api.collect() == []
                is_true(api, truth)
                wait_until(lambda: mounts_below(daemon.base) == [], "no mount is left")
                nothing_unexplained(api, daemon)
            assert slowest < START_LIMIT, f"a start took {slowest:.2f} s"
    print(f"{ROUNDS} rounds, slowest start {slowest:.2f} s")
