"""Images: names for target descriptors."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from supervisord_ctr import filters
from supervisord_ctr.api.services.images.v1 import images_pb2
from supervisord_ctr.errors import AlreadyExists, InvalidArgument, NotFound
from supervisord_ctr.metadata.codec import adapt_image, checked_labels, dump_map, ensure_namespace, load_map
from supervisord_ctr.metadata.engine import Engine, Row, Transaction, Value
from supervisord_ctr.metadata.leases import hold_image, release_resource
from supervisord_ctr.model import Descriptor, Image
from supervisord_ctr.names import is_digest

_COLUMNS = "name, created, updated, labels, media_type, digest, size, annotations"


def _load(row: Row) -> Image:
    return Image(
        name=row[0], created_at=row[1], updated_at=row[2], labels=load_map(row[3]),
        target=Descriptor(row[4], row[5], row[6], load_map(row[7])),
    )


def _dump(image: Image) -> tuple[Value, ...]:
    target = image.target
    return (
        image.name, image.created_at, image.updated_at, dump_map(image.labels),
        target.media_type, target.digest, target.size, dump_map(target.annotations),
    )


def _checked(image: Image) -> Image:
    if not image.name:
        raise InvalidArgument("image name must not be empty", kind="image")
    labels = checked_labels(image.labels, "image.labels")
    if not is_digest(image.target.digest):
        raise InvalidArgument(f'target.digest "{image.target.digest}" invalid', kind="image", key=image.name)
    if image.target.size <= 0:
        raise InvalidArgument("target.size must be greater than zero", kind="image", key=image.name)
    if not image.target.media_type:
        raise InvalidArgument("target.mediatype must be set", kind="image", key=image.name)
    annotations = {key: value for key, value in image.target.annotations.items() if value}
    if "" in annotations:
        raise InvalidArgument("target.annotations: keys must not be empty", kind="image", key=image.name)
    return replace(image, labels=labels, target=replace(image.target, annotations=annotations, platform=None))


class Images:
    """Images by namespace and name. `collect` is called for a synchronous delete."""

    def __init__(self, engine: Engine, collect: Callable[[], Awaitable[object]]) -> None:
        self._engine = engine
        self._collect = collect

    async def get(self, namespace: str, name: str) -> Image:
        """NotFound."""
        row = self._engine.row(f"SELECT {_COLUMNS} FROM images WHERE namespace = ? AND name = ?", (namespace, name))
        if row is None:
            raise NotFound(f'image "{name}": not found', kind="image", key=name)
        return _load(row)

    async def list(self, namespace: str, filter_texts: Sequence[str] = ()) -> list[Image]:
        """Those that match (fields name, target.digest, target.mediatype, labels, annotations), by name."""
        matching = filters.parse(filter_texts)
        rows = self._engine.rows(f"SELECT {_COLUMNS} FROM images WHERE namespace = ? ORDER BY name", (namespace,))
        return [image for image in map(_load, rows) if matching.matches(adapt_image(image))]

    async def create(self, namespace: str, image: Image, *, at: float | None = None, lease: str | None = None) -> Image:
        """AlreadyExists; InvalidArgument for a target without digest, size or media type.

        `at` stands in for the present time (SOURCE_DATE_EPOCH). An image with an expiry label joins
        the lease; any other is a root by itself.
        """
        now = time.time() if at is None else at
        stored = replace(_checked(image), created_at=now, updated_at=now)
        values = (namespace, *_dump(stored))

        def work(tx: Transaction) -> Image:
            ensure_namespace(tx, namespace)
            hold_image(tx, namespace, lease, stored)
            marks = ", ".join("?" * len(values))
            if not tx.execute(f"INSERT OR IGNORE INTO images (namespace, {_COLUMNS}) VALUES ({marks})", values):
                raise AlreadyExists(f'image "{image.name}": already exists', kind="image", key=image.name)
            tx.event(namespace, "/images/create", images_pb2.ImageCreate(name=stored.name, labels=stored.labels))
            return stored

        return await self._engine.write(work)

    async def update(
        self, namespace: str, image: Image, fieldpaths: Sequence[str] = (), *,
        at: float | None = None, lease: str | None = None,
    ) -> Image:
        """Change labels, labels.KEY, target, annotations, annotations.KEY; without paths everything. NotFound."""
        if not image.name:
            raise InvalidArgument("image name is required for update", kind="image")

        def work(tx: Transaction) -> Image:
            row = tx.row(f"SELECT {_COLUMNS} FROM images WHERE namespace = ? AND name = ?", (namespace, image.name))
            if row is None:
                raise NotFound(f'image "{image.name}": not found', kind="image", key=image.name)
            current = _load(row)
            updated = replace(
                _checked(_apply(current, image, fieldpaths)),
                created_at=current.created_at, updated_at=time.time() if at is None else at,
            )
            hold_image(tx, namespace, lease, updated)
            values = (namespace, *_dump(updated))
            marks = ", ".join("?" * len(values))
            tx.execute(f"INSERT OR REPLACE INTO images (namespace, {_COLUMNS}) VALUES ({marks})", values)
            tx.dirty = current.target.digest != updated.target.digest
            tx.event(namespace, "/images/update", images_pb2.ImageUpdate(name=updated.name, labels=updated.labels))
            return updated

        return await self._engine.write(work)

    async def delete(
        self, namespace: str, name: str, *, target_digest: str = "", sync: bool = False, lease: str | None = None
    ) -> None:
        """NotFound, also when the image has another target than `target_digest` (if given).

        With `sync`, garbage is collected before it returns: the space is free again then.
        """

        def work(tx: Transaction) -> None:
            row = tx.row("SELECT digest FROM images WHERE namespace = ? AND name = ?", (namespace, name))
            if row is None:
                raise NotFound(f'image "{name}": not found', kind="image", key=name)
            if target_digest and row[0] != target_digest:
                raise NotFound(f'image "{name}" has target {row[0]}, not {target_digest}', kind="image", key=name)
            release_resource(tx, namespace, lease, "images", name)
            tx.execute("DELETE FROM images WHERE namespace = ? AND name = ?", (namespace, name))
            tx.dirty = True
            tx.event(namespace, "/images/delete", images_pb2.ImageDelete(name=name))

        await self._engine.write(work)
        if sync:
            await self._collect()


def _apply(current: Image, wanted: Image, fieldpaths: Sequence[str]) -> Image:
    if not fieldpaths:
        return wanted
    labels, target = dict(current.labels), current.target
    for path in fieldpaths:
        if path.startswith("labels."):
            key = path.removeprefix("labels.")
            labels[key] = wanted.labels.get(key, "")
        elif path.startswith("annotations."):
            key = path.removeprefix("annotations.")
            target = replace(target, annotations={**target.annotations, key: wanted.target.annotations.get(key, "")})
        elif path == "labels":
            labels = dict(wanted.labels)
        elif path == "target":
            target = wanted.target
        elif path == "annotations":
            target = replace(target, annotations=wanted.target.annotations)
        else:
            raise InvalidArgument(f'cannot update "{path}" field on image "{current.name}"', key=current.name)
    return replace(current, labels=labels, target=target)
