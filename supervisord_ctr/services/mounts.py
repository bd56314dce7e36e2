"""containerd.services.mounts.v1.Mounts: mounts that the daemon performs on behalf of a client.

Owns the activated mounts below one folder and their records. An activation performs what the system
cannot (see `mount_steps`) or, when it is temporary, all of it, and returns what is left to mount.
Mounts that need nothing of that are UNIMPLEMENTED: the client mounts them itself. A record stays while
its lease or something else refers to it, as with any object that is collected.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import empty_pb2

from supervisord_ctr import filters
from supervisord_ctr.aio import Executors, KeyedLock, TaskOwner, shielded
from supervisord_ctr.api.services.mounts.v1 import mounts_pb2 as pb
from supervisord_ctr.api.services.mounts.v1 import mounts_pb2_grpc
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.errors import AlreadyExists, InvalidArgument, NotFound, Unimplemented, from_os_error
from supervisord_ctr.linux import mounts as linux
from supervisord_ctr.metadata import Database
from supervisord_ctr.model import Mount
from supervisord_ctr.names import check_labels
from supervisord_ctr.rpc import Context, lease_of, namespace_of, timestamp
from supervisord_ctr.services.convert import mount_to_message, mounts_from_messages, mounts_to_messages
from supervisord_ctr.services.mount_steps import Steps, needs_steps

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ActiveMount:
    """A mount that was performed."""

    mount: Mount
    mount_point: str
    mounted_at: float


@dataclass(frozen=True, slots=True)
class Activation:
    """What one activation performed (`active`) and left to its client (`system`)."""

    name: str
    active: tuple[ActiveMount, ...]
    system: tuple[Mount, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    lease: str = ""
    folder: str = ""


def _dump(value: Activation) -> str:
    def plain(mount: Mount) -> list[Any]:
        return [mount.type, mount.source, list(mount.options), mount.target]

    return json.dumps({
        "active": [[plain(item.mount), item.mount_point, item.mounted_at] for item in value.active],
        "system": [plain(item) for item in value.system], "labels": dict(value.labels), "lease": value.lease,
        "folder": value.folder,
    })


def _load(name: str, text: str) -> Activation:
    def mount(value: list[Any]) -> Mount:
        return Mount(value[0], value[1], tuple(value[2]), value[3])

    found = json.loads(text)
    active = tuple(ActiveMount(mount(item), point, at) for item, point, at in found["active"])
    return Activation(
        name, active, tuple(mount(item) for item in found["system"]), found["labels"], found["lease"], found["folder"]
    )


class MountManager:
    """Activations below `folder` (in the state directory: they do not survive a reboot). Directories and file
    systems are made below it and below `roots` only."""

    def __init__(
        self, folder: Path, database: Database, executors: Executors, *, roots: Sequence[Path] = ()
    ) -> None:
        self._folder = folder
        #: Folders that a call is at work on: no strays.
        self._busy: set[str] = set()
        self._steps = Steps((folder, *roots))
        self._records = database.activations
        self._database = database
        self._executors = executors
        self._locks = KeyedLock()
        self._owner = TaskOwner("mounts")

    async def close(self) -> None:
        """Stop what runs; what it leaves half done is seen to by the next `open`."""
        await self._owner.close()

    async def open(self) -> None:
        """Forget activations whose mounts are gone (after a reboot) and unmount what no record explains."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept = set()
        for namespace, name, text in await self._records.list():
            record = _load(name, text)
            if os.path.isdir(record.folder) and all(linux.is_mountpoint(item.mount_point) for item in record.active):
                kept.add(record.folder)
            else:
                await self._records.delete(namespace, name)
        for entry in os.scandir(self._folder):
            if entry.path not in kept:
                await self._executors.run_io(self._unmount, entry.path)

    async def activate(
        self, namespace: str, name: str, mounts: Sequence[Mount], *, labels: Mapping[str, str] | None = None,
        temporary: bool = False, lease: str | None = None,
    ) -> Activation:
        """Perform what must be performed. AlreadyExists; Unimplemented when the client can mount all of it."""
        if not name:
            raise InvalidArgument("mount name must not be empty", kind="mount")
        check_labels(dict(labels or {}))
        count = len(mounts) if temporary else needs_steps(mounts)
        if count < 0 or not mounts:
            raise Unimplemented(f"mount {name!r}: nothing here needs the mount service", kind="mount", key=name)
        work = self._activate(namespace, name, list(mounts), count, dict(labels or {}), temporary, lease or "")
        return await shielded(self._owner, work, f"activate {name}")

    async def _activate(
        self, namespace: str, name: str, mounts: list[Mount], count: int, labels: dict[str, str], temporary: bool,
        lease: str,
    ) -> Activation:
        async with self._locks.hold((namespace, name)):
            try:
                await self._records.get(namespace, name)
            except NotFound:
                pass
            else:
                raise AlreadyExists(f'mount "{name}": already exists', kind="mount", key=name)
            folder = str(self._folder / f"{time.time_ns():x}")
            self._busy.add(folder)
            try:
                active, system = await self._executors.run_io(self._perform, Path(folder), mounts, count, temporary)
                made = Activation(name, active, system, labels, lease, folder)
                await self._records.create(namespace, name, _dump(made))
            except BaseException as error:
                await self._executors.run_io(self._unmount, folder)
                if isinstance(error, OSError):
                    raise from_os_error(error, f'mount "{name}"') from error
                raise
            finally:
                self._busy.discard(folder)
            return made

    @contextlib.asynccontextmanager
    async def performed(self, mounts: Sequence[Mount]) -> AsyncIterator[Sequence[Mount]]:
        """What is left to mount of `mounts`, for the length of the block: an activation without name and record."""
        count = needs_steps(mounts)
        if count < 0:
            yield mounts
            return
        folder = str(self._folder / f"{time.time_ns():x}")
        self._busy.add(folder)
        making = self._owner.start(
            self._executors.run_io(self._perform, Path(folder), list(mounts), count, False), "perform"
        )

        async def leave() -> None:
            await asyncio.wait([making])
            try:
                await self._executors.run_io(self._unmount, folder)
            finally:
                self._busy.discard(folder)

        try:
            try:
                _, left = await asyncio.shield(making)
            except OSError as error:
                raise from_os_error(error, "mount") from error
            yield left
        finally:
            await shielded(self._owner, leave(), "undo")

    def _perform(
        self, folder: Path, mounts: list[Mount], count: int, temporary: bool
    ) -> tuple[tuple[ActiveMount, ...], tuple[Mount, ...]]:
        folder.mkdir(mode=0o700)
        active: list[ActiveMount] = []
        for number, mount in enumerate(mounts[:count]):
            ready = self._steps.apply(mount, active)
            point = folder / str(number)
            point.mkdir(mode=0o700)
            linux.mount_all([ready], point)
            active.append(ActiveMount(ready, str(point), time.time()))
        system = [self._steps.apply(mount, active) for mount in mounts[count:]]
        if temporary:
            system.append(Mount("bind", active[-1].mount_point, ("rbind",)))
        return tuple(active), tuple(system)

    def _unmount(self, folder: str) -> None:
        linux.unmount_below(folder)
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            os.rmdir(os.path.join(folder, name))
        if os.path.isdir(folder):
            os.rmdir(folder)

    @property
    def folder(self) -> Path:
        """Where activations are mounted."""
        return self._folder

    async def strays(self) -> list[str]:
        """Folders without a record: what a failed deactivation left."""
        listed = await self._executors.run_io(lambda: sorted(entry.path for entry in os.scandir(self._folder)))
        kept = {_load(name, text).folder for _, name, text in await self._records.list()}
        return [path for path in listed if path not in kept and path not in self._busy]

    async def remove_stray(self, path: str) -> None:
        """Unmount and remove one of `strays`."""
        if path in await self.strays():
            await self._executors.run_io(self._unmount, path)

    async def deactivate(self, namespace: str, name: str) -> None:
        """Unmount and forget; NotFound."""
        await shielded(self._owner, self._deactivate(namespace, name), f"deactivate {name}")

    async def _deactivate(self, namespace: str, name: str) -> None:
        async with self._locks.hold((namespace, name)):
            record = _load(name, await self._records.get(namespace, name))
            self._busy.add(record.folder)
            try:
                await self._records.delete(namespace, name)
                await self._executors.run_io(self._unmount, record.folder)
            except OSError as error:
                raise from_os_error(error, f'unmount "{name}"') from error
            finally:
                self._busy.discard(record.folder)

    async def info(self, namespace: str, name: str) -> Activation:
        """NotFound."""
        return _load(name, await self._records.get(namespace, name))

    async def update(
        self, namespace: str, name: str, labels: Mapping[str, str], fieldpaths: Sequence[str]
    ) -> Activation:
        """Change labels or labels.KEY; NotFound; InvalidArgument for other paths."""
        check_labels(dict(labels))
        async with self._locks.hold((namespace, name)):
            record = _load(name, await self._records.get(namespace, name))
            changed = dict(record.labels) if fieldpaths else dict(labels)
            for path in fieldpaths:
                if path == "labels":
                    changed = dict(labels)
                elif path.startswith("labels."):
                    key = path.removeprefix("labels.")
                    changed[key] = labels.get(key, "")
                else:
                    raise InvalidArgument(f"cannot update {path!r} field on mount {name!r}", kind="mount", key=name)
            changed = {key: value for key, value in changed.items() if value}
            made = Activation(name, record.active, record.system, changed, record.lease, record.folder)
            await self._records.put(namespace, name, _dump(made))
            return made

    async def collect(self) -> list[tuple[str, str, str]]:
        """Unmount what has no record any more, once the collector has removed those of unwanted activations."""
        removed = []
        for path in await self.strays():
            try:
                await self._executors.run_io(self._unmount, path)
            except OSError as error:
                log.warning("mounts below %s: %s", path, error)
            else:
                removed.append(("", "mount-data", path))
        return removed

    async def list(self, namespace: str, filter_texts: Sequence[str] = ()) -> list[Activation]:
        """Those that match (fields name, labels)."""
        matching = filters.parse(filter_texts)
        found = [_load(name, text) for _, name, text in await self._records.list(namespace)]
        return [item for item in found if matching.matches(_adapt(item))]


def _adapt(item: Activation) -> filters.Adaptor:
    def field_of(path: Sequence[str]) -> tuple[str, bool]:
        match list(path):
            case ["name", *_]:
                return item.name, True
            case ["labels", *rest]:
                return item.labels.get(".".join(rest), ""), ".".join(rest) in item.labels
            case _:
                return "", False

    return field_of


def _message(value: Activation) -> types_pb2.ActivationInfo:
    return types_pb2.ActivationInfo(
        name=value.name, labels=dict(value.labels), system=mounts_to_messages(value.system),
        active=[
            types_pb2.ActiveMount(
                mount=mount_to_message(item.mount), mount_point=item.mount_point, mounted_at=timestamp(item.mounted_at)
            )
            for item in value.active
        ],
    )


class MountsService(mounts_pb2_grpc.MountsServicer):
    """Activated mounts of a namespace."""

    def __init__(self, manager: MountManager) -> None:
        self._manager = manager

    async def Activate(self, request: pb.ActivateRequest, context: Context) -> pb.ActivateResponse:
        """UNIMPLEMENTED when the client can mount all of it by itself; ALREADY_EXISTS."""
        made = await self._manager.activate(
            namespace_of(context), request.name, mounts_from_messages(request.mounts), labels=dict(request.labels),
            temporary=request.temporary, lease=lease_of(context),
        )
        return pb.ActivateResponse(info=_message(made))

    async def Deactivate(self, request: pb.DeactivateRequest, context: Context) -> empty_pb2.Empty:
        """NOT_FOUND."""
        await self._manager.deactivate(namespace_of(context), request.name)
        return empty_pb2.Empty()

    async def Info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        """NOT_FOUND."""
        return pb.InfoResponse(info=_message(await self._manager.info(namespace_of(context), request.name)))

    async def Update(self, request: pb.UpdateRequest, context: Context) -> pb.UpdateResponse:
        """Labels: those of the mask, or all."""
        changed = await self._manager.update(
            namespace_of(context), request.info.name, dict(request.info.labels), request.update_mask.paths
        )
        return pb.UpdateResponse(info=_message(changed))

    async def List(self, request: pb.ListRequest, context: Context) -> AsyncIterator[pb.ListMessage]:
        """Those that match the filters (name, labels), one a message."""
        for item in await self._manager.list(namespace_of(context), request.filters):
            yield pb.ListMessage(info=_message(item))
