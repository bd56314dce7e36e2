"""containerd.services.tasks.v1.Tasks on `runtime.Tasks`.

Owns the translation of messages, and checkpoints as content: packing an image of CRIU into blobs
and unpacking one for a restore. Everything else is the runtime room's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from supervisord_ctr import errors
from supervisord_ctr.aio import Executors
from supervisord_ctr.api.runc.v1 import options_pb2
from supervisord_ctr.api.services.tasks.v1 import tasks_pb2 as api
from supervisord_ctr.api.services.tasks.v1.tasks_pb2_grpc import TasksServicer
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.api.types.task import task_pb2
from supervisord_ctr.model import Container, Exit, Mount, TypedValue
from supervisord_ctr.rpc import any_from_value, any_to_value, lease_of, namespace_of, timestamp
from supervisord_ctr.runtime import Tasks, TaskState, checkpoint
from supervisord_ctr.services.convert import mounts_from_messages
from supervisord_ctr.services.mount_steps import needs_steps
from supervisord_ctr.services.mounts import Activation

#: Go's zero time, which clients of containerd get for "not yet".
_NEVER = -62135596800
_CHUNK = 1 << 20
_CHECKPOINT_OPTIONS = "containerd.runc.v1.CheckpointOptions"
_RUNC_OPTIONS = "containerd.runc.v1.Options"
#: Ties an activated root file system to its container.
_CONTAINER_REF = "containerd.io/gc.bref.container"


class Containers(Protocol):
    """Container records: `metadata.Database.containers`."""

    async def get(self, namespace: str, id: str, /) -> Container:  # noqa: A002
        """The record, or NotFound."""


class Activator(Protocol):
    """Performs what the system cannot mount: `services.mounts.MountManager`."""

    async def activate(
        self, namespace: str, name: str, mounts: Sequence[Mount], *, labels: Mapping[str, str], lease: str | None
    ) -> Activation:
        """What is done, and what is left to mount; AlreadyExists."""

    async def info(self, namespace: str, name: str) -> Activation:
        """NotFound."""

    async def deactivate(self, namespace: str, name: str) -> None:
        """NotFound."""


class Store(Protocol):
    """What this service needs of `metadata.Database`."""

    @property
    def containers(self) -> Containers:
        """Container records."""

    @property
    def content(self) -> Any:
        """`metadata.Content`."""


def _time(at: float) -> Timestamp:
    return timestamp(at) if at else Timestamp(seconds=_NEVER)


def _process(state: TaskState) -> task_pb2.Process:
    return task_pb2.Process(
        id=state.exec_id or state.id, pid=state.pid, status=int(state.status),  # type: ignore[arg-type]
        stdin=state.stdin, stdout=state.stdout, stderr=state.stderr, terminal=state.terminal,
        exit_status=state.exit_status, exited_at=_time(state.exited_at),
    )


def _deleted(found: Exit, exec_id: str = "") -> api.DeleteResponse:
    return api.DeleteResponse(id=exec_id, pid=found.pid, exit_status=found.status, exited_at=_time(found.at))


def _checkpoint_options(value: TypedValue | None) -> options_pb2.CheckpointOptions:
    """Options of a checkpoint request, empty when it has none."""
    options = options_pb2.CheckpointOptions()
    if value is None:
        return options
    if value.type_url.rpartition("/")[2] != _CHECKPOINT_OPTIONS:
        raise errors.InvalidArgument(f"invalid task checkpoint option {value.type_url!r}", kind="options")
    try:
        options.ParseFromString(value.value)
    except DecodeError as error:
        raise errors.InvalidArgument(f"task checkpoint option cannot be decoded: {error}", kind="options") from error
    return options


def _image_path(value: TypedValue | None) -> str:
    """`criu_image_path` of create options, "" for other options."""
    if value is None or value.type_url.rpartition("/")[2] != _RUNC_OPTIONS:
        return ""
    try:
        return options_pb2.Options.FromString(value.value).criu_image_path
    except DecodeError as error:
        raise errors.InvalidArgument(f"task create option cannot be decoded: {error}", kind="options") from error


class TasksService(TasksServicer):
    """The service."""

    def __init__(self, tasks: Tasks, database: Store, executors: Executors, mounts: Activator) -> None:
        self._tasks = tasks
        self._mounts = mounts
        self._database = database
        self._executors = executors
        self._scratch = tasks.scratch

    # -- life --------------------------------------------------------------------------------------

    async def Create(self, request: Any, context: Any) -> api.CreateTaskResponse:
        work = self._create(namespace_of(context), request, lease_of(context))
        return await asyncio.shield(self._tasks.own(work, f"create {request.container_id}"))

    async def _create(self, namespace: str, request: Any, lease: str | None) -> api.CreateTaskResponse:
        options = any_to_value(request.options)
        image = _image_path(options)
        async with contextlib.AsyncExitStack() as stack:
            if not image and request.HasField("checkpoint"):
                await self._database.containers.get(namespace, request.container_id)
                image = str(await self._unpacked(namespace, request.checkpoint, stack))
            rootfs = await self._activated(
                namespace, request.container_id, mounts_from_messages(request.rootfs), lease, stack
            )
            pid = await self._tasks.create(
                namespace, request.container_id, rootfs=rootfs, stdin=request.stdin,
                stdout=request.stdout, stderr=request.stderr, terminal=request.terminal,
                checkpoint=Path(image) if image else None, options=options, runtime_path=request.runtime_path,
            )
            # The runtime reads the image at start; the task owns it from here on, and the activated mounts.
            stack.pop_all()
        return api.CreateTaskResponse(container_id=request.container_id, pid=pid)

    async def _activated(
        self, namespace: str, container: str, rootfs: Sequence[Mount], lease: str | None,
        stack: contextlib.AsyncExitStack,
    ) -> Sequence[Mount]:
        """What is left to mount of a root file system; the activation has the container's name and ends with it."""
        if needs_steps(rootfs) < 0:
            return rootfs
        await self._database.containers.get(namespace, container)
        try:
            made = await self._mounts.activate(
                namespace, container, rootfs, labels={_CONTAINER_REF: container}, lease=lease
            )
        except errors.AlreadyExists:
            return (await self._mounts.info(namespace, container)).system
        stack.push_async_callback(self._mounts.deactivate, namespace, container)
        return made.system

    async def Start(self, request: Any, context: Any) -> api.StartResponse:
        pid = await self._tasks.start(namespace_of(context), request.container_id, request.exec_id)
        return api.StartResponse(pid=pid)

    async def Delete(self, request: Any, context: Any) -> api.DeleteResponse:
        work = self._delete(namespace_of(context), request.container_id)
        return _deleted(await asyncio.shield(self._tasks.own(work, f"delete {request.container_id}")))

    async def _delete(self, namespace: str, container: str) -> Exit:
        found = await self._tasks.delete(namespace, container)
        with contextlib.suppress(errors.NotFound):
            record = await self._mounts.info(namespace, container)
            if record.labels.get(_CONTAINER_REF) == container:
                await self._mounts.deactivate(namespace, container)
        return found

    async def DeleteProcess(self, request: Any, context: Any) -> api.DeleteResponse:
        found = await self._tasks.delete_exec(namespace_of(context), request.container_id, request.exec_id)
        return _deleted(found, request.exec_id)

    async def Exec(self, request: Any, context: Any) -> Empty:
        if not request.exec_id:
            raise errors.InvalidArgument("exec id cannot be empty", kind="exec")
        await self._tasks.exec(
            namespace_of(context), request.container_id, request.exec_id,
            spec=TypedValue(request.spec.type_url, request.spec.value), stdin=request.stdin, stdout=request.stdout,
            stderr=request.stderr, terminal=request.terminal,
        )
        return Empty()

    async def Kill(self, request: Any, context: Any) -> Empty:
        await self._tasks.kill(
            namespace_of(context), request.container_id, request.exec_id, request.signal, request.all
        )
        return Empty()

    async def Wait(self, request: Any, context: Any) -> api.WaitResponse:
        found = await self._tasks.wait(namespace_of(context), request.container_id, request.exec_id)
        return api.WaitResponse(exit_status=found.status, exited_at=_time(found.at))

    # -- looking -----------------------------------------------------------------------------------

    async def Get(self, request: Any, context: Any) -> api.GetResponse:
        state = await self._tasks.state(namespace_of(context), request.container_id, request.exec_id)
        return api.GetResponse(process=_process(state))

    async def List(self, request: Any, context: Any) -> api.ListTasksResponse:
        return api.ListTasksResponse(tasks=[_process(state) for state in await self._tasks.list(namespace_of(context))])

    async def ListPids(self, request: Any, context: Any) -> api.ListPidsResponse:
        found = await self._tasks.pids(namespace_of(context), request.container_id)
        return api.ListPidsResponse(
            processes=[task_pb2.ProcessInfo(pid=item.pid, info=any_from_value(item.info)) for item in found]
        )

    async def Metrics(self, request: Any, context: Any) -> api.MetricsResponse:
        found = await self._tasks.metrics(namespace_of(context), list(request.filters))
        return api.MetricsResponse(metrics=[
            types_pb2.Metric(id=item.id, timestamp=timestamp(item.at), data=any_from_value(item.data)) for item in found
        ])

    # -- changing ----------------------------------------------------------------------------------

    async def ResizePty(self, request: Any, context: Any) -> Empty:
        await self._tasks.resize(
            namespace_of(context), request.container_id, request.exec_id, request.width, request.height
        )
        return Empty()

    async def CloseIO(self, request: Any, context: Any) -> Empty:
        namespace = namespace_of(context)
        if request.stdin:
            await self._tasks.close_io(namespace, request.container_id, request.exec_id)
        else:
            await self._tasks.state(namespace, request.container_id, request.exec_id)
        return Empty()

    async def Pause(self, request: Any, context: Any) -> Empty:
        await self._tasks.pause(namespace_of(context), request.container_id)
        return Empty()

    async def Resume(self, request: Any, context: Any) -> Empty:
        await self._tasks.resume(namespace_of(context), request.container_id)
        return Empty()

    async def Update(self, request: Any, context: Any) -> Empty:
        await self._tasks.update(
            namespace_of(context), request.container_id, any_to_value(request.resources), dict(request.annotations)
        )
        return Empty()

    # -- checkpoints -------------------------------------------------------------------------------

    async def Checkpoint(self, request: Any, context: Any) -> api.CheckpointTaskResponse:
        work = self._checkpoint(namespace_of(context), request, lease_of(context))
        return await asyncio.shield(self._tasks.own(work, f"checkpoint {request.container_id}"))

    async def _checkpoint(self, namespace: str, request: Any, lease: str | None) -> api.CheckpointTaskResponse:
        container = await self._database.containers.get(namespace, request.container_id)
        await self._tasks.require(namespace, request.container_id)
        options = any_to_value(request.options)
        image = _checkpoint_options(options).image_path
        if image:
            await self._tasks.checkpoint(namespace, request.container_id, image, options)
            return api.CheckpointTaskResponse()
        async with contextlib.AsyncExitStack() as undo:
            folder = await self._folder(undo)
            await self._tasks.checkpoint(namespace, request.container_id, str(folder), options)
            packed = await self._pack(namespace, folder, lease)
            spec = any_from_value(container.spec)
            data = spec.SerializeToString() if spec is not None else b""
            written = await self._write(namespace, f"{folder}/spec", data, lease)
        return api.CheckpointTaskResponse(descriptors=[
            types_pb2.Descriptor(media_type=checkpoint.MEDIA_TYPE, digest=packed[0], size=packed[1]),
            types_pb2.Descriptor(media_type=checkpoint.CONFIG_MEDIA_TYPE, digest=written, size=len(data)),
        ])

    async def _folder(self, undo: contextlib.AsyncExitStack) -> Path:
        """A folder for one image. `undo` removes it; whoever keeps it takes that back."""

        def make() -> str:
            self._scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
            return tempfile.mkdtemp(prefix="checkpoint-", dir=self._scratch)

        folder = Path(await self._executors.run_io(make))
        undo.push_async_callback(self._executors.run_io, shutil.rmtree, folder, ignore_errors=True)
        return folder

    async def _unpacked(self, namespace: str, descriptor: Any, undo: contextlib.AsyncExitStack) -> Path:
        """The image of a descriptor, unpacked."""
        if descriptor.media_type != checkpoint.MEDIA_TYPE:
            raise errors.InvalidArgument(f"unsupported checkpoint type {descriptor.media_type!r}", kind="checkpoint")
        reader = await self._database.content.reader(namespace, descriptor.digest)
        try:
            folder = await self._folder(undo)
            with open(os.dup(reader.fileno()), "rb", buffering=0) as file:
                file.seek(0)
                await self._executors.run_io(checkpoint.unpack, lambda: file.read(_CHUNK), folder)
            return folder
        finally:
            reader.close()

    async def _pack(self, namespace: str, folder: Path, lease: str | None) -> tuple[str, int]:
        """Digest and size of the blob that holds the folder."""
        writer = await self._database.content.writer(namespace, str(folder), lease=lease)
        try:
            await self._executors.run_io(checkpoint.pack, folder, writer.blocking.write)
            size = writer.offset
            return await _commit(writer, writer.blocking.digest()), size
        finally:
            await writer.close()

    async def _write(self, namespace: str, ref: str, data: bytes, lease: str | None) -> str:
        writer = await self._database.content.writer(namespace, ref, lease=lease)
        try:
            await writer.write(data)
            return await _commit(writer, writer.blocking.digest())
        finally:
            await writer.close()


async def _commit(writer: Any, digest: str) -> str:
    """Commit an ingest; a blob that is there already is as good."""
    with contextlib.suppress(errors.AlreadyExists):
        return str(await writer.commit())
    return digest
