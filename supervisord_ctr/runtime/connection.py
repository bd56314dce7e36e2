"""The task API of a shim over one ttrpc connection, version 2 or 3.

The messages of `containerd.task.v2` and `containerd.task.v3` have the same fields under the same
numbers, so one set of classes serves both and only the service's name differs. A shim that said it
speaks 3 and does not is asked again as 2, once and for all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from supervisord_ctr import errors
from supervisord_ctr.api.runtime.task.v3 import task_pb2 as api
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.model import Exit, Mount, TaskStatus, TypedValue
from supervisord_ctr.runtime.values import ProcessInfo, TaskState

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any as AnyMessage

    from supervisord_ctr.ttrpc.client import Client

M = TypeVar("M", bound=Message)

#: Calls that change nothing.
_LOOKING = frozenset({"State", "Stats", "Pids", "Connect"})
#: Seconds without any call or event after which a task's state is as good as what the shim would say.
_SETTLED = 1.0
#: The header that carries the API namespace on ttrpc connections.
NAMESPACE_HEADER = "containerd-namespace-ttrpc"


def seconds(stamp: Timestamp) -> float:
    """A timestamp as seconds since the epoch; one that is not set is 0.0, as is Go's zero time."""
    value = stamp.seconds + stamp.nanos / 1e9
    return value if value > 0 else 0.0


def _value(message: AnyMessage) -> TypedValue | None:
    return TypedValue(message.type_url, message.value) if message.type_url else None


def _fill(message: AnyMessage, value: TypedValue | None) -> None:
    if value is not None and value.type_url:
        message.type_url = value.type_url
        message.value = value.value


class TaskService:
    """The calls of one namespace on one connection. Every method raises what the shim answered, and
    `Unavailable` when the connection ends.

    With `remembers`, for shims whose events come here, the state of a task in which nothing has happened for a
    while is what it was when it was last asked: whoever lists tasks must not wake every shim that rests.
    """

    def __init__(self, client: Client, namespace: str, version: int, *, remembers: bool = False) -> None:
        self.client = client
        self.version = version
        self._metadata = {NAMESPACE_HEADER: [namespace]}
        self._remembers = remembers
        self._seen: dict[str, TaskState] = {}
        self._happened = time.monotonic()

    def note(self) -> None:
        """Something happened in one of the tasks: what was seen counts no more."""
        self._seen.clear()
        self._happened = time.monotonic()

    async def call(self, method: str, request: Message, response: type[M], timeout: float | None = None) -> M:
        """One call of the task service."""
        if method in _LOOKING:
            return await self._call(method, request, response, timeout)
        if method != "Wait":
            self.note()
        try:
            return await self._call(method, request, response, timeout)
        finally:
            self.note()

    async def _call(self, method: str, request: Message, response: type[M], timeout: float | None) -> M:
        try:
            return await self.call_service(f"containerd.task.v{self.version}.Task", method, request, response, timeout)
        except errors.Unimplemented:
            if self.version < 3:
                raise
            self.version = 2
        return await self.call_service(f"containerd.task.v{self.version}.Task", method, request, response, timeout)

    async def call_service(
        self, service: str, method: str, request: Message, response: type[M], timeout: float | None = None,
    ) -> M:
        """One call of any service of the shim."""
        return await self.client.call(service, method, request, response, timeout=timeout, metadata=self._metadata)

    async def create(
        self, task: str, *, bundle: str, rootfs: Sequence[Mount], terminal: bool, stdin: str, stdout: str, stderr: str,
        checkpoint: str, options: TypedValue | None,
    ) -> int:
        """Make the container; returns the pid of its waiting init."""
        request = api.CreateTaskRequest(
            id=task, bundle=bundle, terminal=terminal, stdin=stdin, stdout=stdout, stderr=stderr, checkpoint=checkpoint,
            rootfs=[
                types_pb2.Mount(type=item.type, source=item.source, target=item.target, options=item.options)
                for item in rootfs
            ],
        )
        if options is not None and options.type_url:
            _fill(request.options, options)
        return (await self.call("Create", request, api.CreateTaskResponse)).pid

    async def start(self, task: str, exec_id: str) -> int:
        """Start the task or an exec; returns its pid."""
        return (await self.call("Start", api.StartRequest(id=task, exec_id=exec_id), api.StartResponse)).pid

    async def delete(self, task: str, exec_id: str, timeout: float | None = None) -> Exit:
        """Take a stopped process away."""
        request = api.DeleteRequest(id=task, exec_id=exec_id)
        found = await self.call("Delete", request, api.DeleteResponse, timeout)
        return Exit(found.exit_status, seconds(found.exited_at), found.pid)

    async def exec(
        self, task: str, exec_id: str, *, spec: TypedValue, terminal: bool, stdin: str, stdout: str, stderr: str,
    ) -> None:
        """Add a process; `start` runs it."""
        request = api.ExecProcessRequest(
            id=task, exec_id=exec_id, terminal=terminal, stdin=stdin, stdout=stdout, stderr=stderr
        )
        _fill(request.spec, spec)
        await self.call("Exec", request, Empty)

    async def state(self, task: str, exec_id: str, timeout: float | None = None) -> TaskState:
        """What a process is doing."""
        if not exec_id and task in self._seen and not self.client.closed:
            return self._seen[task]
        asked = time.monotonic()
        found = await self.call("State", api.StateRequest(id=task, exec_id=exec_id), api.StateResponse, timeout)
        try:
            status = TaskStatus(found.status)
        except ValueError:
            status = TaskStatus.UNKNOWN
        state = TaskState(
            task, exec_id, found.pid, status, found.stdin, found.stdout, found.stderr, found.terminal,
            found.exit_status, seconds(found.exited_at), found.bundle,
        )
        if self._remembers and not exec_id and asked > self._happened + _SETTLED:
            self._seen[task] = state
        return state

    async def wait(self, task: str, exec_id: str) -> Exit:
        """Wait for the end of a process, however long that takes."""
        found = await self.call("Wait", api.WaitRequest(id=task, exec_id=exec_id), api.WaitResponse)
        return Exit(found.exit_status, seconds(found.exited_at))

    async def kill(self, task: str, exec_id: str, signal: int, all_processes: bool) -> None:
        """Send a signal."""
        await self.call("Kill", api.KillRequest(id=task, exec_id=exec_id, signal=signal, all=all_processes), Empty)

    async def pids(self, task: str) -> list[ProcessInfo]:
        """Every process inside."""
        found = await self.call("Pids", api.PidsRequest(id=task), api.PidsResponse)
        return [
            ProcessInfo(entry.pid, _value(entry.info) if entry.HasField("info") else None) for entry in found.processes
        ]

    async def pause(self, task: str) -> None:
        """Freeze the cgroup."""
        await self.call("Pause", api.PauseRequest(id=task), Empty)

    async def resume(self, task: str) -> None:
        """Thaw it."""
        await self.call("Resume", api.ResumeRequest(id=task), Empty)

    async def checkpoint(self, task: str, path: str, options: TypedValue | None) -> None:
        """Write an image of the processes to the folder `path`."""
        request = api.CheckpointTaskRequest(id=task, path=path)
        if options is not None:
            _fill(request.options, options)
        await self.call("Checkpoint", request, Empty)

    async def update(self, task: str, resources: TypedValue | None, annotations: dict[str, str]) -> None:
        """Change cgroup limits; `resources` is an OCI `linux.resources` in JSON."""
        request = api.UpdateTaskRequest(id=task, annotations=annotations)
        if resources is not None:
            _fill(request.resources, resources)
        await self.call("Update", request, Empty)

    async def resize(self, task: str, exec_id: str, width: int, height: int) -> None:
        """Tell a terminal its size."""
        request = api.ResizePtyRequest(id=task, exec_id=exec_id, width=width, height=height)
        await self.call("ResizePty", request, Empty)

    async def close_io(self, task: str, exec_id: str, stdin: bool) -> None:
        """Close standard input after what was written to it."""
        await self.call("CloseIO", api.CloseIORequest(id=task, exec_id=exec_id, stdin=stdin), Empty)

    async def stats(self, task: str, timeout: float | None = None) -> TypedValue | None:
        """The cgroup's numbers."""
        return _value((await self.call("Stats", api.StatsRequest(id=task), api.StatsResponse, timeout)).stats)

    async def connect(self, task: str, timeout: float | None = None) -> tuple[int, int]:
        """Pids of the shim and of the task."""
        found = await self.call("Connect", api.ConnectRequest(id=task), api.ConnectResponse, timeout)
        return found.shim_pid, found.task_pid

    async def shutdown(self, task: str, timeout: float | None = None) -> None:
        """Ask the shim to end unless it serves other containers; the connection may end instead of an answer."""
        try:
            await self.call("Shutdown", api.ShutdownRequest(id=task), Empty, timeout)
        except errors.Unavailable:
            return
