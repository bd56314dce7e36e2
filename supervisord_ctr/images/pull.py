"""Pull: a reference becomes content, snapshots and an image record, in one pass (D3).

Owns the order of things: resolve, the documents of the platforms that are wanted, then every layer
side by side, downloading and unpacking at once; the image record comes last. A lease protects what
arrives from garbage collection. Pulls of the same image join; pulls of different images that share
blobs or layers wait for each other's instead of fetching them twice. A pull that nobody waits for any
more is called off; what arrived stays for the next one (P2).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from supervisord_ctr.aio import Executors, KeyedLock, TaskOwner
from supervisord_ctr.diff.pool import UnpackPool
from supervisord_ctr.diff.stream import Limits
from supervisord_ctr.errors import AlreadyExists, InvalidArgument, NotFound
from supervisord_ctr.images import manifest as documents
from supervisord_ctr.images import platforms, reference
from supervisord_ctr.images.auth import Anonymous, Credentials
from supervisord_ctr.images.config import ImageConfig, parse_config, read_manifest
from supervisord_ctr.images.fetch import BlobFetcher
from supervisord_ctr.images.hosts import HostsConfig
from supervisord_ctr.images.http import Http
from supervisord_ctr.images.leases import PullLeases
from supervisord_ctr.images.progress import EXISTS, Progress, ProgressSink, Tracker
from supervisord_ctr.images.registry import Registry
from supervisord_ctr.images.unpack import ImageUnpacker, LayerFollower
from supervisord_ctr.model import Descriptor, Image, LeaseResource, Platform
from supervisord_ctr.names import LABEL_DISTRIBUTION_SOURCE, LABEL_GC_REF_SNAPSHOT

if TYPE_CHECKING:
    from supervisord_ctr.metadata import Database

_INDEX_DEPTH = 8


@dataclass(frozen=True, slots=True)
class PullRequest:
    """What to pull. `unpacks` names snapshotters to unpack for, each with the platform (None: the wanted one).

    No platforms means this machine's; `all_platforms` every one in the index. `name` is the image
    record's name (the reference's canonical form by default).
    """

    reference: str
    platforms: tuple[Platform, ...] = ()
    all_platforms: bool = False
    all_metadata: bool = False
    unpacks: tuple[tuple[Platform | None, str], ...] = ()
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    credentials: Credentials = field(default_factory=Anonymous)
    config_path: str = ""
    default_scheme: str = ""
    lease: str = ""
    store: bool = True

    def key(self) -> Hashable:
        """What must agree for two requests to be one."""
        return (
            self.reference, self.platforms, self.all_platforms, self.all_metadata, self.unpacks, self.name,
            tuple(sorted(self.labels.items())), tuple(sorted(self.headers.items())), self.credentials,
            self.config_path, self.default_scheme, self.lease, self.store,
        )


class RunningPull:
    """One pull under way, for `pctr image pulls` and the kubelet's watchers."""

    def __init__(self, namespace: str, request: PullRequest, name: str) -> None:
        self.namespace = namespace
        self.reference = name
        self.tracker = Tracker(name, self._fan_out)
        self.sinks: list[ProgressSink] = []
        self.waiting = 0
        self.task: asyncio.Task[Image] | None = None

    def _fan_out(self, progress: Progress) -> None:
        for sink in self.sinks:
            sink(progress)

    def blobs(self) -> list[Progress]:
        """The state of every blob."""
        return self.tracker.blobs()


class Puller:
    """Pulls and unpacks. Belongs to the event loop; `close` it before the pool and the database."""

    def __init__(
        self, database: Database, executors: Executors, pool: UnpackPool, http: Http, hosts: HostsConfig, *,
        scratch: Path, default_snapshotter: str = "overlayfs", max_downloads: int = 4, retries: int = 5,
        limits: Limits | None = None, sync: bool = False,
    ) -> None:
        self.database = database
        self.executors = executors
        self.pool = pool
        self.http = http
        self.hosts = hosts
        self.scratch = scratch
        self.default_snapshotter = default_snapshotter
        self.retries = retries
        self._max_downloads = max_downloads
        self._limits = limits
        self._sync = sync
        self.leases = PullLeases(database)
        self._owner = TaskOwner("pull")
        self._running: dict[Hashable, RunningPull] = {}
        self._blobs = KeyedLock()
        self._layers = KeyedLock()

    async def close(self) -> None:
        """Call off what runs."""
        await self._owner.close()

    def running(self) -> list[RunningPull]:
        """The pulls under way (P10)."""
        return list(self._running.values())

    # Pulling.

    async def pull(
        self, namespace: str, ref: str, *, platforms: Sequence[Platform] = (), snapshotter: str = "",
        unpack: bool = True, credentials: Credentials | None = None, labels: Mapping[str, str] | None = None,
        progress: ProgressSink | None = None, lease: str | None = None,
    ) -> Image:
        """`run` for the usual case: one platform, unpacked for one snapshotter."""
        unpacks = ((None, snapshotter or self.default_snapshotter),) if unpack else ()
        request = PullRequest(
            ref, tuple(platforms), unpacks=unpacks, labels=dict(labels or {}),
            credentials=credentials or Anonymous(), lease=lease or "",
        )
        return await self.run(namespace, request, progress)

    async def run(self, namespace: str, request: PullRequest, progress: ProgressSink | None = None) -> Image:
        """The image, in the store and unpacked as asked. Joins a pull of the same.

        NotFound, Unauthenticated, PermissionDenied, Unavailable with every host and its reason;
        InvalidArgument for hostile or broken images; ResourceExhausted for a full disk.
        """
        parsed = reference.parse(request.reference)
        key = (namespace, request.key())
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = RunningPull(namespace, request, parsed.canonical())
            running.task = self._owner.start(self._run(running, parsed, request, key), parsed.canonical())
        elif progress is not None:
            for blob in running.blobs():
                progress(blob)
        if progress is not None:
            running.sinks.append(progress)
        running.waiting += 1
        assert running.task is not None
        try:
            return await asyncio.shield(running.task)
        finally:
            running.waiting -= 1
            if progress is not None:
                running.sinks.remove(progress)
            if not running.waiting and not running.task.done():
                running.task.cancel()
                if self._running.get(key) is running:
                    del self._running[key]

    async def _run(
        self, running: RunningPull, parsed: reference.Reference, request: PullRequest, key: Hashable
    ) -> Image:
        try:
            async with self.leases.hold(running.namespace, request.lease, parsed.canonical()) as lease:
                try:
                    return await _Pull(self, running, parsed, request, lease).run()
                except BaseExceptionGroup as group:
                    raise first_error(group) from None
        finally:
            if self._running.get(key) is running:
                del self._running[key]

    def slots(self) -> asyncio.Semaphore:
        """How many layers of one pull download side by side."""
        return asyncio.Semaphore(max(1, self._max_downloads))

    def registry(self, parsed: reference.Reference, request: PullRequest) -> Registry:
        """The repository, with what the request says of hosts and credentials."""
        return Registry(
            parsed, self.hosts.overridden(request.config_path, request.default_scheme), self.http,
            request.credentials, headers=request.headers, retries=self.retries,
        )

    # Unpacking.

    async def unpack(
        self, namespace: str, image: Image, snapshotter: str = "", *, platform: Platform | None = None,
        lease: str = "", tracker: Tracker | None = None,
    ) -> ImageConfig:
        """Unpack an image whose content is here; nothing to do is fine. NotFound when content is missing."""
        _, found = await read_manifest(self.database, namespace, image.target, platform)
        async with self.leases.hold(namespace, lease) as name:
            data = await self.database.content.read(namespace, found.config.digest, documents.MAX_CONFIG)
            config = parse_config(data, f"config {found.config.digest}")
            unpacker = self.unpacker(
                namespace, snapshotter or self.default_snapshotter, name, found.layers, config,
                tracker or Tracker(image.name),
            )
            present = await unpacker.present()
            try:
                async with asyncio.TaskGroup() as group:
                    for index in range(present, len(found.layers)):
                        group.create_task(self.layer(unpacker, index, None, {}))
            except BaseExceptionGroup as error:
                raise first_error(error) from None
            await self.tie_snapshot(namespace, found.config, unpacker)
            await self.settle(namespace, name, found.config)
        return config

    async def settle(self, namespace: str, lease: str, descriptor: Descriptor) -> None:
        """Make everything so far durable: layers and blobs are recorded without waiting for the disk each time."""
        await self.database.leases.add_resource(namespace, lease, LeaseResource("content", descriptor.digest))

    async def unpack_fitting(
        self, namespace: str, target: Descriptor, snapshotter: str, platform: Platform, lease: str
    ) -> None:
        """Unpack what of `target` runs on `platform`; nothing of it doing so is fine (an import's other images)."""
        with contextlib.suppress(NotFound):
            await self.unpack(namespace, Image(target.digest, target), snapshotter, platform=platform, lease=lease)

    def unpacker(
        self, namespace: str, snapshotter: str, lease: str, layers: Sequence[Descriptor], config: ImageConfig,
        tracker: Tracker,
    ) -> ImageUnpacker:
        """The layers of one image for one snapshotter; InvalidArgument for layers that cannot be read."""
        for layer in layers:
            documents.check_layer_type(layer.media_type)
        return ImageUnpacker(
            self.database, self.executors, self.pool, namespace, snapshotter, lease, layers, config, tracker,
            scratch=self.scratch, limits=self._limits, sync=self._sync,
        )

    async def layer(
        self, unpacker: ImageUnpacker, index: int, fetcher: BlobFetcher | None, labels: Mapping[str, str]
    ) -> None:
        """Have layer `index` fetched (when there is a fetcher), unpacked and committed."""
        descriptor = unpacker.layers[index]
        key = (unpacker.namespace, unpacker.snapshots.name, unpacker.chain[index])
        known = dict(labels)
        async with self._layers.hold(key):
            if await unpacker.exists(index):
                unpacker.done(index)
                if fetcher is not None:
                    await self.blob(unpacker.namespace, fetcher, descriptor, known)
                return
            if not unpacker.rebase:
                if fetcher is not None:
                    await self.blob(unpacker.namespace, fetcher, descriptor, known)
                await unpacker.unpack_blob(index)
            else:
                async with LayerFollower(unpacker, index, known) as follower:
                    if fetcher is None or not await self.blob(
                        unpacker.namespace, fetcher, descriptor, known, follower
                    ):
                        await self._follow_blob(unpacker, descriptor, follower)
                    await follower.finish()
        await unpacker.label(index)

    async def _follow_blob(self, unpacker: ImageUnpacker, descriptor: Descriptor, follower: LayerFollower) -> None:
        """Unpack a blob that is here already, beside its parents all the same."""
        blob = await self.database.content.reader(unpacker.namespace, descriptor.digest)
        try:
            await follower.begin(blob.fileno(), blob.size)
            await follower.complete(blob.size)
        finally:
            blob.close()

    async def blob(
        self, namespace: str, fetcher: BlobFetcher, descriptor: Descriptor, labels: Mapping[str, str],
        follower: LayerFollower | None = None,
    ) -> bool:
        """Fetch one blob; waits for another pull that fetches the same. False when it was there."""
        async with self._blobs.hold((namespace, descriptor.digest)):
            return await fetcher.fetch(descriptor, labels, follower)

    async def tie_snapshot(self, namespace: str, config: Descriptor, unpacker: ImageUnpacker) -> None:
        """Let the image's config keep its top snapshot alive."""
        if not unpacker.chain:
            return
        label = f"{LABEL_GC_REF_SNAPSHOT}{unpacker.snapshots.name}"
        await self.set_labels(namespace, config.digest, {label: unpacker.chain[-1]})

    async def set_labels(self, namespace: str, digest: str, labels: Mapping[str, str]) -> None:
        """Set labels of a blob where they differ."""
        info = await self.database.content.info(namespace, digest)
        missing = {key: value for key, value in labels.items() if info.labels.get(key) != value}
        if missing:
            await self.database.content.update(
                namespace, dataclasses.replace(info, labels=missing), [f"labels.{key}" for key in missing],
                durable=False,
            )


class _Pull:
    """The state of one pull."""

    def __init__(
        self, puller: Puller, running: RunningPull, parsed: reference.Reference, request: PullRequest, lease: str
    ) -> None:
        self._puller = puller
        self._database = puller.database
        self._namespace = running.namespace
        self._reference = parsed
        self._request = request
        self._lease = lease
        self._tracker = running.tracker
        self._registry = puller.registry(parsed, request)
        self._fetcher = BlobFetcher(
            puller.database, puller.executors, self._registry, running.namespace, lease, running.tracker,
            puller.slots(),
        )
        self._source = {f"{LABEL_DISTRIBUTION_SOURCE}{parsed.hostname}": parsed.path}

    async def run(self) -> Image:
        """All of it."""
        origin = f"OCI Registry ({self._request.reference})"
        self._tracker.say(f"Resolving from {origin}")
        if self._request.unpacks:
            self._puller.pool.warm()
        target, body = await self._registry.resolve()
        name = self._request.name or self._reference.canonical()
        self._tracker.say(f"Pulling from {origin}")
        self._tracker.say("fetching image content", target, name)
        await self._document(target, body, wanted=True)
        image = Image(name, target, dict(self._request.labels))
        if self._request.store:
            image = await store_image(self._database, self._namespace, image)
            self._tracker.say("saved", image.target, image.name)
        else:
            await self._puller.settle(self._namespace, self._lease, target)
        self._tracker.say(f"Completed pull from {origin}")
        return image

    async def _document(self, descriptor: Descriptor, body: bytes | None, *, wanted: bool, depth: int = 0) -> None:
        """Store a manifest or index and what is wanted below it; `wanted` is false for metadata only."""
        if depth > _INDEX_DEPTH:
            raise InvalidArgument(f"image {self._reference.canonical()}: more than {_INDEX_DEPTH} nested indexes")
        self._tracker.add(descriptor)
        data = body if body is not None else await self._read(descriptor)
        document = documents.parse(data, descriptor.media_type, f"manifest {descriptor.digest}")
        children = documents.children(document)
        self._tracker.children(descriptor, children)
        async with asyncio.TaskGroup() as group:
            # Stored while what it names is fetched: the lease keeps both until the image names them.
            group.create_task(self._store(descriptor, data, {**documents.gc_labels(children), **self._source}))
            if isinstance(document, documents.Index):
                chosen = self._choose(descriptor, document)
                for child in chosen:
                    group.create_task(self._document(child, None, wanted=wanted, depth=depth + 1))
                if self._request.all_metadata:
                    for child in document.manifests:
                        if child not in chosen:
                            group.create_task(self._document(child, None, wanted=False, depth=depth + 1))
            else:
                group.create_task(self._image(document, descriptor.platform, wanted=wanted))

    async def _read(self, descriptor: Descriptor) -> bytes:
        try:
            return await self._database.content.read(self._namespace, descriptor.digest, documents.MAX_MANIFEST)
        except NotFound:
            return await self._registry.fetch_manifest(descriptor)

    async def _store(self, descriptor: Descriptor, data: bytes, labels: Mapping[str, str]) -> None:
        """Put a document into the content store, tied to its children."""
        async with self._puller._blobs.hold((self._namespace, descriptor.digest)):
            writer = await self._fetcher.open(dataclasses.replace(descriptor, size=len(data)))
            if writer is not None:
                try:
                    if not writer.shared:
                        await writer.truncate(0)
                        await writer.write(data)
                    with contextlib.suppress(AlreadyExists):
                        await writer.commit(len(data), descriptor.digest, labels, durable=False)
                finally:
                    await writer.close()
                self._tracker.finish(descriptor)
                return
        await self._puller.set_labels(self._namespace, descriptor.digest, labels)
        self._tracker.finish(descriptor, EXISTS)

    def _choose(self, descriptor: Descriptor, index: documents.Index) -> list[Descriptor]:
        if self._request.all_platforms:
            return list(index.manifests)
        chosen: list[Descriptor] = []
        candidates = [entry for entry in index.manifests if entry.media_type in documents.MANIFESTS | documents.INDEXES]
        for platform in self._request.platforms or (platforms.default(),):
            found = platforms.best(platform, candidates)
            if found and found[0] not in chosen:
                chosen.append(found[0])
        if not chosen:
            asked = ", ".join(platforms.describe(p) for p in self._request.platforms or (platforms.default(),))
            offered = ", ".join(sorted({
                platforms.describe(entry.platform) for entry in index.manifests
                if entry.platform is not None and entry.platform.os != "unknown"
            }))
            raise NotFound(
                f"image {self._reference.canonical()}: no match for platform {asked} in manifest {descriptor.digest}, "
                f"it has {offered or 'none'}", kind="image", key=self._reference.canonical(),
            )
        return chosen

    async def _image(self, document: documents.Manifest, platform: Platform | None, *, wanted: bool) -> None:
        """Fetch one platform's config and layers, and unpack them where that is asked for."""
        await self._puller.blob(self._namespace, self._fetcher, document.config, self._source)
        if not wanted:
            return
        unpackers = await self._unpackers(document, platform)
        if not unpackers:
            async with asyncio.TaskGroup() as group:
                for layer in document.layers:
                    group.create_task(self._puller.blob(self._namespace, self._fetcher, layer, self._source))
            return
        for position, unpacker in enumerate(unpackers):
            present = await unpacker.present()
            async with asyncio.TaskGroup() as group:
                for index, layer in enumerate(document.layers):
                    if index >= present:
                        fetcher = None if position else self._fetcher
                        group.create_task(self._puller.layer(unpacker, index, fetcher, self._source))
                    elif not position:
                        group.create_task(self._puller.blob(self._namespace, self._fetcher, layer, self._source))
            await self._puller.tie_snapshot(self._namespace, document.config, unpacker)

    async def _unpackers(self, document: documents.Manifest, platform: Platform | None) -> list[ImageUnpacker]:
        """One for each snapshotter that this manifest is to be unpacked for."""
        if document.config.media_type not in documents.CONFIGS or not self._request.unpacks:
            return []
        data = await self._database.content.read(self._namespace, document.config.digest, documents.MAX_CONFIG)
        config = parse_config(data, f"config {document.config.digest}")
        actual = platform if platform is not None and platform.architecture else config.platform
        found = []
        for wanted, snapshotter in self._request.unpacks:
            if wanted is None and self._request.all_platforms:
                wanted = platforms.default()
            if wanted is not None and actual.architecture and platforms.rank(wanted, actual) is None:
                continue
            found.append(self._puller.unpacker(
                self._namespace, snapshotter or self._puller.default_snapshotter, self._lease, document.layers, config,
                self._tracker,
            ))
        return found


async def store_image(database: Database, namespace: str, image: Image) -> Image:
    """Create the record, or point the one that exists to the new target; labels are added."""
    try:
        return await database.images.create(namespace, image)
    except AlreadyExists:
        paths = ["target", *(f"labels.{key}" for key in image.labels)]
        try:
            return await database.images.update(namespace, image, paths)
        except NotFound:
            return await database.images.create(namespace, image)


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that a group of tasks failed with: the first real one, a cancellation only if there is no other."""
    found: BaseException | None = None
    for error in group.exceptions:
        inner = first_error(error) if isinstance(error, BaseExceptionGroup) else error
        if not isinstance(inner, asyncio.CancelledError):
            return inner
        found = found or inner
    return found or group

