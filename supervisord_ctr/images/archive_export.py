"""Archive export: images as one tar file, an OCI image layout that Docker can load, too.

Owns `oci-layout`, `index.json`, `blobs/…` and Docker's `manifest.json`; the archive is made while it
is sent, and every blob's digest is verified on the way. Source: OCI image specification,
image-layout.md; Docker's `image save` format 1.2.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from supervisord_ctr.aio import Executors
from supervisord_ctr.diff.tarwriter import TarWriter
from supervisord_ctr.errors import DataLoss, InvalidArgument, NotFound
from supervisord_ctr.images import manifest as documents
from supervisord_ctr.images import platforms as platform_rules
from supervisord_ctr.images.naming import IMAGE_NAME, REF_NAME, ref_name
from supervisord_ctr.images.reference import parse
from supervisord_ctr.model import Descriptor, Image, Platform
from supervisord_ctr.names import LABEL_DISTRIBUTION_SOURCE

if TYPE_CHECKING:
    from supervisord_ctr.metadata import Database

_PIECE = 1 << 20

#: Takes the archive's bytes, piece by piece.
Sink = Callable[[bytes], Awaitable[object]]


@dataclass
class _DockerEntry:
    manifest: Descriptor
    names: list[str] = field(default_factory=list)


async def export_archive(
    database: Database, executors: Executors, namespace: str, images: Sequence[Image], sink: Sink, *,
    platforms: Sequence[Platform] = (), docker_manifest: bool = True, skip_nondistributable: bool = False,
) -> None:
    """Write `images` to `sink`. No `platforms` means all; NotFound when one has none of them or content is missing."""
    await _Export(database, executors, namespace, sink, platforms, skip_nondistributable).run(images, docker_manifest)


class _Export:
    def __init__(
        self, database: Database, executors: Executors, namespace: str, sink: Sink, platforms: Sequence[Platform],
        skip_nondistributable: bool,
    ) -> None:
        self._database = database
        self._executors = executors
        self._namespace = namespace
        self._sink = sink
        self._platforms = platforms
        self._skip = skip_nondistributable
        self._blobs: dict[str, Descriptor] = {}
        self._docker: dict[str, _DockerEntry] = {}
        self._pieces: list[bytes] = []
        self._tar = TarWriter(self._pieces.append)

    async def run(self, images: Sequence[Image], docker_manifest: bool) -> None:
        tops = []
        for image in images:
            await self._collect(image.target, image.name)
            tops.append(await self._top(image))
        await self._file("oci-layout", b'{"imageLayoutVersion":"1.0.0"}', 0o444)
        algorithms = sorted({digest.partition(":")[0] for digest in self._blobs})
        for folder in ("blobs/", *(f"blobs/{algorithm}/" for algorithm in algorithms)):
            self._tar.add(folder.encode(), stat.S_IFDIR, mode=0o755)
        for descriptor in self._blobs.values():
            await self._blob(descriptor)
        index = {
            "schemaVersion": 2, "mediaType": documents.OCI_INDEX,
            "manifests": [documents.descriptor_json(top) for top in tops],
        }
        await self._file("index.json", json.dumps(index, separators=(",", ":")).encode(), 0o644)
        if docker_manifest and self._docker:
            await self._file("manifest.json", await self._docker_json(), 0o444)
        self._tar.finish()
        await self._send()

    async def _top(self, image: Image) -> Descriptor:
        """The image's descriptor in the index, with its name and where its content came from."""
        info = await self._database.content.info(self._namespace, image.target.digest)
        sources = {key: value for key, value in info.labels.items() if key.startswith(LABEL_DISTRIBUTION_SOURCE)}
        names = {IMAGE_NAME: image.name, REF_NAME: ref_name(image.name)}
        return replace(image.target, annotations={**image.target.annotations, **sources, **names})

    async def _collect(self, descriptor: Descriptor, name: str, *, below_index: bool = False) -> bool:
        """Note every blob below `descriptor`; whether the platform fits."""
        data = await self._database.content.read(self._namespace, descriptor.digest, documents.MAX_MANIFEST)
        document = documents.parse(data, descriptor.media_type, f"manifest {descriptor.digest}")
        self._blobs[descriptor.digest] = descriptor
        if isinstance(document, documents.Manifest):
            for child in documents.children(document):
                if not (self._skip and documents.is_foreign(child.media_type)):
                    self._blobs.setdefault(child.digest, child)
            if not below_index:
                self._name(descriptor, name)
            return True
        wanted = [child for child in document.manifests if platform_rules.matches_any(self._platforms, child.platform)]
        if self._platforms and not wanted:
            raise NotFound(f"image {name}: no manifest found for platform", kind="image", key=name)
        for child in wanted:
            await self._collect(child, name, below_index=True)
        first = platform_rules.best(self._platforms[0] if self._platforms else platform_rules.default(), wanted)
        for child in first[:1]:
            if child.media_type in documents.MANIFESTS:
                self._name(child, name)
        return True

    def _name(self, manifest: Descriptor, name: str) -> None:
        entry = self._docker.setdefault(manifest.digest, _DockerEntry(manifest))
        if name not in entry.names:
            entry.names.append(name)

    async def _docker_json(self) -> bytes:
        entries = []
        for entry in self._docker.values():
            data = await self._database.content.read(self._namespace, entry.manifest.digest, documents.MAX_MANIFEST)
            document = documents.parse(data, entry.manifest.media_type, f"manifest {entry.manifest.digest}")
            assert isinstance(document, documents.Manifest)
            entries.append({
                "Config": _blob_path(document.config.digest), "RepoTags": [_familiar(name) for name in entry.names],
                "Layers": [_blob_path(layer.digest) for layer in document.layers],
            })
        return json.dumps(entries, separators=(",", ":")).encode()

    # Writing.

    async def _send(self) -> None:
        data = b"".join(self._pieces)
        self._pieces.clear()
        if data:
            await self._sink(data)

    async def _file(self, name: str, data: bytes, mode: int) -> None:
        self._tar.add(name.encode(), stat.S_IFREG, mode=mode, size=len(data))
        self._tar.data(data)
        await self._send()

    async def _blob(self, descriptor: Descriptor) -> None:
        reader = await self._database.content.reader(self._namespace, descriptor.digest)
        try:
            hasher = hashlib.new(descriptor.digest.partition(":")[0])
            self._tar.add(_blob_path(descriptor.digest).encode(), stat.S_IFREG, mode=0o444, size=reader.size)
            await self._send()
            position = 0
            while data := await reader.read_at(_PIECE, position):
                await self._executors.run_cpu(hasher.update, data)
                await self._sink(data)
                position += len(data)
            if hasher.hexdigest() != descriptor.digest.partition(":")[2] or position != reader.size:
                raise DataLoss(
                    f"content {descriptor.digest} is damaged on disk", kind="content", key=descriptor.digest
                )
            self._tar.pad(position)
            await self._send()
        finally:
            reader.close()


def _blob_path(digest: str) -> str:
    algorithm, _, encoded = digest.partition(":")
    return f"blobs/{algorithm}/{encoded}"


def _familiar(name: str) -> str:
    try:
        return parse(name).familiar()
    except InvalidArgument:
        return name
