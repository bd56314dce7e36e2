"""The gRPC face of ImageService: six methods that hand over to `images.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.api.cri.v1.cri_pb2_grpc import ImageServiceServicer
from supervisord_ctr.cri import images
from supervisord_ctr.cri.container_report import pages
from supervisord_ctr.cri.core import Core


class ImageService(ImageServiceServicer):
    """Images for a kubelet."""

    def __init__(self, core: Core, fetcher: images.Fetcher) -> None:
        self._core = core
        self._fetcher = fetcher

    async def PullImage(self, request: pb.PullImageRequest, context: Any) -> pb.PullImageResponse:
        return pb.PullImageResponse(image_ref=await images.pull_image(self._core, self._fetcher, request))

    async def ListImages(self, request: pb.ListImagesRequest, context: Any) -> pb.ListImagesResponse:
        return pb.ListImagesResponse(images=await images.list_images(self._core, request.filter))

    async def StreamImages(
        self, request: pb.StreamImagesRequest, context: Any
    ) -> AsyncIterator[pb.StreamImagesResponse]:
        for page in pages(await images.list_images(self._core, request.filter)):
            yield pb.StreamImagesResponse(images=page)

    async def ImageStatus(self, request: pb.ImageStatusRequest, context: Any) -> pb.ImageStatusResponse:
        return await images.image_status(self._core, request)

    async def RemoveImage(self, request: pb.RemoveImageRequest, context: Any) -> pb.RemoveImageResponse:
        await images.remove_image(self._core, request.image.image)
        return pb.RemoveImageResponse()

    async def ImageFsInfo(self, request: pb.ImageFsInfoRequest, context: Any) -> pb.ImageFsInfoResponse:
        return images.filesystem_usage(self._core)
