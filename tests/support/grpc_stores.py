# ruff: noqa: A002 - the arguments are named as those of the stores
"""The metadata stores seen through gRPC, with the same methods as the Python objects.

So one contract suite runs against both. Errors come back as the classes of `errors`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc

from supervisord_ctr.api.services.containers.v1 import containers_pb2, containers_pb2_grpc
from supervisord_ctr.api.services.content.v1 import content_pb2, content_pb2_grpc
from supervisord_ctr.api.services.images.v1 import images_pb2, images_pb2_grpc
from supervisord_ctr.api.services.leases.v1 import leases_pb2, leases_pb2_grpc
from supervisord_ctr.api.services.namespaces.v1 import namespaces_pb2, namespaces_pb2_grpc
from supervisord_ctr.api.services.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc
from supervisord_ctr.errors import Error, from_code
from supervisord_ctr.model import (
    Container,
    ContentInfo,
    Descriptor,
    Image,
    IngestStatus,
    Lease,
    LeaseResource,
    Namespace,
    Runtime,
    Sandbox,
)
from supervisord_ctr.rpc import RpcServer, any_to_value, seconds
from supervisord_ctr.services.containers import ContainersService
from supervisord_ctr.services.content import ContentService
from supervisord_ctr.services.convert import container_to_message, image_to_message
from supervisord_ctr.services.images import ImagesService
from supervisord_ctr.services.leases import LeasesService
from supervisord_ctr.services.namespaces import NamespacesService
from supervisord_ctr.services.sandbox_store import SandboxStoreService, sandbox_to_message
from tests.support.stores import Stores

T = TypeVar("T")


def _metadata(namespace: str, lease: str | None = None) -> tuple[tuple[str, str], ...]:
    headers: tuple[tuple[str, str], ...] = (("containerd-namespace", namespace),)
    return (*headers, ("containerd-lease", lease)) if lease else headers


def translated(error: grpc.RpcError) -> Error:
    code: Any = error.code()
    return from_code(code.value[0], error.details() or "")


async def call(answer: Awaitable[T]) -> T:
    try:
        return await answer
    except grpc.aio.AioRpcError as error:
        raise translated(error) from None


class GrpcReader:
    def __init__(self, stub: Any, namespace: str, digest: str, size: int) -> None:
        self._stub, self._namespace, self._digest, self.size = stub, namespace, digest, size

    async def read_at(self, count: int, offset: int) -> bytes:
        if count == 0 or offset >= self.size:
            return b""
        request = content_pb2.ReadContentRequest(digest=self._digest, offset=offset, size=count)
        pieces = []
        try:
            async for answer in self._stub.Read(request, metadata=_metadata(self._namespace)):
                pieces.append(answer.data)
        except grpc.aio.AioRpcError as error:
            raise translated(error) from None
        return b"".join(pieces)

    def close(self) -> None:
        pass


class GrpcWriter:
    """One Write stream."""

    def __init__(self, stub: Any, namespace: str, ref: str, size: int, expected: str, lease: str | None) -> None:
        self.ref = ref
        self.total = size
        self.offset = 0
        self._digest = ""
        self._stream = stub.Write(metadata=_metadata(namespace, lease))
        self._expected = expected

    async def step(self, action: int, **fields: Any) -> content_pb2.WriteContentResponse:
        request = content_pb2.WriteContentRequest(action=action, ref=self.ref, **fields)  # type: ignore[arg-type]
        try:
            await self._stream.write(request)
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError, grpc.aio.UsageError):
            pass  # the stream ended; its status says why
        try:
            answer = await self._stream.read()
        except grpc.aio.AioRpcError as error:
            raise translated(error) from None
        if answer is grpc.aio.EOF:
            raise from_code((await self._stream.code()).value[0], await self._stream.details())
        self.offset, self._digest = answer.offset, answer.digest
        self.answer = answer
        return answer

    def digest(self) -> str:
        return self._digest

    async def write(self, data: bytes) -> int:
        await self.step(content_pb2.WRITE, offset=self.offset, data=data)
        return len(data)

    async def truncate(self, size: int) -> None:
        assert size == 0
        await self.step(content_pb2.WRITE, offset=0)

    async def status(self) -> IngestStatus:
        answer = await self.step(content_pb2.STAT)
        return IngestStatus(
            self.ref, answer.offset, answer.total, "", seconds(answer.started_at), seconds(answer.updated_at)
        )

    async def commit(self, size: int = 0, expected: str = "", labels: Mapping[str, str] | None = None) -> str:
        answer = await self.step(
            content_pb2.COMMIT, offset=self.offset, total=size, expected=expected, labels=dict(labels or {})
        )
        return str(answer.digest)

    async def close(self) -> None:
        await self._stream.done_writing()
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await self._stream.read() is not grpc.aio.EOF:
                pass


def _info(message: content_pb2.Info) -> ContentInfo:
    return ContentInfo(
        message.digest, message.size, seconds(message.created_at), seconds(message.updated_at), dict(message.labels)
    )


class GrpcContent:
    def __init__(self, channel: Any) -> None:
        self.stub: Any = content_pb2_grpc.ContentStub(channel)

    async def info(self, namespace: str, digest: str) -> ContentInfo:
        request = content_pb2.InfoRequest(digest=digest)
        return _info((await call(self.stub.Info(request, metadata=_metadata(namespace)))).info)

    async def update(self, namespace: str, info: ContentInfo, fieldpaths: Sequence[str] = ()) -> ContentInfo:
        request = content_pb2.UpdateRequest(info=content_pb2.Info(digest=info.digest, labels=dict(info.labels)))
        request.update_mask.paths.extend(fieldpaths)
        return _info((await call(self.stub.Update(request, metadata=_metadata(namespace)))).info)

    async def walk(self, namespace: str, filters: Sequence[str] = ()) -> list[ContentInfo]:
        found = []
        try:
            async for answer in self.stub.List(
                content_pb2.ListContentRequest(filters=filters), metadata=_metadata(namespace)
            ):
                found.extend(_info(info) for info in answer.info)
        except grpc.aio.AioRpcError as error:
            raise translated(error) from None
        return found

    async def delete(self, namespace: str, digest: str, *, lease: str | None = None) -> None:
        await call(self.stub.Delete(
            content_pb2.DeleteContentRequest(digest=digest), metadata=_metadata(namespace, lease)
        ))

    async def reader(self, namespace: str, digest: str) -> GrpcReader:
        return GrpcReader(self.stub, namespace, digest, (await self.info(namespace, digest)).size)

    async def writer(
        self, namespace: str, ref: str, *, size: int = 0, expected: str = "", lease: str | None = None
    ) -> GrpcWriter:
        writer = GrpcWriter(self.stub, namespace, ref, size, expected, lease)
        await writer.step(content_pb2.STAT, total=size, expected=expected)
        return writer

    async def status(self, namespace: str, ref: str) -> IngestStatus:
        answer = await call(self.stub.Status(content_pb2.StatusRequest(ref=ref), metadata=_metadata(namespace)))
        return IngestStatus(answer.status.ref, answer.status.offset, answer.status.total)

    async def statuses(self, namespace: str, filters: Sequence[str] = ()) -> list[IngestStatus]:
        request = content_pb2.ListStatusesRequest(filters=filters)
        answer = await call(self.stub.ListStatuses(request, metadata=_metadata(namespace)))
        return [IngestStatus(status.ref, status.offset, status.total) for status in answer.statuses]

    async def abort(self, namespace: str, ref: str, *, lease: str | None = None) -> None:
        await call(self.stub.Abort(content_pb2.AbortRequest(ref=ref), metadata=_metadata(namespace, lease)))


def _image(message: images_pb2.Image) -> Image:
    target = message.target
    return Image(
        message.name, Descriptor(target.media_type, target.digest, target.size, dict(target.annotations)),
        dict(message.labels), seconds(message.created_at), seconds(message.updated_at),
    )


class GrpcImages:
    def __init__(self, channel: Any) -> None:
        self._stub: Any = images_pb2_grpc.ImagesStub(channel)

    async def get(self, namespace: str, name: str) -> Image:
        request = images_pb2.GetImageRequest(name=name)
        return _image((await call(self._stub.Get(request, metadata=_metadata(namespace)))).image)

    async def list(self, namespace: str, filters: Sequence[str] = ()) -> list[Image]:
        request = images_pb2.ListImagesRequest(filters=filters)
        answer = await call(self._stub.List(request, metadata=_metadata(namespace)))
        return [_image(image) for image in answer.images]

    async def create(self, namespace: str, image: Image, *, lease: str | None = None) -> Image:
        request = images_pb2.CreateImageRequest(image=image_to_message(image))
        return _image((await call(self._stub.Create(request, metadata=_metadata(namespace, lease)))).image)

    async def update(self, namespace: str, image: Image, fieldpaths: Sequence[str] = ()) -> Image:
        request = images_pb2.UpdateImageRequest(image=image_to_message(image))
        request.update_mask.paths.extend(fieldpaths)
        return _image((await call(self._stub.Update(request, metadata=_metadata(namespace)))).image)

    async def delete(self, namespace: str, name: str, *, target_digest: str = "", sync: bool = False) -> None:
        request = images_pb2.DeleteImageRequest(name=name, sync=sync)
        if target_digest:
            request.target.digest = target_digest
        await call(self._stub.Delete(request, metadata=_metadata(namespace)))


def _container(message: containers_pb2.Container) -> Container:
    return Container(
        message.id, dict(message.labels), message.image,
        Runtime(message.runtime.name, any_to_value(message.runtime.options)), any_to_value(message.spec),
        message.snapshotter, message.snapshot_key, seconds(message.created_at), seconds(message.updated_at),
        {key: value for key, packed in message.extensions.items() if (value := any_to_value(packed)) is not None},
        message.sandbox,
    )


class GrpcContainers:
    def __init__(self, channel: Any) -> None:
        self._stub: Any = containers_pb2_grpc.ContainersStub(channel)

    async def get(self, namespace: str, id: str) -> Container:
        request = containers_pb2.GetContainerRequest(id=id)
        return _container((await call(self._stub.Get(request, metadata=_metadata(namespace)))).container)

    async def list(self, namespace: str, filters: Sequence[str] = ()) -> list[Container]:
        request = containers_pb2.ListContainersRequest(filters=filters)
        answer = await call(self._stub.List(request, metadata=_metadata(namespace)))
        streamed = [item.container async for item in self._stub.ListStream(request, metadata=_metadata(namespace))]
        assert streamed == list(answer.containers)
        return [_container(container) for container in answer.containers]

    async def create(self, namespace: str, container: Container) -> Container:
        request = containers_pb2.CreateContainerRequest(container=container_to_message(container))
        return _container((await call(self._stub.Create(request, metadata=_metadata(namespace)))).container)

    async def update(self, namespace: str, container: Container, fieldpaths: Sequence[str] = ()) -> Container:
        request = containers_pb2.UpdateContainerRequest(container=container_to_message(container))
        request.update_mask.paths.extend(fieldpaths)
        return _container((await call(self._stub.Update(request, metadata=_metadata(namespace)))).container)

    async def delete(self, namespace: str, id: str) -> None:
        await call(self._stub.Delete(containers_pb2.DeleteContainerRequest(id=id), metadata=_metadata(namespace)))


class GrpcLeases:
    def __init__(self, channel: Any) -> None:
        self._stub: Any = leases_pb2_grpc.LeasesStub(channel)

    async def create(self, namespace: str, id: str = "", labels: Mapping[str, str] | None = None) -> Lease:
        request = leases_pb2.CreateRequest(id=id, labels=dict(labels or {}))
        made = (await call(self._stub.Create(request, metadata=_metadata(namespace)))).lease
        return Lease(made.id, seconds(made.created_at), dict(made.labels))

    async def list(self, namespace: str, filters: Sequence[str] = ()) -> list[Lease]:
        request = leases_pb2.ListRequest(filters=filters)
        answer = await call(self._stub.List(request, metadata=_metadata(namespace)))
        return [Lease(lease.id, seconds(lease.created_at), dict(lease.labels)) for lease in answer.leases]

    async def delete(self, namespace: str, id: str, *, sync: bool = False) -> None:
        await call(self._stub.Delete(leases_pb2.DeleteRequest(id=id, sync=sync), metadata=_metadata(namespace)))

    async def add_resource(self, namespace: str, id: str, resource: LeaseResource) -> None:
        request = leases_pb2.AddResourceRequest(
            id=id, resource=leases_pb2.Resource(id=resource.id, type=resource.type)
        )
        await call(self._stub.AddResource(request, metadata=_metadata(namespace)))

    async def delete_resource(self, namespace: str, id: str, resource: LeaseResource) -> None:
        request = leases_pb2.DeleteResourceRequest(
            id=id, resource=leases_pb2.Resource(id=resource.id, type=resource.type)
        )
        await call(self._stub.DeleteResource(request, metadata=_metadata(namespace)))

    async def list_resources(self, namespace: str, id: str) -> list[LeaseResource]:
        request = leases_pb2.ListResourcesRequest(id=id)
        answer = await call(self._stub.ListResources(request, metadata=_metadata(namespace)))
        return [LeaseResource(item.type, item.id) for item in answer.resources]


class GrpcNamespaces:
    def __init__(self, channel: Any) -> None:
        self._stub: Any = namespaces_pb2_grpc.NamespacesStub(channel)

    async def get(self, name: str) -> Namespace:
        found = (await call(self._stub.Get(namespaces_pb2.GetNamespaceRequest(name=name)))).namespace
        return Namespace(found.name, dict(found.labels))

    async def list(self) -> list[Namespace]:
        answer = await call(self._stub.List(namespaces_pb2.ListNamespacesRequest()))
        return [Namespace(item.name, dict(item.labels)) for item in answer.namespaces]

    async def create(self, name: str, labels: Mapping[str, str] | None = None) -> Namespace:
        request = namespaces_pb2.CreateNamespaceRequest(
            namespace=namespaces_pb2.Namespace(name=name, labels=dict(labels or {}))
        )
        made = (await call(self._stub.Create(request))).namespace
        return Namespace(made.name, dict(made.labels))

    async def update(self, name: str, labels: Mapping[str, str], fieldpaths: Sequence[str] = ()) -> Namespace:
        request = namespaces_pb2.UpdateNamespaceRequest(
            namespace=namespaces_pb2.Namespace(name=name, labels=dict(labels))
        )
        request.update_mask.paths.extend(fieldpaths)
        made = (await call(self._stub.Update(request))).namespace
        return Namespace(made.name, dict(made.labels))

    async def delete(self, name: str) -> None:
        await call(self._stub.Delete(namespaces_pb2.DeleteNamespaceRequest(name=name)))


class GrpcSandboxes:
    def __init__(self, channel: Any) -> None:
        self._stub: Any = sandbox_pb2_grpc.StoreStub(channel)

    @staticmethod
    def _value(message: Any) -> Sandbox:
        return Sandbox(
            message.sandbox_id, Runtime(message.runtime.name, any_to_value(message.runtime.options)),
            any_to_value(message.spec), dict(message.labels), seconds(message.created_at),
            seconds(message.updated_at),
            {key: value for key, packed in message.extensions.items() if (value := any_to_value(packed)) is not None},
            message.sandboxer,
        )

    async def get(self, namespace: str, id: str) -> Sandbox:
        request = sandbox_pb2.StoreGetRequest(sandbox_id=id)
        return self._value((await call(self._stub.Get(request, metadata=_metadata(namespace)))).sandbox)

    async def list(self, namespace: str, filters: Sequence[str] = ()) -> list[Sandbox]:
        request = sandbox_pb2.StoreListRequest(filters=filters)
        answer = await call(self._stub.List(request, metadata=_metadata(namespace)))
        return [self._value(item) for item in answer.list]

    async def create(self, namespace: str, sandbox: Sandbox) -> Sandbox:
        request = sandbox_pb2.StoreCreateRequest(sandbox=sandbox_to_message(sandbox))
        return self._value((await call(self._stub.Create(request, metadata=_metadata(namespace)))).sandbox)

    async def update(self, namespace: str, sandbox: Sandbox, fields: Sequence[str] = ()) -> Sandbox:
        request = sandbox_pb2.StoreUpdateRequest(sandbox=sandbox_to_message(sandbox), fields=fields)
        return self._value((await call(self._stub.Update(request, metadata=_metadata(namespace)))).sandbox)

    async def delete(self, namespace: str, id: str) -> None:
        request = sandbox_pb2.StoreDeleteRequest(sandbox_id=id)
        await call(self._stub.Delete(request, metadata=_metadata(namespace)))


class GrpcStores:
    """All of them over one channel; the attributes are named as those of `metadata.Database`."""

    def __init__(self, channel: Any) -> None:
        self.content = GrpcContent(channel)
        self.images = GrpcImages(channel)
        self.containers = GrpcContainers(channel)
        self.leases = GrpcLeases(channel)
        self.namespaces = GrpcNamespaces(channel)
        self.sandboxes = GrpcSandboxes(channel)


@contextlib.asynccontextmanager
async def served(stores: Stores, address: Path) -> AsyncIterator[GrpcStores]:
    """Serve `stores` on a socket and yield the view of a client."""
    database = stores.database
    server = RpcServer(address)
    native = "containerd.services"
    server.add(f"{native}.content.v1.Content", content_pb2_grpc.add_ContentServicer_to_server, ContentService(database))
    server.add(f"{native}.images.v1.Images", images_pb2_grpc.add_ImagesServicer_to_server, ImagesService(database))
    server.add(
        f"{native}.containers.v1.Containers", containers_pb2_grpc.add_ContainersServicer_to_server,
        ContainersService(database),
    )
    server.add(f"{native}.leases.v1.Leases", leases_pb2_grpc.add_LeasesServicer_to_server, LeasesService(database))
    server.add(
        f"{native}.namespaces.v1.Namespaces", namespaces_pb2_grpc.add_NamespacesServicer_to_server,
        NamespacesService(database),
    )
    server.add(
        f"{native}.sandbox.v1.Store", sandbox_pb2_grpc.add_StoreServicer_to_server, SandboxStoreService(database)
    )
    await server.start()
    try:
        async with grpc.aio.insecure_channel(
            f"unix:{address}", options=[("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            yield GrpcStores(channel)
    finally:
        await server.stop(1.0)
