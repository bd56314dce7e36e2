"""containerd.services.transfer.v1.Transfer: images between registries, the store and streams.

Owns the meaning of source and destination by their types; the work is done in `images`. What a
client may combine: registry → store (pull), store → registry (push), store → store (tag), stream →
store (import), store → stream (export), stream → stream (echo).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from google.protobuf import any_pb2, empty_pb2
from google.protobuf.message import DecodeError, Message

from supervisord_ctr.aio import TaskOwner
from supervisord_ctr.api.services.transfer.v1 import transfer_pb2 as pb
from supervisord_ctr.api.services.transfer.v1 import transfer_pb2_grpc
from supervisord_ctr.api.types.transfer import transfer_pb2 as types
from supervisord_ctr.errors import InvalidArgument, NotFound, Unavailable, Unimplemented
from supervisord_ctr.images import archive_export, archive_import, platforms
from supervisord_ctr.images.auth import Anonymous, Credential, Credentials
from supervisord_ctr.images.naming import NameRule, image_names
from supervisord_ctr.images.progress import Progress
from supervisord_ctr.images.pull import Puller, PullRequest, store_image
from supervisord_ctr.images.push import Pusher, PushRequest
from supervisord_ctr.metadata import Database
from supervisord_ctr.model import Descriptor, Image, Platform
from supervisord_ctr.rpc import Context, lease_of, namespace_of
from supervisord_ctr.services.convert import platform_from_message
from supervisord_ctr.services.streaming import ByteReader, ByteWriter, ProgressSender, Stream, Streams, type_name

M = TypeVar("M", bound=Message)

_KNOWN: dict[str, type[Message]] = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (types.OCIRegistry, types.ImageStore, types.ImageImportStream, types.ImageExportStream)
}


class StreamCredentials:
    """Asks the client over a stream, once for each host; one question at a time."""

    def __init__(self, stream: Stream, reference: str) -> None:
        self._stream = stream
        self._reference = reference
        self._lock = asyncio.Lock()

    async def get(self, host: str) -> Credential:
        """See `images.auth.Credentials`; Unavailable when the client went away."""
        async with self._lock:
            await self._stream.send(types.AuthRequest(host=host, reference=self._reference))
            answer = await self._stream.receive()
        if answer is None:
            raise Unavailable("the client that has the credentials went away", kind="credentials", key=host)
        response = types.AuthResponse.FromString(answer.value)
        if response.authType == types.CREDENTIALS:
            return Credential(response.username, response.secret)
        if response.authType == types.REFRESH:
            return Credential("", response.secret)
        if response.authType == types.HEADER:
            return Credential(header=response.secret)
        return Credential()


class TransferService(transfer_pb2_grpc.TransferServicer):
    """Transfers, with progress and credentials over streams."""

    def __init__(self, database: Database, puller: Puller, pusher: Pusher, streams: Streams) -> None:
        self._database = database
        self._puller = puller
        self._pusher = pusher
        self._streams = streams
        self._owner = TaskOwner("transfer")

    async def close(self) -> None:
        """Stop sending progress."""
        await self._owner.close()

    async def Transfer(self, request: pb.TransferRequest, context: Context) -> empty_pb2.Empty:
        """UNIMPLEMENTED for a combination that makes no sense; else the errors of pull, push, import, export."""
        namespace, lease = namespace_of(context), lease_of(context) or ""
        source, target = _decode(request.source), _decode(request.destination)
        work = self._choose(source, target, request)
        async with self._progress(namespace, request.options.progress_stream) as tell:
            await work(namespace, lease, source, target, tell)
        return empty_pb2.Empty()

    def _choose(self, source: Message, target: Message, request: pb.TransferRequest) -> Callable[..., Any]:
        match source, target:
            case types.OCIRegistry(), types.ImageStore():
                return self._pull
            case types.ImageStore(), types.OCIRegistry():
                return self._push
            case types.ImageStore(), types.ImageStore():
                return self._tag
            case types.ImageImportStream(), types.ImageStore():
                return self._import
            case types.ImageStore(), types.ImageExportStream():
                return self._export
            case types.ImageImportStream(), types.ImageExportStream():
                return self._echo
        raise Unimplemented(
            f"method Transfer not implemented for {request.source.type_url} to {request.destination.type_url}"
        )

    @contextlib.asynccontextmanager
    async def _progress(self, namespace: str, name: str) -> AsyncIterator[Callable[[Progress], None]]:
        """A sink for progress, sent over the stream `name` when there is one; the stream is ended afterwards."""
        if not name:
            yield lambda progress: None
            return
        stream = self._streams.get(namespace, name)
        sender = ProgressSender(stream)
        task = self._owner.start(sender.run(), "progress")
        try:
            yield sender.offer
        finally:
            sender.end()
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(5.0):
                        await asyncio.shield(task)
            finally:
                stream.close()

    # Registry.

    def _resolver(self, namespace: str, registry: types.OCIRegistry) -> dict[str, Any]:
        resolver = registry.resolver
        credentials: Credentials = Anonymous()
        if resolver.auth_stream:
            credentials = StreamCredentials(self._streams.get(namespace, resolver.auth_stream), registry.reference)
        return {
            "credentials": credentials, "headers": dict(resolver.headers), "config_path": resolver.host_dir,
            "default_scheme": resolver.default_scheme,
        }

    async def _pull(
        self, namespace: str, lease: str, source: types.OCIRegistry, target: types.ImageStore,
        tell: Callable[[Progress], None],
    ) -> None:
        wanted = tuple(map(_platform, target.platforms))
        request = PullRequest(
            source.reference, wanted, all_platforms=not wanted, all_metadata=target.all_metadata,
            unpacks=tuple(
                (_platform(unpack.platform) if unpack.HasField("platform") else None, unpack.snapshotter)
                for unpack in target.unpacks
            ),
            name=target.name, labels=dict(target.labels), lease=lease, **self._resolver(namespace, source),
        )
        image = await self._puller.run(namespace, request, tell)
        rules = _rules(target)
        if rules:
            await self._save(namespace, image.target, target, tell, skip=image.name)

    async def _push(
        self, namespace: str, lease: str, source: types.ImageStore, target: types.OCIRegistry,
        tell: Callable[[Progress], None],
    ) -> None:
        image = await self._database.images.get(namespace, source.name)
        request = PushRequest(
            target.reference, image, tuple(map(_platform, source.platforms)), **self._resolver(namespace, target)
        )
        await self._pusher.push(namespace, request, tell)

    # Store.

    async def _tag(
        self, namespace: str, lease: str, source: types.ImageStore, target: types.ImageStore,
        tell: Callable[[Progress], None],
    ) -> None:
        image = await self._database.images.get(namespace, source.name)
        await self._save(namespace, image.target, target, tell)

    async def _save(
        self, namespace: str, found: Descriptor, target: types.ImageStore, tell: Callable[[Progress], None], *,
        skip: str = "",
    ) -> int:
        """Records under every name that the destination gives; NotFound when it gives none."""
        names = image_names(found, target.name, _rules(target))
        if not names:
            raise NotFound("no image name found", kind="image", key=found.digest)
        bare = Descriptor(found.media_type, found.digest, found.size, {
            key: value for key, value in found.annotations.items() if key != archive_import.REF_SOURCE
        })
        for name in names:
            if name == skip:
                continue
            labels = dict(target.labels)
            if target.name and name != target.name:
                labels["containerd.io/gc.bref.image"] = target.name
                labels["containerd.io/gc.expire"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            image = await store_image(self._database, namespace, Image(name, bare, labels))
            tell(Progress("saved", image.name, (), image.target))
        return len(names)

    # Archives.

    async def _import(
        self, namespace: str, lease: str, source: types.ImageImportStream, target: types.ImageStore,
        tell: Callable[[Progress], None],
    ) -> None:
        reader = ByteReader(self._streams.get(namespace, source.stream))
        wanted = tuple(map(_platform, target.platforms))
        tell(Progress("Importing"))
        async with self._puller.leases.hold(namespace, lease) as held:
            found = await archive_import.import_archive(
                self._database, namespace, reader.read, lease=held,
                compress=source.force_compress, platforms=wanted,
            )
            saved = 0
            for descriptor in found:
                for unpack in target.unpacks:
                    platform = _platform(unpack.platform) if unpack.HasField("platform") else platforms.default()
                    await self._puller.unpack_fitting(namespace, descriptor, unpack.snapshotter, platform, held)
                with contextlib.suppress(NotFound):
                    saved += await self._save(namespace, descriptor, target, tell)
        tell(Progress("Completed import"))

    async def _export(
        self, namespace: str, lease: str, source: types.ImageStore, target: types.ImageExportStream,
        tell: Callable[[Progress], None],
    ) -> None:
        writer = ByteWriter(self._streams.get(namespace, target.stream))
        tell(Progress("Exporting"))
        try:
            names = [source.name] if source.name else []
            for reference in source.extra_references:
                if reference.is_prefix:
                    raise Unimplemented("prefix lookup on export not implemented", kind="image", key=reference.name)
                names.append(reference.name)
            images = [await self._database.images.get(namespace, name) for name in names]
            wanted = tuple(map(_platform, target.platforms)) or (platforms.default(),)
            await archive_export.export_archive(
                self._database, self._puller.executors, namespace, images, writer.write,
                platforms=() if target.all_platforms else wanted,
                docker_manifest=not target.skip_compatibility_manifest,
                skip_nondistributable=target.skip_non_distributable,
            )
        finally:
            writer.close()
        tell(Progress("Completed export"))

    async def _echo(
        self, namespace: str, lease: str, source: types.ImageImportStream, target: types.ImageExportStream,
        tell: Callable[[Progress], None],
    ) -> None:
        reader = ByteReader(self._streams.get(namespace, source.stream))
        writer = ByteWriter(self._streams.get(namespace, target.stream))
        try:
            while data := await reader.read():
                await writer.write(data)
        finally:
            writer.close()


def _decode(value: any_pb2.Any) -> Message:
    kind = _KNOWN.get(type_name(value))
    if kind is None:
        return value
    try:
        return kind.FromString(value.value)
    except DecodeError as error:
        raise InvalidArgument(f"{value.type_url}: {error}") from error


def _platform(message: Any) -> Platform:
    return platforms.normalize(platform_from_message(message))


def _rules(target: types.ImageStore) -> tuple[NameRule, ...]:
    return tuple(
        NameRule(rule.name, rule.is_prefix, rule.allow_overwrite, rule.add_digest, rule.skip_named_digest)
        for rule in target.extra_references
    )
