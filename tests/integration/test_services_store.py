"""The store services of a real daemon, over its socket: protocol details, memory, crashes, the real `ctr`."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, empty_pb2
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from supervisord_ctr.api.services.content.v1 import content_pb2, content_pb2_grpc
from supervisord_ctr.api.services.events.v1 import events_pb2, events_pb2_grpc
from supervisord_ctr.api.services.images.v1 import images_pb2, images_pb2_grpc
from supervisord_ctr.api.services.introspection.v1 import introspection_pb2, introspection_pb2_grpc
from supervisord_ctr.api.services.leases.v1 import leases_pb2, leases_pb2_grpc
from supervisord_ctr.api.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from supervisord_ctr.api.types import types_pb2
from tests.support.daemon import DaemonProcess, running_daemon, wait_until

#: Labels of what no lease protects: the collector may come at any time.
KEPT = {"containerd.io/gc.root": "suite"}


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@pytest.fixture
def channel(daemon: DaemonProcess) -> Iterator[grpc.Channel]:
    with daemon.channel() as made:
        yield made


def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        result = call()
        if hasattr(result, "__next__"):
            list(result)
    found: grpc.StatusCode = caught.value.code()
    return found


def messages(ref: str, data: bytes, piece: int = 1 << 20, **last: Any) -> Iterator[content_pb2.WriteContentRequest]:
    yield content_pb2.WriteContentRequest(action=content_pb2.STAT, ref=ref, total=len(data))
    for offset in range(0, len(data), piece):
        yield content_pb2.WriteContentRequest(
            action=content_pb2.WRITE, ref=ref, offset=offset, data=data[offset:offset + piece]
        )
    yield content_pb2.WriteContentRequest(
        action=content_pb2.COMMIT, ref=ref, offset=len(data), total=len(data), expected=sha256(data), **last
    )


def put(daemon: DaemonProcess, channel: grpc.Channel, data: bytes, lease: str = "", **last: Any) -> str:
    stub: Any = content_pb2_grpc.ContentStub(channel)
    answers = list(stub.Write(messages(f"put-{sha256(data)}", data, **last), metadata=daemon.metadata(lease)))
    digest: str = answers[-1].digest
    return digest


def lease_for(daemon: DaemonProcess, channel: grpc.Channel) -> str:
    stub: Any = leases_pb2_grpc.LeasesStub(channel)
    made: str = stub.Create(leases_pb2.CreateRequest(), metadata=daemon.metadata()).lease.id
    return made


def test_a_namespace_is_required(daemon: DaemonProcess, channel: grpc.Channel) -> None:
    content: Any = content_pb2_grpc.ContentStub(channel)
    images: Any = images_pb2_grpc.ImagesStub(channel)
    for call in (
        lambda: content.Info(content_pb2.InfoRequest(digest=sha256(b""))),
        lambda: content.List(content_pb2.ListContentRequest()),
        lambda: content.Write(iter([content_pb2.WriteContentRequest(ref="x")])),
        lambda: images.List(images_pb2.ListImagesRequest()),
    ):
        assert code_of(call) == grpc.StatusCode.FAILED_PRECONDITION
    bad = (("containerd-namespace", "a/b"),)
    assert code_of(
        lambda: images.List(images_pb2.ListImagesRequest(), metadata=bad)
    ) == grpc.StatusCode.INVALID_ARGUMENT


def test_windows_of_reads(daemon: DaemonProcess, channel: grpc.Channel) -> None:
    stub: Any = content_pb2_grpc.ContentStub(channel)
    data = os.urandom(2_500_000)
    digest = put(daemon, channel, data, lease_for(daemon, channel))

    def read(offset: int, size: int) -> tuple[bytes, list[int]]:
        request = content_pb2.ReadContentRequest(digest=digest, offset=offset, size=size)
        answers = list(stub.Read(request, metadata=daemon.metadata()))
        return b"".join(answer.data for answer in answers), [answer.offset for answer in answers]

    assert read(0, 0)[0] == data
    assert read(7, 100) == (data[7:107], [0])
    assert read(2_400_000, 1 << 30) == (data[2_400_000:], [0])
    assert read(-5, 10)[0] == data[:10]
    assert read(len(data), 0) == (b"", [])
    assert read(100, -1)[0] == data[100:]
    whole, offsets = read(0, 0)
    assert len(whole) == len(data)
    assert offsets == sorted(offsets)
    for offset in (len(data) + 1, 1 << 40):
        request = content_pb2.ReadContentRequest(digest=digest, offset=offset)
        assert code_of(
            lambda request=request: stub.Read(request, metadata=daemon.metadata())
        ) == grpc.StatusCode.OUT_OF_RANGE
    for bad, code in ((sha256(b"nothing"), grpc.StatusCode.NOT_FOUND), ("bad", grpc.StatusCode.INVALID_ARGUMENT)):
        request = content_pb2.ReadContentRequest(digest=bad)
        assert code_of(lambda request=request: stub.Read(request, metadata=daemon.metadata())) == code


def test_the_protocol_of_writes(daemon: DaemonProcess, channel: grpc.Channel) -> None:
    stub: Any = content_pb2_grpc.ContentStub(channel)

    def write(*requests: content_pb2.WriteContentRequest) -> list[content_pb2.WriteContentResponse]:
        return list(stub.Write(iter(requests), metadata=daemon.metadata()))

    request = content_pb2.WriteContentRequest
    answers = write(
        request(action=content_pb2.STAT, ref="proto", total=6),
        request(action=content_pb2.WRITE, data=b"abc"),
        request(action=content_pb2.WRITE, offset=3, data=b"def"),
        request(action=content_pb2.STAT),
    )
    assert [answer.offset for answer in answers[:4]] == [0, 3, 6, 6]
    assert (answers[0].total, answers[0].digest) == (6, sha256(b""))
    assert answers[3].digest == sha256(b"abcdef")
    assert answers[3].started_at.seconds > 0
    wait_until(lambda: stub.Status(content_pb2.StatusRequest(ref="proto"), metadata=daemon.metadata()).status.offset == 6,
               "the ingest is there")

    def again(*requests: content_pb2.WriteContentRequest) -> list[content_pb2.WriteContentResponse]:
        """The stream before may still be closing on the server."""
        def attempt() -> list[content_pb2.WriteContentResponse] | None:
            try:
                return write(*requests)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
                return None

        made: list[content_pb2.WriteContentResponse] = wait_until(attempt, "the ref is free")
        return made

    assert again(request(action=content_pb2.STAT, ref="proto", total=6))[0].offset == 6
    assert code_of(
        lambda: again(request(action=content_pb2.WRITE, ref="proto", offset=5, data=b"x"))
    ) == grpc.StatusCode.OUT_OF_RANGE
    assert again(request(action=content_pb2.WRITE, ref="proto", data=b"new"))[0].offset == 3
    assert code_of(
        lambda: again(request(action=content_pb2.COMMIT, ref="proto", offset=3, expected=sha256(b"other")))
    ) == grpc.StatusCode.FAILED_PRECONDITION
    assert code_of(
        lambda: again(request(ref="proto"), request(action=content_pb2.COMMIT, offset=3, total=9))
    ) == grpc.StatusCode.FAILED_PRECONDITION
    answers = again(request(ref="proto"), request(
        action=content_pb2.COMMIT, offset=3, total=3, expected=sha256(b"new"), labels={"k": "v", **KEPT}
    ))
    assert (answers[1].action, answers[1].offset, answers[1].digest) == (content_pb2.COMMIT, 3, sha256(b"new"))
    info = stub.Info(content_pb2.InfoRequest(digest=sha256(b"new")), metadata=daemon.metadata()).info
    assert (info.size, dict(info.labels)) == (3, {"k": "v", **KEPT})
    assert code_of(
        lambda: write(request(action=content_pb2.STAT, ref="other", expected=sha256(b"new")))
    ) == grpc.StatusCode.ALREADY_EXISTS
    assert code_of(
        lambda: write(
            request(action=content_pb2.STAT, ref="late"),
            request(action=content_pb2.WRITE, data=b"x", expected=sha256(b"new")),
        )
    ) == grpc.StatusCode.ALREADY_EXISTS
    assert code_of(
        lambda: stub.Status(content_pb2.StatusRequest(ref="late"), metadata=daemon.metadata())
    ) == grpc.StatusCode.NOT_FOUND
    assert code_of(lambda: write(request(action=content_pb2.STAT))) == grpc.StatusCode.INVALID_ARGUMENT


def test_a_second_writer_of_a_ref_is_refused(daemon: DaemonProcess, channel: grpc.Channel) -> None:
    stub: Any = content_pb2_grpc.ContentStub(channel)
    hold = threading.Event()

    def first() -> Iterator[content_pb2.WriteContentRequest]:
        yield content_pb2.WriteContentRequest(action=content_pb2.STAT, ref="held")
        hold.wait(60)

    stream = stub.Write(first(), metadata=daemon.metadata())
    next(stream)
    assert code_of(lambda: stub.Write(
        iter([content_pb2.WriteContentRequest(action=content_pb2.STAT, ref="held")]), metadata=daemon.metadata()
    )) == grpc.StatusCode.UNAVAILABLE
    # A client that vanishes lets go of the ref.
    stream.cancel()
    hold.set()

    def free() -> bool:
        try:
            list(stub.Write(
                iter([content_pb2.WriteContentRequest(action=content_pb2.STAT, ref="held")]), metadata=daemon.metadata()
            ))
        except grpc.RpcError:
            return False
        return True

    wait_until(free, "the ref of a vanished client is free")


def memory(daemon: DaemonProcess) -> int:
    """Peak resident memory of the daemon in bytes."""
    assert daemon.process is not None
    for line in Path(f"/proc/{daemon.process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


@pytest.mark.slow
def test_memory_stays_flat_while_a_large_blob_is_written(daemon: DaemonProcess, channel: grpc.Channel) -> None:
    stub: Any = content_pb2_grpc.ContentStub(channel)
    piece = os.urandom(1 << 20)
    count = 384
    whole = hashlib.sha256()
    for _ in range(count):
        whole.update(piece)

    def requests(ref: str, pieces: int) -> Iterator[content_pb2.WriteContentRequest]:
        yield content_pb2.WriteContentRequest(action=content_pb2.STAT, ref=ref)
        for number in range(pieces):
            yield content_pb2.WriteContentRequest(action=content_pb2.WRITE, offset=number << 20, data=piece)
        if pieces == count:
            yield content_pb2.WriteContentRequest(
                action=content_pb2.COMMIT, offset=count << 20, expected=f"sha256:{whole.hexdigest()}"
            )

    list(stub.Write(requests("warm", 16), metadata=daemon.metadata()))
    before = memory(daemon)
    answers = list(stub.Write(requests("large", count), metadata=daemon.metadata()))
    assert answers[-1].digest == f"sha256:{whole.hexdigest()}"
    assert memory(daemon) - before < 96 << 20


def test_images_give_their_space_back_with_sync(daemon: DaemonProcess, channel: grpc.Channel) -> None:
    images: Any = images_pb2_grpc.ImagesStub(channel)
    lease = lease_for(daemon, channel)
    digest = put(daemon, channel, os.urandom(100_000), lease)
    image = images_pb2.Image(
        name="space", target=types_pb2.Descriptor(media_type="m", digest=digest, size=100_000)
    )
    images.Create(images_pb2.CreateImageRequest(image=image), metadata=daemon.metadata())
    leases: Any = leases_pb2_grpc.LeasesStub(channel)
    leases.Delete(leases_pb2.DeleteRequest(id=lease, sync=True), metadata=daemon.metadata())
    blob = daemon.root / "content" / "blobs" / "sha256" / digest.removeprefix("sha256:")
    assert blob.exists()
    images.Delete(images_pb2.DeleteImageRequest(name="space", sync=True), metadata=daemon.metadata())
    assert not blob.exists()


def test_p16_collection_explains_itself(daemon: DaemonProcess, channel: grpc.Channel) -> None:
    introspection: Any = introspection_pb2_grpc.IntrospectionStub(channel)

    def ask(kind: str, name: str, **question: Any) -> dict[str, Any]:
        options = Struct()
        options.update(question)
        request = introspection_pb2.PluginInfoRequest(type=kind, id=name, options=any_pb2.Any(
            type_url="google.protobuf.Struct", value=options.SerializeToString()
        ))
        answer: dict[str, Any] = MessageToDict(Struct.FromString(introspection.PluginInfo(request).extra.value))
        return answer

    lease = lease_for(daemon, channel)
    digest = put(daemon, channel, b"explained", lease)
    told = ask("io.containerd.gc.v1", "scheduler", dry_run=True)
    assert digest not in str(told["removed"])
    assert told["dry_run"] is True
    leases: Any = leases_pb2_grpc.LeasesStub(channel)
    leases.Delete(leases_pb2.DeleteRequest(id=lease, sync=True), metadata=daemon.metadata())
    assert ask("io.containerd.gc.v1", "scheduler", collect=True)["errors"] == []
    assert code_of(lambda: ask("io.containerd.content.v1", "content", x=1)) == grpc.StatusCode.UNIMPLEMENTED
    assert code_of(lambda: ask("io.containerd.content.v1", "nothing", x=1)) == grpc.StatusCode.NOT_FOUND
    server = introspection.Server(empty_pb2.Empty())
    assert daemon.process is not None
    assert (server.pid, len(server.uuid)) == (daemon.process.pid, 36)
    plugins = introspection.Plugins(introspection_pb2.PluginsRequest(filters=["type==io.containerd.snapshotter.v1"]))
    assert {plugin.id for plugin in plugins.plugins} >= {"overlayfs", "native"}


def test_p14_events_of_the_stores(daemon: DaemonProcess, channel: grpc.Channel) -> None:
    events: Any = events_pb2_grpc.EventsStub(channel)
    snapshots: Any = snapshots_pb2_grpc.SnapshotsStub(channel)
    stream = events.Subscribe(events_pb2.SubscribeRequest(
        filters=[f'namespace=={daemon.namespace},topic~=|^/snapshot/|']
    ))
    stream.initial_metadata()
    snapshots.Prepare(
        snapshots_pb2.PrepareSnapshotRequest(snapshotter="overlayfs", key="told", labels=KEPT),
        metadata=daemon.metadata(),
    )
    first = next(stream)
    assert (first.topic, first.event.type_url) == ("/snapshot/prepare", "containerd.events.SnapshotPrepare")
    snapshots.Remove(
        snapshots_pb2.RemoveSnapshotRequest(snapshotter="overlayfs", key="told"), metadata=daemon.metadata()
    )
    assert next(stream).topic == "/snapshot/remove"
    stream.cancel()
    for name, code in (("", grpc.StatusCode.INVALID_ARGUMENT), ("zfs", grpc.StatusCode.INVALID_ARGUMENT)):
        request = snapshots_pb2.PrepareSnapshotRequest(snapshotter=name, key="x")
        assert code_of(lambda request=request: snapshots.Prepare(request, metadata=daemon.metadata())) == code
    bad = events_pb2.PublishRequest(topic="bad topic", event=any_pb2.Any(type_url="x", value=b"y"))
    assert code_of(lambda: events.Publish(bad, metadata=daemon.metadata())) == grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def patient() -> Iterator[DaemonProcess]:
    """A daemon for clients that leave a moment between making something and protecting it."""
    never = "[gc]\ninterval = 0\nstartup_delay = 3600\nmutation_threshold = 0\ndeletion_threshold = 1000000\n"
    with running_daemon(never) as made:
        yield made


def test_the_real_ctr(patient: DaemonProcess) -> None:
    if shutil.which("ctr") is None:
        pytest.fail("ctr is not installed (Debian: containerd)")
    daemon = patient
    namespace = f"{daemon.namespace}-ctr"

    def ctr(*arguments: str, data: bytes = b"") -> str:
        done = subprocess.run(
            ["ctr", "-a", str(daemon.address), "-n", namespace, *arguments], input=data, capture_output=True, timeout=60
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    assert "Server:" in ctr("version")
    assert "io.containerd.snapshotter.v1" in ctr("plugins", "ls")
    ctr("namespaces", "create", namespace, "tier=test")
    assert "tier=test" in ctr("namespaces", "ls")
    ctr("namespaces", "label", namespace, "tier=", "more=1")
    assert "more=1" in ctr("namespaces", "ls")
    lease = ctr("leases", "create").strip()
    assert lease in ctr("leases", "ls")
    data = os.urandom(300_000)
    digest = sha256(data)
    ctr("content", "ingest", "--expected-size", str(len(data)), "--expected-digest", digest, "some-ref", data=data)
    ctr("content", "label", digest, "containerd.io/gc.root=1")
    assert digest in ctr("content", "ls", "-q")
    done = subprocess.run(
        ["ctr", "-a", str(daemon.address), "-n", namespace, "content", "get", digest], capture_output=True, timeout=60
    )
    assert done.stdout == data
    ctr("snapshots", "prepare", "work")
    assert "work" in ctr("snapshots", "ls")
    ctr("snapshots", "commit", "layer", "work")
    ctr("snapshots", "prepare", "--mounts", "run", "layer")
    assert "overlay" in ctr("snapshots", "mounts", "/x", "run")
    assert "layer" in ctr("snapshots", "tree")
    assert '"Kind": "Committed"' in ctr("snapshots", "info", "layer")
    assert "layer" in ctr("snapshots", "usage")
    for key in ("run", "layer"):
        ctr("snapshots", "rm", key)
    ctr("content", "rm", digest)
    ctr("leases", "rm", lease)
    ctr("namespaces", "rm", namespace)
    assert namespace not in ctr("namespaces", "ls")


@pytest.mark.slow
def test_p2_an_ingest_survives_the_daemon(tmp_path: Path) -> None:
    with running_daemon() as daemon:
        data = os.urandom(3 << 20)
        with daemon.channel() as channel:
            stub: Any = content_pb2_grpc.ContentStub(channel)
            sent = iter(list(messages("survives", data))[:3])
            list(stub.Write(sent, metadata=daemon.metadata()))
        daemon.restart(kill=True)
        with daemon.channel() as channel:
            stub = content_pb2_grpc.ContentStub(channel)
            status = stub.Status(content_pb2.StatusRequest(ref="survives"), metadata=daemon.metadata()).status
            assert status.offset == 2 << 20
            rest = [
                content_pb2.WriteContentRequest(
                    action=content_pb2.WRITE, ref="survives", offset=2 << 20, data=data[2 << 20:]
                ),
                content_pb2.WriteContentRequest(
                    action=content_pb2.COMMIT, ref="survives", offset=3 << 20, total=3 << 20, expected=sha256(data)
                ),
            ]
            answers = list(stub.Write(iter(rest), metadata=daemon.metadata()))
            assert answers[-1].digest == sha256(data)


@pytest.mark.slow
def test_a_daemon_uses_the_snapshotter_of_another(patient: DaemonProcess) -> None:
    """As in containerd, the name in the configuration is also what the other side calls it."""
    daemon = patient
    config = f'[proxy_plugins.native]\ntype = "snapshot"\naddress = "{daemon.address}"\n'
    with running_daemon(config) as second, second.channel() as channel:
        stub: Any = snapshots_pb2_grpc.SnapshotsStub(channel)

        def prepare(key: str, parent: str = "") -> Any:
            request = snapshots_pb2.PrepareSnapshotRequest(snapshotter="native", key=key, parent=parent, labels=KEPT)
            return stub.Prepare(request, metadata=second.metadata()).mounts[0]

        mount = prepare("work")
        assert mount.source.startswith(str(daemon.root))
        (Path(mount.source) / "file").write_text("over there")
        stub.Commit(
            snapshots_pb2.CommitSnapshotRequest(snapshotter="native", name="layer", key="work", labels=KEPT),
            metadata=second.metadata(),
        )
        assert (Path(prepare("run", "layer").source) / "file").read_text() == "over there"
        listed = [
            info.name for answer in stub.List(
                snapshots_pb2.ListSnapshotsRequest(snapshotter="native"), metadata=second.metadata()
            ) for info in answer.info
        ]
        assert listed == ["layer", "run"]
        assert code_of(lambda: stub.Remove(
            snapshots_pb2.RemoveSnapshotRequest(snapshotter="native", key="layer"), metadata=second.metadata()
        )) == grpc.StatusCode.FAILED_PRECONDITION
