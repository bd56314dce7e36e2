"""Layers: what changed between two lists of mounts, as a blob in the content store.

Owns mounting both sides read-only, comparing, compressing and storing in one pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from supervisord_ctr.aio import Executors, shielded
from supervisord_ctr.diff.compression import GZIP, NONE, ZSTD, Deflater
from supervisord_ctr.diff.compute import Layer, write_layer
from supervisord_ctr.errors import AlreadyExists, NotFound, Unimplemented
from supervisord_ctr.images import manifest as documents
from supervisord_ctr.linux.mounts import temp_mount
from supervisord_ctr.model import Descriptor, Mount
from supervisord_ctr.names import LABEL_UNCOMPRESSED

if TYPE_CHECKING:
    from supervisord_ctr.metadata import Database
    from supervisord_ctr.metadata.content import ContentWriter

_COMPRESSIONS = {
    documents.OCI_LAYER: NONE, documents.OCI_LAYER_GZIP: GZIP, documents.OCI_LAYER_ZSTD: ZSTD,
    documents.DOCKER_LAYER: NONE, documents.DOCKER_LAYER_GZIP: GZIP, documents.DOCKER_LAYER_ZSTD: ZSTD,
}


async def compare_mounts(
    database: Database, executors: Executors, namespace: str, left: Sequence[Mount], right: Sequence[Mount], *,
    media_type: str = documents.OCI_LAYER_GZIP, ref: str = "", labels: Mapping[str, str] | None = None,
    source_date_epoch: float | None = None, lease: str | None = None, scratch: Path,
) -> Descriptor:
    """Store the layer of what `right` has changed against `left` and return its descriptor.

    Unimplemented for a media type that is not a layer's. The blob's label `containerd.io/uncompressed`
    holds the diff ID, and so does an annotation of the descriptor.
    """
    if media_type not in _COMPRESSIONS:
        raise Unimplemented(f"unsupported diff media type: {media_type}", kind="layer", key=media_type)
    writer = await database.content.writer(namespace, ref or f"generated-diff-{secrets.token_hex(8)}", lease=lease)
    done = False
    try:
        await writer.truncate(0)
        layer = await asyncio.shield(
            executors.run_io(
                _compare, _readable(left), _readable(right), writer, _COMPRESSIONS[media_type], source_date_epoch,
                scratch,
            )
        )
        size, digest = writer.offset, writer.digest()
        with contextlib.suppress(AlreadyExists):
            await writer.commit(size, digest, {**(labels or {}), LABEL_UNCOMPRESSED: layer.diff_id})
        done = True
    finally:
        # An ingest that the caller did not name is one that nobody would resume.
        unwanted = not done and not ref
        await shielded(database.content.owner, _end(database, namespace, writer, lease, unwanted), "end of a diff")
    return Descriptor(media_type, digest, size, {LABEL_UNCOMPRESSED: layer.diff_id})


async def _end(
    database: Database, namespace: str, writer: ContentWriter, lease: str | None, unwanted: bool
) -> None:
    await writer.close()
    if unwanted:
        with contextlib.suppress(NotFound):
            await database.content.abort(namespace, writer.ref, lease=lease)


def _compare(
    left: Sequence[Mount], right: Sequence[Mount], writer: ContentWriter, compression: str, epoch: float | None,
    scratch: Path,
) -> Layer:
    deflater = Deflater(compression, writer.blocking.write)
    with contextlib.ExitStack() as stack:
        lower = Path(stack.enter_context(temp_mount(left, scratch))) if left else None
        upper = Path(stack.enter_context(temp_mount(right, scratch)))
        layer = write_layer(lower, upper, deflater.write, source_date_epoch=epoch)
    deflater.finish()
    return layer


def _readable(mounts: Sequence[Mount]) -> list[Mount]:
    """The same mounts, read-only; an overlay without its writable layer, which may be in use elsewhere."""
    result = []
    for mount in mounts:
        options = [option for option in mount.options if option != "rw"]
        upper = next((option.partition("=")[2] for option in options if option.startswith("upperdir=")), "")
        if mount.type == "overlay" and upper:
            lower = next((option.partition("=")[2] for option in options if option.startswith("lowerdir=")), "")
            options = [o for o in options if not o.startswith(("upperdir=", "workdir=", "lowerdir="))]
            options.append(f"lowerdir={upper}:{lower}")
        if "ro" not in options:
            options.append("ro")
        result.append(replace(mount, options=tuple(options)))
    return result
