"""containerd.services.namespaces.v1.Namespaces: tenancies of the API. Needs no namespace header."""

from __future__ import annotations

from google.protobuf import empty_pb2

from supervisord_ctr.api.services.namespaces.v1 import namespaces_pb2 as pb
from supervisord_ctr.api.services.namespaces.v1 import namespaces_pb2_grpc
from supervisord_ctr.metadata import Database
from supervisord_ctr.model import Namespace
from supervisord_ctr.rpc import Context


def _message(value: Namespace) -> pb.Namespace:
    return pb.Namespace(name=value.name, labels=dict(value.labels))


class NamespacesService(namespaces_pb2_grpc.NamespacesServicer):
    """Namespaces and their labels."""

    def __init__(self, database: Database) -> None:
        self._namespaces = database.namespaces

    async def Get(self, request: pb.GetNamespaceRequest, context: Context) -> pb.GetNamespaceResponse:
        """NOT_FOUND."""
        return pb.GetNamespaceResponse(namespace=_message(await self._namespaces.get(request.name)))

    async def List(self, request: pb.ListNamespacesRequest, context: Context) -> pb.ListNamespacesResponse:
        """Every namespace; the filter is not looked at, as in containerd."""
        return pb.ListNamespacesResponse(namespaces=[_message(item) for item in await self._namespaces.list()])

    async def Create(self, request: pb.CreateNamespaceRequest, context: Context) -> pb.CreateNamespaceResponse:
        """ALREADY_EXISTS; INVALID_ARGUMENT for a name that is no identifier."""
        await self._namespaces.create(request.namespace.name, dict(request.namespace.labels))
        return pb.CreateNamespaceResponse(namespace=request.namespace)

    async def Update(self, request: pb.UpdateNamespaceRequest, context: Context) -> pb.UpdateNamespaceResponse:
        """Labels: those of the mask, or all."""
        changed = await self._namespaces.update(
            request.namespace.name, dict(request.namespace.labels), request.update_mask.paths
        )
        return pb.UpdateNamespaceResponse(namespace=_message(changed))

    async def Delete(self, request: pb.DeleteNamespaceRequest, context: Context) -> empty_pb2.Empty:
        """FAILED_PRECONDITION while anything is in it."""
        await self._namespaces.delete(request.name)
        return empty_pb2.Empty()
