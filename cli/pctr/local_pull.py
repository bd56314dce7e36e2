"""Pull and push without the daemon's transfer service, as clients of containerd 1.6 do it.

The registry is spoken to by `supervisord_ctr.images`, the daemon through its content, image,
diff and snapshot services.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urljoin

from pctr import image_config, image_tree, services
from pctr.command import Context, Failed
from pctr.image_config import choose_manifest, is_index, is_manifest, platform_of
from pctr.light import Descriptor as LightDescriptor
from pctr.light_transfer import Progress
from pctr.pulling import RegistryOptions, credentials_for
from pctr.rpc import Client
from pctr.unpack import unpack
from supervisord_ctr import errors
from supervisord_ctr.api.services.images.v1 import images_pb2
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.images.hosts import HostsConfig, RegistryHost
from supervisord_ctr.images.http import HostFailure, Http
from supervisord_ctr.images.manifest import children, gc_labels, parse, parse_descriptor, ref_key
from supervisord_ctr.images.reference import parse as parse_reference
from supervisord_ctr.images.registry import BlobRefused, Registry, retry_delay
from supervisord_ctr.model import Descriptor

if TYPE_CHECKING:
    from pctr.transfer import Sink

_CHUNK = 1 << 20
_PARALLEL = 3


class _Unverified(HostsConfig):
    """Hosts whose certificates are not checked."""

    def lookup(self, domain: str, capability: str) -> list[RegistryHost]:
        return [dataclasses.replace(host, skip_verify=True) for host in super().lookup(domain, capability)]


def _hosts(options: RegistryOptions) -> HostsConfig:
    kind = _Unverified if options.skip_verify else HostsConfig
    return kind(options.hosts_dir, default_scheme="http" if options.plain_http else "")


def with_registry(name: str, options: RegistryOptions, work: Callable[[Registry], Awaitable[None]]) -> None:
    """Run `work` with the repository of `name`."""

    async def main() -> None:
        http = Http(user_agent="pctr")
        try:
            reference = parse_reference(name)
            await work(Registry(reference, _hosts(options), http, credentials_for(name, options.user)))
        except HostFailure as failure:
            raise errors.Unavailable(f"{name}: {failure.reason}") from failure
        finally:
            await http.close()

    asyncio.run(main())


def report(sink: Sink, descriptor: Descriptor, event: str, done: int = 0) -> None:
    """Tell the display about a blob."""
    sink.update(Progress(
        event=event, name=descriptor.digest, progress=done, total=descriptor.size,
        desc=LightDescriptor(media_type=descriptor.media_type, digest=descriptor.digest, size=descriptor.size),
    ))


class _Pull:
    """One pull: what is fetched, and what is chosen of an index."""

    def __init__(self, client: Client, registry: Registry, platforms: list[str], sink: Sink) -> None:
        self._client = client
        self._registry = registry
        self._platforms = platforms
        self._sink = sink
        self.manifests: list[tuple[str, dict[str, Any]]] = []
        reference = registry.reference
        self._source = {f"containerd.io/distribution.source.{reference.hostname}": reference.path}

    async def tree(self, descriptor: Descriptor, body: bytes) -> None:
        """Store a manifest or index and everything wanted below it."""
        document = parse(body, descriptor.media_type, f"manifest {descriptor.digest}")
        below = children(document)
        if is_index(descriptor.media_type):
            for child in self._chosen(json.loads(body)):
                await self.tree(child, await self._registry.fetch_manifest(child))
        else:
            gate = asyncio.Semaphore(_PARALLEL)
            async with asyncio.TaskGroup() as group:
                for child in below:
                    group.create_task(self._blob(child, gate))
            self.manifests.append((descriptor.digest, json.loads(body)))
        labels = {**gc_labels(below), **self._source}
        services.write_content(
            self._client, ref_key(descriptor), [body], digest=descriptor.digest, size=len(body), labels=labels)
        report(self._sink, descriptor, "complete", len(body))

    def _chosen(self, index: dict[str, Any]) -> list[Descriptor]:
        entries = [entry for entry in index.get("manifests") or ()
                   if is_manifest(entry.get("mediaType", "")) or is_index(entry.get("mediaType", ""))]
        if self._platforms:
            found = [choose_manifest(index, platform) for platform in self._platforms]
            missing = [name for name, entry in zip(self._platforms, found, strict=True) if entry is None]
            if missing:
                offered = ", ".join(sorted({platform_of(entry) or "?" for entry in entries}))
                raise errors.NotFound(f"{self._registry.reference}: nothing for {missing[0]}, only for {offered}")
            entries = [entry for entry in found if entry is not None]
        return [parse_descriptor(entry, "index") for entry in entries]

    async def _blob(self, descriptor: Descriptor, gate: asyncio.Semaphore) -> None:
        try:
            services.content_info(self._client, descriptor.digest)
            report(self._sink, descriptor, "already exists", descriptor.size)
            return
        except errors.NotFound:
            report(self._sink, descriptor, "waiting")
        async with gate:
            failures = self._registry.failures(f"blob {descriptor.digest} of {self._registry.reference.name}")
            for host in self._registry.hosts("pull"):
                for attempt in range(self._registry.retries):
                    try:
                        await self._fetch(host, descriptor)
                        return
                    except BlobRefused as refused:
                        failures.add(host, refused.status, refused.reason)
                        if not refused.transient:
                            break
                    except HostFailure as failure:
                        self._registry.note_failure(host, failures, failure)
                        if failure.lasting:
                            break
                    await asyncio.sleep(retry_delay(attempt))
            raise failures.error()

    async def _fetch(self, host: RegistryHost, descriptor: Descriptor) -> None:
        try:
            writer = services.Writer(
                self._client, ref_key(descriptor), digest=descriptor.digest, size=descriptor.size)
        except errors.AlreadyExists:
            report(self._sink, descriptor, "already exists", descriptor.size)
            return
        try:
            if writer.commit_complete(self._source):
                report(self._sink, descriptor, "already exists", descriptor.size)
                return
            async with self._registry.open_blob(host, descriptor, writer.offset) as (start, response):
                if start != writer.offset:
                    writer.restart()
                async for data in self._body(response):
                    writer.write(data)
                    report(self._sink, descriptor, "downloading", writer.offset)
                    if writer.offset > descriptor.size:
                        raise HostFailure(f"sends more than the {descriptor.size} bytes of {descriptor.digest}")
            writer.commit(self._source)
            report(self._sink, descriptor, "complete", descriptor.size)
        except errors.AlreadyExists:
            report(self._sink, descriptor, "already exists", descriptor.size)
        finally:
            writer.close()

    async def _body(self, response: Any) -> AsyncIterator[bytes]:
        import aiohttp

        try:
            async for data in response.content.iter_chunked(_CHUNK):
                yield data
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise HostFailure(f"the connection broke: {error or type(error).__name__}") from error


def pull(
    context: Context, name: str, platforms: list[str], snapshotter: str, labels: dict[str, str],
    options: RegistryOptions, sink: Sink,
) -> None:
    """Pull into the daemon's stores; `snapshotter` "" leaves the layers packed."""
    client = context.client

    async def work(registry: Registry) -> None:
        descriptor, body = await registry.resolve()
        run = _Pull(client, registry, platforms, sink)
        try:
            await run.tree(descriptor, body)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        services.put_image(client, images_pb2.Image(
            name=name, labels=labels,
            target=types_pb2.Descriptor(
                media_type=descriptor.media_type, digest=descriptor.digest, size=descriptor.size),
        ))
        if snapshotter:
            for digest, manifest in run.manifests:
                config = image_config.read_json(client, manifest["config"]["digest"])
                diff_ids = list((config.get("rootfs") or {}).get("diff_ids") or ())
                unpack(client, digest, diff_ids, manifest, snapshotter)

    with services.Lease(client):
        with_registry(name, options, work)


def push(
    context: Context, local_name: str, remote_name: str, platforms: list[str], options: RegistryOptions, sink: Sink,
) -> None:
    """Push an image: blobs first, then manifests, then the name."""
    client = context.client
    image = services.get_image(client, local_name)
    target = image_tree.descriptor_of(image.target)
    if platforms:
        digest, manifest = image_config.read_manifest(
            client, image_config.get_image(client, local_name), platforms[0])
        target = {"mediaType": manifest["mediaType"], "digest": digest,
                  "size": services.content_info(client, digest).size}
    nodes = list({node.digest: node for node in image_tree.walk(client, target)}.values())
    missing = [node.digest for node in nodes if node.kind in ("manifest", "index") and node.document is None]
    if missing:
        raise Failed(f"image {local_name}: content {missing[0]} is not here; push one platform with --platform")

    async def work(registry: Registry) -> None:
        for node in reversed(nodes):
            descriptor = parse_descriptor(node.descriptor, f"image {local_name}")
            if node.kind in ("manifest", "index"):
                top = node.digest == target["digest"]
                tag = registry.reference.tag or ("" if registry.reference.digest else "latest")
                await _push_manifest(client, registry, descriptor, tag if top and tag else node.digest)
            else:
                await push_blob(client, registry, descriptor, sink)
            report(sink, descriptor, "complete", descriptor.size)

    with_registry(remote_name, options, work)


async def push_blob(client: Client, registry: Registry, descriptor: Descriptor, sink: Sink) -> None:
    """Upload one blob unless the registry has it."""
    host = _push_host(registry)
    if await registry.has_blob(host, descriptor):
        report(sink, descriptor, "already exists", descriptor.size)
        return
    scope = f"repository:{registry.reference.path}:pull,push"
    async with registry.call(host, "POST", "blobs/uploads/", scope=scope) as response:
        if response.status != 202:
            raise Failed(f"{host.url}: {await registry.describe(response)}")
        place = urljoin(str(response.url), response.headers.get("Location", ""))
    place += ("&" if "?" in place else "?") + urlencode({"digest": descriptor.digest})

    async def body() -> AsyncIterator[bytes]:
        sent = 0
        for part in services.read_content(client, descriptor.digest):
            yield part
            sent += len(part)
            report(sink, descriptor, "uploading", sent)

    headers = {"Content-Length": str(descriptor.size), "Content-Type": "application/octet-stream"}
    async with registry.call(
        host, "PUT", "", url=place, data=body(), headers=headers, scope=scope, redirects=False,
    ) as response:
        if response.status != 201:
            raise Failed(f"{host.url}: blob {descriptor.digest}: {await registry.describe(response)}")


async def _push_manifest(client: Client, registry: Registry, descriptor: Descriptor, name: str) -> None:
    host = _push_host(registry)
    body = image_config.read_blob(client, descriptor.digest)
    async with registry.call(
        host, "PUT", f"manifests/{name}", data=body, headers={"Content-Type": descriptor.media_type},
        scope=f"repository:{registry.reference.path}:pull,push",
    ) as response:
        if response.status != 201:
            raise Failed(f"{host.url}: manifest {name}: {await registry.describe(response)}")


def _push_host(registry: Registry) -> RegistryHost:
    hosts = registry.push_hosts()
    if not hosts:
        raise Failed(f"{registry.reference.name}: no host is configured to push to")
    return hosts[-1]
