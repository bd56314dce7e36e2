"""What every concern of the CRI room works with, handed over as one value.

Owns no logic: the stores, the parts it is wired to (as Protocols, because their rooms are
siblings), the memory, and the book of stages that tells what an operation is doing and since when.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from supervisord_ctr import errors
from supervisord_ctr.aio import Executors, KeyedLock, Operations, TaskOwner
from supervisord_ctr.api.runc.v1 import options_pb2
from supervisord_ctr.cri.events import EventHub
from supervisord_ctr.cri.state import State
from supervisord_ctr.cri.stats import StatsCollector
from supervisord_ctr.model import Exit, Mount, Runtime, TaskStatus, TypedValue
from supervisord_ctr.settings import RuntimeClass, Settings

if TYPE_CHECKING:
    from supervisord_ctr.cri.image_store import ImageStore
    from supervisord_ctr.events import Exchange
    from supervisord_ctr.metadata import Database
    from supervisord_ctr.sandbox.environment import Environments
    from supervisord_ctr.sandbox.network import PodNetworks
    from supervisord_ctr.sandbox.pause import Forker


#: Failures that are remembered.
_TROUBLES = 256
#: Letters that the beginning of an ID must have to mean it.
_SHORTEST = 4


async def all_of(*works: Awaitable[Any]) -> list[Any]:
    """The results of all; when one fails, the first failure, but only after every one has ended."""
    results = await asyncio.gather(*works, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


class TaskView(Protocol):
    """What a task tells of itself."""

    @property
    def status(self) -> TaskStatus: ...

    @property
    def pid(self) -> int: ...

    @property
    def exit_status(self) -> int: ...

    @property
    def exited_at(self) -> float: ...


class Tasks(Protocol):
    """`runtime.Tasks`, as far as it is used here."""

    def expect(self, namespace: str, runtime: str, group: str = "") -> None: ...

    async def create(
        self, namespace: str, container_id: str, *, rootfs: Sequence[Mount] | None, stdin: str = "",
        stdout: str = "", stderr: str = "", terminal: bool = False, checkpoint: Path | None = None,
        options: TypedValue | None = None, runtime_path: str = "",
    ) -> int: ...

    async def start(self, namespace: str, container_id: str, exec_id: str = "") -> int: ...

    async def exec(
        self, namespace: str, container_id: str, exec_id: str, *, spec: TypedValue, stdin: str = "", stdout: str = "",
        stderr: str = "", terminal: bool = False,
    ) -> None: ...

    async def kill(
        self, namespace: str, container_id: str, exec_id: str = "", signal: int = 15, all_: bool = False
    ) -> None: ...

    async def delete(self, namespace: str, container_id: str, exec_id: str = "") -> Exit: ...

    async def wait(self, namespace: str, container_id: str, exec_id: str = "") -> Exit: ...

    async def state(self, namespace: str, container_id: str, exec_id: str = "") -> TaskView: ...

    async def update(
        self, namespace: str, container_id: str, resources: TypedValue | None, annotations: Mapping[str, str]
    ) -> None: ...

    async def resize(self, namespace: str, container_id: str, exec_id: str, width: int, height: int) -> None: ...

    async def close_io(self, namespace: str, container_id: str, exec_id: str = "", stdin: bool = True) -> None: ...

    async def attach(
        self, namespace: str, container_id: str, exec_id: str = "", *, stdin: bool = False, stdout: bool = True,
        stderr: bool = True,
    ) -> Any: ...

    async def reopen_log(self, namespace: str, container_id: str) -> None: ...

    async def checkpoint(
        self, namespace: str, container_id: str, path: str, options: TypedValue | None = None
    ) -> None: ...

    async def pids(self, namespace: str, container_id: str) -> Sequence[Any]: ...

    async def exit_records(self, namespace: str, container_id: str) -> list[Any]: ...


@dataclass(frozen=True)
class Trouble:
    """An operation that failed: on what (`label` is what people call it), in which stage, why, and when (epoch)."""

    name: str
    label: str
    stage: str
    message: str
    at: float


@dataclass
class Stages:
    """What runs, in which stage and since when, by name, and what failed last; the words of errors and of
    `pctr explain` (P22)."""

    _now: dict[str, tuple[str, float, float]] = field(default_factory=dict)
    _labels: dict[str, str] = field(default_factory=dict)
    _troubles: deque[Trouble] = field(default_factory=lambda: deque(maxlen=_TROUBLES))

    @contextlib.contextmanager
    def track(self, name: str, first: str, label: str = "") -> Iterator[Stage]:
        """Book an operation; an error that leaves the block is remembered with its stage."""
        self.begin(name, first, label)
        try:
            yield Stage(self, name)
        except (errors.Error, OSError) as error:
            self.fail(name, error)
            raise
        finally:
            self.leave(name)

    def begin(self, name: str, stage: str, label: str = "") -> None:
        """An operation starts."""
        self._now[name] = (stage, time.monotonic(), time.monotonic())
        if label:
            self._labels[name] = label

    def fail(self, name: str, error: Exception) -> None:
        """The operation under `name` fails in the stage it is in."""
        stage = self._now.get(name, ("",))[0]
        message = error.message if isinstance(error, errors.Error) else str(error)
        self._troubles.append(Trouble(name, self._labels.get(name, ""), stage, message, time.time()))

    def troubles(self, *words: str) -> list[Trouble]:
        """What failed lately on these names or labels, or below a label, newest last."""
        return [found for found in self._troubles if _means(found.name, found.label, words)]

    def about(self, *words: str) -> dict[str, str]:
        """What runs under these names or labels, by label."""
        return {
            self._labels.get(name, name): self.tell(name) for name in list(self._now)
            if _means(name, self._labels.get(name, ""), words)
        }

    def enter(self, name: str, stage: str) -> None:
        """The operation goes on to another stage."""
        begun = self._now.get(name, ("", time.monotonic(), 0.0))[1]
        self._now[name] = (stage, begun, time.monotonic())

    def tell(self, name: str) -> str:
        """"stage, for 1.2 s of 3.4 s", "" when nothing runs under that name."""
        found = self._now.get(name)
        if found is None:
            return ""
        stage, begun, entered = found
        now = time.monotonic()
        return f"{stage}, for {now - entered:.1f} s of {now - begun:.1f} s"

    def leave(self, name: str) -> None:
        """The operation is over."""
        self._now.pop(name, None)
        self._labels.pop(name, None)

    def all(self) -> dict[str, str]:
        """Everything that runs."""
        return {name: self.tell(name) for name in list(self._now)}


def _means(name: str, label: str, words: Sequence[str]) -> bool:
    """Whether one of `words` is the name or its beginning, the label, the end of the label, or what it is below."""
    parts = label.split("/")
    return any(
        word == name or (len(word) >= _SHORTEST and name.startswith(word)) or (label and (
            word == label or label.startswith(f"{word}/") or word in parts[1:])) for word in words
    )


@dataclass(frozen=True)
class Stage:
    """A handle on one booked operation."""

    book: Stages
    name: str

    def enter(self, stage: str) -> None:
        """Go on to `stage`."""
        self.book.enter(self.name, stage)


@dataclass
class Core:
    """Everything."""

    settings: Settings
    database: Database
    tasks: Tasks
    exchange: Exchange
    executors: Executors
    owner: TaskOwner
    operations: Operations
    state: State
    events: EventHub
    environments: Environments
    networks: PodNetworks
    forker: Forker
    images: ImageStore
    root: Path
    run: Path
    stages: Stages = field(default_factory=Stages)
    locks: KeyedLock = field(default_factory=KeyedLock)
    exits: dict[str, asyncio.Event] = field(default_factory=dict)
    closing: bool = False
    #: SELinux levels of pods that are being made (`selinux_labels`).
    levels: list[str] = field(default_factory=list)
    stats: StatsCollector = field(default_factory=StatsCollector)

    def handler(self, name: str) -> tuple[str, RuntimeClass]:
        """The runtime class of a handler's name, "" being the default; raises `InvalidArgument`."""
        wanted = name or self.settings.runtime.default
        found = self.settings.runtime.classes.get(wanted)
        if found is None:
            known = ", ".join(sorted(self.settings.runtime.classes))
            raise errors.InvalidArgument(
                f"no runtime for {wanted!r} is configured; known handlers: {known}", kind="runtime handler", key=wanted
            )
        return wanted, found

    def snapshotter(self, handler: str) -> str:
        """The snapshotter that a handler's containers use."""
        _, found = self.handler(handler)
        return found.snapshotter or self.settings.snapshots.default

    def systemd_cgroups(self, handler: str) -> bool:
        """Whether a handler's cgroups are made by systemd."""
        _, found = self.handler(handler)
        return found.systemd_cgroup or self.settings.cri.cgroup_driver == "systemd"

    def runtime(self, handler: str, owner: tuple[int, int] = (0, 0)) -> Runtime:
        """What is stored with a container: the runtime's name and its options; `owner` gets the standard streams."""
        _, found = self.handler(handler)
        options = options_pb2.Options(
            binary_name=found.binary, root=found.root, systemd_cgroup=self.systemd_cgroups(handler),
            io_uid=owner[0], io_gid=owner[1],
        )
        return Runtime(found.type, TypedValue("containerd.runc.v1.Options", options.SerializeToString()))

    def container_folder(self, container_id: str) -> Path:
        """Where a container keeps what must survive a reboot (its volumes)."""
        return self.root / "containers" / container_id

    def id_mapped_folder(self, container_id: str) -> Path:
        """Where a container's volumes with mapped owners are mounted while it is made."""
        return self.run / "id-mapped" / container_id

    @contextlib.asynccontextmanager
    async def hold(self, key: str, what: str) -> AsyncIterator[None]:
        """The lock of a pod or container; what runs under it is told by `stages`."""
        async with self.locks.hold(key):
            with self.stages.track(key, what, self.label(key)):
                yield

    def label(self, key: str) -> str:
        """What people call a pod ("NAMESPACE/NAME") or a container ("NAMESPACE/POD/NAME"); "" for neither."""
        container = self.state.container_or_none(key)
        pod = self.state.pod_or_none(container.pod_id if container is not None else key)
        if pod is None:
            return ""
        metadata = pod.config.metadata
        words = [metadata.namespace, metadata.name, *([container.config.metadata.name] if container else [])]
        return "/".join(words)

    def explain(self, *words: str) -> dict[str, Any]:
        """What is being done to the pods or containers that these words mean, and what failed on them lately."""
        return {
            "doing": [f"{label}: {told}" for label, told in self.stages.about(*words).items()],
            "errors": [
                {"at": found.at, "stage": found.stage, "message": found.message, "on": found.label or found.name}
                for found in self.stages.troubles(*words)
            ],
        }
