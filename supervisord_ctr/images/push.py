"""Push: an image of the store into a repository.

Owns the push half of the distribution protocol: blobs that are there are skipped, blobs that another
repository of the registry is known to have are mounted from it, the others are uploaded whole or in
chunks; documents follow their children, the tag comes last. Source: OCI distribution specification,
"Push".
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urljoin, urlsplit

from supervisord_ctr.aio import Executors
from supervisord_ctr.errors import Error, InvalidArgument, NotFound
from supervisord_ctr.images import manifest as documents
from supervisord_ctr.images import platforms, reference
from supervisord_ctr.images.auth import Anonymous, Credentials
from supervisord_ctr.images.hosts import HostsConfig, RegistryHost
from supervisord_ctr.images.http import HostFailure, Http
from supervisord_ctr.images.progress import EXISTS, UPLOADING, ProgressSink, Tracker
from supervisord_ctr.images.registry import Failures, Registry, retry_delay
from supervisord_ctr.model import Descriptor, Image, Platform
from supervisord_ctr.names import LABEL_DISTRIBUTION_SOURCE

if TYPE_CHECKING:
    from supervisord_ctr.metadata import Database

_TRIES = 3
#: The size of one request, once a registry said that a whole blob is too large for one.
_CHUNK = 8 << 20
_SIDE_BY_SIDE = 4


@dataclass(frozen=True, slots=True)
class PushRequest:
    """What to push where. With `chunk` bytes, blobs go up in pieces of that size; 0 sends each whole, unless the
    registry finds that too large."""

    reference: str
    image: Image
    platforms: tuple[Platform, ...] = ()
    credentials: Credentials = field(default_factory=Anonymous)
    headers: Mapping[str, str] = field(default_factory=dict)
    config_path: str = ""
    default_scheme: str = ""
    chunk: int = 0


class Pusher:
    """Pushes images. Holds nothing of its own. `chunk` is for requests that do not say."""

    def __init__(
        self, database: Database, executors: Executors, http: Http, hosts: HostsConfig, *, chunk: int = 0
    ) -> None:
        self._chunk = chunk
        self._database = database
        self._executors = executors
        self._http = http
        self._hosts = hosts

    async def push(self, namespace: str, request: PushRequest, progress: ProgressSink | None = None) -> None:
        """Push the image; NotFound when content is missing here, the registry's errors with its reason."""
        parsed = reference.parse(request.reference)
        registry = Registry(
            parsed, self._hosts.overridden(request.config_path, request.default_scheme), self._http,
            request.credentials, headers=request.headers,
        )
        hosts = registry.push_hosts()
        if not hosts:
            raise NotFound(f"image {parsed.canonical()}: no host is configured to be pushed to", kind="image")
        tracker = Tracker(request.image.name, progress, UPLOADING)
        target = f"OCI Registry ({request.reference})"
        tracker.say(f"Pushing to {target}")
        tracker.say("pushing content", request.image.target, request.image.name)
        job = _Push(
            self._database, self._executors, registry, hosts[0], namespace, request, tracker,
            request.chunk or self._chunk,
        )
        await job.document(request.image.target, parsed.tag or request.image.target.digest)
        tracker.say("pushed content", request.image.target, request.image.name)
        tracker.say(f"Completed push to {target}", request.image.target)


class _Push:
    """The state of one push to one host."""

    def __init__(
        self, database: Database, executors: Executors, registry: Registry, host: RegistryHost, namespace: str,
        request: PushRequest, tracker: Tracker, chunk: int,
    ) -> None:
        self._chunk = chunk
        self._database = database
        self._executors = executors
        self._registry = registry
        self._host = host
        self._namespace = namespace
        self._request = request
        self._tracker = tracker
        self._scope = f"repository:{registry.reference.path}:pull,push"
        self._slots = asyncio.Semaphore(_SIDE_BY_SIDE)
        self._done: dict[str, asyncio.Lock] = {}
        self._pushed: set[str] = set()

    async def document(self, descriptor: Descriptor, name: str) -> None:
        """Push a manifest or index after everything below it, under `name` (a tag or its digest)."""
        self._tracker.add(descriptor)
        data = await self._database.content.read(self._namespace, descriptor.digest, documents.MAX_MANIFEST)
        document = documents.parse(data, descriptor.media_type, f"manifest {descriptor.digest}")
        children = documents.children(document)
        self._tracker.children(descriptor, children)
        if isinstance(document, documents.Index):
            for child in children:
                if platforms.matches_any(self._request.platforms, child.platform):
                    await self.document(child, child.digest)
        else:
            results = await asyncio.gather(
                *(self._blob(child) for child in children if not documents.is_foreign(child.media_type)),
                return_exceptions=True,
            )
            for result in results:
                if isinstance(result, BaseException):
                    raise result
        await self._put_document(descriptor, data, name)
        self._tracker.finish(descriptor)

    async def _put_document(self, descriptor: Descriptor, data: bytes, name: str) -> None:
        failures = Failures(f"push manifest {descriptor.digest} to {self._registry.reference.name}")
        for attempt in range(_TRIES):
            try:
                async with self._registry.call(
                    self._host, "PUT", f"manifests/{name}", scope=self._scope, data=data,
                    headers={"Content-Type": descriptor.media_type},
                ) as response:
                    if response.status in (200, 201, 202, 204):
                        return
                    failures.add(self._host, response.status, await self._registry.describe(response))
                    if response.status < 500 and response.status != 429:
                        raise _refused(failures, response.status)
            except HostFailure as failure:
                failures.add(self._host, 0, failure.reason)
            await asyncio.sleep(retry_delay(attempt))
        raise failures.error()

    # Blobs.

    async def _blob(self, descriptor: Descriptor) -> None:
        lock = self._done.setdefault(descriptor.digest, asyncio.Lock())
        async with lock:
            if descriptor.digest in self._pushed:
                return
            self._tracker.add(descriptor)
            async with self._slots:
                await self._try_blob(descriptor)
            self._pushed.add(descriptor.digest)

    async def _try_blob(self, descriptor: Descriptor) -> None:
        failures = Failures(f"push blob {descriptor.digest} to {self._registry.reference.name}")
        for attempt in range(_TRIES):
            try:
                if await self._registry.has_blob(self._host, descriptor):
                    self._tracker.finish(descriptor, EXISTS)
                    return
                location, least = await self._start_upload(descriptor, failures)
                if location:
                    await self._upload(descriptor, location, least, failures)
                self._tracker.finish(descriptor)
                return
            except HostFailure as failure:
                failures.add(self._host, 0, failure.reason)
            except _TryAgain:
                pass
            await asyncio.sleep(retry_delay(attempt))
        raise failures.error()

    async def _mount_source(self, digest: str) -> str:
        """Another repository of the same registry that is known to have the blob."""
        info = await self._database.content.info(self._namespace, digest)
        told = info.labels.get(f"{LABEL_DISTRIBUTION_SOURCE}{self._registry.reference.hostname}", "")
        for repository in told.split(","):
            if repository and repository != self._registry.reference.path:
                return repository
        return ""

    async def _start_upload(self, descriptor: Descriptor, failures: Failures) -> tuple[str, int]:
        """The upload's URL and the least that the registry takes at once; "" when the blob could be mounted instead."""
        source = await self._mount_source(descriptor.digest)
        attempts: list[tuple[list[tuple[str, str]], str]] = [([], self._scope)]
        if source:
            attempts.insert(0, (
                [("mount", descriptor.digest), ("from", source)], f"{self._scope} repository:{source}:pull"
            ))
        status = 0
        for params, scope in attempts:
            async with self._registry.call(
                self._host, "POST", "blobs/uploads/", scope=scope, params=params, data=b"", redirects=False
            ) as response:
                status = response.status
                if status == 201:
                    return "", 0
                location = response.headers.get("Location", "")
                if status in (200, 202, 204) and location:
                    least = response.headers.get("OCI-Chunk-Min-Length", "")
                    return urljoin(str(response.url), location), int(least) if least.isdigit() else 0
                failures.add(self._host, status, await self._registry.describe(response))
        raise _refused(failures, status)

    async def _upload(self, descriptor: Descriptor, location: str, least: int, failures: Failures) -> None:
        blob = await self._database.content.reader(self._namespace, descriptor.digest)
        try:
            if self._chunk:
                position = 0
                while position < blob.size:
                    data = await blob.read_at(max(self._chunk, least), position)
                    location = await self._patch(location, data, position, failures)
                    position += len(data)
                    self._tracker.update(descriptor, position)
                await self._finish(location, descriptor, b"", failures)
            else:
                # The file itself and not its name, which may go before all is sent.
                await self._finish(location, descriptor, lambda: _reopened(blob.fileno()), failures)
        finally:
            blob.close()

    async def _patch(self, location: str, data: bytes, position: int, failures: Failures) -> str:
        headers = {
            "Content-Type": "application/octet-stream", "Content-Range": f"{position}-{position + len(data) - 1}",
        }
        async with self._send("PATCH", location, data, headers, None) as response:
            if response.status in (200, 202, 204):
                return str(urljoin(str(response.url), response.headers.get("Location", location)))
            failures.add(self._host, response.status, await self._registry.describe(response))
            raise _refused(failures, response.status)

    async def _finish(self, location: str, descriptor: Descriptor, body: Any, failures: Failures) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        async with self._send("PUT", location, body, headers, descriptor.digest) as response:
            if response.status in (200, 201, 202, 204):
                return
            failures.add(self._host, response.status, await self._registry.describe(response))
            if response.status == 413 and not self._chunk:
                self._chunk = _CHUNK
                raise _TryAgain
            raise _refused(failures, response.status)

    def _send(self, method: str, location: str, body: Any, headers: dict[str, str], digest: str | None) -> Any:
        """A request to an upload's URL, with credentials only where it is the registry's own (S15)."""
        parts = urlsplit(location)
        if parts.scheme not in ("http", "https"):
            raise InvalidArgument(f"registry {self._host.url}: upload location {location[:200]!r} is not HTTP")
        if digest is not None:
            location += ("&" if parts.query else "?") + f"digest={digest}"
        if f"{parts.scheme}://{parts.netloc}" == self._registry.http.url(self._host):
            return self._registry.call(
                self._host, method, "", url=location, scope=self._scope, data=body, headers=headers, redirects=False
            )
        body = body() if callable(body) else body
        return self._registry.http.request(method, location, data=body, headers=headers, redirects=False)


def _reopened(fd: int) -> BinaryIO:
    """The file of a descriptor from its start, with a position of its own; whoever sends it closes it."""
    return open(f"/proc/self/fd/{fd}", "rb")


class _TryAgain(Exception):
    """The registry may accept it next time."""


def _refused(failures: Failures, status: int) -> Exception:
    """What to raise for an error status: another try for passing troubles, else the error."""
    if status >= 500 or status in (408, 429):
        return _TryAgain()
    error: Error = failures.error()
    if status == 401:
        error = type(error)(f"push access denied, or it needs authorization: {error.message}")
    return error

