"""The image calls: pull, list, status, remove, and what images use on disk.

Owns credentials of a request and the names an image gets. A pull belongs to the daemon: the client
may go away, and another call for the same image joins it.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
import time
from collections.abc import Sequence
from typing import Any, Protocol

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import ids
from supervisord_ctr.cri.core import Core, all_of
from supervisord_ctr.cri.image_store import ImageRecord
from supervisord_ctr.images import reference
from supervisord_ctr.model import Image
from supervisord_ctr.names import CRI_NAMESPACE

log = logging.getLogger(__name__)


class Login(Protocol):
    """Makes the puller's credentials from a request's."""

    def __call__(
        self, *, username: str = "", password: str = "", identity_token: str = "", registry_token: str = "",
        server: str = "",
    ) -> Any: ...


class Fetcher(Protocol):
    """Pulls, as `images.pull.Puller` does."""

    async def pull(self, name: str, *, snapshotter: str, credentials: Any, labels: dict[str, str]) -> Image:
        """The image in the store, unpacked for `snapshotter`."""
        ...

    def login(
        self, *, username: str = "", password: str = "", identity_token: str = "", registry_token: str = "",
        server: str = "",
    ) -> Any:
        """Credentials for `pull`."""
        ...


def credentials(fetcher: Fetcher, auth: pb.AuthConfig) -> Any:
    """The request's credentials, None for none; raises `InvalidArgument` when they cannot be read."""
    username, password = auth.username, auth.password
    if not username and auth.auth:
        try:
            username, colon, password = base64.b64decode(auth.auth, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            raise errors.InvalidArgument("field auth of the credentials is not base64", kind="auth") from None
        if not colon:
            raise errors.InvalidArgument("field auth of the credentials holds no colon", kind="auth")
        password = password.strip("\0")
    if not (username or auth.identity_token or auth.registry_token):
        return None
    return fetcher.login(
        username=username, password=password, identity_token=auth.identity_token, registry_token=auth.registry_token,
        server=auth.server_address,
    )


async def pull_image(core: Core, fetcher: Fetcher, request: pb.PullImageRequest) -> str:
    """The ID of the image, pulled and unpacked for the handler that will run it."""
    parsed = reference.parse(request.image.image)
    handler, _ = core.handler(request.image.runtime_handler)
    snapshotter = core.snapshotter(handler)
    login = credentials(fetcher, request.auth)
    labels = {ids.LABEL_IMAGE: ids.IMAGE_MANAGED}
    name = parsed.canonical()
    if name in {reference.parse(pinned).canonical() for pinned in core.settings.cri.pinned_images}:
        labels[ids.LABEL_PINNED] = ids.PINNED
    secret = request.auth.SerializeToString(deterministic=True)
    return await core.operations.run(
        ("pull", name, snapshotter, secret), lambda: _pull(core, fetcher, parsed, snapshotter, login, labels)
    )


async def _pull(
    core: Core, fetcher: Fetcher, parsed: reference.Reference, snapshotter: str, login: Any, labels: dict[str, str]
) -> str:
    name = parsed.canonical()
    begun = time.monotonic()
    with core.stages.track(f"pull {name}", "pulling"):
        try:
            image = await fetcher.pull(name, snapshotter=snapshotter, credentials=login, labels=labels)
        except errors.Error as error:
            raise type(error)(
                f"failed to pull and unpack image {name!r}: {error.message}", kind="image", key=name
            ) from error
        record = await core.images.update(image.name)
        if record is None:
            raise errors.Internal(f"image {name!r} was pulled but is not in the store", kind="image", key=name)
        await _add_names(core, parsed, image, record, labels)
    log.info("pulled image %s as %s in %.1f s", name, record.id, time.monotonic() - begun)
    return record.id


async def _add_names(
    core: Core, parsed: reference.Reference, image: Image, record: ImageRecord, labels: dict[str, str]
) -> None:
    """The image's ID and its name by digest lead to it too, beside the name it was pulled by."""
    by_digest = f"{parsed.domain}/{parsed.path}@{image.target.digest}"

    async def add(name: str) -> None:
        wanted = Image(name, image.target, labels)
        try:
            await core.database.images.create(CRI_NAMESPACE, wanted)
        except errors.AlreadyExists:
            await core.database.images.update(CRI_NAMESPACE, wanted, ["target"])
        await core.images.update(name)

    # At once: the database writes both to disk together.
    await all_of(*(add(name) for name in (record.id, by_digest) if name != image.name))


async def remove_image(core: Core, text: str) -> None:
    """Remove an image with all its names; an unknown one is no error."""
    try:
        record = await core.images.resolve(text)
    except errors.NotFound:
        return
    await core.operations.run(("remove image", record.id), lambda: _remove(core, record))


async def _remove(core: Core, record: ImageRecord) -> None:
    async with core.images.unadopted():
        names = sorted(record.names)
        for index, name in enumerate(names):
            try:
                await core.database.images.delete(CRI_NAMESPACE, name, sync=index == len(names) - 1)
            except errors.NotFound:
                log.debug("image name %s was gone already", name)
            core.images.drop(name)


async def list_images(core: Core, wanted: pb.ImageFilter) -> list[pb.Image]:
    """All images, or the one that the filter names."""
    if wanted.image.image:
        try:
            return [(await core.images.resolve(wanted.image.image)).message()]
        except errors.NotFound:
            return []
    return [record.message() for record in core.images.all()]


async def image_status(core: Core, request: pb.ImageStatusRequest) -> pb.ImageStatusResponse:
    """The image, or an empty answer when there is none."""
    try:
        record = await core.images.resolve(request.image.image)
    except errors.NotFound:
        return pb.ImageStatusResponse()
    response = pb.ImageStatusResponse(image=record.message())
    if request.verbose:
        response.info["info"] = json.dumps({"chainID": record.chain_id, "imageSpec": record.document})
    return response


def filesystem_usage(core: Core) -> pb.ImageFsInfoResponse:
    """What images and containers use, from accounting (P11); both live below the same snapshotter here."""
    usage = pb.FilesystemUsage(
        timestamp=time.time_ns(), fs_id=pb.FilesystemIdentifier(mountpoint=snapshot_folder(core)),
        used_bytes=pb.UInt64Value(value=core.stats.images.size),
        inodes_used=pb.UInt64Value(value=core.stats.images.inodes),
    )
    return pb.ImageFsInfoResponse(image_filesystems=[usage], container_filesystems=[usage])


def snapshot_folder(core: Core, snapshotter: str = "") -> str:
    """Where a snapshotter keeps its layers: what a kubelet calls the mount point."""
    name = snapshotter or core.settings.snapshots.default
    for candidate in _folders(core, name):
        if os.path.isdir(candidate):
            return candidate
    return str(core.settings.root)


def _folders(core: Core, name: str) -> Sequence[str]:
    root = core.settings.root
    return (f"{root}/snapshots/{name}", f"{root}/io.containerd.snapshotter.v1.{name}", f"{root}/{name}")
