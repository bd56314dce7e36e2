"""Archive import: an OCI image layout or a Docker archive becomes content.

Owns reading the archive as it arrives, on a thread of its own, with every file written straight into
an ingest; the archive is hostile input (names are keys and never paths, sizes are bounded). Answers
with the descriptors that can be named. Source: OCI image specification, image-layout.md; Docker's
`image save` formats 1.1 and 1.2.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import posixpath
import queue
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from supervisord_ctr.diff.compression import GZIP, NONE, ZSTD, Deflater, Inflater, detect
from supervisord_ctr.diff.tar import REGULAR, SYMLINK, TarReader
from supervisord_ctr.errors import AlreadyExists, InvalidArgument, NotFound
from supervisord_ctr.images import manifest as documents
from supervisord_ctr.images import platforms as platform_rules
from supervisord_ctr.images import reference
from supervisord_ctr.images.config import parse_config
from supervisord_ctr.images.naming import IMAGE_NAME, REF_NAME, REF_SOURCE
from supervisord_ctr.images.registry import digest_of
from supervisord_ctr.model import Descriptor, Platform
from supervisord_ctr.names import LABEL_UNCOMPRESSED

if TYPE_CHECKING:
    from supervisord_ctr.metadata import Database

T = TypeVar("T")

_MAX_JSON = 20 << 20
_MAX_FILES = 200_000
_CHUNK = 1 << 20
_AHEAD = 8

#: Gives the archive's bytes, b"" at the end.
Source = Callable[[], Awaitable[bytes]]


class _Feed:
    """Bytes from the loop to the thread that parses, a few pieces ahead; neither side holds a thread to wait."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._room = asyncio.Event()
        self._pending = 0
        self._rest = b""
        self._ended = False

    async def fill(self, source: Source) -> None:
        """Hand over everything, then the end."""
        try:
            while data := await source():
                self._queue.put(data)
                self._pending += 1
                while self._pending >= _AHEAD:
                    self._room.clear()
                    await self._room.wait()
        finally:
            self._queue.put(b"")

    def _taken(self) -> None:
        self._pending -= 1
        self._room.set()

    def read(self, size: int, /) -> bytes:
        """For the parser's thread; b"" at the end."""
        if not self._rest and not self._ended:
            self._rest = self._queue.get()
            if self._rest:
                self._loop.call_soon_threadsafe(self._taken)
            else:
                self._ended = True
        part, self._rest = self._rest[:size], self._rest[size:]
        return part

    def drain(self) -> None:
        """Let the filler finish."""
        while self.read(_CHUNK):
            pass


class _Import:
    """One archive, parsed on a thread; database calls hop to the loop."""

    def __init__(self, database: Database, namespace: str, lease: str, loop: asyncio.AbstractEventLoop) -> None:
        self._content = database.content
        self._namespace = namespace
        self._lease = lease
        self._loop = loop
        self.blobs: dict[str, Descriptor] = {}
        self.links: dict[str, str] = {}
        self.layout: Any = None
        self.docker: Any = None

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def parse(self, feed: _Feed) -> None:
        """Store every file of the archive; keep the two JSON files that say what it is."""
        inflater = Inflater(feed)
        reader = TarReader(lambda: inflater.read(_CHUNK))
        count = 0
        while (entry := reader.next()) is not None:
            count += 1
            if count > _MAX_FILES:
                raise InvalidArgument(f"archive has more than {_MAX_FILES} files", kind="archive")
            name = posixpath.normpath(entry.name.decode("utf-8", "surrogateescape"))
            if entry.type == SYMLINK:
                target = entry.link.decode("utf-8", "surrogateescape")
                self.links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
            if entry.type != REGULAR:
                continue
            if name in ("oci-layout", "manifest.json"):
                value = _json(_whole(reader, entry.size, name), name)
                if name == "oci-layout":
                    self.layout = value
                else:
                    self.docker = value
            else:
                self.blobs[name] = self._store(reader, entry.size, name)
        reader.drain()

    def _store(self, reader: TarReader, size: int, name: str) -> Descriptor:
        """One file as a blob. A blob of a layout must have the digest that its name says."""
        parts = name.split("/")
        expected = f"{parts[1]}:{parts[2]}" if len(parts) == 3 and parts[0] == "blobs" else ""
        writer = self._await(self._content.writer(
            self._namespace, f"import-{secrets.token_hex(8)}-{name[-64:]}", size=size, lease=self._lease
        ))
        try:
            while piece := reader.body():
                writer.blocking.write(piece)
            digest = writer.digest()
            if expected.startswith("sha256:") and digest != expected:
                raise InvalidArgument(f"archive entry {name!r} has the digest {digest}", kind="archive", key=name)
            with contextlib.suppress(AlreadyExists):
                self._await(writer.commit(size, digest))
        finally:
            self._await(writer.close())
        return Descriptor("", digest, size)

    # What it is.

    def index(self, compress: bool) -> Descriptor:
        """The index of the archive: its own, or one made for Docker's list."""
        if self.layout is not None:
            if not isinstance(self.layout, dict) or self.layout.get("imageLayoutVersion") != "1.0.0":
                raise InvalidArgument("archive: unsupported version of the OCI image layout", kind="archive")
            found = self.blobs.get("index.json")
            if found is None:
                raise InvalidArgument("archive: missing index.json in OCI layout 1.0.0", kind="archive")
            return replace(found, media_type=documents.OCI_INDEX)
        if not isinstance(self.docker, list):
            raise InvalidArgument("archive: unrecognized image format", kind="archive")
        for name, target in self.links.items():
            if name not in self.blobs:
                if target not in self.blobs:
                    raise InvalidArgument(f"archive: link {name!r} leads to nothing", kind="archive", key=name)
                self.blobs[name] = self.blobs[target]
        manifests = []
        for entry in self.docker:
            manifests += self._docker_image(entry, compress)
        body = {"schemaVersion": 2, "mediaType": documents.OCI_INDEX, "manifests": manifests}
        return self._document(body, documents.OCI_INDEX)

    def _docker_image(self, entry: Any, compress: bool) -> list[dict[str, Any]]:
        try:
            config_name, layer_names, tags = str(entry["Config"]), list(entry["Layers"]), entry.get("RepoTags") or []
        except (KeyError, TypeError, AttributeError):
            raise InvalidArgument("archive: manifest.json is not a list of images", kind="archive") from None
        config = self.blobs.get(posixpath.normpath(config_name))
        if config is None:
            raise InvalidArgument(f"archive: image config {config_name!r} not found", kind="archive")
        config = replace(config, media_type=documents.DOCKER_CONFIG)
        layers = []
        for name in layer_names:
            blob = self.blobs.get(posixpath.normpath(str(name)))
            if blob is None:
                raise InvalidArgument(f"archive: layer {name!r} not found", kind="archive")
            layers.append(self._layer(blob, compress))
        manifest = self._document({
            "schemaVersion": 2, "mediaType": documents.DOCKER_MANIFEST, "config": documents.descriptor_json(config),
            "layers": [documents.descriptor_json(layer) for layer in layers],
        }, documents.DOCKER_MANIFEST)
        parsed = parse_config(
            self._await(self._content.read(self._namespace, config.digest, documents.MAX_CONFIG)),
            f"config {config.digest}",
        )
        if parsed.platform.architecture:
            manifest = replace(manifest, platform=platform_rules.normalize(parsed.platform))
        if not tags:
            return [documents.descriptor_json(manifest)]
        result = []
        for tag in tags:
            named = reference.parse(str(tag))
            annotations = {IMAGE_NAME: named.canonical(), REF_NAME: named.tag or named.canonical()}
            result.append(documents.descriptor_json(replace(manifest, annotations=annotations)))
        return result

    def _layer(self, blob: Descriptor, compress: bool) -> Descriptor:
        """A layer file with its media type; packed first when that is asked for."""
        filters = [f'labels."{LABEL_UNCOMPRESSED}"=={blob.digest}']
        for info in self._await(self._content.walk(self._namespace, filters)):
            blob = Descriptor("", info.digest, info.size)
            break
        reader = self._await(self._content.reader(self._namespace, blob.digest))
        try:
            with open(reader.path, "rb") as file:
                packing = detect(file.read(10))
        finally:
            reader.close()
        types = {
            NONE: documents.DOCKER_LAYER, GZIP: documents.DOCKER_LAYER_GZIP, ZSTD: documents.DOCKER_LAYER_ZSTD
        }
        if packing == NONE and compress:
            return self._packed(blob)
        return replace(blob, media_type=types[packing])

    def _packed(self, blob: Descriptor) -> Descriptor:
        writer = self._await(self._content.writer(
            self._namespace, f"compress-blob-{blob.digest.replace(':', '-')}", lease=self._lease
        ))
        reader = self._await(self._content.reader(self._namespace, blob.digest))
        try:
            self._await(writer.truncate(0))
            deflater = Deflater(GZIP, writer.blocking.write)
            with open(reader.path, "rb") as file:
                while data := file.read(_CHUNK):
                    deflater.write(data)
            deflater.finish()
            size, digest = writer.offset, writer.digest()
            with contextlib.suppress(AlreadyExists):
                self._await(writer.commit(size, digest, {LABEL_UNCOMPRESSED: blob.digest}))
        finally:
            reader.close()
            self._await(writer.close())
        return Descriptor(documents.DOCKER_LAYER_GZIP, digest, size)

    def _document(self, body: dict[str, Any], media_type: str) -> Descriptor:
        data = json.dumps(body, separators=(",", ":")).encode()
        digest = digest_of(data)
        writer = None
        with contextlib.suppress(AlreadyExists):
            writer = self._await(self._content.writer(
                self._namespace, f"manifest-{digest}", size=len(data), expected=digest, lease=self._lease
            ))
        if writer is not None:
            try:
                if not writer.shared:
                    self._await(writer.truncate(0))
                    self._await(writer.write(data))
                with contextlib.suppress(AlreadyExists):
                    self._await(writer.commit(len(data), digest))
            finally:
                self._await(writer.close())
        return Descriptor(media_type, digest, len(data))


def _whole(reader: TarReader, size: int, name: str) -> bytes:
    if size > _MAX_JSON:
        raise InvalidArgument(f"archive entry {name!r}: {size} bytes, at most {_MAX_JSON} are allowed", kind="archive")
    text = io.BytesIO()
    while piece := reader.body():
        text.write(piece)
    return text.getvalue()


def _json(data: bytes, name: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"archive entry {name!r} is not valid JSON: {error}", kind="archive") from error


async def import_archive(
    database: Database, namespace: str, source: Source, *, lease: str, compress: bool = False,
    platforms: Sequence[Platform] = (),
) -> list[Descriptor]:
    """Store the archive's content under `lease`; the index first, then the images in it.

    The images carry the annotation `REF_SOURCE`: their names are in their own annotations. Content of
    platforms that are not wanted is stored, but not tied to the index. InvalidArgument for what is no
    image archive.
    """
    loop = asyncio.get_running_loop()
    feed = _Feed(loop)
    work = _Import(database, namespace, lease, loop)

    def run() -> Descriptor:
        try:
            work.parse(feed)
        finally:
            feed.drain()
        return work.index(compress)

    found, filled = await asyncio.gather(
        asyncio.shield(asyncio.to_thread(run)), feed.fill(source), return_exceptions=True
    )
    if isinstance(found, BaseException):
        raise found
    if filled is not None:
        raise filled
    tops = await _tie(database, namespace, found, platforms, 0)
    return [found, *(replace(top, annotations={**top.annotations, REF_SOURCE: "annotation"}) for top in tops)]


async def _tie(
    database: Database, namespace: str, descriptor: Descriptor, platforms: Sequence[Platform], depth: int
) -> list[Descriptor]:
    """Label documents with their children (as garbage collection follows them); the images of the top index."""
    if depth > 8:
        raise InvalidArgument("archive: more than 8 nested indexes", kind="archive")
    try:
        data = await database.content.read(namespace, descriptor.digest, documents.MAX_MANIFEST)
    except NotFound:
        if depth > 1 or platforms:
            return []
        raise
    document = documents.parse(data, descriptor.media_type, f"manifest {descriptor.digest}")
    children = documents.children(document)
    labels = documents.gc_labels(children)
    info = await database.content.info(namespace, descriptor.digest)
    if labels and any(info.labels.get(key) != value for key, value in labels.items()):
        await database.content.update(
            namespace, replace(info, labels=labels), [f"labels.{key}" for key in labels]
        )
    if isinstance(document, documents.Manifest):
        return []
    for child in children:
        if child.media_type in documents.MANIFESTS | documents.INDEXES and platform_rules.matches_any(
            platforms, child.platform
        ):
            await _tie(database, namespace, child, platforms, depth + 1)
    return list(children)


__all__ = ["REF_SOURCE", "import_archive"]
