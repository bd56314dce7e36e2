"""Image configuration: what an image says about running it, and the chain of its layers.

Owns reading; what a container makes of it is `oci`'s business. Source: OCI image specification,
config.md ("Properties", "Layer ChainID").
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from supervisord_ctr.errors import InvalidArgument, NotFound
from supervisord_ctr.images import platforms
from supervisord_ctr.images.manifest import MAX_CONFIG, Index, Manifest, load, parse
from supervisord_ctr.model import Descriptor, Image, Platform
from supervisord_ctr.names import check_digest

if TYPE_CHECKING:
    from supervisord_ctr.metadata import Database


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The parsed configuration; absent fields are empty."""

    platform: Platform
    diff_ids: tuple[str, ...]
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    stop_signal: str = ""
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict)

    def chain_ids(self) -> list[str]:
        """The name of the committed snapshot for each layer."""
        return chain_ids(self.diff_ids)


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """The chain ID of each prefix of `diff_ids` (config.md, "Layer ChainID")."""
    result: list[str] = []
    for diff_id in diff_ids:
        if not result:
            result.append(diff_id)
        else:
            result.append("sha256:" + hashlib.sha256(f"{result[-1]} {diff_id}".encode()).hexdigest())
    return result


def parse_config(data: bytes, where: str) -> ImageConfig:
    """The configuration in `data`; InvalidArgument when it is none."""
    if len(data) > MAX_CONFIG:
        raise InvalidArgument(f"{where}: {len(data)} bytes, at most {MAX_CONFIG} are allowed", kind="config")
    document = load(data, where)
    rootfs = document.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    config = document.get("config") or {}
    if not isinstance(config, dict):
        raise InvalidArgument(f"{where}: config is not an object", kind="config")
    return ImageConfig(
        Platform(
            _word(document, "os", where), _word(document, "architecture", where), _word(document, "variant", where),
            _word(document, "os.version", where),
        ),
        tuple(check_digest(value) for value in _words(diff_ids, "rootfs.diff_ids", where)),
        _words(config.get("Env"), "Env", where), _words(config.get("Entrypoint"), "Entrypoint", where),
        _words(config.get("Cmd"), "Cmd", where), _word(config, "WorkingDir", where), _word(config, "User", where),
        _word(config, "StopSignal", where), _keys(config.get("Volumes"), "Volumes", where),
        _keys(config.get("ExposedPorts"), "ExposedPorts", where), _labels(config.get("Labels"), where),
        _word(document, "created", where), document,
    )


def _word(data: Mapping[str, Any], key: str, where: str) -> str:
    value = data.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidArgument(f"{where}: {key} is not a string", kind="config")
    return value


def _words(value: object, key: str, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise InvalidArgument(f"{where}: {key} is not a list of strings", kind="config")
    return tuple(value)


def _keys(value: object, key: str, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise InvalidArgument(f"{where}: {key} is not an object", kind="config")
    return tuple(value)


def _labels(value: object, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InvalidArgument(f"{where}: Labels are not strings", kind="config")
    return value


async def read_manifest(
    database: Database, namespace: str, target: Descriptor, platform: Platform | None = None
) -> tuple[Descriptor, Manifest]:
    """The manifest below `target` for `platform` (default: this machine's), from content that is here.

    NotFound when the image has none for it, or when its manifest was not pulled.
    """
    wanted = platform or platforms.default()
    missing: NotFound | None = None
    queue = [target]
    for _ in range(64):
        if not queue:
            break
        descriptor = queue.pop(0)
        try:
            data = await database.content.read(namespace, descriptor.digest)
        except NotFound as error:
            missing = missing or error
            continue
        document = parse(data, descriptor.media_type, f"manifest {descriptor.digest}")
        if isinstance(document, Manifest):
            return descriptor, document
        queue = platforms.best(wanted, _images(document)) + queue
    if missing is not None:
        raise missing
    raise NotFound(
        f"image {target.digest} has no manifest for platform {platforms.describe(wanted)}", kind="image",
        key=target.digest,
    )


def _images(index: Index) -> list[Descriptor]:
    """The entries that can be images: attestations name no platform that runs."""
    return [
        entry for entry in index.manifests
        if not (entry.platform is not None and entry.platform.os == "unknown")
    ]


async def read_config(
    database: Database, namespace: str, image: Image | Descriptor, platform: Platform | None = None
) -> ImageConfig:
    """The configuration of an image for `platform`, from content that is here; NotFound."""
    target = image.target if isinstance(image, Image) else image
    _, manifest = await read_manifest(database, namespace, target, platform)
    data = await database.content.read(namespace, manifest.config.digest, MAX_CONFIG)
    return parse_config(data, f"config {manifest.config.digest}")
