"""What tasks are made of and what they need: the in-memory `Task`, and the Protocols of other rooms."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from supervisord_ctr.linux.cgroups import Cgroup
from supervisord_ctr.model import Container, Event, Exit, Mount
from supervisord_ctr.runtime.bundle import Bundle, Record
from supervisord_ctr.runtime.shims import Shim


class ContainerSource(Protocol):
    """Container records: `metadata.Database.containers`."""

    async def get(self, namespace: str, id: str, /) -> Container:  # noqa: A002
        """The record, or NotFound."""


class SnapshotterSource(Protocol):
    """A snapshotter in a namespace: `metadata.NamespacedSnapshotter`."""

    async def mounts(self, namespace: str, key: str, /) -> Sequence[Mount]:
        """Mounts of an active snapshot or a view."""


class Store(Protocol):
    """What tasks need of the metadata room: `metadata.Database`."""

    @property
    def containers(self) -> ContainerSource:
        """Container records."""

    def snapshotter(self, name: str, /) -> SnapshotterSource:
        """A snapshotter by name."""


class Events(Protocol):
    """Where events go: `events.Exchange`."""

    def publish(self, namespace: str, topic: str, message: Any) -> None:
        """Tell of something that happened just now."""

    def forward(self, event: Event) -> None:
        """Hand on somebody else's event."""


@dataclass(eq=False)
class Task:
    """One task. `shim` is None while it is unknown whether its shim lives (P6)."""

    bundle: Bundle
    record: Record
    shim: Shim | None
    pid: int = 0
    created: bool = False
    trouble: str = ""
    #: Where its numbers are, once somebody has asked for them.
    group: Cgroup | None = None
    #: The CRIU image that it is restored from.
    checkpoint: Path | None = None
    #: How it ended, when its shim could not tell.
    exited: Exit | None = None
    #: Whether task and bundle are gone.
    buried: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def attach_shim(self, shim: Shim | None, trouble: str = "") -> None:
        """Take another shim, or none for `trouble`; wakes those in `wait_settled`."""
        self.shim, self.trouble = shim, trouble
        self._wake()

    def bury(self) -> None:
        """The task is gone; wakes those in `wait_settled`."""
        self.buried = True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait_settled(self, lost: Shim | None) -> None:
        """Return when another shim took the place of `lost`, or the task is gone."""
        while not self.buried and (self.shim is None or self.shim is lost):
            await self._changed.wait()

    @property
    def id(self) -> str:
        """The container's id."""
        return self.bundle.id

    @property
    def namespace(self) -> str:
        """The API namespace."""
        return self.bundle.namespace


@dataclass(frozen=True, slots=True)
class Streams:
    """Where a process's standard streams go: paths or URIs."""

    stdin: str
    stdout: str
    stderr: str
    terminal: bool
