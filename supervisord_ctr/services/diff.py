"""containerd.services.diff.v1.Diff: layers into mounts and out of them.

Owns the media types that are taken and what is answered; unpacking and comparing are `diff`'s.
"""

from __future__ import annotations

import os
from pathlib import Path

from supervisord_ctr.aio import Executors
from supervisord_ctr.api.services.diff.v1 import diff_pb2 as pb
from supervisord_ctr.api.services.diff.v1 import diff_pb2_grpc
from supervisord_ctr.diff.pool import UnpackPool
from supervisord_ctr.errors import InvalidArgument, Unimplemented
from supervisord_ctr.images import manifest as documents
from supervisord_ctr.images.layers import compare_mounts
from supervisord_ctr.images.unpack import apply_to_mounts
from supervisord_ctr.linux import files
from supervisord_ctr.metadata import Database
from supervisord_ctr.model import Descriptor
from supervisord_ctr.names import check_digest
from supervisord_ctr.rpc import Context, lease_of, namespace_of, seconds
from supervisord_ctr.services.convert import descriptor_to_message, mounts_from_messages
from supervisord_ctr.services.mounts import MountManager


class DiffService(diff_pb2_grpc.DiffServicer):
    """Applies and makes layers."""

    def __init__(
        self, database: Database, executors: Executors, pool: UnpackPool, scratch: Path, activations: MountManager
    ) -> None:
        self._database = database
        self._activations = activations
        self._executors = executors
        self._pool = pool
        self._scratch = scratch

    async def Apply(self, request: pb.ApplyRequest, context: Context) -> pb.ApplyResponse:
        """Unpack a blob into the mounts; answers what it is uncompressed.

        NOT_FOUND for a blob that is not there, UNIMPLEMENTED for a media type that is no readable layer.
        """
        namespace, digest = namespace_of(context), check_digest(request.diff.digest)
        mounts = mounts_from_messages(request.mounts)
        blob = await self._database.content.reader(namespace, digest)
        try:
            _check_readable(request.diff.media_type, digest)
            async with self._activations.performed(mounts) as ready:
                applied = await apply_to_mounts(
                    self._pool, self._executors, blob.fileno(), blob.size, ready, self._scratch
                )
        finally:
            blob.close()
        if request.sync_fs:
            await self._executors.run_io(_sync, self._scratch)
        return pb.ApplyResponse(applied=descriptor_to_message(
            Descriptor(documents.OCI_LAYER, applied.diff_id, applied.size)
        ))

    async def Diff(self, request: pb.DiffRequest, context: Context) -> pb.DiffResponse:
        """A layer of what `right` has changed against `left`, stored as content under `ref`."""
        epoch = seconds(request.source_date_epoch) if request.HasField("source_date_epoch") else None
        made = await compare_mounts(
            self._database, self._executors, namespace_of(context), mounts_from_messages(request.left),
            mounts_from_messages(request.right), media_type=request.media_type or documents.OCI_LAYER_GZIP,
            ref=request.ref, labels=dict(request.labels), source_date_epoch=epoch, lease=lease_of(context),
            scratch=self._scratch,
        )
        return pb.DiffResponse(diff=descriptor_to_message(made))


def _check_readable(media_type: str, digest: str) -> None:
    try:
        documents.check_layer_type(media_type)
    except InvalidArgument as error:
        raise Unimplemented(f'currently unsupported media type: "{media_type}"', kind="layer", key=digest) from error


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        files.sync_filesystem(fd)
    finally:
        os.close(fd)
