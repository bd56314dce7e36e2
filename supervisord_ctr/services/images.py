"""containerd.services.images.v1.Images: names for target descriptors."""

from __future__ import annotations

from google.protobuf import empty_pb2, timestamp_pb2

from supervisord_ctr.api.services.images.v1 import images_pb2 as pb
from supervisord_ctr.api.services.images.v1 import images_pb2_grpc
from supervisord_ctr.metadata import Database
from supervisord_ctr.rpc import Context, lease_of, namespace_of, seconds
from supervisord_ctr.services.convert import image_from_message, image_to_message


def _epoch(value: timestamp_pb2.Timestamp) -> float | None:
    return seconds(value) if value.seconds or value.nanos else None


class ImagesService(images_pb2_grpc.ImagesServicer):
    """Image records of a namespace."""

    def __init__(self, database: Database) -> None:
        self._images = database.images

    async def Get(self, request: pb.GetImageRequest, context: Context) -> pb.GetImageResponse:
        """NOT_FOUND."""
        return pb.GetImageResponse(image=image_to_message(await self._images.get(namespace_of(context), request.name)))

    async def List(self, request: pb.ListImagesRequest, context: Context) -> pb.ListImagesResponse:
        """Those that match the filters (name, target.digest, target.mediatype, labels)."""
        found = await self._images.list(namespace_of(context), request.filters)
        return pb.ListImagesResponse(images=[image_to_message(item) for item in found])

    async def Create(self, request: pb.CreateImageRequest, context: Context) -> pb.CreateImageResponse:
        """ALREADY_EXISTS; INVALID_ARGUMENT for a target without digest, size or media type."""
        made = await self._images.create(
            namespace_of(context), image_from_message(request.image), at=_epoch(request.source_date_epoch),
            lease=lease_of(context),
        )
        return pb.CreateImageResponse(image=image_to_message(made))

    async def Update(self, request: pb.UpdateImageRequest, context: Context) -> pb.UpdateImageResponse:
        """Changes the fields of the mask, or all of them; NOT_FOUND."""
        changed = await self._images.update(
            namespace_of(context), image_from_message(request.image), request.update_mask.paths,
            at=_epoch(request.source_date_epoch), lease=lease_of(context),
        )
        return pb.UpdateImageResponse(image=image_to_message(changed))

    async def Delete(self, request: pb.DeleteImageRequest, context: Context) -> empty_pb2.Empty:
        """NOT_FOUND, also for another target than the given one. With `sync` the space is free on return."""
        target = request.target.digest if request.HasField("target") else ""
        await self._images.delete(
            namespace_of(context), request.name, target_digest=target, sync=request.sync, lease=lease_of(context)
        )
        return empty_pb2.Empty()
