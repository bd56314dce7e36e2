"""Containers: their metadata; the running process is a task and lives elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from supervisord_ctr import filters
from supervisord_ctr.api.events import events_pb2
from supervisord_ctr.errors import AlreadyExists, InvalidArgument, NotFound
from supervisord_ctr.metadata.codec import (
    adapt_container,
    checked_labels,
    dump_any,
    dump_extensions,
    dump_map,
    ensure_namespace,
    load_any,
    load_extensions,
    load_map,
)
from supervisord_ctr.metadata.engine import Engine, Row, Transaction, Value
from supervisord_ctr.model import Container, Runtime, TypedValue
from supervisord_ctr.names import check_identifier

_COLUMNS = (
    "id, created, updated, labels, image, runtime, options_url, options, spec_url, spec, "
    "snapshotter, snapshot_key, extensions, sandbox"
)
#: Records kept in memory for lists.
_KNOWN = 4096
_ALL_FIELDS = ("labels", "spec", "extensions", "image", "snapshotkey")


def _load(row: Row) -> Container:
    return Container(
        id=row[0], created_at=row[1], updated_at=row[2], labels=load_map(row[3]), image=row[4],
        runtime=Runtime(row[5], load_any(row[6], row[7])), spec=load_any(row[8], row[9]),
        snapshotter=row[10], snapshot_key=row[11], extensions=load_extensions(row[12]), sandbox=row[13],
    )


def _dump(container: Container) -> tuple[Value, ...]:
    return (
        container.id, container.created_at, container.updated_at, dump_map(container.labels), container.image,
        container.runtime.name, *dump_any(container.runtime.options), *dump_any(container.spec),
        container.snapshotter, container.snapshot_key, dump_extensions(container.extensions), container.sandbox,
    )


def _checked(container: Container, what: str) -> Container:
    """The container as it will be stored; InvalidArgument where containerd refuses it."""
    check_identifier(container.id, "container id")
    labels = checked_labels(container.labels, "container.labels")
    if "" in container.extensions:
        raise InvalidArgument(f"{what}: container.extensions keys must not be zero-length", key=container.id)
    if not container.runtime.name:
        raise InvalidArgument(f"{what}: container.runtime.name must be set", kind="container", key=container.id)
    if container.snapshot_key and not container.snapshotter:
        raise InvalidArgument(
            f"{what}: container.snapshotter must be set if container.snapshotkey is set",
            kind="container", key=container.id,
        )
    return replace(container, labels=labels)


class Containers:
    """Container metadata by namespace and id."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._listed: dict[str, tuple[int, list[Container]]] = {}
        self._loaded: dict[tuple[str, str], tuple[Row, Container]] = {}

    async def get(self, namespace: str, id: str) -> Container:  # noqa: A002
        """NotFound."""
        row = self._engine.row(f"SELECT {_COLUMNS} FROM containers WHERE namespace = ? AND id = ?", (namespace, id))
        if row is None:
            raise NotFound(f'container "{id}" in namespace "{namespace}": not found', kind="container", key=id)
        return _load(row)

    def _all(self, namespace: str) -> list[Container]:
        """Every record of a namespace; read again only when something was committed since."""
        version = self._engine.version()
        if self._listed.get(namespace, (-1, []))[0] != version:
            statement = f"SELECT {_COLUMNS} FROM containers WHERE namespace = ? ORDER BY id"
            rows = self._engine.rows(statement, (namespace,))
            self._listed = {namespace: (version, [self._known(namespace, row) for row in rows])}
        return self._listed[namespace][1]

    def _known(self, namespace: str, row: Row) -> Container:
        """The record of a row; the same object as the last time while the row is the same."""
        key = (namespace, str(row[0]))
        known = self._loaded.get(key)
        if known is None or known[0] != row:
            if len(self._loaded) >= _KNOWN:
                self._loaded.clear()
            known = self._loaded[key] = (row, _load(row))
        return known[1]

    async def list(self, namespace: str, filter_texts: Sequence[str] = ()) -> list[Container]:
        """Those that match (fields id, image, runtime.name, labels), by id."""
        matching = filters.parse(filter_texts)
        names = matching.names_only("id")
        if names is not None:
            marks = ", ".join("?" * len(names))
            rows = self._engine.rows(
                f"SELECT {_COLUMNS} FROM containers WHERE namespace = ? AND id IN ({marks}) ORDER BY id",
                (namespace, *sorted(names)),
            )
            return [_load(row) for row in rows]
        found = self._all(namespace)
        if not filter_texts:
            return found.copy()
        return [container for container in found if matching.matches(adapt_container(container))]

    async def labelled(self, label: str) -> Sequence[tuple[str, Container]]:
        """Those of every namespace that have the label, with their namespaces."""
        statement = f"SELECT namespace, {_COLUMNS} FROM containers WHERE labels IS NOT NULL AND instr(labels, ?) > 0"
        found = [(str(row[0]), _load(row[1:])) for row in self._engine.rows(statement, (f'"{label}":',))]
        return [(namespace, container) for namespace, container in found if label in container.labels]

    async def create(self, namespace: str, container: Container) -> Container:
        """AlreadyExists; InvalidArgument for a bad id, no runtime, a snapshot key without snapshotter.

        A record without a spec is taken, as containerd takes it from its clients; no task can be made of it.
        """
        now = time.time()
        stored = replace(_checked(container, "create container failed validation"), created_at=now, updated_at=now)
        values = (namespace, *_dump(stored))

        def work(tx: Transaction) -> Container:
            ensure_namespace(tx, namespace)
            marks = ", ".join("?" * len(values))
            if not tx.execute(f"INSERT OR IGNORE INTO containers (namespace, {_COLUMNS}) VALUES ({marks})", values):
                raise AlreadyExists(f'container "{container.id}": already exists', kind="container", key=container.id)
            runtime = events_pb2.ContainerCreate.Runtime(name=stored.runtime.name)
            if stored.runtime.options is not None:
                runtime.options.type_url = stored.runtime.options.type_url
                runtime.options.value = stored.runtime.options.value
            tx.event(
                namespace, "/containers/create",
                events_pb2.ContainerCreate(id=stored.id, image=stored.image, runtime=runtime),
            )
            return stored

        return await self._engine.write(work)

    async def update(self, namespace: str, container: Container, fieldpaths: Sequence[str] = ()) -> Container:
        """Change labels, labels.KEY, spec, extensions, extensions.KEY, image, snapshotkey.

        Without paths all of these are replaced, and a snapshotter or runtime name that differs is
        InvalidArgument, as any other path is; so is a change of a record without a spec that brings none. NotFound.
        """
        if not container.id:
            raise InvalidArgument("must specify a container id", kind="container")

        def work(tx: Transaction) -> Container:
            row = tx.row(
                f"SELECT {_COLUMNS} FROM containers WHERE namespace = ? AND id = ?", (namespace, container.id)
            )
            if row is None:
                raise NotFound(
                    f'cannot update container "{container.id}" in namespace "{namespace}": not found',
                    kind="container", key=container.id,
                )
            updated = _apply(_load(row), container, fieldpaths)
            if updated.spec is None and fieldpaths and "spec" not in fieldpaths:
                raise InvalidArgument("update failed validation: container.spec must be set", key=container.id)
            updated = replace(_checked(updated, "update failed validation"), updated_at=time.time())
            values = (namespace, *_dump(updated))
            marks = ", ".join("?" * len(values))
            tx.execute(f"INSERT OR REPLACE INTO containers (namespace, {_COLUMNS}) VALUES ({marks})", values)
            tx.event(
                namespace, "/containers/update",
                events_pb2.ContainerUpdate(
                    id=updated.id, image=updated.image, labels=updated.labels, snapshot_key=updated.snapshot_key
                ),
            )
            return updated

        return await self._engine.write(work)

    async def delete(self, namespace: str, id: str) -> None:  # noqa: A002
        """NotFound."""

        def work(tx: Transaction) -> None:
            if not tx.execute("DELETE FROM containers WHERE namespace = ? AND id = ?", (namespace, id)):
                raise NotFound(
                    f'cannot delete container "{id}" in namespace "{namespace}": not found', kind="container", key=id
                )
            tx.dirty = True
            tx.event(namespace, "/containers/delete", events_pb2.ContainerDelete(id=id))

        await self._engine.write(work)


def _apply(current: Container, wanted: Container, fieldpaths: Sequence[str]) -> Container:
    if not fieldpaths:
        fieldpaths = _ALL_FIELDS
        if current.snapshotter != wanted.snapshotter:
            raise InvalidArgument("container.snapshotter field is immutable", kind="container", key=current.id)
        if current.runtime.name != wanted.runtime.name:
            raise InvalidArgument("container.runtime.name field is immutable", kind="container", key=current.id)
    labels = dict(current.labels)
    extensions: dict[str, TypedValue] = dict(current.extensions)
    spec, image, snapshot_key = current.spec, current.image, current.snapshot_key
    for path in fieldpaths:
        if path.startswith("labels."):
            key = path.removeprefix("labels.")
            labels[key] = wanted.labels.get(key, "")
        elif path.startswith("extensions."):
            _set_extension(extensions, wanted.extensions, path.removeprefix("extensions."))
        elif path == "labels":
            labels = dict(wanted.labels)
        elif path == "extensions":
            extensions = dict(wanted.extensions)
        elif path == "spec":
            spec = wanted.spec
        elif path == "image":
            image = wanted.image
        elif path == "snapshotkey":
            snapshot_key = wanted.snapshot_key
        else:
            raise InvalidArgument(f'cannot update "{path}" field on "{current.id}"', kind="container", key=current.id)
    return replace(
        current, labels=labels, extensions=extensions, spec=spec, image=image, snapshot_key=snapshot_key
    )


def _set_extension(extensions: dict[str, TypedValue], wanted: Mapping[str, TypedValue], key: str) -> None:
    if key in wanted:
        extensions[key] = wanted[key]
    else:
        extensions.pop(key, None)
