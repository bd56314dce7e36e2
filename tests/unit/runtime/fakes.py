"""Shims inside the test's process: a ttrpc server that keeps tasks in a dictionary, and a zygote that "forks" it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.empty_pb2 import Empty

from supervisord_ctr import errors
from supervisord_ctr.aio import Executors
from supervisord_ctr.api.runtime.task.v3 import task_pb2 as api
from supervisord_ctr.events import Exchange
from supervisord_ctr.model import Container, Event, Exit, Mount, Runtime, TypedValue
from supervisord_ctr.runtime import RuntimeConfig, Tasks
from supervisord_ctr.runtime.connection import NAMESPACE_HEADER
from supervisord_ctr.runtime.zygote import Forked, Remains
from supervisord_ctr.ttrpc.server import Context, Method, Server, listen

NAMESPACE = "ns"


@dataclass
class FakeTask:
    """A task of a fake shim; `ended` is set by whoever lets it exit."""

    bundle: str
    pid: int
    status: int = 1
    exit_status: int = 0
    exited_at: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def exit(self, status: int) -> None:
        """End the process."""
        self.status, self.exit_status, self.exited_at = 3, status, time.time()
        self.ended.set()


class FakeShim:
    """Serves the task API at `path`. `stuck` makes State hang; `versions` are those offered."""

    def __init__(self, path: str, versions: tuple[int, ...] = (2, 3)) -> None:
        self.path = path
        self.tasks: dict[str, FakeTask] = {}
        self.calls: list[str] = []
        self.namespaces: set[str] = set()
        self.stuck = asyncio.Event()
        self.stuck.set()
        self.fail_create: errors.Error | None = None
        self.die_in: str = ""
        methods = {
            "Create": Method(api.CreateTaskRequest, self._create), "Start": Method(api.StartRequest, self._start),
            "State": Method(api.StateRequest, self._state), "Wait": Method(api.WaitRequest, self._wait),
            "Delete": Method(api.DeleteRequest, self._delete), "Kill": Method(api.KillRequest, self._kill),
            "Shutdown": Method(api.ShutdownRequest, self._shutdown),
        }
        self._server = Server({f"containerd.task.v{version}.Task": methods for version in versions})
        self.ended = False

    async def start(self) -> None:
        """Listen."""
        await self._server.serve(listen(self.path))

    async def die(self) -> None:
        """End as SIGKILL would: connections break, the socket file stays."""
        self.ended = True
        await self._server.close()

    async def _enter(self, method: str, context: Context) -> None:
        self.calls.append(method)
        self.namespaces.update(context.metadata.get(NAMESPACE_HEADER, ()))
        if self.die_in == method:
            asyncio.get_running_loop().call_soon(lambda: _background.add(_start(self.die())))
            await asyncio.Event().wait()

    def _task(self, name: str) -> FakeTask:
        try:
            return self.tasks[name]
        except KeyError:
            raise errors.NotFound(f"container {name} not found") from None

    async def _create(self, request: Any, context: Context) -> api.CreateTaskResponse:
        await self._enter("Create", context)
        if self.fail_create is not None:
            raise self.fail_create
        self.tasks[request.id] = FakeTask(request.bundle, 100 + len(self.tasks))
        return api.CreateTaskResponse(pid=self.tasks[request.id].pid)

    async def _start(self, request: Any, context: Context) -> api.StartResponse:
        await self._enter("Start", context)
        task = self._task(request.id)
        task.status = 2
        return api.StartResponse(pid=task.pid)

    async def _state(self, request: Any, context: Context) -> api.StateResponse:
        await self._enter("State", context)
        await self.stuck.wait()
        task = self._task(request.id)
        answer = api.StateResponse(id=request.id, pid=task.pid, status=task.status, exit_status=task.exit_status)
        answer.exited_at.FromNanoseconds(int(task.exited_at * 1e9))
        return answer

    async def _wait(self, request: Any, context: Context) -> api.WaitResponse:
        await self._enter("Wait", context)
        task = self._task(request.id)
        await task.ended.wait()
        answer = api.WaitResponse(exit_status=task.exit_status)
        answer.exited_at.FromNanoseconds(int(task.exited_at * 1e9))
        return answer

    async def _delete(self, request: Any, context: Context) -> api.DeleteResponse:
        await self._enter("Delete", context)
        task = self._task(request.id)
        if task.status == 2:
            raise errors.FailedPrecondition("cannot delete a running process")
        del self.tasks[request.id]
        answer = api.DeleteResponse(pid=task.pid, exit_status=task.exit_status)
        answer.exited_at.FromNanoseconds(int(task.exited_at * 1e9))
        return answer

    async def _kill(self, request: Any, context: Context) -> Empty:
        await self._enter("Kill", context)
        self._task(request.id).exit(128 + request.signal)
        return Empty()

    async def _shutdown(self, request: Any, context: Context) -> Empty:
        await self._enter("Shutdown", context)
        if not self.tasks:
            asyncio.get_running_loop().call_soon(lambda: _background.add(_start(self.die())))
        return Empty()


_background: set[asyncio.Task[None]] = set()


def _start(work: Any) -> asyncio.Task[None]:
    return asyncio.get_running_loop().create_task(work)


class FakeZygote:
    """Makes fake shims. `remains` is what the next clean-up finds; an error there is raised."""

    def __init__(self) -> None:
        self.shims: list[FakeShim] = []
        self.versions: tuple[int, ...] = (2, 3)
        self.fail: list[errors.Error] = []
        self.cleaned: list[str] = []
        self.remains: Remains | errors.Error = Remains(Exit(137, 1000.0, 0))
        self.prepare: Any = None

    async def fork_shim(self, *, group: str, socket_path: str, **_: Any) -> Forked:
        """A shim that listens."""
        if self.fail:
            raise self.fail.pop(0)
        shim = FakeShim(socket_path, self.versions)
        if self.prepare is not None:
            self.prepare(shim)
        await shim.start()
        self.shims.append(shim)
        return Forked(0, 0, f"unix://{socket_path}")

    async def cleanup(self, *, container: str, **_: Any) -> Remains:
        """What is left of a container."""
        self.cleaned.append(container)
        if isinstance(self.remains, errors.Error):
            raise self.remains
        return self.remains


class Records(dict[tuple[str, str], Container]):
    """Container records."""

    async def get(self, namespace: str, name: str, /) -> Container:  # type: ignore[override]
        """The record, or NotFound."""
        try:
            return self[namespace, name]
        except KeyError:
            raise errors.NotFound(f"container {name!r} in namespace {namespace!r}: not found") from None


class Store:
    """The metadata room, as far as tasks need it."""

    def __init__(self) -> None:
        self.containers = Records()

    def add(self, name: str, **options: Any) -> None:
        """Record a container."""
        options.setdefault("runtime", Runtime("io.containerd.runc.v2"))
        options.setdefault("spec", TypedValue("spec", b"{}"))
        self.containers[NAMESPACE, name] = Container(name, **options)

    def snapshotter(self, name: str, /) -> Any:
        """One whose every snapshot is mounted the same way."""

        class Snapshotter:
            async def mounts(self, namespace: str, key: str, /) -> list[Mount]:
                return [Mount("bind", f"/{name}/{key}", ("rbind",))]

        return Snapshotter()


class Machine:
    """A `Tasks` with fakes below it, and another one on the same folders after `restart`."""

    def __init__(self, folder: Path, config: RuntimeConfig | None = None) -> None:
        self.folder = folder
        self.store = Store()
        self.zygote = FakeZygote()
        self.exchange = Exchange()
        self.executors = Executors.create(4, 1)
        self.config = config or RuntimeConfig(load_timeout=5.0, create_grace=0.1)
        self.events: list[Event] = []
        self.tasks = self._make()

    def _make(self) -> Tasks:
        return Tasks(self.folder / "state", self.folder / "root", self.store, self, self.zygote,  # type: ignore[arg-type]
                     self.executors, self.config)

    def publish(self, namespace: str, topic: str, message: Any) -> None:
        """Keep what is published."""
        self.events.append(Event(time.time(), namespace, topic, TypedValue(topic, message.SerializeToString())))

    def forward(self, event: Event) -> None:
        """Keep what is handed on."""
        self.events.append(event)

    @property
    def topics(self) -> list[str]:
        """Topics of the events so far."""
        return [event.topic for event in self.events]

    async def start(self) -> None:
        """Recover."""
        await self.tasks.recover()

    async def restart(self, config: RuntimeConfig | None = None) -> None:
        """Another daemon; shims go on."""
        await self.tasks.close()
        self.config = config or self.config
        self.tasks = self._make()
        await self.tasks.recover()

    async def close(self) -> None:
        """End everything."""
        await self.tasks.close()
        for shim in self.zygote.shims:
            await shim.die()
        self.executors.close()

    async def run(self, name: str, **options: Any) -> FakeShim:
        """A running task; returns its shim."""
        self.store.add(name, **options)
        await self.tasks.create(NAMESPACE, name, rootfs=[])
        await self.tasks.start(NAMESPACE, name)
        return next(shim for shim in self.zygote.shims if name in shim.tasks)

    def leftovers(self) -> list[str]:
        """Bundles, working folders and sockets on disk."""
        found = [*self.folder.glob("state/tasks/*/*"), *self.folder.glob("root/tasks/*/*"), *self.folder.glob("state/s/*")]
        return sorted(str(path.relative_to(self.folder)) for path in found)
