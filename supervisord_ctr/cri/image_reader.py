"""Reads what an image is from the content store, for the memory of images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from supervisord_ctr.cri.image_store import Config, Described
from supervisord_ctr.images.config import parse_config, read_manifest
from supervisord_ctr.images.manifest import MAX_CONFIG
from supervisord_ctr.model import Image
from supervisord_ctr.names import CRI_NAMESPACE

if TYPE_CHECKING:
    from supervisord_ctr.metadata import Database


class Unpacker(Protocol):
    """Makes layers there, as `images.pull.Puller` does."""

    async def unpack(self, namespace: str, image: Image, snapshotter: str) -> None:
        """Unpack what is not yet."""
        ...


class ImageReader:
    """`image_store.Reader` over the content store."""

    def __init__(self, database: Database, unpacker: Unpacker) -> None:
        self._database = database
        self._unpacker = unpacker

    async def describe(self, image: Image) -> Described:
        """The image's parts for this machine; its size is that of what is stored: manifest, config and layers."""
        descriptor, manifest = await read_manifest(self._database, CRI_NAMESPACE, image.target)
        digest = manifest.config.digest
        config = parse_config(
            await self._database.content.read(CRI_NAMESPACE, digest, MAX_CONFIG), f"config {digest}"
        )
        chain = config.chain_ids()
        return Described(
            id=digest, chain_id=chain[-1] if chain else "", document=config.raw,
            size=descriptor.size + manifest.config.size + sum(layer.size for layer in manifest.layers),
            config=Config(
                config.user, config.env, config.entrypoint, config.cmd, config.working_dir, config.stop_signal,
                config.volumes, config.labels,
            ),
        )

    async def unpack(self, image: Image, snapshotter: str) -> None:
        """Make the layers there for `snapshotter`."""
        await self._unpacker.unpack(CRI_NAMESPACE, image, snapshotter)
