"""containerd.services.snapshots.v1.Snapshots: the snapshotters, each by its name."""

from __future__ import annotations

from collections.abc import AsyncIterator

from google.protobuf import empty_pb2

from supervisord_ctr.api.services.snapshots.v1 import snapshots_pb2 as pb
from supervisord_ctr.api.services.snapshots.v1 import snapshots_pb2_grpc
from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.metadata import Database
from supervisord_ctr.model import SnapshotInfo
from supervisord_ctr.rpc import Context, lease_of, namespace_of, timestamp
from supervisord_ctr.services.convert import mounts_to_messages

#: Snapshots in one message of List.
_BATCH = 100


def _message(value: SnapshotInfo) -> pb.Info:
    return pb.Info(
        name=value.name, parent=value.parent, kind=pb.Kind.ValueType(int(value.kind)), labels=dict(value.labels),
        created_at=timestamp(value.created_at), updated_at=timestamp(value.updated_at),
    )


class SnapshotsService(snapshots_pb2_grpc.SnapshotsServicer):
    """Snapshots of a namespace; every request names its snapshotter, INVALID_ARGUMENT when it is not loaded."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def Prepare(self, request: pb.PrepareSnapshotRequest, context: Context) -> pb.PrepareSnapshotResponse:
        """ALREADY_EXISTS for a key in use, also when the layer named by `containerd.io/snapshot.ref` is there."""
        mounts = await self._database.snapshotter(request.snapshotter).prepare(
            namespace_of(context), request.key, request.parent, dict(request.labels), lease=lease_of(context)
        )
        return pb.PrepareSnapshotResponse(mounts=mounts_to_messages(mounts))

    async def View(self, request: pb.ViewSnapshotRequest, context: Context) -> pb.ViewSnapshotResponse:
        """As Prepare, read-only."""
        mounts = await self._database.snapshotter(request.snapshotter).view(
            namespace_of(context), request.key, request.parent, dict(request.labels), lease=lease_of(context)
        )
        return pb.ViewSnapshotResponse(mounts=mounts_to_messages(mounts))

    async def Mounts(self, request: pb.MountsRequest, context: Context) -> pb.MountsResponse:
        """NOT_FOUND."""
        mounts = await self._database.snapshotter(request.snapshotter).mounts(namespace_of(context), request.key)
        return pb.MountsResponse(mounts=mounts_to_messages(mounts))

    async def Commit(self, request: pb.CommitSnapshotRequest, context: Context) -> empty_pb2.Empty:
        """ALREADY_EXISTS for a name in use; `parent` puts a snapshot prepared without one onto it."""
        await self._database.snapshotter(request.snapshotter).commit(
            namespace_of(context), request.name, request.key, dict(request.labels), parent=request.parent or None,
            lease=lease_of(context),
        )
        return empty_pb2.Empty()

    async def Remove(self, request: pb.RemoveSnapshotRequest, context: Context) -> empty_pb2.Empty:
        """FAILED_PRECONDITION while it has children."""
        await self._database.snapshotter(request.snapshotter).remove(
            namespace_of(context), request.key, lease=lease_of(context)
        )
        return empty_pb2.Empty()

    async def Stat(self, request: pb.StatSnapshotRequest, context: Context) -> pb.StatSnapshotResponse:
        """NOT_FOUND."""
        found = await self._database.snapshotter(request.snapshotter).stat(namespace_of(context), request.key)
        return pb.StatSnapshotResponse(info=_message(found))

    async def Update(self, request: pb.UpdateSnapshotRequest, context: Context) -> pb.UpdateSnapshotResponse:
        """Labels: those of the mask, or all."""
        wanted = SnapshotInfo(request.info.name, labels=dict(request.info.labels))
        changed = await self._database.snapshotter(request.snapshotter).update(
            namespace_of(context), wanted, request.update_mask.paths
        )
        return pb.UpdateSnapshotResponse(info=_message(changed))

    async def List(
        self, request: pb.ListSnapshotsRequest, context: Context
    ) -> AsyncIterator[pb.ListSnapshotsResponse]:
        """Those that match the filters (name, parent, kind, labels)."""
        found = await self._database.snapshotter(request.snapshotter).walk(namespace_of(context), request.filters)
        for start in range(0, len(found), _BATCH):
            yield pb.ListSnapshotsResponse(info=[_message(item) for item in found[start:start + _BATCH]])

    async def Usage(self, request: pb.UsageRequest, context: Context) -> pb.UsageResponse:
        """Disk used by the snapshot alone."""
        found = await self._database.snapshotter(request.snapshotter).usage(namespace_of(context), request.key)
        return pb.UsageResponse(size=found.size, inodes=found.inodes)

    async def Cleanup(self, request: pb.CleanupRequest, context: Context) -> empty_pb2.Empty:
        """Gives back the disk of removed snapshots."""
        if not request.snapshotter:
            raise InvalidArgument("snapshotter is required", kind="snapshotter")
        await self._database.snapshotter(request.snapshotter).cleanup()
        return empty_pb2.Empty()
