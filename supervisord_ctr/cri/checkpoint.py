"""CheckpointContainer, and containers that begin from a checkpoint (S5: both off unless configured).

A checkpoint is a tar archive, as a kubelet keeps them: `checkpoint/` (CRIU's images), `config.dump`,
`spec.dump` and `rootfs-diff.tar`. It is input: when one is read, only regular files and folders
below `checkpoint/` are taken, within limits; mounts, devices and everything else come from the
request alone.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri.core import Core
from supervisord_ctr.cri.state import Container
from supervisord_ctr.names import CRI_NAMESPACE, check_line

log = logging.getLogger(__name__)

_ENTRIES, _BYTES, _METADATA = 100_000, 64 << 30, 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """An archive that a container shall begin from."""

    path: str
    base_image: str


def _require_enabled(core: Core) -> None:
    if not core.settings.cri.checkpoint:
        raise errors.Unimplemented("checkpoints are switched off (cri.checkpoint)", kind="checkpoint")
    if shutil.which("criu") is None:
        raise errors.Unimplemented("checkpoints need criu, which is not installed", kind="checkpoint")


async def checkpoint_container(core: Core, request: pb.CheckpointContainerRequest) -> None:
    """Write the archive to `location`; the container runs on."""
    _require_enabled(core)
    container = core.state.container(request.container_id)
    if not container.running:
        raise errors.FailedPrecondition(
            f"container {container.id!r} is not running", kind="container", key=container.id
        )
    location = check_line(request.location, "checkpoint location")
    if not location.startswith("/"):
        raise errors.InvalidArgument(f"checkpoint location {location!r} is not absolute", kind="checkpoint")
    await core.operations.run(
        ("checkpoint", container.id, location), lambda: _checkpoint(core, container, Path(location))
    )


async def _checkpoint(core: Core, container: Container, location: Path) -> None:
    async with core.hold(container.id, "checkpointing"):
        work = core.run / "checkpoint" / container.id
        images = work / "checkpoint"
        try:
            await core.executors.run_io(_fresh, images)
            await core.tasks.checkpoint(CRI_NAMESPACE, container.id, str(images))
            stored = await core.database.containers.get(CRI_NAMESPACE, container.id)
            spec = stored.spec.value if stored.spec is not None else b"{}"
            await core.executors.run_io(_write, location, images, container, spec)
        finally:
            await core.executors.run_io(shutil.rmtree, work, True)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)


def _write(location: Path, images: Path, container: Container, spec: bytes) -> None:
    config = {
        "id": container.id, "name": container.config.metadata.name, "rootfsImage": container.image_name,
        "rootfsImageRef": container.image_id, "rootfsImageName": container.config.image.user_specified_image
        or container.image_name, "runtime": container.runtime,
        "createdTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(container.created_at / 1e9)),
        "checkpointedTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    temporary = location.with_name(location.name + ".part")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as handle, tarfile.open(fileobj=handle, mode="w") as archive:
            for name, data in (("config.dump", json.dumps(config).encode()), ("spec.dump", spec)):
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode, entry.mtime = len(data), 0o600, int(time.time())
                archive.addfile(entry, io.BytesIO(data))
            archive.add(images, arcname="checkpoint")
        os.rename(temporary, location)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


async def find(core: Core, text: str) -> Checkpoint | None:
    """The checkpoint that an image reference names (the path of an archive), None for any other reference."""
    if not text.startswith("/"):
        return None
    _require_enabled(core)
    return await core.executors.run_io(_describe, text)


def _describe(path: str) -> Checkpoint:
    try:
        with tarfile.open(path, mode="r:") as archive:
            for number, entry in enumerate(archive):
                if number > _ENTRIES:
                    break
                if entry.name.removeprefix("./") == "config.dump" and entry.isreg() and entry.size <= _METADATA:
                    handle = archive.extractfile(entry)
                    assert handle is not None
                    config = json.load(handle)
                    base = config.get("rootfsImageRef") or config.get("rootfsImageName")
                    if isinstance(base, str) and base:
                        return Checkpoint(path, base)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise errors.InvalidArgument(f"checkpoint {path!r} cannot be read: {error}", kind="checkpoint") from error
    raise errors.InvalidArgument(f"checkpoint {path!r} does not tell its image", kind="checkpoint", key=path)


async def unpack(core: Core, container: Container) -> Path | None:
    """The folder of CRIU's images that a container begins from, None for a plain start."""
    if not container.checkpoint:
        return None
    _require_enabled(core)
    folder = core.container_folder(container.id) / "restore"
    await core.executors.run_io(_extract, container.checkpoint, folder)
    return folder


def _extract(path: str, folder: Path) -> None:
    """Regular files below checkpoint/, one level deep, created exclusively; anything else is refused (S5)."""
    _fresh(folder)
    room = _BYTES
    try:
        with tarfile.open(path, mode="r:") as archive:
            for number, entry in enumerate(archive):
                if number > _ENTRIES:
                    raise errors.ResourceExhausted(f"checkpoint {path!r} holds more than {_ENTRIES} entries")
                parts = PurePosixPath(entry.name).parts
                if parts[:1] != ("checkpoint",) or entry.isdir():
                    continue
                if not entry.isreg() or len(parts) != 2 or parts[1] in ("..", "."):
                    raise errors.InvalidArgument(f"checkpoint {path!r} holds {entry.name!r}, which is not a plain file")
                room -= entry.size
                if room < 0:
                    raise errors.ResourceExhausted(f"checkpoint {path!r} is larger than {_BYTES} bytes")
                source = archive.extractfile(entry)
                assert source is not None
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(folder / parts[1], flags, 0o600)
                with os.fdopen(fd, "wb") as target:
                    shutil.copyfileobj(source, target)
    except (OSError, tarfile.TarError) as error:
        raise errors.InvalidArgument(f"checkpoint {path!r} cannot be read: {error}", kind="checkpoint") from error
