"""The stores of the metadata room. (Interface; being filled.)

Every method takes the namespace first; mutators take `lease`, the id of the lease that shall protect
what they create. All stores raise NotFound, AlreadyExists, InvalidArgument and FailedPrecondition
where containerd's metadata does, and publish the events it publishes, after the state is durable.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from google.protobuf.message import Message

from supervisord_ctr.aio import Executors
from supervisord_ctr.content import IngestWriter, LocalContent
from supervisord_ctr.metadata.engine import Engine
from supervisord_ctr.model import (
    Container,
    ContentInfo,
    Image,
    IngestStatus,
    Lease,
    LeaseResource,
    Mount,
    Namespace,
    Sandbox,
    SnapshotInfo,
    Usage,
)
from supervisord_ctr.snapshots import Snapshotter

#: Tells of an event: namespace, topic, message.
Publish: TypeAlias = Callable[[str, str, Message], None]


class Namespaces:
    """Tenancies; they also come into being when something is first created in them."""

    async def get(self, name: str) -> Namespace: ...  # type: ignore[empty-body]
    async def list(self) -> list[Namespace]: ...  # type: ignore[empty-body]
    async def create(self, name: str, labels: Mapping[str, str] | None = None) -> Namespace: ...  # type: ignore[empty-body]
    async def update(self, name: str, labels: Mapping[str, str], fieldpaths: Sequence[str] = ()) -> Namespace: ...  # type: ignore[empty-body]
    async def delete(self, name: str) -> None:
        """FailedPrecondition while anything is in it; the message lists what."""


class Containers:
    """`update` fieldpaths: labels, labels.KEY, spec, extensions, extensions.KEY, image, snapshotkey; none = all mutable."""

    async def get(self, namespace: str, id: str) -> Container: ...  # type: ignore[empty-body] # noqa: A002
    async def list(self, namespace: str, filters: Sequence[str] = ()) -> list[Container]: ...  # type: ignore[empty-body]
    async def create(self, namespace: str, container: Container) -> Container: ...  # type: ignore[empty-body]
    async def update(self, namespace: str, container: Container, fieldpaths: Sequence[str] = ()) -> Container: ...  # type: ignore[empty-body]
    async def delete(self, namespace: str, id: str) -> None: ...  # noqa: A002


class Images:
    async def get(self, namespace: str, name: str) -> Image: ...  # type: ignore[empty-body]
    async def list(self, namespace: str, filters: Sequence[str] = ()) -> list[Image]: ...  # type: ignore[empty-body]
    async def create(self, namespace: str, image: Image) -> Image: ...  # type: ignore[empty-body]
    async def update(self, namespace: str, image: Image, fieldpaths: Sequence[str] = ()) -> Image: ...  # type: ignore[empty-body]
    async def delete(self, namespace: str, name: str, *, target_digest: str = "", sync: bool = False) -> None:
        """With `sync`, garbage is collected before it returns."""


class BlobReader:
    size: int
    path: Path

    async def read_at(self, count: int, offset: int) -> bytes: ...  # type: ignore[empty-body]
    def fileno(self) -> int: ...  # type: ignore[empty-body]
    def close(self) -> None: ...


class ContentWriter:
    """One ingest in a namespace. `blocking` is the underlying writer for a one-pass thread (write/digest/offset only;
    commit through this object)."""

    ref: str

    @property
    def offset(self) -> int: ...  # type: ignore[empty-body]
    @property
    def blocking(self) -> IngestWriter: ...  # type: ignore[empty-body]
    async def write(self, data: bytes) -> int: ...  # type: ignore[empty-body]
    async def truncate(self, size: int) -> None: ...
    async def status(self) -> IngestStatus: ...  # type: ignore[empty-body]
    async def commit(self, size: int = 0, expected: str = "", labels: Mapping[str, str] | None = None) -> str: ...  # type: ignore[empty-body]
    async def close(self) -> None: ...


class Content:
    async def info(self, namespace: str, digest: str) -> ContentInfo: ...  # type: ignore[empty-body]
    async def update(self, namespace: str, info: ContentInfo, fieldpaths: Sequence[str] = ()) -> ContentInfo: ...  # type: ignore[empty-body]
    async def walk(self, namespace: str, filters: Sequence[str] = ()) -> list[ContentInfo]: ...  # type: ignore[empty-body]
    async def delete(self, namespace: str, digest: str) -> None: ...
    async def reader(self, namespace: str, digest: str) -> BlobReader: ...  # type: ignore[empty-body]
    async def read(self, namespace: str, digest: str, limit: int = 4 << 20) -> bytes: ...  # type: ignore[empty-body]
    async def writer(  # type: ignore[empty-body]
        self, namespace: str, ref: str, *, size: int = 0, expected: str = "", lease: str | None = None
    ) -> ContentWriter:
        """AlreadyExists when `expected` is in the namespace (it joins the lease); a blob of another namespace is shared:
        the writer then stands at its end and `commit` costs nothing."""
    async def status(self, namespace: str, ref: str) -> IngestStatus: ...  # type: ignore[empty-body]
    async def statuses(self, namespace: str, filters: Sequence[str] = ()) -> list[IngestStatus]: ...  # type: ignore[empty-body]
    async def abort(self, namespace: str, ref: str, *, lease: str | None = None) -> None: ...


class NamespacedSnapshotter:
    """A snapshotter seen from a namespace: as `snapshots.Snapshotter`, namespace first."""

    name: str
    capabilities: frozenset[str]

    async def stat(self, namespace: str, key: str) -> SnapshotInfo: ...  # type: ignore[empty-body]
    async def update(self, namespace: str, info: SnapshotInfo, fieldpaths: Sequence[str] = ()) -> SnapshotInfo: ...  # type: ignore[empty-body]
    async def usage(self, namespace: str, key: str) -> Usage: ...  # type: ignore[empty-body]
    async def mounts(self, namespace: str, key: str) -> tuple[Mount, ...]: ...  # type: ignore[empty-body]
    async def prepare(  # type: ignore[empty-body]
        self, namespace: str, key: str, parent: str = "", labels: Mapping[str, str] | None = None, *,
        lease: str | None = None,
    ) -> tuple[Mount, ...]: ...
    async def view(  # type: ignore[empty-body]
        self, namespace: str, key: str, parent: str = "", labels: Mapping[str, str] | None = None, *,
        lease: str | None = None,
    ) -> tuple[Mount, ...]: ...
    async def commit(
        self, namespace: str, name: str, key: str, labels: Mapping[str, str] | None = None, *,
        parent: str | None = None, lease: str | None = None,
    ) -> None: ...
    async def remove(self, namespace: str, key: str, *, lease: str | None = None) -> None: ...
    async def walk(self, namespace: str, filters: Sequence[str] = ()) -> list[SnapshotInfo]: ...  # type: ignore[empty-body]
    async def cleanup(self) -> int: ...  # type: ignore[empty-body]
    async def upper_dir(self, namespace: str, key: str) -> Path | None: ...


class Leases:
    async def create(  # type: ignore[empty-body]
        self, namespace: str, id: str = "", labels: Mapping[str, str] | None = None  # noqa: A002
    ) -> Lease:
        """An empty id is replaced by a made-up one."""
    async def get(self, namespace: str, id: str) -> Lease: ...  # type: ignore[empty-body] # noqa: A002
    async def list(self, namespace: str, filters: Sequence[str] = ()) -> list[Lease]: ...  # type: ignore[empty-body]
    async def delete(self, namespace: str, id: str, *, sync: bool = False) -> None: ...  # noqa: A002
    async def add_resource(self, namespace: str, id: str, resource: LeaseResource) -> None: ...  # noqa: A002
    async def delete_resource(self, namespace: str, id: str, resource: LeaseResource) -> None: ...  # noqa: A002
    async def list_resources(self, namespace: str, id: str) -> list[LeaseResource]: ...  # type: ignore[empty-body] # noqa: A002


class Sandboxes:
    """`update` fields: labels, labels.KEY, extensions, extensions.KEY, runtime, spec; none = all."""

    async def get(self, namespace: str, id: str) -> Sandbox: ...  # type: ignore[empty-body] # noqa: A002
    async def list(self, namespace: str, filters: Sequence[str] = ()) -> list[Sandbox]: ...  # type: ignore[empty-body]
    async def create(self, namespace: str, sandbox: Sandbox) -> Sandbox: ...  # type: ignore[empty-body]
    async def update(self, namespace: str, sandbox: Sandbox, fields: Sequence[str] = ()) -> Sandbox: ...  # type: ignore[empty-body]
    async def delete(self, namespace: str, id: str) -> None: ...  # noqa: A002


class CriRecords:
    """Durable records of the Kubernetes face; the value is opaque here."""

    async def put(self, kind: str, id: str, value: bytes) -> None: ...  # noqa: A002
    async def get(self, kind: str, id: str) -> bytes: ...  # type: ignore[empty-body] # noqa: A002
    async def list(self, kind: str) -> list[tuple[str, bytes]]: ...  # type: ignore[empty-body]
    async def delete(self, kind: str, id: str) -> None:  # noqa: A002
        """A record that is not there is fine."""


class Addresses:
    """The address table of the embedded bridge: one row per leased address."""

    async def lease(self, network: str, owner: str) -> str:  # type: ignore[empty-body]
        """The owner's address in `network` (CIDR text, e.g. "10.88.0.0/16"), the same again for the same owner.
        The first host address is the gateway's and never given out. ResourceExhausted when none is free."""
    async def release(self, network: str, owner: str) -> None: ...
    async def list(self, network: str) -> list[tuple[str, str]]:  # type: ignore[empty-body]
        """(address, owner) pairs."""


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a collection removed (or would remove, after a dry run); lists are (namespace, kind, key)."""

    removed: tuple[tuple[str, str, str], ...]
    errors: tuple[str, ...]
    seconds: float
    dry_run: bool


class Collector:
    async def collect(self, *, dry_run: bool = False) -> GcReport: ...  # type: ignore[empty-body]
    def schedule(self) -> None:
        """A mutation happened that may have left garbage: collect soon."""


class Database:
    """All stores over one engine, one content store and the snapshotters."""

    def __init__(
        self,
        engine: Engine,
        content: LocalContent,
        snapshotters: Mapping[str, Snapshotter],
        publish: Publish,
        executors: Executors,
    ) -> None:
        self.namespaces = Namespaces()
        self.containers = Containers()
        self.images = Images()
        self.content = Content()
        self.leases = Leases()
        self.sandboxes = Sandboxes()
        self.cri = CriRecords()
        self.addresses = Addresses()
        self.gc = Collector()

    async def open(self) -> None:
        """Open the file (migrating, repairing), the snapshotters, and start the collector."""

    async def close(self) -> None:
        """Stop the collector, close the snapshotters and the file."""

    def snapshotter(self, name: str) -> NamespacedSnapshotter:
        """InvalidArgument when no such snapshotter is loaded."""
        raise NotImplementedError

    @property
    def snapshotters(self) -> Mapping[str, NamespacedSnapshotter]:
        raise NotImplementedError


_unused = AsyncIterator
