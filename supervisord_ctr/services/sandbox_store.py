"""containerd.services.sandbox.v1.Store: sandbox records. Their environments are the controller's."""

from __future__ import annotations

from collections.abc import Sequence

from supervisord_ctr.api.services.sandbox.v1 import sandbox_pb2 as pb
from supervisord_ctr.api.services.sandbox.v1 import sandbox_pb2_grpc
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.metadata import Database
from supervisord_ctr.model import Runtime, Sandbox
from supervisord_ctr.rpc import Context, any_from_value, any_to_value, namespace_of, timestamp


def sandbox_to_message(value: Sandbox) -> types_pb2.Sandbox:
    """A sandbox record."""
    message = types_pb2.Sandbox(
        sandbox_id=value.id, labels=dict(value.labels), created_at=timestamp(value.created_at),
        updated_at=timestamp(value.updated_at), sandboxer=value.sandboxer, spec=any_from_value(value.spec),
        runtime=types_pb2.Sandbox.Runtime(name=value.runtime.name, options=any_from_value(value.runtime.options)),
    )
    for key, extension in value.extensions.items():
        message.extensions[key].type_url = extension.type_url
        message.extensions[key].value = extension.value
    return message


def sandbox_from_message(message: types_pb2.Sandbox) -> Sandbox:
    """The reverse; times are the store's business."""
    extensions = {key: value for key, any_ in message.extensions.items() if (value := any_to_value(any_)) is not None}
    return Sandbox(
        id=message.sandbox_id, runtime=Runtime(message.runtime.name, any_to_value(message.runtime.options)),
        spec=any_to_value(message.spec), labels=dict(message.labels), extensions=extensions,
        sandboxer=message.sandboxer,
    )


class SandboxStoreService(sandbox_pb2_grpc.StoreServicer):
    """Sandbox records of a namespace."""

    def __init__(self, database: Database) -> None:
        self._sandboxes = database.sandboxes

    async def Create(self, request: pb.StoreCreateRequest, context: Context) -> pb.StoreCreateResponse:
        """ALREADY_EXISTS; INVALID_ARGUMENT for a bad id."""
        made = await self._sandboxes.create(namespace_of(context), sandbox_from_message(request.sandbox))
        return pb.StoreCreateResponse(sandbox=sandbox_to_message(made))

    async def Update(self, request: pb.StoreUpdateRequest, context: Context) -> pb.StoreUpdateResponse:
        """Changes the named fields, or all mutable ones; NOT_FOUND."""
        fields: Sequence[str] = request.fields
        changed = await self._sandboxes.update(namespace_of(context), sandbox_from_message(request.sandbox), fields)
        return pb.StoreUpdateResponse(sandbox=sandbox_to_message(changed))

    async def Delete(self, request: pb.StoreDeleteRequest, context: Context) -> pb.StoreDeleteResponse:
        """NOT_FOUND."""
        await self._sandboxes.delete(namespace_of(context), request.sandbox_id)
        return pb.StoreDeleteResponse()

    async def List(self, request: pb.StoreListRequest, context: Context) -> pb.StoreListResponse:
        """Those that match the filters (id, labels)."""
        found = await self._sandboxes.list(namespace_of(context), request.filters)
        return pb.StoreListResponse(list=[sandbox_to_message(item) for item in found])

    async def Get(self, request: pb.StoreGetRequest, context: Context) -> pb.StoreGetResponse:
        """NOT_FOUND."""
        return pb.StoreGetResponse(
            sandbox=sandbox_to_message(await self._sandboxes.get(namespace_of(context), request.sandbox_id))
        )
