"""Images made in memory for tests: layers of any shape, also of those that no honest tool makes."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


def digest_of(data: bytes) -> str:
    """The sha256 digest."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Member:
    """One entry of a layer."""

    name: str
    kind: bytes = tarfile.REGTYPE
    data: bytes = b""
    link: str = ""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: float = 1_600_000_000
    device: tuple[int, int] = (0, 0)
    pax: Mapping[str, str] = field(default_factory=dict)


def file(name: str, data: bytes = b"content", **more: Any) -> Member:
    """A regular file."""
    return Member(name, data=data, **more)


def folder(name: str, mode: int = 0o755, **more: Any) -> Member:
    """A directory."""
    return Member(name, tarfile.DIRTYPE, mode=mode, **more)


def symlink(name: str, target: str, **more: Any) -> Member:
    """A symbolic link."""
    return Member(name, tarfile.SYMTYPE, link=target, mode=0o777, **more)


def hard_link(name: str, target: str, **more: Any) -> Member:
    """A hard link to an earlier entry."""
    return Member(name, tarfile.LNKTYPE, link=target, **more)


def character(name: str, major: int, minor: int, **more: Any) -> Member:
    """A character device."""
    return Member(name, tarfile.CHRTYPE, device=(major, minor), **more)


def fifo(name: str, **more: Any) -> Member:
    """A named pipe."""
    return Member(name, tarfile.FIFOTYPE, **more)


def whiteout(name: str) -> Member:
    """A marker that hides `name` of lower layers."""
    head, _, base = name.rpartition("/")
    return Member(f"{head}/.wh.{base}" if head else f".wh.{base}")


def opaque(name: str) -> Member:
    """A marker that hides everything of lower layers below the directory `name`."""
    return Member(f"{name}/.wh..wh..opq")


def layer(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    """The tar stream of a layer."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.size, info.linkname, info.mode = member.kind, len(member.data), member.link, member.mode
            info.uid, info.gid, info.mtime = member.uid, member.gid, member.mtime  # type: ignore[assignment]
            info.devmajor, info.devminor = member.device
            info.pax_headers = dict(member.pax)
            tar.addfile(info, io.BytesIO(member.data) if member.data else None)
    return buffer.getvalue()


def pack(tar: bytes, compression: str = "gzip") -> bytes:
    """The layer as it is sent: "gzip", "zstd" or "" for plain."""
    if compression == "gzip":
        return gzip.compress(tar, 1, mtime=0)
    if compression == "zstd":
        import zstandard

        return zstandard.ZstdCompressor(level=1).compress(tar)
    return tar


@dataclass
class BuiltImage:
    """An image's blobs by digest, its documents, and what its tag names."""

    blobs: dict[str, bytes]
    manifest: bytes
    manifest_type: str
    index: bytes
    layers: list[str]
    config: str

    @property
    def target(self) -> str:
        """The digest of the index."""
        return digest_of(self.index)


def build(
    tars: Sequence[bytes], *, compression: str = "gzip", config: Mapping[str, Any] | None = None,
    platform: Mapping[str, str] | None = None, diff_ids: Sequence[str] | None = None, docker: bool = False,
) -> BuiltImage:
    """An image of `tars`, behind an index of one platform. `diff_ids` may lie."""
    place = {"os": "linux", "architecture": ARCHITECTURE, **(platform or {})}
    blobs: dict[str, bytes] = {}
    layers = []
    suffix = f"+{compression}" if compression else ""
    for tar in tars:
        packed = pack(tar, compression)
        blobs[digest_of(packed)] = packed
        layers.append({"mediaType": f"{OCI_LAYER}{suffix}", "digest": digest_of(packed), "size": len(packed)})
    document = json.dumps({
        **place, "config": {"Cmd": ["/bin/sh"], **(config or {})},
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids or map(digest_of, tars))},
    }).encode()
    blobs[digest_of(document)] = document
    manifest_type = "application/vnd.docker.distribution.manifest.v2+json" if docker else OCI_MANIFEST
    config_type = "application/vnd.docker.container.image.v1+json" if docker else OCI_CONFIG
    if docker:
        for item in layers:
            item["mediaType"] = "application/vnd.docker.image.rootfs.diff.tar.gzip"
    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": manifest_type,
        "config": {"mediaType": config_type, "digest": digest_of(document), "size": len(document)}, "layers": layers,
    }).encode()
    index = json.dumps({
        "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
            {"mediaType": manifest_type, "digest": digest_of(manifest), "size": len(manifest), "platform": place}
        ],
    }).encode()
    return BuiltImage(
        blobs, manifest, manifest_type, index, [str(item["digest"]) for item in layers], digest_of(document)
    )


def small_image(mark: str = "hello") -> BuiltImage:
    """Two little layers."""
    return build([
        layer(folder("etc"), file("etc/name", mark.encode()), file("etc/gone", b"x")),
        layer(folder("etc"), whiteout("etc/gone"), file("etc/new", b"new")),
    ])
