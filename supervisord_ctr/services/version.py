"""containerd.services.version.v1.Version: which program answers."""

from __future__ import annotations

from google.protobuf import empty_pb2

from supervisord_ctr import __version__
from supervisord_ctr.api.services.version.v1 import version_pb2, version_pb2_grpc
from supervisord_ctr.rpc import Context


class VersionService(version_pb2_grpc.VersionServicer):
    """Answers with our own version; needs no namespace."""

    def __init__(self, revision: str = "") -> None:
        self._revision = revision

    async def Version(self, request: empty_pb2.Empty, context: Context) -> version_pb2.VersionResponse:
        """Version and revision of this daemon."""
        return version_pb2.VersionResponse(version=__version__, revision=self._revision)
