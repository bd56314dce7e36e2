"""Namespaces: the tenancies of the API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from supervisord_ctr.api.events import events_pb2
from supervisord_ctr.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from supervisord_ctr.metadata.codec import check_namespace, checked_labels, dump_map, load_map
from supervisord_ctr.metadata.engine import Engine, Transaction
from supervisord_ctr.model import Namespace
from supervisord_ctr.names import check_label

#: Tables whose rows must be gone before their namespace may go, with the word for the message.
_HOLDING = (("images", "images"), ("blobs", "blobs"), ("containers", "containers"))
#: Tables whose rows go with it.
_GOING = ("leases", "lease_resources", "ingests", "sandboxes", "activations", "snapshots")


class Namespaces:
    """Tenancies; they also come into being when something is first created in them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def get(self, name: str) -> Namespace:
        """The namespace; one that does not exist has no labels and is no error, as in containerd."""
        row = self._engine.row("SELECT labels FROM namespaces WHERE name = ?", (name,))
        return Namespace(name, load_map(row[0]) if row else {})

    async def exists(self, name: str) -> bool:
        """Whether anything was ever created in it (and it was not deleted)."""
        return self._engine.row("SELECT 1 FROM namespaces WHERE name = ?", (name,)) is not None

    async def list(self) -> list[Namespace]:
        """All, by name."""
        rows = self._engine.rows("SELECT name, labels FROM namespaces ORDER BY name")
        return [Namespace(name, load_map(labels)) for name, labels in rows]

    async def create(self, name: str, labels: Mapping[str, str] | None = None) -> Namespace:
        """AlreadyExists, also for one that came into being by itself."""
        check_namespace(name)
        kept = checked_labels(labels, "namespace.labels")

        def work(tx: Transaction) -> Namespace:
            changed = tx.execute("INSERT OR IGNORE INTO namespaces VALUES (?, ?)", (name, dump_map(kept)))
            if not changed:
                raise AlreadyExists(f'namespace "{name}": already exists', kind="namespace", key=name)
            tx.event(name, "/namespaces/create", events_pb2.NamespaceCreate(name=name, labels=kept))
            return Namespace(name, kept)

        return await self._engine.write(work)

    async def update(self, name: str, labels: Mapping[str, str], fieldpaths: Sequence[str] = ()) -> Namespace:
        """Set labels: all of them, or those that the paths "labels.KEY" name; an empty value removes one.

        Other paths, "labels" alone among them, are InvalidArgument.
        """
        check_namespace(name)
        for path in fieldpaths:
            if not path.startswith("labels."):
                raise InvalidArgument(f'cannot update "{path}" field', kind="namespace", key=name)
        for key, value in labels.items():
            check_label(key, value)

        def work(tx: Transaction) -> Namespace:
            row = tx.row("SELECT labels FROM namespaces WHERE name = ?", (name,))
            current = load_map(row[0]) if row else {}
            if fieldpaths:
                for path in fieldpaths:
                    key = path.removeprefix("labels.")
                    current[key] = labels.get(key, "")
            else:
                current = dict(labels)
            kept = {key: value for key, value in current.items() if value}
            tx.execute(
                "INSERT INTO namespaces VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET labels = excluded.labels",
                (name, dump_map(kept)),
            )
            tx.event(name, "/namespaces/update", events_pb2.NamespaceUpdate(name=name, labels=labels))
            return Namespace(name, kept)

        return await self._engine.write(work)

    async def delete(self, name: str) -> None:
        """NotFound; FailedPrecondition while it holds images, blobs, containers or snapshots (it says which)."""

        def work(tx: Transaction) -> None:
            held = [
                word for table, word in _HOLDING
                if tx.row(f"SELECT 1 FROM {table} WHERE namespace = ? LIMIT 1", (name,))
            ]
            rows = tx.rows("SELECT DISTINCT snapshotter FROM snapshots WHERE namespace = ?", (name,))
            held.extend(f'snapshots on "{row[0]}" snapshotter' for row in rows)
            if held:
                raise FailedPrecondition(
                    f"namespace {name!r} must be empty, but it still has {', '.join(held)}", kind="namespace", key=name
                )
            if not tx.execute("DELETE FROM namespaces WHERE name = ?", (name,)):
                raise NotFound(f'namespace "{name}": not found', kind="namespace", key=name)
            for table in _GOING:
                tx.execute(f"DELETE FROM {table} WHERE namespace = ?", (name,))
            tx.dirty = True
            tx.event(name, "/namespaces/delete", events_pb2.NamespaceDelete(name=name))

        await self._engine.write(work)
