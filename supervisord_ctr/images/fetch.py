"""Fetch: one blob from the hosts that serve it into the content store, however often the line drops.

Owns retries, resumption and verification (P2): bytes are appended to the ingest as they come and stay
there whatever happens; a host that answers a range wrongly is not believed; a blob whose digest does
not fit is dropped and asked for once more from the start. Hands the growing file to whoever unpacks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from supervisord_ctr import faults
from supervisord_ctr.aio import Executors
from supervisord_ctr.errors import AlreadyExists, FailedPrecondition, NotFound, Unauthenticated, Unavailable
from supervisord_ctr.images.hosts import PULL, RegistryHost
from supervisord_ctr.images.http import HostFailure
from supervisord_ctr.images.manifest import ref_key
from supervisord_ctr.images.progress import COMPLETE, EXISTS, Tracker
from supervisord_ctr.images.registry import BlobRefused, Failures, Registry, retry_delay
from supervisord_ctr.model import Descriptor
from supervisord_ctr.names import check_digest

if TYPE_CHECKING:
    import aiohttp

    from supervisord_ctr.metadata import Database
    from supervisord_ctr.metadata.content import ContentWriter

log = logging.getLogger(__name__)

RECEIVED = faults.declare("pull.received", "a piece of a blob is in its ingest, the next one is not")
COMPLETED = faults.declare("pull.completed", "a blob is complete in its ingest and not committed")

#: Tries altogether for one blob, however much progress each makes.
_MAX_TRIES = 200
#: Seconds to wait for another writer of the same blob that does not get on.
_LOCKED = 0.2


class Follower(Protocol):
    """Unpacks a blob while it arrives."""

    async def begin(self, fd: int, offset: int) -> None:
        """The blob grows in `fd`; `offset` bytes are there. Called again when it starts over."""
        ...

    def grown(self, size: int) -> None:
        """So many bytes are there now."""
        ...

    async def complete(self, size: int) -> None:
        """All bytes are there; waits until they are unpacked, so that errors come before the commit."""
        ...


class BlobFetcher:
    """Fetches the blobs of one pull. `slots` bounds how many download side by side."""

    def __init__(
        self, database: Database, executors: Executors, registry: Registry, namespace: str, lease: str,
        tracker: Tracker, slots: asyncio.Semaphore,
    ) -> None:
        self._database = database
        self._executors = executors
        self._registry = registry
        self._namespace = namespace
        self._lease = lease
        self._tracker = tracker
        self._slots = slots

    async def open(self, descriptor: Descriptor) -> ContentWriter | None:
        """A writer for the blob, None when the namespace has it (it joined the lease). Waits for other writers."""
        while True:
            try:
                return await self._database.content.writer(
                    self._namespace, ref_key(descriptor), size=descriptor.size, expected=descriptor.digest,
                    lease=self._lease, keep=True,
                )
            except AlreadyExists:
                return None
            except Unavailable:
                # Another client writes the same blob; its bytes are as good as ours.
                await asyncio.sleep(_LOCKED)

    async def fetch(
        self, descriptor: Descriptor, labels: Mapping[str, str], follower: Follower | None = None
    ) -> bool:
        """Have the blob committed with `labels`; False when it was there already (`follower` is not asked then).

        The error of the registry, FailedPrecondition when what it sends has another digest, ResourceExhausted when
        the disk is full; what arrived stays for the next pull.
        """
        check_digest(descriptor.digest)
        self._tracker.add(descriptor)
        writer = await self.open(descriptor)
        if writer is None:
            self._tracker.finish(descriptor, EXISTS)
            return False
        try:
            if not writer.shared:
                async with self._slots:
                    await self._download(writer, descriptor, follower)
                faults.point(COMPLETED)
                await self._settled(writer, descriptor, follower)
            with contextlib.suppress(AlreadyExists):
                await writer.commit(descriptor.size, descriptor.digest, labels, durable=False)
        finally:
            await writer.close()
        self._tracker.finish(descriptor, COMPLETE)
        return not writer.shared

    async def _settled(self, writer: ContentWriter, descriptor: Descriptor, follower: Follower | None) -> None:
        """Bring the bytes to disk while the rest of them is unpacked."""
        if follower is None:
            return
        results = await asyncio.gather(
            self._executors.run_io(writer.blocking.settle, descriptor.size), follower.complete(descriptor.size),
            return_exceptions=True,
        )
        for result in reversed(results):
            if isinstance(result, BaseException):
                raise result

    async def _download(self, writer: ContentWriter, descriptor: Descriptor, follower: Follower | None) -> None:
        what = f"blob {descriptor.digest} of {self._registry.reference.name}"
        for again in (True, False):
            failures = self._registry.failures(what)
            if follower is not None:
                await follower.begin(writer.blocking.fileno(), writer.offset)
            if not await self._from_hosts(writer, descriptor, follower, failures):
                raise failures.error()
            digest = writer.digest()
            if digest == descriptor.digest:
                return
            await writer.truncate(0)
            if not again:
                with contextlib.suppress(NotFound):
                    await self._database.content.abort(self._namespace, writer.ref)
                raise FailedPrecondition(
                    f"{what}: unexpected digest {digest} of what was sent", kind="content", key=descriptor.digest
                )
            log.warning("%s: wrong digest %s, starting over", what, digest)

    async def _from_hosts(
        self, writer: ContentWriter, descriptor: Descriptor, follower: Follower | None, failures: Failures
    ) -> bool:
        if writer.offset >= descriptor.size:
            return True
        for host in self._registry.hosts(PULL):
            if await self._from_host(host, writer, descriptor, follower, failures):
                return True
        return False

    async def _from_host(
        self, host: RegistryHost, writer: ContentWriter, descriptor: Descriptor, follower: Follower | None,
        failures: Failures,
    ) -> bool:
        """Try one host until the blob is complete or the host is not worth another try."""
        fruitless = 0
        for _ in range(_MAX_TRIES):
            before = writer.offset
            retry_after: str | None = None
            try:
                async with self._registry.open_blob(host, descriptor, before) as (start, response):
                    await self._receive(response, start, writer, descriptor, follower)
                if writer.offset == descriptor.size:
                    return True
                failures.add(host, 0, f"the connection ended after {writer.offset} of {descriptor.size} bytes")
            except HostFailure as failure:
                self._registry.note_failure(host, failures, failure)
                if failure.lasting and writer.offset == before:
                    return False
            except BlobRefused as refused:
                failures.add(host, refused.status, refused.reason)
                if refused.status == 416 and before:
                    await self._start_over(writer, follower)
                elif not refused.transient:
                    return False
                retry_after = refused.retry_after
            except (Unauthenticated, Unavailable) as error:
                failures.add(host, 401 if isinstance(error, Unauthenticated) else 0, error.message)
                return False
            fruitless = 0 if writer.offset > before else fruitless + 1
            if fruitless >= self._registry.retries:
                return False
            await asyncio.sleep(retry_delay(fruitless, retry_after))
        return False

    async def _start_over(self, writer: ContentWriter, follower: Follower | None) -> None:
        await writer.truncate(0)
        if follower is not None:
            await follower.begin(writer.blocking.fileno(), 0)

    async def _receive(
        self, response: aiohttp.ClientResponse, start: int, writer: ContentWriter, descriptor: Descriptor,
        follower: Follower | None,
    ) -> None:
        """Append the answer's bytes; those before the writer's offset (Range was ignored) are dropped."""
        import aiohttp

        drop = writer.offset - start
        clock = asyncio.get_running_loop().time
        timeouts = self._registry.http.timeouts
        since, received = clock(), 0
        write = writer.blocking.write
        run_io: Callable[..., Awaitable[object]] = self._executors.run_io

        async def keep(part: bytes) -> None:
            nonlocal drop
            if drop:
                part, drop = part[drop:], max(0, drop - len(part))
                if not part:
                    return
            if writer.offset + len(part) > descriptor.size:
                raise HostFailure(f"sends more than the {descriptor.size} bytes of the blob", lasting=True)
            await run_io(write, part)
            faults.point(RECEIVED)
            if follower is not None:
                follower.grown(writer.offset)
            self._tracker.update(descriptor, writer.offset)

        try:
            async for part in response.content.iter_any():
                received += len(part)
                now = clock()
                if now - since > timeouts.rate_window:
                    if received < timeouts.rate * (now - since):
                        raise HostFailure(f"sends less than {timeouts.rate} bytes a second")
                    since, received = now, 0
                await keep(part)
        except TimeoutError as error:
            raise HostFailure(f"sent nothing for {timeouts.stall:g} s") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            # What came before the break is still buffered; it need not be sent again.
            await keep(response.content._read_nowait(-1))
            raise HostFailure(f"the connection broke after {writer.offset} of {descriptor.size} bytes") from error
