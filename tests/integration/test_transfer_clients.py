"""The transfer, streaming and diff services as clients use them: over gRPC, with a real registry, by the real `ctr`."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.message import Message

from supervisord_ctr.api.services.content.v1 import content_pb2, content_pb2_grpc
from supervisord_ctr.api.services.diff.v1 import diff_pb2, diff_pb2_grpc
from supervisord_ctr.api.services.images.v1 import images_pb2, images_pb2_grpc
from supervisord_ctr.api.services.leases.v1 import leases_pb2, leases_pb2_grpc
from supervisord_ctr.api.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from supervisord_ctr.api.services.streaming.v1 import streaming_pb2, streaming_pb2_grpc
from supervisord_ctr.api.services.transfer.v1 import transfer_pb2, transfer_pb2_grpc
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.api.types.transfer import transfer_pb2 as types
from supervisord_ctr.images.config import chain_ids
from tests.support.daemon import DaemonProcess, running_daemon
from tests.support.fake_registry import ask_basic, fake_registry
from tests.support.images import ARCHITECTURE, build, digest_of, file, folder, layer, small_image
from tests.support.registry import RunningRegistry, running_registry


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with running_daemon() as made:
        yield made


@pytest.fixture(scope="module")
def registry() -> Iterator[RunningRegistry]:
    with running_registry() as made:
        yield made


@pytest.fixture
def channel(daemon: DaemonProcess) -> Iterator[grpc.Channel]:
    with daemon.channel() as made:
        yield made


def pack(message: Message) -> any_pb2.Any:
    return any_pb2.Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


class ClientStream:
    """A stream that a client opens before a transfer."""

    def __init__(self, channel: grpc.Channel, daemon: DaemonProcess, name: str) -> None:
        self._outgoing: SimpleQueue[any_pb2.Any | None] = SimpleQueue()
        self._outgoing.put(pack(streaming_pb2.StreamInit(id=name)))
        self.call = streaming_pb2_grpc.StreamingStub(channel).Stream(
            iter(self._outgoing.get, None), metadata=daemon.metadata()
        )
        assert next(self.call).type_url == "google.protobuf.Empty"

    def send(self, message: Message) -> None:
        self._outgoing.put(pack(message))

    def messages(self) -> Iterator[any_pb2.Any]:
        """What comes until either side ends the stream."""
        with contextlib.suppress(grpc.RpcError):
            yield from self.call

    def end(self) -> None:
        self._outgoing.put(None)


def transfer(
    channel: grpc.Channel, daemon: DaemonProcess, source: Message, target: Message, progress: str = ""
) -> None:
    request = transfer_pb2.TransferRequest(source=pack(source), destination=pack(target))
    if progress:
        request.options.progress_stream = progress
    transfer_pb2_grpc.TransferStub(channel).Transfer(request, metadata=daemon.metadata(), timeout=120)


def lease(channel: grpc.Channel, daemon: DaemonProcess, name: str) -> tuple[tuple[str, str], ...]:
    """Headers whose lease `name` protects what the calls make: the collector may come at any time."""
    leases_pb2_grpc.LeasesStub(channel).Create(leases_pb2.CreateRequest(id=name), metadata=daemon.metadata())
    return daemon.metadata(lease=name)


def store(name: str, *, unpack: bool = True) -> types.ImageStore:
    platform = types_pb2.Platform(os="linux", architecture=ARCHITECTURE)
    unpacks = [types.UnpackConfiguration(platform=platform, snapshotter="overlayfs")] if unpack else []
    return types.ImageStore(name=name, platforms=[platform], unpacks=unpacks)


def image_target(channel: grpc.Channel, daemon: DaemonProcess, name: str) -> str:
    request = images_pb2.GetImageRequest(name=name)
    answer = images_pb2_grpc.ImagesStub(channel).Get(request, metadata=daemon.metadata())
    return str(answer.image.target.digest)


def test_a_pull_with_progress(channel: grpc.Channel, daemon: DaemonProcess, registry: RunningRegistry) -> None:
    made = small_image("progress")
    name = registry.push("transfer/progress", "v1", made)
    stream = ClientStream(channel, daemon, "progress-1")
    transfer(channel, daemon, types.OCIRegistry(reference=name), store(name), "progress-1")
    events = [types.Progress.FromString(message.value) for message in stream.call]
    stream.end()
    assert events[0].event == f"Resolving from OCI Registry ({name})"
    assert events[-1].event == f"Completed pull from OCI Registry ({name})"
    assert {e.desc.digest for e in events if e.event == "extracted"} == set(made.layers)
    assert image_target(channel, daemon, name) == made.target


def test_credentials_are_asked_over_a_stream(channel: grpc.Channel, daemon: DaemonProcess) -> None:
    with fake_registry() as private:
        private.rules.append(ask_basic("user", "secret"))
        name = private.add("app", "v1", small_image("auth"))
        stream = ClientStream(channel, daemon, "creds-1")
        asked: list[types.AuthRequest] = []

        def answer() -> None:
            for message in stream.messages():
                asked.append(types.AuthRequest.FromString(message.value))
                stream.send(types.AuthResponse(authType=types.CREDENTIALS, username="user", secret="secret"))

        thread = threading.Thread(target=answer)
        thread.start()
        resolver = types.RegistryResolver(auth_stream="creds-1")
        transfer(channel, daemon, types.OCIRegistry(reference=name, resolver=resolver), store(name))
        stream.end()
        stream.call.cancel()
        thread.join(30)
        assert [(a.host, a.reference) for a in asked] == [(private.address, name)]


def test_push_mounts_what_is_there_and_uploads_the_rest(
    channel: grpc.Channel, daemon: DaemonProcess, registry: RunningRegistry
) -> None:
    made = small_image("push")
    name = registry.push("transfer/source", "v1", made)
    transfer(channel, daemon, types.OCIRegistry(reference=name), store(name))
    target = f"{registry.address}/transfer/target:v2"
    transfer(channel, daemon, types.ImageStore(name=name), types.OCIRegistry(reference=target))
    assert digest_of(registry.manifest("transfer/target", "v2")[1]) == made.target
    assert all(registry.has_blob("transfer/target", digest) for digest in made.blobs)
    with running_registry() as other:
        elsewhere = f"{other.address}/copy:v1"
        transfer(channel, daemon, types.ImageStore(name=name), types.OCIRegistry(reference=elsewhere))
        assert digest_of(other.manifest("copy", "v1")[1]) == made.target


def test_tag(channel: grpc.Channel, daemon: DaemonProcess, registry: RunningRegistry) -> None:
    made = small_image("tag")
    name = registry.push("transfer/tag", "v1", made)
    transfer(channel, daemon, types.OCIRegistry(reference=name), store(name))
    transfer(channel, daemon, types.ImageStore(name=name), types.ImageStore(name="other/name:v9"))
    assert image_target(channel, daemon, "other/name:v9") == made.target
    with pytest.raises(grpc.RpcError) as caught:
        transfer(channel, daemon, types.ImageStore(name="no/such"), types.ImageStore(name="x"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def exported(channel: grpc.Channel, daemon: DaemonProcess, name: str, stream_name: str) -> bytes:
    stream = ClientStream(channel, daemon, stream_name)
    parts: list[bytes] = []

    def receive() -> None:
        stream.send(types.WindowUpdate(update=65536))
        for message in stream.messages():
            data = types.Data.FromString(message.value).data
            parts.append(data)
            stream.send(types.WindowUpdate(update=len(data)))

    thread = threading.Thread(target=receive)
    thread.start()
    transfer(channel, daemon, types.ImageStore(name=name), types.ImageExportStream(stream=stream_name))
    thread.join(60)
    stream.end()
    return b"".join(parts)


def imported(
    channel: grpc.Channel, daemon: DaemonProcess, data: bytes, stream_name: str, target: types.ImageStore
) -> None:
    stream = ClientStream(channel, daemon, stream_name)

    def send() -> None:
        position = 0
        for message in stream.messages():
            window = types.WindowUpdate.FromString(message.value).update
            while window > 0 and position < len(data):
                piece = data[position:position + min(window, 32768)]
                stream.send(types.Data(data=piece))
                position += len(piece)
                window -= len(piece)
            if position >= len(data):
                break
        stream.end()

    thread = threading.Thread(target=send)
    thread.start()
    try:
        transfer(channel, daemon, types.ImageImportStream(stream=stream_name), target)
    finally:
        stream.call.cancel()
        thread.join(60)


def test_export_and_import_come_back(channel: grpc.Channel, daemon: DaemonProcess, registry: RunningRegistry) -> None:
    made = build([layer(folder("d"), file("d/f", bytes(200_000)))])
    name = registry.push("transfer/archive", "v1", made)
    transfer(channel, daemon, types.OCIRegistry(reference=name), store(name))
    data = exported(channel, daemon, name, "export-1")
    members = tarfile.open(fileobj=io.BytesIO(data)).getnames()
    assert {"oci-layout", "index.json", "manifest.json"} <= set(members)
    request = images_pb2.DeleteImageRequest(name=name, sync=True)
    images_pb2_grpc.ImagesStub(channel).Delete(request, metadata=daemon.metadata())
    with pytest.raises(grpc.RpcError):
        next(content_pb2_grpc.ContentStub(channel).Read(
            content_pb2.ReadContentRequest(digest=made.layers[0]), metadata=daemon.metadata()
        ))
    target = store("")
    target.extra_references.add(name=f"{registry.address}/transfer/archive", is_prefix=True)
    imported(channel, daemon, data, "import-1", target)
    assert image_target(channel, daemon, name) == made.target
    stat = snapshots_pb2.StatSnapshotRequest(
        snapshotter="overlayfs", key=chain_ids([digest_of(layer(folder("d"), file("d/f", bytes(200_000))))])[-1]
    )
    snapshots_pb2_grpc.SnapshotsStub(channel).Stat(stat, metadata=daemon.metadata())


def docker_archive(tars: list[bytes], tag: str) -> bytes:
    config = json.dumps({
        "architecture": ARCHITECTURE, "os": "linux", "rootfs": {"type": "layers", "diff_ids": list(map(digest_of, tars))}
    }).encode()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for number, data in enumerate(tars):
            add(f"{number}/layer.tar", data)
        again = tarfile.TarInfo("again/layer.tar")
        again.type, again.linkname = tarfile.SYMTYPE, "../0/layer.tar"
        tar.addfile(again)
        add("config.json", config)
        add("manifest.json", json.dumps([{
            "Config": "config.json", "RepoTags": [tag],
            "Layers": [*(f"{number}/layer.tar" for number in range(len(tars)))],
        }]).encode())
    return out.getvalue()


def test_a_docker_archive(channel: grpc.Channel, daemon: DaemonProcess) -> None:
    data = docker_archive([layer(folder("a"), file("a/b")), layer(file("c"))], "docker-app:v3")
    target = store("")
    target.extra_references.add(name="docker.io/library/docker-app", is_prefix=True)
    imported(channel, daemon, data, "import-docker", target)
    assert image_target(channel, daemon, "docker.io/library/docker-app:v3").startswith("sha256:")


@pytest.mark.parametrize("data", [
    b"rubbish" * 400, docker_archive([], "x:y")[:600], b"",
    docker_archive([layer(file("x"))], "BAD TAG"),
], ids=["rubbish", "cut", "empty", "bad-tag"])
def test_archives_that_are_none(channel: grpc.Channel, daemon: DaemonProcess, data: bytes) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        imported(channel, daemon, data, f"import-bad-{len(data)}", store("bad/name:v1"))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError):
        image_target(channel, daemon, "bad/name:v1")


def test_combinations_that_make_no_sense(channel: grpc.Channel, daemon: DaemonProcess) -> None:
    for source, target in (
        (types.OCIRegistry(), types.OCIRegistry()), (types.ImageExportStream(), types.ImageStore()),
        (types.Data(), types.ImageStore()),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            transfer(channel, daemon, source, target)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_streams_have_one_name_and_end(channel: grpc.Channel, daemon: DaemonProcess) -> None:
    first = ClientStream(channel, daemon, "taken")
    second = streaming_pb2_grpc.StreamingStub(channel).Stream(
        iter([pack(streaming_pb2.StreamInit(id="taken"))]), metadata=daemon.metadata()
    )
    with pytest.raises(grpc.RpcError) as caught:
        next(second)
    assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS
    first.end()
    first.call.cancel()
    with pytest.raises(grpc.RpcError) as missing:
        transfer(channel, daemon, types.OCIRegistry(reference="a"), store("a"), "never-opened")
    assert missing.value.code() == grpc.StatusCode.NOT_FOUND


def test_diff_applies_and_computes(channel: grpc.Channel, daemon: DaemonProcess, registry: RunningRegistry) -> None:
    base = layer(folder("etc"), file("etc/a", b"a"), file("etc/b", b"b"))
    made = build([base])
    name = registry.push("transfer/diff", "v1", made)
    transfer(channel, daemon, types.OCIRegistry(reference=name), store(name))
    snapshots = snapshots_pb2_grpc.SnapshotsStub(channel)
    diff = diff_pb2_grpc.DiffStub(channel)
    parent = digest_of(base)
    headers = lease(channel, daemon, "diff")

    def mounts(kind: str, key: str) -> list[types_pb2.Mount]:
        request = snapshots_pb2.PrepareSnapshotRequest(snapshotter="overlayfs", key=key, parent=parent)
        if kind == "view":
            view = snapshots_pb2.ViewSnapshotRequest(snapshotter="overlayfs", key=key, parent=parent)
            return list(snapshots.View(view, metadata=headers).mounts)
        return list(snapshots.Prepare(request, metadata=headers).mounts)

    active, below = mounts("prepare", "diff-active"), mounts("view", "diff-below")
    upper = next(o for m in active for o in m.options if o.startswith("upperdir=")).partition("=")[2]
    Path(upper, "etc").mkdir()
    Path(upper, "etc/new").write_text("new")
    answer = diff.Diff(diff_pb2.DiffRequest(
        left=below, right=active, media_type="application/vnd.oci.image.layer.v1.tar+gzip", ref="diff-test",
        labels={"mine": "yes"},
    ), metadata=headers)
    info = content_pb2_grpc.ContentStub(channel).Info(
        content_pb2.InfoRequest(digest=answer.diff.digest), metadata=headers
    ).info
    assert info.labels["mine"] == "yes"
    fresh = list(snapshots.Prepare(
        snapshots_pb2.PrepareSnapshotRequest(snapshotter="overlayfs", key="diff-fresh", parent=parent),
        metadata=headers,
    ).mounts)
    applied = diff.Apply(diff_pb2.ApplyRequest(diff=answer.diff, mounts=fresh), metadata=headers).applied
    assert applied.digest == info.labels["containerd.io/uncompressed"]
    assert applied.media_type == "application/vnd.oci.image.layer.v1.tar"
    fresh_upper = next(o for m in fresh for o in m.options if o.startswith("upperdir=")).partition("=")[2]
    assert Path(fresh_upper, "etc/new").read_text() == "new"
    assert not Path(fresh_upper, "etc/a").exists()
    for media_type, code in (
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", grpc.StatusCode.UNIMPLEMENTED),
        ("text/plain", grpc.StatusCode.UNIMPLEMENTED),
    ):
        wrong = types_pb2.Descriptor(media_type=media_type, digest=answer.diff.digest, size=1)
        with pytest.raises(grpc.RpcError) as caught:
            diff.Apply(diff_pb2.ApplyRequest(diff=wrong, mounts=fresh), metadata=headers)
        assert caught.value.code() == code
    gone = types_pb2.Descriptor(
        media_type="application/vnd.oci.image.layer.v1.tar", digest="sha256:" + "1" * 64, size=1
    )
    with pytest.raises(grpc.RpcError) as missing:
        diff.Apply(diff_pb2.ApplyRequest(diff=gone, mounts=fresh), metadata=headers)
    assert missing.value.code() == grpc.StatusCode.NOT_FOUND
    leases_pb2_grpc.LeasesStub(channel).Delete(
        leases_pb2.DeleteRequest(id="diff", sync=True), metadata=daemon.metadata()
    )
    with pytest.raises(grpc.RpcError) as collected:
        snapshots.Stat(snapshots_pb2.StatSnapshotRequest(snapshotter="overlayfs", key="diff-fresh"), metadata=headers)
    assert collected.value.code() == grpc.StatusCode.NOT_FOUND


def test_the_real_ctr(daemon: DaemonProcess, registry: RunningRegistry, tmp_path: Path) -> None:
    made = small_image("ctr")
    name = registry.push("transfer/ctr", "v1", made)

    def ctr(*arguments: str) -> str:
        done = subprocess.run(
            ["ctr", "--address", str(daemon.address), "--namespace", daemon.namespace, *arguments],
            capture_output=True, text=True, timeout=120, check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    ctr("images", "pull", "--plain-http", name)
    assert made.target in ctr("images", "ls")
    archive = tmp_path / "image.tar"
    ctr("images", "export", str(archive), name)
    ctr("images", "tag", name, f"{registry.address}/transfer/pushed:v1")
    ctr("images", "push", "--plain-http", f"{registry.address}/transfer/pushed:v1")
    assert digest_of(registry.manifest("transfer/pushed", "v1")[1]) == made.target
    ctr("images", "rm", "--sync", name, f"{registry.address}/transfer/pushed:v1")
    ctr("images", "import", str(archive))
    assert name in ctr("images", "ls", "-q")
    assert "complete" in ctr("images", "check")
