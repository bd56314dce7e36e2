"""containerd.services.leases.v1.Leases: what protects resources from garbage collection."""

from __future__ import annotations

from google.protobuf import empty_pb2

from supervisord_ctr.api.services.leases.v1 import leases_pb2 as pb
from supervisord_ctr.api.services.leases.v1 import leases_pb2_grpc
from supervisord_ctr.metadata import Database
from supervisord_ctr.model import Lease, LeaseResource
from supervisord_ctr.rpc import Context, namespace_of, timestamp


def _message(value: Lease) -> pb.Lease:
    return pb.Lease(id=value.id, created_at=timestamp(value.created_at), labels=dict(value.labels))


def _resource(message: pb.Resource) -> LeaseResource:
    return LeaseResource(message.type, message.id)


class LeasesService(leases_pb2_grpc.LeasesServicer):
    """Leases of a namespace and their resources."""

    def __init__(self, database: Database) -> None:
        self._leases = database.leases

    async def Create(self, request: pb.CreateRequest, context: Context) -> pb.CreateResponse:
        """ALREADY_EXISTS. An empty id is replaced by a made-up one."""
        made = await self._leases.create(namespace_of(context), request.id, dict(request.labels))
        return pb.CreateResponse(lease=_message(made))

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> empty_pb2.Empty:
        """NOT_FOUND. With `sync`, garbage is collected before it returns."""
        await self._leases.delete(namespace_of(context), request.id, sync=request.sync)
        return empty_pb2.Empty()

    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        """Those that match the filters (id, labels)."""
        found = await self._leases.list(namespace_of(context), request.filters)
        return pb.ListResponse(leases=[_message(item) for item in found])

    async def AddResource(self, request: pb.AddResourceRequest, context: Context) -> empty_pb2.Empty:
        """NOT_FOUND for the lease; UNIMPLEMENTED for a type of resource that is not known."""
        await self._leases.add_resource(namespace_of(context), request.id, _resource(request.resource))
        return empty_pb2.Empty()

    async def DeleteResource(self, request: pb.DeleteResourceRequest, context: Context) -> empty_pb2.Empty:
        """As AddResource."""
        await self._leases.delete_resource(namespace_of(context), request.id, _resource(request.resource))
        return empty_pb2.Empty()

    async def ListResources(self, request: pb.ListResourcesRequest, context: Context) -> pb.ListResourcesResponse:
        """NOT_FOUND for the lease."""
        found = await self._leases.list_resources(namespace_of(context), request.id)
        return pb.ListResourcesResponse(resources=[pb.Resource(id=item.id, type=item.type) for item in found])
