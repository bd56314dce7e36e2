"""containerd.services.containers.v1.Containers: container records.

Thin: validation, field masks, filters and events are the metadata store's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from google.protobuf import empty_pb2

from supervisord_ctr.api.services.containers.v1 import containers_pb2 as pb
from supervisord_ctr.api.services.containers.v1 import containers_pb2_grpc
from supervisord_ctr.metadata import Database
from supervisord_ctr.model import Container
from supervisord_ctr.rpc import Context, namespace_of, serialized
from supervisord_ctr.services.convert import container_from_message, container_to_message

#: Records whose messages are kept for lists.
_MADE = 4096


class ContainersService(containers_pb2_grpc.ContainersServicer):
    """Container records of a namespace. `expect` is told of each whose task may follow: namespace, runtime, sandbox."""

    def __init__(self, database: Database, expect: Callable[[str, str, str], None] | None = None) -> None:
        self._containers = database.containers
        self._expect = expect
        self._made: dict[tuple[str, str], tuple[Container, bytes]] = {}

    async def Get(self, request: pb.GetContainerRequest, context: Context) -> pb.GetContainerResponse:
        """NOT_FOUND."""
        found = await self._containers.get(namespace_of(context), request.id)
        return pb.GetContainerResponse(container=container_to_message(found))

    async def List(self, request: pb.ListContainersRequest, context: Context) -> pb.ListContainersResponse:
        """INVALID_ARGUMENT for a filter that does not parse."""
        namespace = namespace_of(context)
        found = await self._containers.list(namespace, request.filters)
        answer = b"".join([self._packed(namespace, item) for item in found])
        return serialized(pb.ListContainersResponse, answer)

    def _packed(self, namespace: str, item: Container) -> bytes:
        """The record as a field of a list's answer, made once for each version of the record."""
        key = (namespace, item.id)
        known = self._made.get(key)
        if known is None or known[0] is not item:
            if len(self._made) >= _MADE:
                self._made.clear()
            data = pb.ListContainersResponse(containers=[container_to_message(item)]).SerializeToString()
            known = self._made[key] = (item, data)
        return known[1]

    async def ListStream(
        self, request: pb.ListContainersRequest, context: Context
    ) -> AsyncIterator[pb.ListContainerMessage]:
        """As List, one record a message (P12)."""
        for item in await self._containers.list(namespace_of(context), request.filters):
            yield pb.ListContainerMessage(container=container_to_message(item))

    async def Create(self, request: pb.CreateContainerRequest, context: Context) -> pb.CreateContainerResponse:
        """ALREADY_EXISTS; INVALID_ARGUMENT for a record that containerd would refuse."""
        namespace, wanted = namespace_of(context), container_from_message(request.container)
        if self._expect is not None:
            self._expect(namespace, wanted.runtime.name, wanted.sandbox)
        made = await self._containers.create(namespace, wanted)
        return pb.CreateContainerResponse(container=container_to_message(made))

    async def Update(self, request: pb.UpdateContainerRequest, context: Context) -> pb.UpdateContainerResponse:
        """Changes the fields of the mask, or all mutable ones without a mask."""
        changed = await self._containers.update(
            namespace_of(context), container_from_message(request.container), request.update_mask.paths
        )
        return pb.UpdateContainerResponse(container=container_to_message(changed))

    async def Delete(self, request: pb.DeleteContainerRequest, context: Context) -> empty_pb2.Empty:
        """NOT_FOUND. The snapshot stays until it is removed or collected."""
        await self._containers.delete(namespace_of(context), request.id)
        return empty_pb2.Empty()
