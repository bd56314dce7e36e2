"""What an image is made of: a walk from its target over indexes and manifests to configs and layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pctr.image_config import is_index, is_manifest, platform_of, read_json
from pctr.rpc import Client
from supervisord_ctr import errors


class Node(NamedTuple):
    """A blob of an image; `platform` is "" above and for what does not say. `document` for JSON that is there."""

    descriptor: dict[str, Any]
    platform: str
    document: dict[str, Any] | None
    kind: str

    @property
    def digest(self) -> str:
        """The blob's digest."""
        return str(self.descriptor.get("digest", ""))

    @property
    def size(self) -> int:
        """The blob's size as stated."""
        return int(self.descriptor.get("size", 0))


def descriptor_of(target: Any) -> dict[str, Any]:
    """A protobuf descriptor in the form it has inside indexes."""
    return {"mediaType": target.media_type, "digest": target.digest, "size": target.size}


def walk(client: Client, target: dict[str, Any], platform: str = "", depth: int = 0) -> Iterator[Node]:
    """The target and all below it, as far as the blobs are there."""
    media_type = str(target.get("mediaType", ""))
    if is_index(media_type) and depth < 4:
        document = _read(client, str(target["digest"]))
        yield Node(target, platform, document, "index")
        for child in (document or {}).get("manifests") or ():
            yield from walk(client, child, platform_of(child), depth + 1)
    elif is_manifest(media_type):
        document = _read(client, str(target["digest"]))
        yield Node(target, platform, document, "manifest")
        if document is not None:
            config = document.get("config") or {}
            if config.get("digest"):
                yield Node(config, platform, None, "config")
            for layer in document.get("layers") or ():
                yield Node(layer, platform, None, "layer")
    else:
        yield Node(target, platform, None, "blob")


def _read(client: Client, digest: str) -> dict[str, Any] | None:
    try:
        return read_json(client, digest)
    except errors.NotFound:
        return None


def manifests(nodes: list[Node]) -> list[Node]:
    """The manifests that are there."""
    return [node for node in nodes if node.kind == "manifest" and node.document is not None]


def blobs_of(manifest: Node) -> list[dict[str, Any]]:
    """Config and layers of a manifest."""
    document = manifest.document or {}
    return [document.get("config") or {}, *(document.get("layers") or ())]


def platform_from_config(client: Client, manifest: Node) -> str:
    """The platform of a manifest, from its config when no index says it."""
    if manifest.platform:
        return manifest.platform
    config = (manifest.document or {}).get("config") or {}
    document = _read(client, str(config.get("digest", ""))) if config.get("digest") else None
    return platform_of({"platform": document}) if document else ""
