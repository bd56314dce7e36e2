"""Calls that several commands make, over the generated messages.

Each function is one request to one service; lists come back whole. What they raise is what
`pctr.rpc` raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from pctr.rpc import CONTAINERS, CONTENT, IMAGES, LEASES, NAMESPACES, SNAPSHOTS, TASKS, Client
from supervisord_ctr import errors
from supervisord_ctr.api.services.containers.v1 import containers_pb2
from supervisord_ctr.api.services.content.v1 import content_pb2
from supervisord_ctr.api.services.images.v1 import images_pb2
from supervisord_ctr.api.services.leases.v1 import leases_pb2
from supervisord_ctr.api.services.namespaces.v1 import namespaces_pb2
from supervisord_ctr.api.services.snapshots.v1 import snapshots_pb2
from supervisord_ctr.api.services.tasks.v1 import tasks_pb2
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.api.types.task import task_pb2

_WRITE_CHUNK = 1 << 20


# -- images --------------------------------------------------------------------------------------------


def list_images(client: Client, filters: Sequence[str] = ()) -> list[images_pb2.Image]:
    """Images by name."""
    response = client.unary(
        IMAGES + "List", images_pb2.ListImagesRequest(filters=filters), images_pb2.ListImagesResponse)
    return sorted(response.images, key=lambda image: image.name)


def get_image(client: Client, name: str) -> images_pb2.Image:
    """One image by the name as given or in full."""
    from pctr.image_config import get_image as find

    found = find(client, name)
    return client.unary(IMAGES + "Get", images_pb2.GetImageRequest(name=found.name), images_pb2.GetImageResponse).image


def put_image(client: Client, image: images_pb2.Image) -> None:
    """Create the image, or point the existing name at the new target."""
    try:
        client.unary(IMAGES + "Create", images_pb2.CreateImageRequest(image=image), images_pb2.CreateImageResponse)
    except errors.AlreadyExists:
        client.unary(
            IMAGES + "Update",
            images_pb2.UpdateImageRequest(image=image, update_mask=FieldMask(paths=["target", "labels"])),
            images_pb2.UpdateImageResponse,
        )


def delete_image(client: Client, name: str, *, sync: bool = False) -> None:
    """Delete the name; with `sync` what it held is collected before the call returns."""
    client.unary(IMAGES + "Delete", images_pb2.DeleteImageRequest(name=name, sync=sync), Empty)


# -- containers and tasks ------------------------------------------------------------------------------


def list_containers(client: Client, filters: Sequence[str] = ()) -> list[containers_pb2.Container]:
    """Containers by id."""
    response = client.unary(
        CONTAINERS + "List", containers_pb2.ListContainersRequest(filters=filters),
        containers_pb2.ListContainersResponse,
    )
    return sorted(response.containers, key=lambda container: container.id)


def get_container(client: Client, name: str) -> containers_pb2.Container:
    """One container."""
    return client.unary(
        CONTAINERS + "Get", containers_pb2.GetContainerRequest(id=name), containers_pb2.GetContainerResponse
    ).container


def update_container(client: Client, container: containers_pb2.Container, *paths: str) -> containers_pb2.Container:
    """Update these fields."""
    return client.unary(
        CONTAINERS + "Update",
        containers_pb2.UpdateContainerRequest(container=container, update_mask=FieldMask(paths=paths)),
        containers_pb2.UpdateContainerResponse,
    ).container


def list_tasks(client: Client) -> list[task_pb2.Process]:
    """Tasks by container."""
    response = client.unary(TASKS + "List", tasks_pb2.ListTasksRequest(), tasks_pb2.ListTasksResponse)
    return sorted(response.tasks, key=lambda task: task.container_id or task.id)


def get_task(client: Client, container: str, exec_id: str = "") -> task_pb2.Process:
    """One task or exec."""
    return client.unary(
        TASKS + "Get", tasks_pb2.GetRequest(container_id=container, exec_id=exec_id), tasks_pb2.GetResponse
    ).process


# -- content -------------------------------------------------------------------------------------------


def list_content(client: Client, filters: Sequence[str] = ()) -> Iterator[content_pb2.Info]:
    """Blobs as the daemon sends them."""
    request = content_pb2.ListContentRequest(filters=filters)
    for part in client.start(CONTENT + "List", request, content_pb2.ListContentResponse):
        yield from part.info


def content_info(client: Client, digest: str) -> content_pb2.Info:
    """One blob."""
    return client.unary(CONTENT + "Info", content_pb2.InfoRequest(digest=digest), content_pb2.InfoResponse).info


def update_content_labels(client: Client, digest: str, labels: dict[str, str]) -> None:
    """Set labels, or remove those whose value is empty."""
    info = content_pb2.Info(digest=digest, labels=labels)
    mask = FieldMask(paths=[f"labels.{key}" for key in labels])
    client.unary(CONTENT + "Update", content_pb2.UpdateRequest(info=info, update_mask=mask), content_pb2.UpdateResponse)


def read_content(client: Client, digest: str, *, offset: int = 0, size: int = 0) -> Iterator[bytes]:
    """A blob in parts."""
    request = content_pb2.ReadContentRequest(digest=digest, offset=offset, size=size)
    for part in client.start(CONTENT + "Read", request, content_pb2.ReadContentResponse):
        yield part.data


class Writer:
    """One ingest: `offset` bytes are there already. Close it, committed or not."""

    def __init__(self, client: Client, ref: str, *, digest: str = "", size: int = 0) -> None:
        self._client = client
        self.ref = ref
        self.digest = digest
        self.size = size
        self._open()

    def _open(self) -> None:
        self._call = self._client.stream(CONTENT + "Write", content_pb2.WriteContentResponse)
        self._call.send(content_pb2.WriteContentRequest(
            action=content_pb2.STAT, ref=self.ref, total=self.size, expected=self.digest))
        status = self._call.receive()
        self.offset = status.offset if status is not None else 0

    def commit_complete(self, labels: dict[str, str] | None = None) -> bool:
        """Commit when every byte is there already: from another attempt, or from another namespace.

        False when bytes are missing; what turns out to be wrong is thrown away.
        """
        if not self.digest or not self.size or self.offset < self.size:
            return False
        try:
            self.commit(labels)
        except errors.FailedPrecondition:
            self.restart()
            return False
        return True

    def restart(self) -> None:
        """Throw away what was written, and begin again."""
        self.abort()
        self._open()

    def write(self, data: bytes) -> None:
        """Append."""
        for at in range(0, len(data), _WRITE_CHUNK):
            chunk = data[at:at + _WRITE_CHUNK]
            self._call.send(content_pb2.WriteContentRequest(
                action=content_pb2.WRITE, offset=self.offset, data=chunk))
            answer = self._call.receive()
            self.offset = answer.offset if answer is not None else self.offset + len(chunk)

    def commit(self, labels: dict[str, str] | None = None) -> str:
        """Commit what was written; its digest."""
        self._call.send(content_pb2.WriteContentRequest(
            action=content_pb2.COMMIT, total=self.offset, offset=self.offset, expected=self.digest,
            labels=labels or {},
        ))
        done = self._call.receive()
        self._call.close_send()
        if done is None:
            raise errors.Internal(f"ingest {self.ref}: no answer to the commit")
        return done.digest

    def close(self) -> None:
        """Let go of the ingest; what was not committed may be resumed."""
        self._call.cancel()

    def abort(self) -> None:
        """Throw away what was written."""
        self.close()
        self._client.unary(CONTENT + "Abort", content_pb2.AbortRequest(ref=self.ref), Empty)


def write_content(
    client: Client, ref: str, parts: Iterable[bytes], *, digest: str = "", size: int = 0,
    labels: dict[str, str] | None = None,
) -> str:
    """Write and commit a blob; returns its digest. One that exists already only gets the labels."""
    try:
        writer = Writer(client, ref, digest=digest, size=size)
        try:
            if writer.commit_complete(labels):
                return digest
            if writer.offset:
                # What another attempt left need not be of the same bytes.
                writer.restart()
            for part in parts:
                writer.write(part)
            return writer.commit(labels)
        finally:
            writer.close()
    except errors.AlreadyExists:
        if not digest:
            raise
        if labels:
            update_content_labels(client, digest, labels)
        return digest


# -- snapshots -----------------------------------------------------------------------------------------


def list_snapshots(client: Client, snapshotter: str, filters: Sequence[str] = ()) -> list[snapshots_pb2.Info]:
    """Snapshots of a snapshotter."""
    request = snapshots_pb2.ListSnapshotsRequest(snapshotter=snapshotter, filters=filters)
    found: list[snapshots_pb2.Info] = []
    for part in client.start(SNAPSHOTS + "List", request, snapshots_pb2.ListSnapshotsResponse):
        found.extend(part.info)
    return found


def stat_snapshot(client: Client, snapshotter: str, key: str) -> snapshots_pb2.Info:
    """One snapshot."""
    return client.unary(
        SNAPSHOTS + "Stat", snapshots_pb2.StatSnapshotRequest(snapshotter=snapshotter, key=key),
        snapshots_pb2.StatSnapshotResponse,
    ).info


def prepare_snapshot(
    client: Client, snapshotter: str, key: str, parent: str, *, view: bool = False,
    labels: dict[str, str] | None = None,
) -> list[types_pb2.Mount]:
    """A new active snapshot, or a view; its mounts."""
    if view:
        return list(client.unary(
            SNAPSHOTS + "View",
            snapshots_pb2.ViewSnapshotRequest(snapshotter=snapshotter, key=key, parent=parent, labels=labels or {}),
            snapshots_pb2.ViewSnapshotResponse,
        ).mounts)
    return list(client.unary(
        SNAPSHOTS + "Prepare",
        snapshots_pb2.PrepareSnapshotRequest(snapshotter=snapshotter, key=key, parent=parent, labels=labels or {}),
        snapshots_pb2.PrepareSnapshotResponse,
    ).mounts)


def commit_snapshot(
    client: Client, snapshotter: str, name: str, key: str, labels: dict[str, str] | None = None,
) -> None:
    """Commit an active snapshot under a name."""
    client.unary(SNAPSHOTS + "Commit", snapshots_pb2.CommitSnapshotRequest(
        snapshotter=snapshotter, name=name, key=key, labels=labels or {}), Empty)


def snapshot_mounts(client: Client, snapshotter: str, key: str) -> list[types_pb2.Mount]:
    """What has to be mounted to see a snapshot."""
    return list(client.unary(
        SNAPSHOTS + "Mounts", snapshots_pb2.MountsRequest(snapshotter=snapshotter, key=key),
        snapshots_pb2.MountsResponse,
    ).mounts)


def remove_snapshot(client: Client, snapshotter: str, key: str) -> None:
    """Remove one snapshot."""
    client.unary(
        SNAPSHOTS + "Remove", snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=key), Empty)


def snapshot_usage(client: Client, snapshotter: str, key: str) -> snapshots_pb2.UsageResponse:
    """Bytes and inodes of one snapshot."""
    return client.unary(
        SNAPSHOTS + "Usage", snapshots_pb2.UsageRequest(snapshotter=snapshotter, key=key),
        snapshots_pb2.UsageResponse,
    )


# -- namespaces and leases -----------------------------------------------------------------------------


def list_namespaces(client: Client) -> list[namespaces_pb2.Namespace]:
    """Namespaces by name."""
    response = client.unary(
        NAMESPACES + "List", namespaces_pb2.ListNamespacesRequest(), namespaces_pb2.ListNamespacesResponse)
    return sorted(response.namespaces, key=lambda namespace: namespace.name)


class Lease:
    """A lease for the length of a block: what is made inside is not collected before the block ends."""

    def __init__(self, client: Client, seconds: float = 24 * 3600.0) -> None:
        self._client = client
        self._seconds = seconds
        self._before = ""

    def __enter__(self) -> str:
        from datetime import UTC, datetime, timedelta

        expires = (datetime.now(UTC) + timedelta(seconds=self._seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
        from pctr.command import new_id

        request = leases_pb2.CreateRequest(id=f"pctr-{new_id()}", labels={"containerd.io/gc.expire": expires})
        lease = self._client.unary(LEASES + "Create", request, leases_pb2.CreateResponse).lease
        self._before, self._client.lease = self._client.lease, lease.id
        return lease.id

    def __exit__(self, *_: object) -> None:
        lease, self._client.lease = self._client.lease, self._before
        try:
            self._client.unary(LEASES + "Delete", leases_pb2.DeleteRequest(id=lease), Empty)
        except errors.Error:
            pass  # it expires by itself
