"""Sandboxes: their metadata (containerd.types.Sandbox); the environment itself lives elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from supervisord_ctr import filters
from supervisord_ctr.errors import AlreadyExists, InvalidArgument, NotFound
from supervisord_ctr.metadata.codec import (
    adapt_sandbox,
    dump_any,
    dump_extensions,
    dump_map,
    ensure_namespace,
    load_any,
    load_extensions,
    load_map,
)
from supervisord_ctr.metadata.engine import Engine, Row, Transaction, Value
from supervisord_ctr.model import Runtime, Sandbox
from supervisord_ctr.names import check_identifier

_COLUMNS = "id, created, updated, labels, runtime, options_url, options, spec_url, spec, extensions, sandboxer"


def _load(row: Row) -> Sandbox:
    return Sandbox(
        id=row[0], created_at=row[1], updated_at=row[2], labels=load_map(row[3]),
        runtime=Runtime(row[4], load_any(row[5], row[6])), spec=load_any(row[7], row[8]),
        extensions=load_extensions(row[9]), sandboxer=row[10],
    )


def _dump(sandbox: Sandbox) -> tuple[Value, ...]:
    return (
        sandbox.id, sandbox.created_at, sandbox.updated_at, dump_map(sandbox.labels),
        sandbox.runtime.name, *dump_any(sandbox.runtime.options), *dump_any(sandbox.spec),
        dump_extensions(sandbox.extensions), sandbox.sandboxer,
    )


def _checked(sandbox: Sandbox) -> Sandbox:
    """The sandbox as it will be stored; InvalidArgument. Labels may have any length, as in containerd."""
    labels = {key: value for key, value in sandbox.labels.items() if value}
    for what, keys in (("extensions", sandbox.extensions), ("labels", labels)):
        if "" in keys:
            raise InvalidArgument(f"sandbox.{what}: keys must not be empty", kind="sandbox", key=sandbox.id)
    return replace(sandbox, labels=labels)


class Sandboxes:
    """Sandbox metadata by namespace and id."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def get(self, namespace: str, id: str) -> Sandbox:  # noqa: A002
        """NotFound."""
        row = self._engine.row(f"SELECT {_COLUMNS} FROM sandboxes WHERE namespace = ? AND id = ?", (namespace, id))
        if row is None:
            raise NotFound(f'sandbox "{id}": not found', kind="sandbox", key=id)
        return _load(row)

    async def list(self, namespace: str, filter_texts: Sequence[str] = ()) -> list[Sandbox]:
        """Those that match (fields id, labels), by id."""
        matching = filters.parse(filter_texts)
        rows = self._engine.rows(f"SELECT {_COLUMNS} FROM sandboxes WHERE namespace = ? ORDER BY id", (namespace,))
        return [sandbox for sandbox in map(_load, rows) if matching.matches(adapt_sandbox(sandbox))]

    async def create(self, namespace: str, sandbox: Sandbox) -> Sandbox:
        """AlreadyExists; InvalidArgument for a bad id."""
        check_identifier(sandbox.id, "sandbox id")
        now = time.time()
        stored = replace(_checked(sandbox), created_at=now, updated_at=now)
        values = (namespace, *_dump(stored))

        def work(tx: Transaction) -> Sandbox:
            ensure_namespace(tx, namespace)
            marks = ", ".join("?" * len(values))
            if not tx.execute(f"INSERT OR IGNORE INTO sandboxes (namespace, {_COLUMNS}) VALUES ({marks})", values):
                raise AlreadyExists(f'sandbox "{sandbox.id}": already exists', kind="sandbox", key=sandbox.id)
            return stored

        return await self._engine.write(work)

    async def update(self, namespace: str, sandbox: Sandbox, fields: Sequence[str] = ()) -> Sandbox:
        """Change labels, labels.KEY, extensions, extensions.KEY, runtime, spec; without fields all of them.

        NotFound; InvalidArgument for any other field, and for another runtime name without fields.
        """

        def work(tx: Transaction) -> Sandbox:
            row = tx.row(
                f"SELECT {_COLUMNS} FROM sandboxes WHERE namespace = ? AND id = ?", (namespace, sandbox.id)
            )
            if row is None:
                raise NotFound(f'sandbox "{sandbox.id}": not found', kind="sandbox", key=sandbox.id)
            updated = replace(_checked(_apply(_load(row), sandbox, fields)), updated_at=time.time())
            values = (namespace, *_dump(updated))
            marks = ", ".join("?" * len(values))
            tx.execute(f"INSERT OR REPLACE INTO sandboxes (namespace, {_COLUMNS}) VALUES ({marks})", values)
            tx.dirty = True
            return updated

        return await self._engine.write(work)

    async def delete(self, namespace: str, id: str) -> None:  # noqa: A002
        """NotFound."""

        def work(tx: Transaction) -> None:
            if not tx.execute("DELETE FROM sandboxes WHERE namespace = ? AND id = ?", (namespace, id)):
                raise NotFound(f'failed to delete sandbox "{id}": not found', kind="sandbox", key=id)
            tx.dirty = True

        await self._engine.write(work)


def _apply(current: Sandbox, wanted: Sandbox, fields: Sequence[str]) -> Sandbox:
    if not fields:
        fields = ("labels", "extensions", "spec", "runtime")
        if current.runtime.name != wanted.runtime.name:
            raise InvalidArgument("sandbox.runtime.name field is immutable", kind="sandbox", key=current.id)
    labels, extensions = dict(current.labels), dict(current.extensions)
    spec, runtime = current.spec, current.runtime
    for path in fields:
        if path.startswith("labels."):
            key = path.removeprefix("labels.")
            labels[key] = wanted.labels.get(key, "")
        elif path.startswith("extensions."):
            key = path.removeprefix("extensions.")
            if key in wanted.extensions:
                extensions[key] = wanted.extensions[key]
            else:
                extensions.pop(key, None)
        elif path == "labels":
            labels = dict(wanted.labels)
        elif path == "extensions":
            extensions = dict(wanted.extensions)
        elif path == "runtime":
            runtime = wanted.runtime
        elif path == "spec":
            spec = wanted.spec
        else:
            raise InvalidArgument(f'cannot update "{path}" field on sandbox "{current.id}"', key=current.id)
    return replace(current, labels=labels, extensions=extensions, spec=spec, runtime=runtime)
