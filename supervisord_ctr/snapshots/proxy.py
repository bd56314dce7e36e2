"""The proxy snapshotter: one that another process serves over containerd's snapshots API.

Owns the translation between the `Snapshotter` interface and the messages. How they travel is a
`Remote`, which an upper floor builds over gRPC; errors arrive as `errors.*` already.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from google.protobuf import empty_pb2
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from supervisord_ctr.api.services.snapshots.v1 import snapshots_pb2 as pb
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.errors import Unimplemented
from supervisord_ctr.model import Mount, SnapshotInfo, SnapshotKind, Usage

M = TypeVar("M", bound=Message)

_SERVICE = "/containerd.services.snapshots.v1.Snapshots"


class Remote(Protocol):
    """Carries calls to another process; raises `errors.*`, Unavailable when it cannot be reached."""

    async def call(self, method: str, request: Message, response: type[M], *, namespace: str) -> M:
        """One unary call; `method` is "/SERVICE/METHOD"."""
        ...

    def stream(self, method: str, request: Message, response: type[M], *, namespace: str) -> AsyncIterator[M]:
        """One call that answers with a stream."""
        ...

    async def close(self) -> None:
        """Give the connection up."""
        ...


class ProxySnapshotter:
    """A snapshotter of another process; `remote_name` is what it is called there.

    Calls carry the namespace that the key begins with (metadata's keys are NAMESPACE/NUMBER/KEY). A
    remote may keep namespaces apart (ours and containerd do) or not know them, so `walk` asks in each
    that `namespaces` names, in those seen so far and in `namespace`, and takes every key once.
    """

    def __init__(
        self,
        name: str,
        remote: Remote,
        *,
        remote_name: str = "",
        capabilities: frozenset[str] = frozenset(),
        namespace: str = "default",
    ) -> None:
        self.name = name
        self.capabilities = capabilities
        self._remote = remote
        self._remote_name = remote_name or name
        self._namespace = namespace
        self._seen: set[str] = set()
        self.namespaces: Callable[[], Iterable[str]] = tuple

    async def _call(self, method: str, key: str, request: Message, response: type[M]) -> M:
        namespace = self._namespace
        if key.count("/") >= 2:
            namespace = key.partition("/")[0]
            self._seen.add(namespace)
        return await self._remote.call(f"{_SERVICE}/{method}", request, response, namespace=namespace)

    async def open(self, *, adopt: bool = False) -> None:
        """Nothing to do: the connection is made by the first call, and made again when it breaks."""

    async def close(self) -> None:
        """Give the connection up."""
        await self._remote.close()

    async def stat(self, key: str) -> SnapshotInfo:
        """See `Snapshotter.stat`."""
        request = pb.StatSnapshotRequest(snapshotter=self._remote_name, key=key)
        return _info((await self._call("Stat", key, request, pb.StatSnapshotResponse)).info)

    async def update(self, info: SnapshotInfo, fieldpaths: Sequence[str] = ()) -> SnapshotInfo:
        """See `Snapshotter.update`."""
        request = pb.UpdateSnapshotRequest(
            snapshotter=self._remote_name, info=pb.Info(name=info.name, labels=dict(info.labels))
        )
        request.update_mask.paths.extend(fieldpaths)
        return _info((await self._call("Update", info.name, request, pb.UpdateSnapshotResponse)).info)

    async def usage(self, key: str) -> Usage:
        """See `Snapshotter.usage`."""
        request = pb.UsageRequest(snapshotter=self._remote_name, key=key)
        found = await self._call("Usage", key, request, pb.UsageResponse)
        return Usage(found.size, found.inodes)

    async def mounts(self, key: str) -> tuple[Mount, ...]:
        """See `Snapshotter.mounts`."""
        request = pb.MountsRequest(snapshotter=self._remote_name, key=key)
        return _mounts((await self._call("Mounts", key, request, pb.MountsResponse)).mounts)

    async def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> tuple[Mount, ...]:
        """See `Snapshotter.prepare`."""
        request = pb.PrepareSnapshotRequest(
            snapshotter=self._remote_name, key=key, parent=parent, labels=dict(labels or {})
        )
        return _mounts((await self._call("Prepare", key, request, pb.PrepareSnapshotResponse)).mounts)

    async def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> tuple[Mount, ...]:
        """See `Snapshotter.view`."""
        request = pb.ViewSnapshotRequest(
            snapshotter=self._remote_name, key=key, parent=parent, labels=dict(labels or {})
        )
        return _mounts((await self._call("View", key, request, pb.ViewSnapshotResponse)).mounts)

    async def commit(
        self, name: str, key: str, labels: Mapping[str, str] | None = None, *, parent: str | None = None
    ) -> None:
        """See `Snapshotter.commit`."""
        request = pb.CommitSnapshotRequest(
            snapshotter=self._remote_name, name=name, key=key, labels=dict(labels or {}), parent=parent or ""
        )
        await self._call("Commit", key, request, empty_pb2.Empty)

    async def remove(self, key: str) -> None:
        """See `Snapshotter.remove`."""
        await self._call(
            "Remove", key, pb.RemoveSnapshotRequest(snapshotter=self._remote_name, key=key), empty_pb2.Empty
        )

    async def walk(self, filter_texts: Sequence[str] = ()) -> list[SnapshotInfo]:
        """See `Snapshotter.walk`."""
        request = pb.ListSnapshotsRequest(snapshotter=self._remote_name, filters=filter_texts)
        found: dict[str, SnapshotInfo] = {}
        for namespace in {self._namespace, *self._seen, *self.namespaces()}:
            async for answer in self._remote.stream(
                f"{_SERVICE}/List", request, pb.ListSnapshotsResponse, namespace=namespace
            ):
                for info in answer.info:
                    found[info.name] = _info(info)
        return list(found.values())

    async def cleanup(self) -> int:
        """See `Snapshotter.cleanup`; a remote that does not know the call has nothing to clean."""
        try:
            await self._call("Cleanup", "", pb.CleanupRequest(snapshotter=self._remote_name), empty_pb2.Empty)
        except Unimplemented:
            pass
        return 0

    def account(self, key: str, usage: Usage) -> None:
        """Without effect: the other process measures for itself."""

    def upper_dir(self, key: str) -> Path | None:
        """None: only its mounts say where its files are."""
        return None


def _seconds(value: Timestamp) -> float:
    return float(value.seconds) + value.nanos / 1e9


def _info(message: pb.Info) -> SnapshotInfo:
    return SnapshotInfo(
        message.name, message.parent, SnapshotKind(message.kind), _seconds(message.created_at),
        _seconds(message.updated_at), dict(message.labels),
    )


def _mounts(messages: Sequence[types_pb2.Mount]) -> tuple[Mount, ...]:
    return tuple(Mount(m.type, m.source, tuple(m.options), m.target) for m in messages)
