"""`pctr image convert`: a copy of an image in other formats."""

from __future__ import annotations

import hashlib
from typing import Any

from pctr import image_config, image_tree, services
from pctr.command import Context, Failed, UsageError, new_id
from pctr.committing import write_json, write_manifest
from pctr.image_config import is_index, is_manifest, platform_of
from pctr.rpc import Client
from supervisord_ctr.api.services.images.v1 import images_pb2
from supervisord_ctr.api.types import types_pb2

_TO_OCI = {
    "application/vnd.docker.distribution.manifest.list.v2+json": "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json": "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.container.image.v1+json": "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.image.rootfs.diff.tar": "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
}
_PLAIN = {"+gzip": "", "+zstd": "", ".gzip": "", ".zstd": ""}


class _Converter:
    def __init__(self, client: Client, *, oci: bool, uncompress: bool, platforms: list[str]) -> None:
        self._client = client
        self._oci = oci
        self._uncompress = uncompress
        self._platforms = platforms

    def _type(self, media_type: str) -> str:
        return _TO_OCI.get(media_type, media_type) if self._oci else media_type

    def target(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        """The converted form of an index or manifest: its descriptor."""
        document = image_config.read_json(self._client, descriptor["digest"])
        if is_index(descriptor["mediaType"]):
            return self._index(descriptor, document)
        if is_manifest(descriptor["mediaType"]):
            return self._manifest(descriptor, document)
        raise Failed(f"content {descriptor['digest']}: {descriptor['mediaType']} cannot be converted")

    def _index(self, descriptor: dict[str, Any], index: dict[str, Any]) -> dict[str, Any]:
        children = []
        for child in index.get("manifests") or ():
            platform = platform_of(child)
            if self._platforms and not any(platform == wanted or platform.startswith(f"{wanted}/")
                                           for wanted in self._platforms):
                continue
            children.append({**child, **self.target(child)})
        if not children:
            raise Failed(f"index {descriptor['digest']}: nothing for {', '.join(self._platforms) or 'any platform'}")
        media_type = self._type(descriptor["mediaType"])
        labels = {f"containerd.io/gc.ref.content.m.{number}": child["digest"]
                  for number, child in enumerate(children)}
        return write_json(
            self._client, {**index, "mediaType": media_type, "manifests": children}, media_type, labels)

    def _manifest(self, descriptor: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
        config = image_config.read_json(self._client, manifest["config"]["digest"])
        layers = [self._layer(layer) for layer in manifest.get("layers") or ()]
        done, _ = write_manifest(
            self._client, config, layers, media_type=self._type(descriptor["mediaType"]),
            config_type=self._type(manifest["config"]["mediaType"]),
        )
        return done

    def _layer(self, layer: dict[str, Any]) -> dict[str, Any]:
        media_type = self._type(layer["mediaType"])
        suffix = next((suffix for suffix in _PLAIN if media_type.endswith(suffix)), "")
        if not self._uncompress or not suffix:
            return {**layer, "mediaType": media_type}
        inflate = _inflater(suffix)
        writer = services.Writer(self._client, f"pctr-convert-{new_id()}")
        seen = hashlib.sha256()
        try:
            for part in services.read_content(self._client, layer["digest"]):
                data = inflate.decompress(part)
                seen.update(data)
                writer.write(data)
            size = writer.offset
            digest = f"sha256:{seen.hexdigest()}"
            writer.digest = digest
            _commit(writer, digest)
        finally:
            writer.close()
        return {"mediaType": media_type.removesuffix(suffix), "digest": digest, "size": size}


def _commit(writer: services.Writer, digest: str) -> None:
    """Commit a plain layer; one that is there already is fine."""
    from supervisord_ctr import errors

    try:
        writer.commit({"containerd.io/uncompressed": digest})
    except errors.AlreadyExists:
        pass


def _inflater(suffix: str) -> Any:
    if suffix.endswith("zstd"):
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj()
    import zlib

    return zlib.decompressobj(wbits=31)


def convert(context: Context) -> str:
    """Make the copy; its name."""
    args, client = context.args, context.client
    if not (args.oci or args.uncompress or args.platform):
        raise UsageError("nothing to convert: --oci, --uncompress or --platform")
    source = services.get_image(client, args.source)
    name = image_config.normalise(args.target)
    converter = _Converter(client, oci=args.oci, uncompress=args.uncompress, platforms=args.platform)
    with services.Lease(client):
        done = converter.target(image_tree.descriptor_of(source.target))
        services.put_image(client, images_pb2.Image(
            name=name, labels=source.labels,
            target=types_pb2.Descriptor(media_type=done["mediaType"], digest=done["digest"], size=done["size"]),
        ))
    return name
