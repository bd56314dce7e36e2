"""From an image's name to what a container needs of it: manifest, config, chain ID.

Reads through the content service; light enough for the path of `pctr run`.
"""

from __future__ import annotations

import os

from pctr import documents, light
from pctr.command import Failed
from pctr.rpc import CONTENT, IMAGES, Client
from supervisord_ctr import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Largest manifest or config that is read (S8).
DOCUMENT_LIMIT = 4 << 20

_INDEXES = (
    "application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json",
)
_MACHINES = {
    "x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm/v7", "armv6l": "arm/v6", "i686": "386", "i386": "386",
    "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64", "loongarch64": "loong64", "mips64": "mips64le",
}


class ImageConfig:
    """An image as one platform sees it; `config` is its whole configuration document."""

    __slots__ = ("config", "config_digest", "manifest_digest", "name")

    def __init__(self, name: str, manifest_digest: str, config_digest: str, config: dict[str, Any]) -> None:
        self.name = name
        self.manifest_digest = manifest_digest
        self.config_digest = config_digest
        self.config = config

    @property
    def runtime(self) -> dict[str, Any]:
        """The `config` object: Env, Entrypoint, Cmd, User …"""
        return self.config.get("config") or {}

    @property
    def diff_ids(self) -> list[str]:
        """Digests of the layers' tar streams, lowest first."""
        return list((self.config.get("rootfs") or {}).get("diff_ids") or ())

    @property
    def chain_id(self) -> str:
        """The name of the snapshot of all layers together."""
        return chain_id(self.diff_ids)


def host_platform() -> str:
    """This machine in the words of images: `linux/amd64`."""
    machine = os.uname().machine
    return f"linux/{_MACHINES.get(machine, machine)}"


def chain_id(diff_ids: list[str]) -> str:
    """OCI image specification, config.md, "Layer ChainID"; "" for no layers."""
    if not diff_ids:
        return ""
    chain = diff_ids[0]
    if len(diff_ids) > 1:
        import hashlib

        for diff_id in diff_ids[1:]:
            chain = "sha256:" + hashlib.sha256(f"{chain} {diff_id}".encode()).hexdigest()
    return chain


def normalise(name: str) -> str:
    """A reference in full: `busybox` is `docker.io/library/busybox:latest`."""
    if not name or name.startswith("sha256:"):
        return name
    domain, slash, rest = name.partition("/")
    if not slash or not ("." in domain or ":" in domain or domain == "localhost"):
        domain, rest = "docker.io", name
    if domain in ("docker.io", "index.docker.io"):
        domain = "docker.io"
        if "/" not in rest:
            rest = f"library/{rest}"
    if "@" not in rest and ":" not in rest.rpartition("/")[2]:
        rest += ":latest"
    return f"{domain}/{rest}"


def get_image(client: Client, name: str) -> light.Image:
    """The image of that name, as given or in full. Raises `NotFound`."""
    names = list(dict.fromkeys((name, normalise(name)) if "/" in name else (normalise(name), name)))
    for number, candidate in enumerate(names):
        try:
            response = client.unary(IMAGES + "Get", light.GetImageRequest(name=candidate), light.GetImageResponse)
        except errors.NotFound:
            if number == len(names) - 1:
                raise errors.NotFound(f"image {names[0]!r}: not found", kind="image", key=names[0]) from None
            continue
        if response.image is not None:
            return response.image
    raise errors.NotFound(f"image {name!r}: not found", kind="image", key=name)


def read_blob(client: Client, digest: str, limit: int = DOCUMENT_LIMIT) -> bytes:
    """A small blob as a whole; `Failed` when it is larger than `limit`."""
    result = bytearray()
    call = client.start(CONTENT + "Read", light.ReadContentRequest(digest=digest), light.ReadContentResponse)
    for part in call:
        result += part.data
        if len(result) > limit:
            call.cancel()
            raise Failed(f"content {digest}: larger than {limit} bytes")
    return bytes(result)


def read_json(client: Client, digest: str) -> dict[str, Any]:
    """A blob that is a JSON object."""
    try:
        document = documents.loads(read_blob(client, digest))
    except ValueError as error:
        raise Failed(f"content {digest}: no JSON: {error}") from error
    if not isinstance(document, dict):
        raise Failed(f"content {digest}: not a JSON object")
    return document


def platform_of(descriptor: dict[str, Any]) -> str:
    """`linux/arm/v7`, or "" when an index does not say."""
    platform = descriptor.get("platform") or {}
    words = [platform.get("os"), platform.get("architecture"), platform.get("variant")]
    if words[1:] == ["arm64", "v8"] or words[1:] == ["amd64", "v1"]:
        words.pop()
    return "/".join(word for word in words if word)


def _matches(wanted: str, offered: str) -> bool:
    return offered == wanted or (offered.startswith(f"{wanted}/") and wanted.count("/") == 1)


def choose_manifest(index: dict[str, Any], platform: str) -> dict[str, Any] | None:
    """The descriptor in an index for a platform: the exact one, or one that does not say."""
    manifests = [entry for entry in index.get("manifests") or () if entry.get("mediaType") in (*_MANIFESTS, *_INDEXES)]
    for entry in manifests:
        if _matches(platform, platform_of(entry)):
            return entry  # type: ignore[no-any-return]
    silent = [entry for entry in manifests if not platform_of(entry)]
    return silent[0] if silent else None


def is_index(media_type: str) -> bool:
    """Whether a media type is an index or a Docker manifest list."""
    return media_type in _INDEXES


def is_manifest(media_type: str) -> bool:
    """Whether a media type is an image manifest."""
    return media_type in _MANIFESTS


def read_manifest(client: Client, image: light.Image, platform: str = "") -> tuple[str, dict[str, Any]]:
    """Digest and document of the manifest for `platform` (this machine's by default)."""
    wanted = platform or host_platform()
    if image.target is None:
        raise Failed(f"image {image.name}: has no target")
    digest, media_type = image.target.digest, image.target.media_type
    for _ in range(4):
        document = read_json(client, digest)
        if not is_index(media_type):
            return digest, document
        chosen = choose_manifest(document, wanted)
        if chosen is None:
            raise errors.NotFound(f"image {image.name}: nothing for platform {wanted}", kind="image", key=image.name)
        digest, media_type = chosen["digest"], chosen["mediaType"]
    raise Failed(f"image {image.name}: indexes nested too deeply")


def load_config(client: Client, image: light.Image, platform: str = "") -> ImageConfig:
    """The image's configuration for `platform`."""
    digest, manifest = read_manifest(client, image, platform)
    config = manifest.get("config") or {}
    if not config.get("digest"):
        raise Failed(f"image {image.name}: its manifest {digest} names no config")
    return ImageConfig(image.name, digest, config["digest"], read_json(client, config["digest"]))


def unpacked_chain_id(client: Client, image: ImageConfig, snapshotter: str) -> str:
    """The name of the image's snapshot.

    Whoever unpacked the image labelled its config with it, for garbage collection; reading that
    costs less than loading a hash library. Without the label it is computed.
    """
    if len(image.diff_ids) < 2:
        return image.chain_id
    response = client.unary(CONTENT + "Info", light.DigestRequest(digest=image.config_digest), light.InfoResponse)
    labels = response.info.labels if response.info is not None else {}
    return labels.get(f"containerd.io/gc.ref.snapshot.{snapshotter}") or image.chain_id
