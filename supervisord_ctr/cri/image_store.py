"""The memory of images: one entry for each image ID (config digest), with all its names.

Owns what CRI's image calls and container creation read; kept true by the events that the metadata
store publishes, so that an image made with `ctr -n k8s.io` or removed by anybody is seen. Nothing
here pulls; see `images.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import ids
from supervisord_ctr.images import reference
from supervisord_ctr.model import Descriptor, Image
from supervisord_ctr.names import CRI_NAMESPACE, is_digest
from supervisord_ctr.oci.users import User

if TYPE_CHECKING:
    from supervisord_ctr.events import Exchange
    from supervisord_ctr.metadata import Database

log = logging.getLogger(__name__)

_USERS_LIMIT = 4096


@dataclass(frozen=True)
class Config:
    """What CRI needs of an image's config."""

    user: str = ""
    env: Sequence[str] = ()
    entrypoint: Sequence[str] = ()
    cmd: Sequence[str] = ()
    working_dir: str = ""
    stop_signal: str = ""
    volumes: Sequence[str] = ()
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Described:
    """What a reader of manifests says about a target: ID, config, chain and size of what is stored."""

    id: str
    config: Config
    chain_id: str
    size: int
    document: Mapping[str, Any]


class Reader(Protocol):
    """Reads an image's manifest and config from the content store."""

    async def describe(self, image: Image) -> Described:
        """Raises `NotFound` when parts of the image for this platform are missing."""
        ...

    async def unpack(self, image: Image, snapshotter: str) -> None:
        """Make the image's layers there for a snapshotter."""
        ...


@dataclass
class ImageRecord:
    """One image. `names` holds every reference in the store, the ID itself included."""

    id: str
    target: Descriptor
    config: Config
    chain_id: str
    size: int
    document: Mapping[str, Any]
    names: set[str] = field(default_factory=set)
    pinned: bool = False
    _message: pb.Image | None = None

    @property
    def tags(self) -> list[str]:
        """Names with a tag."""
        return sorted(name for name in self.names if not is_digest(name) and "@" not in name)

    @property
    def digests(self) -> list[str]:
        """Names with a digest."""
        return sorted(name for name in self.names if "@" in name)

    @property
    def main_name(self) -> str:
        """The name that a container of it is stored with."""
        return next(iter(self.tags), next(iter(self.digests), self.id))

    def changed(self) -> None:
        """Forget the message built so far."""
        self._message = None

    def message(self) -> pb.Image:
        """What lists and statuses return; shared, not to be changed."""
        if self._message is None:
            self._message = pb.Image(
                id=self.id, repo_tags=self.tags, repo_digests=self.digests, size=self.size, pinned=self.pinned
            )
            user = self.config.user.partition(":")[0]
            if user.isascii() and user.isdigit() and len(user) < 19:
                self._message.uid.value = int(user)
            elif user:
                self._message.username = user
        return self._message


class ImageStore:
    """All images of the CRI namespace."""

    def __init__(self, database: Database, reader: Reader, pinned: Sequence[str] = ()) -> None:
        self._database = database
        self._reader = reader
        self._pinned = {_canonical(name) for name in pinned}
        self._images: dict[str, ImageRecord] = {}
        self._names: dict[str, str] = {}
        self._targets: dict[str, Described] = {}
        self._lock = asyncio.Lock()
        self.users: dict[Hashable, User] = {}

    async def load(self) -> None:
        """Read every image of the store."""
        for image in await self._database.images.list(CRI_NAMESPACE):
            await self._take(image)

    async def follow(self, exchange: Exchange) -> None:
        """Keep up with the store until cancelled; after a cut-off everything is read anew."""
        while True:
            try:
                async with exchange.subscribe([f"namespace=={CRI_NAMESPACE},topic~=/images/"]) as events:
                    await self.resync()
                    for name in list(self._names):
                        await self.adopt(name)
                    async for event in events:
                        from supervisord_ctr.events import unpack

                        message: Any = unpack(event.event)
                        if message is not None and message.name:
                            await self.adopt(message.name)
                    return
            except errors.ResourceExhausted:
                log.warning("image events came faster than they were read; images are read anew")

    async def resync(self) -> None:
        """Make memory what the store is."""
        listed = {image.name: image for image in await self._database.images.list(CRI_NAMESPACE)}
        for name in [name for name in self._names if name not in listed]:
            self._drop_name(name)
        for image in listed.values():
            await self._take(image)

    async def update(self, name: str) -> ImageRecord | None:
        """Look at one name in the store; returns its image, None when the name is gone."""
        async with self._lock:
            try:
                image = await self._database.images.get(CRI_NAMESPACE, name)
            except errors.NotFound:
                self._drop_name(name)
                return None
            return await self._take(image)

    async def adopt(self, name: str) -> None:
        """See a name that anybody made, and make the image known by its ID too, as a kubelet needs it.

        Names that others made get the label that says that CRI minds them.
        """
        async with self._lock:
            try:
                image = await self._database.images.get(CRI_NAMESPACE, name)
            except errors.NotFound:
                self._drop_name(name)
                return
            record = await self._take(image)
            if record is None:
                return
            labels = {ids.LABEL_IMAGE: ids.IMAGE_MANAGED}
            try:
                if image.labels.get(ids.LABEL_IMAGE) != ids.IMAGE_MANAGED:
                    marked = replace(image, labels={**image.labels, **labels})
                    await self._database.images.update(CRI_NAMESPACE, marked, [f"labels.{ids.LABEL_IMAGE}"])
                if record.id not in self._names:
                    made = await self._database.images.create(CRI_NAMESPACE, Image(record.id, image.target, labels))
                    await self._take(made)
            except errors.AlreadyExists:
                await self._take(replace(image, name=record.id))
            except errors.NotFound:
                log.debug("image %s went while it was looked at", name)

    @contextlib.asynccontextmanager
    async def unadopted(self) -> AsyncIterator[None]:
        """Names that vanish in this block are not brought back by an event of before."""
        async with self._lock:
            yield

    def drop(self, name: str) -> None:
        """A name is gone."""
        self._drop_name(name)

    async def _take(self, image: Image) -> ImageRecord | None:
        described = self._targets.get(image.target.digest)
        if described is None:
            try:
                described = await self._reader.describe(image)
            except errors.Error as error:
                log.info("image %s is not usable: %s", image.name, error.message)
                self._drop_name(image.name)
                return None
            self._targets[image.target.digest] = described
        if self._names.get(image.name, described.id) != described.id:
            self._drop_name(image.name)
        record = self._images.get(described.id)
        if record is None:
            record = self._images[described.id] = ImageRecord(
                described.id, image.target, described.config, described.chain_id, described.size, described.document
            )
        record.names.add(image.name)
        self._names[image.name] = described.id
        if image.labels.get(ids.LABEL_PINNED) == ids.PINNED or image.name in self._pinned:
            record.pinned = True
        record.changed()
        return record

    def _drop_name(self, name: str) -> None:
        record = self._images.get(self._names.pop(name, ""))
        if record is None:
            return
        record.names.discard(name)
        record.changed()
        if not record.names:
            self._images.pop(record.id, None)
            for target in [key for key, value in self._targets.items() if value.id == record.id]:
                del self._targets[target]

    def all(self) -> list[ImageRecord]:
        """Every image."""
        return list(self._images.values())

    def get(self, image_id: str) -> ImageRecord | None:
        """The image of an ID."""
        return self._images.get(image_id)

    async def resolve(self, text: str) -> ImageRecord:
        """The image of an ID, the beginning of one, a name with tag or digest, or a short name; raises `NotFound`.

        A name that memory does not have is looked up in the store, since its event may be under way.
        """
        if not text:
            raise errors.InvalidArgument("image reference must not be empty", kind="image")
        found = self._local(text)
        if found is not None:
            return found
        for name in _candidates(text):
            record = await self.update(name)
            if record is not None:
                return record
        raise errors.NotFound(f"image {text!r} not found", kind="image", key=text)

    def _local(self, text: str) -> ImageRecord | None:
        if is_digest(text):
            return self._images.get(text)
        short = text.removeprefix("sha256:")
        for name in _candidates(text):
            if name in self._names:
                return self._images[self._names[name]]
        if len(short) >= 3 and all(char in "0123456789abcdef" for char in short):
            matches = [record for key, record in self._images.items() if key.partition(":")[2].startswith(short)]
            if len(matches) == 1:
                return matches[0]
        return None

    async def unpack(self, record: ImageRecord, snapshotter: str) -> None:
        """Make the image's layers there for a snapshotter that has not got them."""
        await self._reader.unpack(Image(record.main_name, record.target), snapshotter)

    def remember_user(self, key: Hashable, user: User) -> None:
        """Keep who a user of an image is: images do not change."""
        if len(self.users) >= _USERS_LIMIT:
            self.users.clear()
        self.users[key] = user


def _canonical(text: str) -> str:
    try:
        return reference.parse(text).canonical()
    except errors.InvalidArgument:
        return text


def _candidates(text: str) -> list[str]:
    """Names under which the store may have what `text` means."""
    canonical = _canonical(text)
    return [text] if canonical == text else [canonical, text]
