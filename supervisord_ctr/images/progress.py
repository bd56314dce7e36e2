"""Progress: what a pull or push is doing, blob by blob, for whoever watches (P10).

Owns the events and their names, which are containerd's, so that its clients draw their bars. Events
of one blob are limited to a few a second; the last word on a blob is always said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from supervisord_ctr.images.manifest import ref_key
from supervisord_ctr.model import Descriptor

WAITING, EXISTS, COMPLETE = "waiting", "already exists", "complete"
DOWNLOADING, UPLOADING, EXTRACTING, EXTRACTED = "downloading", "uploading", "extracting", "extracted"

#: Seconds between two events of one blob that say only "more bytes".
INTERVAL = 0.1


@dataclass(frozen=True, slots=True)
class Progress:
    """One event: of the whole operation (no descriptor) or of one blob. `progress` and `total` are bytes."""

    event: str
    name: str = ""
    parents: tuple[str, ...] = ()
    descriptor: Descriptor | None = None
    progress: int = 0
    total: int = 0


#: Takes events; must not block.
ProgressSink = Callable[[Progress], None]


@dataclass(slots=True)
class _Blob:
    descriptor: Descriptor
    event: str
    done: int = 0
    told: float = 0.0


@dataclass(slots=True)
class Tracker:
    """The blobs of one operation on the image `name`."""

    name: str
    sink: ProgressSink | None = None
    moving: str = DOWNLOADING
    started: float = field(default_factory=time.time)
    #: The last word on the whole operation.
    stage: str = ""
    #: When something last happened, on the monotonic clock: what has stalled is told by it.
    moved: float = field(default_factory=time.monotonic)
    _blobs: dict[str, _Blob] = field(default_factory=dict)
    _parents: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def say(self, event: str, descriptor: Descriptor | None = None, name: str = "") -> None:
        """An event of the whole operation."""
        self.stage = event
        self._tell(Progress(event, name, (), descriptor))

    def children(self, parent: Descriptor, children: Iterable[Descriptor]) -> None:
        """`children` hang below `parent` in the tree that clients draw."""
        key = ref_key(parent)
        for child in children:
            self._parents.setdefault(child.digest, (key,))

    def add(self, descriptor: Descriptor) -> None:
        """A blob that will be moved."""
        if descriptor.digest not in self._blobs:
            self._change(descriptor, WAITING, 0)

    def update(self, descriptor: Descriptor, done: int) -> None:
        """So many bytes of it are here."""
        blob = self._blobs.get(descriptor.digest)
        if blob is not None:
            blob.done, blob.event = done, self.moving
            self.moved = now = time.monotonic()
            if now - blob.told < INTERVAL:
                return
        self._change(descriptor, self.moving, done)

    def finish(self, descriptor: Descriptor, event: str = COMPLETE) -> None:
        """The last word: COMPLETE, EXISTS, EXTRACTED; also EXTRACTING, which takes no bytes as progress."""
        self._change(descriptor, event, 0 if event == EXTRACTING else descriptor.size)

    def _change(self, descriptor: Descriptor, event: str, done: int) -> None:
        self.moved = now = time.monotonic()
        self._blobs[descriptor.digest] = _Blob(descriptor, event, done, now)
        self._tell(self._event(self._blobs[descriptor.digest]))

    def _event(self, blob: _Blob) -> Progress:
        descriptor = blob.descriptor
        parents = self._parents.get(descriptor.digest, (self.name,))
        return Progress(blob.event, ref_key(descriptor), parents, descriptor, blob.done, descriptor.size)

    def _tell(self, progress: Progress) -> None:
        if self.sink is not None:
            self.sink(progress)

    def blobs(self) -> list[Progress]:
        """The state of every blob now."""
        return [self._event(blob) for blob in self._blobs.values()]
