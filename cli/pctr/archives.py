"""Image archives in and out: by the daemon where it can, through the content service where not."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from typing import IO, Any, BinaryIO, cast

from pctr import image_config, image_tree, services
from pctr import light_transfer as messages
from pctr.command import Context, Failed, new_id
from pctr.committing import write_manifest
from pctr.image_config import is_index, is_manifest, normalise
from pctr.progress import display
from pctr.pulling import parse_platform
from pctr.rpc import Client
from pctr.transfer import Transfer
from pctr.unpack import unpack
from supervisord_ctr import errors
from supervisord_ctr.api.services.images.v1 import images_pb2
from supervisord_ctr.api.types import types_pb2

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_NAME_ANNOTATION = "io.containerd.image.name"
_TAG_ANNOTATION = "org.opencontainers.image.ref.name"
_BLOB = re.compile(r"(?:\./)?blobs/(sha256|sha512)/([0-9a-f]{64,128})\Z")
_DOCUMENT_LIMIT = 4 << 20


@contextlib.contextmanager
def _opened(path: str, mode: str) -> Iterator[BinaryIO]:
    if path == "-":
        yield sys.stdin.buffer if "r" in mode else sys.stdout.buffer
        if "w" in mode:
            sys.stdout.buffer.flush()
        return
    with open(path, mode) as file:
        yield cast(BinaryIO, file)


# -- in ------------------------------------------------------------------------------------------------


def import_archive(context: Context, path: str) -> list[str]:
    """Read an archive into the daemon; names of the images that came."""
    args = context.args
    before = {image.name: image.target.digest for image in services.list_images(context.client)}
    with _opened(path, "rb") as file:
        if not args.local:
            try:
                return _import_by_daemon(context, file, before)
            except errors.Unimplemented:
                pass
        return _Import(context, file).run()


def _import_by_daemon(context: Context, file: BinaryIO, before: dict[str, str]) -> list[str]:
    args = context.args
    platform = args.platform or image_config.host_platform()
    store = messages.ImageStore(
        name=args.index_name, platforms=[parse_platform(args.platform)] if args.platform else [])
    prefix = args.base_name
    if prefix:
        store.extra_references.append(messages.ImageReference(
            name=prefix, is_prefix=True, allow_overwrite=True, add_digest=args.digests))
    else:
        store.extra_references.append(messages.ImageReference(
            name="import", is_prefix=True, allow_overwrite=True, add_digest=args.digests, skip_named_digest=True))
    if not args.no_unpack:
        store.unpacks.append(messages.UnpackConfiguration(
            platform=parse_platform(platform), snapshotter=context.snapshotter))
    transfer = Transfer(context.client)
    seen: list[str] = []
    with display(args.quiet) as sink:

        class Recording:
            def update(self, progress: messages.Progress) -> None:
                if progress.event.startswith("saved") and progress.name not in seen:
                    seen.append(progress.name)
                sink.update(progress)

        transfer.run(messages.ImageImportStream(stream=transfer.sending_from(file)), store, Recording())
    if seen:
        return seen
    after = {image.name: image.target.digest for image in services.list_images(context.client)}
    return [name for name, digest in after.items() if before.get(name) != digest]


class _Import:
    """Reads an OCI layout or a `docker save` archive in one pass."""

    def __init__(self, context: Context, file: BinaryIO) -> None:
        self._context = context
        self._client = context.client
        self._file = file
        self._documents: dict[str, bytes] = {}
        self._members: dict[str, tuple[str, int]] = {}

    def run(self) -> list[str]:
        """Store everything, then name the images."""
        args, client = self._context.args, self._client
        with services.Lease(client):
            with tarfile.open(fileobj=self._file, mode="r|*") as archive:
                for member in archive:
                    if member.isreg() and (data := archive.extractfile(member)) is not None:
                        self._store(member, data)
            if "index.json" in self._documents:
                images = self._from_layout(json.loads(self._documents["index.json"]))
            elif "manifest.json" in self._documents:
                images = self._from_docker(json.loads(self._documents["manifest.json"]))
            else:
                raise Failed("the archive is neither an OCI layout nor of docker save")
            for name, descriptor in images.items():
                target = types_pb2.Descriptor(
                    media_type=descriptor["mediaType"], digest=descriptor["digest"], size=descriptor["size"])
                services.put_image(client, images_pb2.Image(name=name, target=target))
                if not args.no_unpack:
                    self._unpack(name)
        return list(images)

    def _store(self, member: tarfile.TarInfo, data: IO[bytes]) -> None:
        name = member.name.removeprefix("./")
        found = _BLOB.match(name)
        digest = f"{found[1]}:{found[2]}" if found else ""
        if name in ("index.json", "manifest.json", "oci-layout", "repositories"):
            if member.size > _DOCUMENT_LIMIT:
                raise Failed(f"{name} in the archive is larger than {_DOCUMENT_LIMIT} bytes")
            self._documents[name] = data.read()
            return
        ref = f"pctr-import-{new_id()}"
        if digest:
            parts = iter(lambda: data.read(1 << 20), b"")
            services.write_content(self._client, ref, parts, digest=digest, size=member.size)
        else:
            digest = _store_unnamed(self._client, ref, data)
        self._members[name] = (digest, member.size)

    def _from_layout(self, index: dict[str, Any]) -> dict[str, dict[str, Any]]:
        images: dict[str, dict[str, Any]] = {}
        args = self._context.args
        for descriptor in index.get("manifests") or ():
            annotations = descriptor.get("annotations") or {}
            name = annotations.get(_NAME_ANNOTATION, "")
            tag = annotations.get(_TAG_ANNOTATION, "")
            if not name and tag:
                name = tag if "/" in tag else f"{args.base_name}:{tag}" if args.base_name else tag
            if not name:
                name = f"{args.base_name or 'import'}@{descriptor['digest']}"
            self._label(descriptor)
            images[normalise(name)] = descriptor
            if args.digests:
                images[f"{args.base_name or 'import'}@{descriptor['digest']}"] = descriptor
        if not images:
            raise Failed("the archive's index names no image")
        return images

    def _label(self, descriptor: dict[str, Any]) -> None:
        """Labels that keep children with their parents."""
        try:
            document = image_config.read_json(self._client, descriptor["digest"])
        except errors.NotFound:
            return
        labels: dict[str, str] = {}
        if is_index(descriptor["mediaType"]):
            for number, child in enumerate(document.get("manifests") or ()):
                labels[f"containerd.io/gc.ref.content.m.{number}"] = child["digest"]
                self._label(child)
        elif is_manifest(descriptor["mediaType"]):
            labels["containerd.io/gc.ref.content.config"] = document["config"]["digest"]
            for number, layer in enumerate(document.get("layers") or ()):
                labels[f"containerd.io/gc.ref.content.l.{number}"] = layer["digest"]
        if labels:
            services.update_content_labels(self._client, descriptor["digest"], labels)

    def _from_docker(self, entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        images: dict[str, dict[str, Any]] = {}
        for entry in entries:
            config = image_config.read_json(self._client, self._member(entry["Config"])[0])
            layers = []
            for layer in entry.get("Layers") or ():
                digest, size = self._member(layer)
                layers.append({"mediaType": _DOCKER_LAYER, "digest": digest, "size": size})
            descriptor, _ = write_manifest(
                self._client, config, layers, media_type="application/vnd.docker.distribution.manifest.v2+json",
                config_type="application/vnd.docker.container.image.v1+json",
            )
            for name in entry.get("RepoTags") or [f"import@{descriptor['digest']}"]:
                images[normalise(name)] = descriptor
        return images

    def _member(self, name: str) -> tuple[str, int]:
        found = self._members.get(name.removeprefix("./"))
        if found is None:
            raise Failed(f"the archive lacks {name}")
        return found

    def _unpack(self, name: str) -> None:
        client = self._client
        try:
            config = image_config.load_config(
                client, image_config.get_image(client, name), self._context.args.platform)
        except errors.NotFound:
            return  # nothing for this machine in it
        manifest = image_config.read_json(client, config.manifest_digest)
        unpack(client, config.manifest_digest, config.diff_ids, manifest, self._context.snapshotter)


def _store_unnamed(client: Client, ref: str, data: IO[bytes]) -> str:
    """A member whose digest its name does not tell."""
    import hashlib

    seen = hashlib.sha256()
    writer = services.Writer(client, ref)
    try:
        while part := data.read(1 << 20):
            seen.update(part)
            writer.write(part)
        digest = f"sha256:{seen.hexdigest()}"
        try:
            writer.commit()
        except errors.AlreadyExists:
            pass
        return digest
    finally:
        writer.close()


# -- out -----------------------------------------------------------------------------------------------


def export_archive(context: Context, path: str, names: list[str]) -> None:
    """Write images into an archive: an OCI layout that `docker load` takes as well."""
    args, client = context.args, context.client
    images = [services.get_image(client, name) for name in names]
    with _opened(path, "wb") as file:
        if not args.local and len(images) == 1:
            try:
                transfer = Transfer(client)
                transfer.run(
                    messages.ImageStore(name=images[0].name),
                    messages.ImageExportStream(
                        stream=transfer.reading_into(file), all_platforms=args.all_platforms,
                        platforms=list(map(parse_platform, args.platform)),
                    ), None,
                )
                return
            except errors.Unimplemented:
                pass
        _export(client, file, images, args.platform, all_platforms=args.all_platforms)


def _export(
    client: Client, file: BinaryIO, images: list[images_pb2.Image], platforms: list[str], *, all_platforms: bool,
) -> None:
    wanted = platforms or [image_config.host_platform()]
    entries, docker, written = [], [], set()
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for image in images:
            light_image = image_config.get_image(client, image.name)
            if all_platforms:
                target = image_tree.descriptor_of(image.target)
            else:
                digest, manifest = image_config.read_manifest(client, light_image, wanted[0])
                size = services.content_info(client, digest).size
                target = {"mediaType": manifest.get("mediaType") or image.target.media_type, "digest": digest,
                          "size": size}
            for node in image_tree.walk(client, target):
                if node.digest in written:
                    continue
                if node.kind in ("manifest", "index") and node.document is None:
                    continue
                _add_blob(client, archive, node.digest)
                written.add(node.digest)
            entries.append({**target, "annotations": {
                _NAME_ANNOTATION: image.name, _TAG_ANNOTATION: image.name.rpartition(":")[2]}})
            docker.append(_docker_entry(client, image.name, light_image, wanted[0]))
        _add(archive, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
        _add(archive, "index.json", json.dumps(
            {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode())
        _add(archive, "manifest.json", json.dumps([entry for entry in docker if entry is not None]).encode())


def _docker_entry(client: Client, name: str, image: Any, platform: str) -> dict[str, Any] | None:
    try:
        _, manifest = image_config.read_manifest(client, image, platform)
    except errors.NotFound:
        return None

    def path(descriptor: dict[str, Any]) -> str:
        algorithm, _, digits = descriptor["digest"].partition(":")
        return f"blobs/{algorithm}/{digits}"

    return {"Config": path(manifest["config"]), "RepoTags": [name],
            "Layers": [path(layer) for layer in manifest.get("layers") or ()]}


class _BlobFile(io.RawIOBase):
    """A blob as a file, for tarfile."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts = parts
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._rest = part
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _add_blob(client: Client, archive: tarfile.TarFile, digest: str) -> None:
    algorithm, _, digits = digest.partition(":")
    info = tarfile.TarInfo(f"blobs/{algorithm}/{digits}")
    info.size = services.content_info(client, digest).size
    info.mode = 0o444
    archive.addfile(info, io.BufferedReader(_BlobFile(services.read_content(client, digest)), 1 << 20))


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o444
    archive.addfile(info, io.BytesIO(data))
