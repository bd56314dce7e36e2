"""The daemon dies at every stage of a pull; the next one pulls the same image and nothing is left over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.message import Message

from supervisord_ctr.api.services.content.v1 import content_pb2, content_pb2_grpc
from supervisord_ctr.api.services.images.v1 import images_pb2, images_pb2_grpc
from supervisord_ctr.api.services.leases.v1 import leases_pb2, leases_pb2_grpc
from supervisord_ctr.api.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from supervisord_ctr.api.services.transfer.v1 import transfer_pb2, transfer_pb2_grpc
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.api.types.transfer import transfer_pb2 as types
from supervisord_ctr.images.config import chain_ids
from tests.support.daemon import DaemonProcess, running_daemon, wait_until
from tests.support.fake_registry import FakeRegistry, Handler, Seen, fake_registry
from tests.support.images import ARCHITECTURE, BuiltImage, build, digest_of, file, folder, layer

TARS = [
    layer(folder("base"), *(file(f"base/{number}", os.urandom(2000)) for number in range(200))),
    layer(file("base/implied/x", os.urandom(600_000))),
    layer(file("top")),
]


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as made:
        yield made


def pack(message: Message) -> any_pb2.Any:
    return any_pb2.Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def pull(daemon: DaemonProcess, name: str) -> None:
    platform = types_pb2.Platform(os="linux", architecture=ARCHITECTURE)
    target = types.ImageStore(
        name=name, platforms=[platform],
        unpacks=[types.UnpackConfiguration(platform=platform, snapshotter="overlayfs")],
    )
    with daemon.channel() as channel:
        transfer_pb2_grpc.TransferStub(channel).Transfer(
            transfer_pb2.TransferRequest(source=pack(types.OCIRegistry(reference=name)), destination=pack(target)),
            metadata=daemon.metadata(), timeout=120,
        )


def pull_twice(daemon: DaemonProcess, name: str) -> None:
    """Pull from a daemon that dies of it, and from the next one."""
    with pytest.raises(grpc.RpcError):
        pull(daemon, name)
    wait_until(lambda: daemon.process is not None and daemon.process.poll() is not None, "the daemon died")
    daemon.environment.clear()
    daemon.start()
    pull(daemon, name)


def found(daemon: DaemonProcess) -> tuple[set[str], set[str], set[str]]:
    """Images, blobs and snapshots of the namespace."""
    with daemon.channel() as channel:
        images = images_pb2_grpc.ImagesStub(channel).List(
            images_pb2.ListImagesRequest(), metadata=daemon.metadata()
        ).images
        blobs = content_pb2_grpc.ContentStub(channel).List(
            content_pb2.ListContentRequest(), metadata=daemon.metadata()
        )
        snapshots = snapshots_pb2_grpc.SnapshotsStub(channel).List(
            snapshots_pb2.ListSnapshotsRequest(snapshotter="overlayfs"), metadata=daemon.metadata()
        )
        return (
            {image.name for image in images}, {info.digest for part in blobs for info in part.info},
            {info.name for part in snapshots for info in part.info},
        )


def expected(image: BuiltImage, name: str) -> tuple[set[str], set[str], set[str]]:
    return (
        {name}, {*image.blobs, image.target, digest_of(image.manifest)}, set(chain_ids([digest_of(t) for t in TARS]))
    )


@pytest.mark.parametrize("point", [
    "pull.received=kill@3", "pull.completed=kill@2", "content.commit.renamed=kill@4", "unpack.unpacked=kill@1",
    "metadata.snapshot.intent=kill@2", "snapshot.commit.recorded=kill@2",
])
def test_a_killed_daemon_s_pull_is_done_again(registry: FakeRegistry, point: str) -> None:
    image = build(TARS)
    name = registry.add("app", "v1", image)
    with running_daemon(environment={"PCTR_FAULTS": point}) as daemon:
        try:
            pull(daemon, name)
            died = False
        except grpc.RpcError as error:
            assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED), error
            died = True
        assert died or not _known(point), f"trace point {point} was not passed"
        daemon.environment.clear()
        if died:
            wait_until(lambda: daemon.process is not None and daemon.process.poll() is not None, "the daemon died")
            daemon.start()
            wait_until(lambda: not found(daemon)[2], "the killed pull's snapshots go")
        pull(daemon, name)
        assert found(daemon) == expected(image, name)
        with daemon.channel() as channel:
            leases = leases_pb2_grpc.LeasesStub(channel).List(leases_pb2.ListRequest(), metadata=daemon.metadata())
        assert list(leases.leases) == []


def _known(point: str) -> bool:
    """Whether the point belongs to this room; those of others may be renamed there."""
    return point.startswith(("pull.", "unpack."))


def test_a_worker_that_dies_fails_the_pull_and_leaves_nothing(registry: FakeRegistry) -> None:
    image = build(TARS)
    name = registry.add("app", "v1", image)
    with running_daemon(environment={"PCTR_FAULTS": "diff.apply.entry=kill@50"}) as daemon:
        with pytest.raises(grpc.RpcError) as caught:
            pull(daemon, name)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "died" in (caught.value.details() or "")
        images, _, snapshots = found(daemon)
        assert (images, snapshots) == (set(), set())
        daemon.environment.clear()
        daemon.restart()
        pull(daemon, name)
        assert found(daemon)[0] == {name}


def test_p2_a_restart_keeps_the_blobs_that_had_arrived(registry: FakeRegistry) -> None:
    image = build([layer(file("base", os.urandom(1000))), layer(file("top", os.urandom(1000)))])
    name = registry.add("app", "v1", image)
    whole, last = image.layers
    # Index, manifest and config are the first three, `whole` is the fourth.
    with running_daemon(environment={"PCTR_FAULTS": "content.commit.renamed=kill@5"}) as daemon:

        def hold(handler: Handler, seen: Seen) -> bool:
            if seen.path.endswith(last) and daemon.environment:
                wait_until(lambda: whole in found(daemon)[1], "the other layer is in the store")
            return False

        registry.rules.append(hold)
        pull_twice(daemon, name)
        assert found(daemon)[0] == {name}
    assert (len(registry.requests(whole)), len(registry.requests(last))) == (1, 2)


def test_p2_a_restart_resumes_where_the_daemon_died(registry: FakeRegistry, tmp_path: Path) -> None:
    image = build([layer(file("data", os.urandom(4 << 20)))])
    name = registry.add("app", "v1", image)
    with running_daemon(environment={"PCTR_FAULTS": "pull.received=kill@2"}) as daemon:
        pull_twice(daemon, name)
        ranges = [seen.headers.get("range") for seen in registry.requests(image.layers[0])]
        assert ranges[0] is None
        assert len(ranges) == 2
        assert ranges[1] is not None
        assert ranges[1] > "bytes=0-"
