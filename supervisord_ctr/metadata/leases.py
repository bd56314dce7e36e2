"""Leases: what protects objects from garbage collection while it exists."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from supervisord_ctr import filters
from supervisord_ctr.errors import AlreadyExists, InvalidArgument, NotFound, Unimplemented
from supervisord_ctr.metadata.codec import adapt_lease, dump_map, ensure_namespace, load_map
from supervisord_ctr.metadata.engine import Engine, Transaction
from supervisord_ctr.model import Image, Lease, LeaseResource
from supervisord_ctr.names import LABEL_GC_EXPIRE, is_digest


def hold_resource(tx: Transaction, namespace: str, lease: str | None, type: str, id: str) -> bool:  # noqa: A002
    """Put an object under the lease of a request; whether there is one. NotFound for a lease that does not exist."""
    if not lease:
        return False
    if tx.row("SELECT 1 FROM leases WHERE namespace = ? AND id = ?", (namespace, lease)) is None:
        raise NotFound(f'lease "{lease}" does not exist', kind="lease", key=lease)
    tx.execute("INSERT OR IGNORE INTO lease_resources VALUES (?, ?, ?, ?)", (namespace, lease, type, id))
    return True


def release_resource(tx: Transaction, namespace: str, lease: str | None, type: str, id: str) -> None:  # noqa: A002
    """Take an object from the lease of a request, if it is under it."""
    if lease:
        tx.execute(
            "DELETE FROM lease_resources WHERE namespace = ? AND lease = ? AND type = ? AND id = ?",
            (namespace, lease, type, id),
        )


def _delete(tx: Transaction, namespace: str, lease: str) -> bool:
    """Delete a lease with what it holds; whether it was there."""
    found = tx.execute("DELETE FROM leases WHERE namespace = ? AND id = ?", (namespace, lease))
    tx.execute("DELETE FROM lease_resources WHERE namespace = ? AND lease = ?", (namespace, lease))
    return bool(found)


def hold_image(tx: Transaction, namespace: str, lease: str | None, image: Image) -> None:
    """Images are roots by themselves; only one that expires needs the lease."""
    if LABEL_GC_EXPIRE in image.labels:
        hold_resource(tx, namespace, lease, "images", image.name)


def _checked(resource: LeaseResource) -> tuple[str, str]:
    kind, _, rest = resource.type.partition("/")
    if kind in ("content", "ingests", "images"):
        if rest or "/" in resource.type:
            raise InvalidArgument(f"invalid resource type {resource.type}", kind="lease", key=resource.type)
        if kind == "content" and not is_digest(resource.id):
            raise InvalidArgument(f"invalid content resource id {resource.id}", kind="lease", key=resource.id)
    elif kind == "snapshots":
        if resource.type.count("/") != 1 or not rest:
            raise InvalidArgument(f"invalid snapshot resource type {resource.type}", kind="lease", key=resource.type)
    else:
        raise Unimplemented(f"resource type {resource.type} not supported yet", kind="lease", key=resource.type)
    return resource.type, resource.id


class Leases:
    """Leases by namespace and id. `collect` is called for a synchronous delete."""

    def __init__(self, engine: Engine, collect: Callable[[], Awaitable[object]]) -> None:
        self._engine = engine
        self._collect = collect

    async def create(
        self, namespace: str, id: str = "", labels: Mapping[str, str] | None = None, *,  # noqa: A002
        durable: bool = True,
    ) -> Lease:
        """AlreadyExists. An empty id is replaced by a made-up one."""
        chosen = id or f"{time.time_ns() % 1_000_000_000}-{secrets.token_urlsafe(4)}"
        kept = {key: value for key, value in (labels or {}).items() if value}
        created = time.time()

        def work(tx: Transaction) -> Lease:
            ensure_namespace(tx, namespace)
            values = (namespace, chosen, created, dump_map(kept))
            if not tx.execute("INSERT OR IGNORE INTO leases VALUES (?, ?, ?, ?)", values):
                raise AlreadyExists(f'lease "{chosen}": already exists', kind="lease", key=chosen)
            return Lease(chosen, created, kept)

        return await self._engine.write(work, durable=durable)

    async def get(self, namespace: str, id: str) -> Lease:  # noqa: A002
        """NotFound."""
        row = self._engine.row("SELECT created, labels FROM leases WHERE namespace = ? AND id = ?", (namespace, id))
        if row is None:
            raise NotFound(f'lease "{id}": not found', kind="lease", key=id)
        return Lease(id, row[0], load_map(row[1]))

    async def delete(
        self, namespace: str, id: str, *, also: str = "", sync: bool = False, durable: bool = True  # noqa: A002
    ) -> None:
        """NotFound. `also` is another that goes with it if it is there. With `sync`, garbage is collected first."""

        def work(tx: Transaction) -> None:
            if not _delete(tx, namespace, id):
                raise NotFound(f'lease "{id}": not found', kind="lease", key=id)
            if also:
                _delete(tx, namespace, also)
            tx.dirty = True

        await self._engine.write(work, durable=durable)
        if sync:
            await self._collect()

    async def reduce(
        self, namespace: str, id: str, into: str, type: str, labels: Mapping[str, str], *,  # noqa: A002
        sync: bool = False, durable: bool = True,
    ) -> None:
        """Replace lease `id` by `into`, which protects only what is of `type`, beside what it protected before.

        There is no `into` in the end when that is nothing. NotFound. With `sync`, garbage is collected first.
        """

        def work(tx: Transaction) -> None:
            self._require(tx, namespace, id)
            tx.execute(
                "INSERT OR IGNORE INTO lease_resources SELECT namespace, ?, type, id FROM lease_resources "
                "WHERE namespace = ? AND lease = ? AND type = ?", (into, namespace, id, type),
            )
            _delete(tx, namespace, id)
            held = ("SELECT 1 FROM lease_resources WHERE namespace = ? AND lease = ? LIMIT 1", (namespace, into))
            if tx.row(*held) is not None:
                tx.execute(
                    "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)",
                    (namespace, into, time.time(), dump_map(labels)),
                )
            tx.dirty = True

        await self._engine.write(work, durable=durable)
        if sync:
            await self._collect()

    async def add_resource(self, namespace: str, id: str, resource: LeaseResource) -> None:  # noqa: A002
        """NotFound for the lease; InvalidArgument or Unimplemented for a type that leases do not know."""

        def work(tx: Transaction) -> None:
            self._require(tx, namespace, id)
            values = (namespace, id, *_checked(resource))
            if not resource.id:
                raise InvalidArgument("resource id must not be empty", kind="lease", key=resource.type)
            tx.execute("INSERT OR IGNORE INTO lease_resources VALUES (?, ?, ?, ?)", values)

        await self._engine.write(work)

    async def delete_resource(self, namespace: str, id: str, resource: LeaseResource) -> None:  # noqa: A002
        """As `add_resource`; a resource that is not under the lease is fine."""

        def work(tx: Transaction) -> None:
            self._require(tx, namespace, id)
            tx.execute(
                "DELETE FROM lease_resources WHERE namespace = ? AND lease = ? AND type = ? AND id = ?",
                (namespace, id, *_checked(resource)),
            )
            tx.dirty = True

        await self._engine.write(work)

    async def list_resources(self, namespace: str, id: str) -> list[LeaseResource]:  # noqa: A002
        """NotFound for the lease."""
        await self.get(namespace, id)
        rows = self._engine.rows(
            "SELECT type, id FROM lease_resources WHERE namespace = ? AND lease = ? ORDER BY type, id", (namespace, id)
        )
        return [LeaseResource(kind, key) for kind, key in rows]

    async def list(self, namespace: str, filter_texts: Sequence[str] = ()) -> list[Lease]:
        """Those that match (fields id, labels), by id."""
        matching = filters.parse(filter_texts)
        rows = self._engine.rows(
            "SELECT id, created, labels FROM leases WHERE namespace = ? ORDER BY id", (namespace,)
        )
        found = (Lease(key, created, load_map(labels)) for key, created, labels in rows)
        return [lease for lease in found if matching.matches(adapt_lease(lease))]

    @staticmethod
    def _require(tx: Transaction, namespace: str, id: str) -> None:  # noqa: A002
        if tx.row("SELECT 1 FROM leases WHERE namespace = ? AND id = ?", (namespace, id)) is None:
            raise NotFound(f'lease "{id}": not found', kind="lease", key=id)
