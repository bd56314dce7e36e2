"""One gRPC client for both daemons: containerd's services and CRI, the same requests in the same order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import any_pb2, empty_pb2

from supervisord_ctr.api.cri.v1 import cri_pb2, cri_pb2_grpc
from supervisord_ctr.api.services.containers.v1 import containers_pb2, containers_pb2_grpc
from supervisord_ctr.api.services.content.v1 import content_pb2, content_pb2_grpc
from supervisord_ctr.api.services.diff.v1 import diff_pb2, diff_pb2_grpc
from supervisord_ctr.api.services.images.v1 import images_pb2, images_pb2_grpc
from supervisord_ctr.api.services.leases.v1 import leases_pb2, leases_pb2_grpc
from supervisord_ctr.api.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from supervisord_ctr.api.services.tasks.v1 import tasks_pb2, tasks_pb2_grpc
from supervisord_ctr.api.services.version.v1 import version_pb2_grpc
from supervisord_ctr.api.types import types_pb2
from tests.bench import spec
from tests.bench.images import LAYER, MANIFEST, BuiltImage

SNAPSHOTTER = "overlayfs"
RUNTIME = "io.containerd.runc.v2"
SPEC_URL = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
PROCESS_URL = "types.containerd.io/opencontainers/runtime-spec/1/Process"
ROOT_LABEL = {"containerd.io/gc.root": "2020-01-01T00:00:00Z"}
OPTIONS = [("grpc.max_receive_message_length", 256 << 20), ("grpc.max_send_message_length", 16 << 20),
           ("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 50)]
CHUNK = 1 << 20
CRI_NAMESPACE = "k8s.io"


def chain_id(diff_ids: list[str]) -> str:
    """Chain ID of the layers, as the OCI image specification defines it."""
    chain = diff_ids[0]
    for diff_id in diff_ids[1:]:
        chain = "sha256:" + hashlib.sha256(f"{chain} {diff_id}".encode()).hexdigest()
    return chain


class Client:
    """Stubs over one channel; every call of the native services names its namespace."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(f"unix://{address}", options=OPTIONS)
        self.containers = containers_pb2_grpc.ContainersStub(self.channel)
        self.content = content_pb2_grpc.ContentStub(self.channel)
        self.diff = diff_pb2_grpc.DiffStub(self.channel)
        self.images = images_pb2_grpc.ImagesStub(self.channel)
        self.leases = leases_pb2_grpc.LeasesStub(self.channel)
        self.snapshots = snapshots_pb2_grpc.SnapshotsStub(self.channel)
        self.tasks = tasks_pb2_grpc.TasksStub(self.channel)
        self.version = version_pb2_grpc.VersionStub(self.channel)
        self.runtime = cri_pb2_grpc.RuntimeServiceStub(self.channel)
        self.cri_images = cri_pb2_grpc.ImageServiceStub(self.channel)

    def close(self) -> None:
        """Close the channel."""
        self.channel.close()

    def serves(self) -> bool:
        """Whether the daemon answers: both faces, native and CRI."""
        try:
            self.version.Version(empty_pb2.Empty(), timeout=5)
            self.runtime.Version(cri_pb2.VersionRequest(), timeout=5)
        except grpc.RpcError:
            return False
        return True

    # Content and images

    def write_blob(self, namespace: str, ref: str, digest: str, pieces: Iterator[bytes], total: int) -> None:
        """Write one blob and commit it; nothing happens to one that exists."""

        def requests() -> Iterator[content_pb2.WriteContentRequest]:
            offset = 0
            for piece in pieces:
                yield content_pb2.WriteContentRequest(action=content_pb2.WRITE, ref=ref, total=total, expected=digest,
                                                      offset=offset, data=piece)
                offset += len(piece)
            yield content_pb2.WriteContentRequest(action=content_pb2.COMMIT, ref=ref, total=total, expected=digest,
                                                  offset=offset, labels=ROOT_LABEL)

        try:
            for _ in self.content.Write(requests(), metadata=meta(namespace)):
                pass
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.ALREADY_EXISTS:
                raise

    def import_image(self, namespace: str, image: BuiltImage, name: str) -> str:
        """Bring an image in by content, diff and snapshot calls, as a client without a registry does; its chain ID."""
        self.write_blob(namespace, "config", _digest(image.config), iter([image.config]), len(image.config))
        self.write_blob(namespace, "manifest", _digest(image.manifest), iter([image.manifest]), len(image.manifest))
        done: list[str] = []
        for layer in image.layers:
            self.write_blob(namespace, f"layer-{layer.digest}", layer.digest, _pieces(layer.path), layer.size)
            parent = chain_id(done) if done else ""
            key = f"extract-{layer.digest}"
            mounts = self.snapshots.Prepare(snapshots_pb2.PrepareSnapshotRequest(
                snapshotter=SNAPSHOTTER, key=key, parent=parent, labels=ROOT_LABEL), metadata=meta(namespace)).mounts
            blob = types_pb2.Descriptor(media_type=LAYER, digest=layer.digest, size=layer.size)
            self.diff.Apply(diff_pb2.ApplyRequest(diff=blob, mounts=mounts), metadata=meta(namespace))
            done.append(layer.diff_id)
            self.snapshots.Commit(snapshots_pb2.CommitSnapshotRequest(
                snapshotter=SNAPSHOTTER, name=chain_id(done), key=key, labels=ROOT_LABEL), metadata=meta(namespace))
        target = types_pb2.Descriptor(media_type=MANIFEST, digest=_digest(image.manifest), size=len(image.manifest))
        self.images.Create(images_pb2.CreateImageRequest(
            image=images_pb2.Image(name=name, target=target)), metadata=meta(namespace))
        return chain_id(done)

    # Containers

    def create_record(self, namespace: str, name: str, arguments: list[str], cgroup: str, image: str = "") -> None:
        """A container as metadata."""
        value = any_pb2.Any(type_url=SPEC_URL, value=spec.container(arguments, f"{cgroup}/{name}"))
        runtime = containers_pb2.Container.Runtime(name=RUNTIME)
        self.containers.Create(containers_pb2.CreateContainerRequest(container=containers_pb2.Container(
            id=name, image=image, runtime=runtime, spec=value, snapshotter=SNAPSHOTTER, snapshot_key=name,
            labels={"bench": "yes"})), metadata=meta(namespace))

    def create(self, namespace: str, name: str, chain: str, arguments: list[str], cgroup: str) -> int:
        """Record, snapshot (labelled, so that no garbage collection takes it) and task; the process id."""
        self.create_record(namespace, name, arguments, cgroup)
        mounts = self.snapshots.Prepare(snapshots_pb2.PrepareSnapshotRequest(
            snapshotter=SNAPSHOTTER, key=name, parent=chain, labels=ROOT_LABEL), metadata=meta(namespace)).mounts
        answer = self.tasks.Create(tasks_pb2.CreateTaskRequest(container_id=name, rootfs=mounts), metadata=meta(namespace))
        return int(answer.pid)

    def start(self, namespace: str, name: str, exec_id: str = "") -> None:
        """Start a created process."""
        self.tasks.Start(tasks_pb2.StartRequest(container_id=name, exec_id=exec_id), metadata=meta(namespace))

    def wait(self, namespace: str, name: str, exec_id: str = "") -> Any:
        """A future of the exit."""
        return self.tasks.Wait.future(tasks_pb2.WaitRequest(container_id=name, exec_id=exec_id), metadata=meta(namespace))

    def kill(self, namespace: str, name: str, number: int = 9) -> None:
        """Send a signal to every process of the container."""
        self.tasks.Kill(tasks_pb2.KillRequest(container_id=name, signal=number, all=True), metadata=meta(namespace))

    def delete_task(self, namespace: str, name: str) -> int:
        """Delete an ended task; its exit status."""
        answer = self.tasks.Delete(tasks_pb2.DeleteTaskRequest(container_id=name), metadata=meta(namespace))
        return int(answer.exit_status)

    def delete_record(self, namespace: str, name: str, *, snapshot: bool = True) -> None:
        """Delete the container, and its snapshot."""
        self.containers.Delete(containers_pb2.DeleteContainerRequest(id=name), metadata=meta(namespace))
        if snapshot:
            self.snapshots.Remove(snapshots_pb2.RemoveSnapshotRequest(snapshotter=SNAPSHOTTER, key=name),
                                  metadata=meta(namespace))

    def delete(self, namespace: str, name: str) -> None:
        """Kill what runs, then delete task, record and snapshot."""
        ended = self.wait(namespace, name)
        self.kill(namespace, name)
        ended.result(60)
        self.delete_task(namespace, name)
        self.delete_record(namespace, name)

    def exec(self, namespace: str, name: str, exec_id: str, arguments: list[str]) -> int:
        """Run one process in a running container to its end; its exit status."""
        value = any_pb2.Any(type_url=PROCESS_URL, value=json.dumps(spec.process(arguments)).encode())
        self.tasks.Exec(tasks_pb2.ExecProcessRequest(container_id=name, exec_id=exec_id, spec=value),
                        metadata=meta(namespace))
        ended = self.wait(namespace, name, exec_id)
        self.start(namespace, name, exec_id)
        status = int(ended.result(60).exit_status)
        self.tasks.DeleteProcess(tasks_pb2.DeleteProcessRequest(container_id=name, exec_id=exec_id),
                                 metadata=meta(namespace))
        return status

    def task_pids(self, namespace: str) -> list[int]:
        """Process ids of the namespace's tasks."""
        answer = self.tasks.List(tasks_pb2.ListTasksRequest(), metadata=meta(namespace))
        return [task.pid for task in answer.tasks if task.pid]

    def collect(self, namespace: str) -> None:
        """Run the garbage collector and return when it has ended: what deleting a lease with `sync` does."""
        name = "bench-collect"
        self.leases.Create(leases_pb2.CreateRequest(id=name), metadata=meta(namespace))
        self.leases.Delete(leases_pb2.DeleteRequest(id=name, sync=True), metadata=meta(namespace))

    def purge(self, namespace: str) -> None:
        """Delete every task and container of a namespace, whatever state they are in."""
        for item in self.containers.List(containers_pb2.ListContainersRequest(), metadata=meta(namespace)).containers:
            for call in (lambda name: self.delete(namespace, name), lambda name: self.delete_task(namespace, name),
                         lambda name: self.delete_record(namespace, name)):
                try:
                    call(item.id)
                except (grpc.RpcError, grpc.FutureTimeoutError):
                    continue

    # Kubernetes

    def pull(self, reference: str) -> None:
        """Pull and unpack through CRI."""
        self.cri_images.PullImage(cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=reference)), timeout=600)

    def remove_image(self, reference: str) -> None:
        """Remove an image through CRI, with everything that nothing else uses."""
        self.cri_images.RemoveImage(cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=reference)), timeout=120)
        self.collect(CRI_NAMESPACE)

    def blobs(self, namespace: str) -> int:
        """How many blobs a namespace has."""
        answers = self.content.List(content_pb2.ListContentRequest(), metadata=meta(namespace))
        return sum(len(answer.info) for answer in answers)


def meta(namespace: str) -> tuple[tuple[str, str | bytes], ...]:
    """The header that names the namespace."""
    return (("containerd-namespace", namespace),)


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as handle:
        while piece := handle.read(CHUNK):
            yield piece
