"""Manifests: the JSON documents of an image, read as hostile input.

Owns media types, parsing of manifests and indexes with the checks of S15 and S8, and the garbage
collection labels that tie an image's content together. Source: OCI image specification, manifest.md
and image-index.md; Docker's "Image Manifest V2, Schema 2".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.model import Descriptor, Platform
from supervisord_ctr.names import LABEL_GC_REF_CONTENT, check_digest

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
OCI_NONDISTRIBUTABLE = "application/vnd.oci.image.layer.nondistributable.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd"
DOCKER_FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar"

MANIFESTS = frozenset((OCI_MANIFEST, DOCKER_MANIFEST))
INDEXES = frozenset((OCI_INDEX, DOCKER_LIST))
CONFIGS = frozenset((OCI_CONFIG, DOCKER_CONFIG))
#: What is asked of a registry, in order of preference.
ACCEPT = ", ".join((OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST, "*/*;q=0.1"))

#: Largest manifest or index that is read (S8; what registries themselves enforce).
MAX_MANIFEST = 4 << 20
#: Largest image configuration.
MAX_CONFIG = 8 << 20
_MAX_CHILDREN = 4096


@dataclass(frozen=True, slots=True)
class Manifest:
    """One platform's image."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    media_type: str
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Index:
    """Images by platform."""

    manifests: tuple[Descriptor, ...]
    media_type: str


def is_layer(media_type: str) -> bool:
    """Whether a blob of that type can be unpacked as a layer."""
    return media_type.startswith((OCI_LAYER, DOCKER_LAYER, OCI_NONDISTRIBUTABLE, DOCKER_FOREIGN))


def is_foreign(media_type: str) -> bool:
    """Whether a layer is not to be pushed (non-distributable)."""
    return media_type.startswith((OCI_NONDISTRIBUTABLE, DOCKER_FOREIGN))


def check_layer_type(media_type: str) -> None:
    """InvalidArgument for layers that nobody here can read: encrypted ones and unknown packings."""
    _, plus, suffix = media_type.partition("tar")
    if plus and suffix in ("", "+gzip", "+zstd", ".gzip", ".zstd") and is_layer(media_type):
        return
    what = "an encrypted layer" if "encrypted" in media_type else "not a layer that can be unpacked"
    raise InvalidArgument(f"media type {media_type!r} is {what}", kind="layer", key=media_type)


def _text(data: Mapping[str, Any], key: str, where: str) -> str:
    value = data.get(key, "")
    if not isinstance(value, str):
        raise InvalidArgument(f"{where}: {key} is not a string", kind="manifest")
    return value


def _list(data: Mapping[str, Any], key: str) -> Any:
    value = data.get(key)
    return [] if value is None else value


def _texts(value: object, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise InvalidArgument(f"{where}: annotations are not strings", kind="manifest")
    return value


def parse_descriptor(data: object, where: str) -> Descriptor:
    """A descriptor from JSON; InvalidArgument when it is none."""
    if not isinstance(data, dict):
        raise InvalidArgument(f"{where}: not a descriptor", kind="manifest")
    size = data.get("size", 0)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 62:
        raise InvalidArgument(f"{where}: size {size!r} is not a size", kind="manifest")
    platform = None
    if isinstance(found := data.get("platform"), dict):
        platform = Platform(
            _text(found, "os", where), _text(found, "architecture", where), _text(found, "variant", where),
            _text(found, "os.version", where),
        )
    return Descriptor(
        _text(data, "mediaType", where), check_digest(_text(data, "digest", where)), size,
        _texts(data.get("annotations"), where), platform,
    )


def descriptor_json(descriptor: Descriptor) -> dict[str, Any]:
    """The JSON form of a descriptor."""
    result: dict[str, Any] = {
        "mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size,
    }
    if descriptor.annotations:
        result["annotations"] = dict(descriptor.annotations)
    if descriptor.platform is not None:
        platform = descriptor.platform
        result["platform"] = {"architecture": platform.architecture, "os": platform.os}
        if platform.os_version:
            result["platform"]["os.version"] = platform.os_version
        if platform.variant:
            result["platform"]["variant"] = platform.variant
    return result


def parse(data: bytes, media_type: str, where: str) -> Manifest | Index:
    """The document in `data`, which must be of `media_type`.

    InvalidArgument when it is larger than `MAX_MANIFEST`, no JSON, of another type than stated, or
    could be read as both kinds (S15: such documents mean different images to different readers).
    """
    if len(data) > MAX_MANIFEST:
        raise InvalidArgument(f"{where}: {len(data)} bytes, at most {MAX_MANIFEST} are allowed", kind="manifest")
    document = load(data, where)
    check_type(document, media_type, where)
    if media_type in INDEXES:
        children = _list(document, "manifests")
        if not isinstance(children, list) or len(children) > _MAX_CHILDREN:
            raise InvalidArgument(f"{where}: manifests is not a list of at most {_MAX_CHILDREN}", kind="manifest")
        return Index(tuple(parse_descriptor(child, where) for child in children), media_type)
    layers = _list(document, "layers")
    if not isinstance(layers, list) or len(layers) > _MAX_CHILDREN:
        raise InvalidArgument(f"{where}: layers is not a list of at most {_MAX_CHILDREN}", kind="manifest")
    return Manifest(
        parse_descriptor(document.get("config"), f"{where}: config"),
        tuple(parse_descriptor(layer, f"{where}: layer") for layer in layers), media_type,
        _texts(document.get("annotations"), where),
    )


def load(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object; InvalidArgument for anything else, also for nesting that exhausts the parser."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{where}: not valid JSON: {error}", kind="manifest") from error
    if not isinstance(document, dict):
        raise InvalidArgument(f"{where}: not a JSON object", kind="manifest")
    return document


def check_type(document: Mapping[str, Any], media_type: str, where: str) -> None:
    """Refuse a document whose body does not fit the media type that it was served with (S15)."""
    if media_type not in MANIFESTS | INDEXES:
        old = " (schema 1 image manifests are no longer supported)" if "manifest.v1" in media_type else ""
        raise InvalidArgument(f"{where}: media type {media_type!r} is not an image's{old}", kind="manifest")
    stated = document.get("mediaType")
    if stated not in (None, "", media_type):
        raise InvalidArgument(
            f"{where}: served as {media_type!r}, but the document says it is {stated!r}", kind="manifest"
        )
    is_index = media_type in INDEXES
    foreign = ("config", "layers", "fsLayers") if is_index else ("manifests", "fsLayers")
    for key in foreign:
        if document.get(key) is not None:
            raise InvalidArgument(
                f"{where}: served as {media_type!r}, but the document has {key!r}, too: it is ambiguous",
                kind="manifest",
            )
    if document.get("schemaVersion") not in (None, 2):
        raise InvalidArgument(f"{where}: schema version {document.get('schemaVersion')!r} is not 2", kind="manifest")


def children(document: Manifest | Index) -> tuple[Descriptor, ...]:
    """What the document refers to, the config first."""
    if isinstance(document, Index):
        return document.manifests
    return (document.config, *document.layers)


def gc_labels(descriptors: Sequence[Descriptor]) -> dict[str, str]:
    """The labels that keep children alive with their parent (`m.0`, `config`, `l.0` …), numbered as in containerd."""
    labels: dict[str, str] = {}
    counts: dict[str, int] = {}
    for child in descriptors:
        if child.media_type in MANIFESTS | INDEXES:
            key = "m."
        elif is_layer(child.media_type):
            key = "l."
        elif child.media_type in CONFIGS:
            key = "config"
        else:
            key = ""
        number = counts.get(key, 0)
        counts[key] = number + 1
        name = f"{LABEL_GC_REF_CONTENT}.{key}"
        if number or key.endswith(".") or not key:
            name += str(number)
        labels[name] = child.digest
    return labels


def ref_key(descriptor: Descriptor) -> str:
    """The ingest ref that containerd's clients use for a descriptor, so that both share what was fetched."""
    kind = "unknown"
    if descriptor.media_type in MANIFESTS:
        kind = "manifest"
    elif descriptor.media_type in INDEXES:
        kind = "index"
    elif is_layer(descriptor.media_type):
        kind = "layer"
    elif descriptor.media_type in CONFIGS:
        kind = "config"
    return f"{kind}-{descriptor.digest}"
