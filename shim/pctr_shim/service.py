"""The task service: containerd.task.v2.Task and containerd.task.v3.Task, all 17 methods.

The two versions have the same messages on the wire, so one implementation (on v3's classes) serves
both. Owns the table of containers and the turning of requests into calls of `container` and `process`;
a mutation that has begun is carried through even when its caller gives up.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message

from pctr_shim.belongings import Belongings, Busy
from pctr_shim.config import ShimConfig
from pctr_shim.container import Container, parse_options
from pctr_shim.process import Process
from pctr_shim.publisher import Publisher
from pctr_shim.reaper import Reaper
from pctr_shim.stdio import StreamAddresses
from pctr_shim.values import any_of, timestamp, type_name
from supervisord_ctr import aio, errors
from supervisord_ctr.aio import TaskOwner
from supervisord_ctr.api.events import events_pb2
from supervisord_ctr.api.runc.v1 import options_pb2
from supervisord_ctr.api.runtime.task.v3 import task_pb2 as api
from supervisord_ctr.api.types.task import task_pb2 as types
from supervisord_ctr.linux import cgroup_messages
from supervisord_ctr.model import Exit, Mount
from supervisord_ctr.names import check_identifier
from supervisord_ctr.ttrpc.server import Context, Method

log = logging.getLogger(__name__)

SERVICES = ("containerd.task.v2.Task", "containerd.task.v3.Task")

T = TypeVar("T")


class TaskService:
    """`stop` is called when a Shutdown found no container left."""

    def __init__(self, config: ShimConfig, reaper: Reaper, publisher: Publisher, stop: Callable[[], None]) -> None:
        self._config = config
        self._reaper = reaper
        self._publisher = publisher
        self._stop = stop
        self.tasks = TaskOwner("shim")
        self.containers: dict[str, Container] = {}
        self._oom_told: dict[str, int] = {}
        self._creating: set[str] = set()
        self.started_at = time.time()

    def methods(self) -> dict[str, Method]:
        """The service's methods by name."""
        table: dict[str, tuple[type[Message], Callable[[Any, Context], Awaitable[Message]]]] = {
            "State": (api.StateRequest, self.state), "Create": (api.CreateTaskRequest, self.create),
            "Start": (api.StartRequest, self.start), "Delete": (api.DeleteRequest, self.delete),
            "Pids": (api.PidsRequest, self.pids), "Pause": (api.PauseRequest, self.pause),
            "Resume": (api.ResumeRequest, self.resume), "Checkpoint": (api.CheckpointTaskRequest, self.checkpoint),
            "Kill": (api.KillRequest, self.kill), "Exec": (api.ExecProcessRequest, self.exec),
            "ResizePty": (api.ResizePtyRequest, self.resize), "CloseIO": (api.CloseIORequest, self.close_io),
            "Update": (api.UpdateTaskRequest, self.update), "Wait": (api.WaitRequest, self.wait),
            "Stats": (api.StatsRequest, self.stats), "Connect": (api.ConnectRequest, self.connect),
            "Shutdown": (api.ShutdownRequest, self.shutdown),
        }
        return {
            name: Method(request, handler, lasting=name == "Wait") for name, (request, handler) in table.items()
        }

    def find(self, container_id: str) -> Container:
        """The container; `NotFound` as containerd words it."""
        container = self.containers.get(container_id)
        if container is None:
            raise errors.NotFound(f"container {container_id} not created", kind="container", key=container_id)
        return container

    def leave(self, belongings: Belongings) -> dict[str, Any]:
        """Describe all containers for the next worker; `Busy` while a request changes something, or without any."""
        if self.tasks or self._creating or not self.containers:
            raise Busy("a request, or nothing to wait for")
        return {
            "containers": [container.leave(belongings) for container in self.containers.values()],
            "oom_told": self._oom_told, "started_at": self.started_at,
        }

    def take_up(self, left: Mapping[str, Any], belongings: Belongings) -> None:
        """Go on with what `leave` described."""
        self._oom_told.update(left["oom_told"])
        self.started_at = left["started_at"]
        for entry in left["containers"]:
            options = options_pb2.Options.FromString(bytes.fromhex(entry["options"]))
            container = Container(
                self._config, self._reaper, self.tasks, self._publisher.publish, entry["id"], entry["bundle"], options,
                self._oom_told, entry["program"],
            )
            self.containers[container.id] = container
            container.resume(entry, belongings)

    async def _carry(self, work: Coroutine[Any, Any, T], name: str) -> T:
        """Await `work` so that it goes on when the caller's deadline passes."""
        return await aio.shielded(self.tasks, work, name)

    async def create(self, request: api.CreateTaskRequest, context: Context) -> api.CreateTaskResponse:
        """Mount, make the container, note its pid."""
        return await self._carry(self._create(request), f"create {request.id}")

    async def _create(self, request: api.CreateTaskRequest) -> api.CreateTaskResponse:
        check_identifier(request.id, "container id")
        if request.id in self.containers or request.id in self._creating:
            raise errors.AlreadyExists(f"task {request.id} already exists", kind="task", key=request.id)
        if not os.path.isdir(request.bundle):
            raise errors.NotFound(f"bundle {request.bundle} is not a folder", kind="bundle", key=request.bundle)
        options = parse_options(type_name(request.options), request.options.value)
        addresses = StreamAddresses(request.stdin, request.stdout, request.stderr, request.terminal)
        rootfs = [Mount(mount.type, mount.source, tuple(mount.options), mount.target) for mount in request.rootfs]
        self._creating.add(request.id)
        try:
            with self._reaper.expecting():
                container = Container(
                    self._config, self._reaper, self.tasks, self._publisher.publish, request.id, request.bundle,
                    options, self._oom_told,
                )
                await container.create(rootfs, addresses, request.checkpoint, request.parent_checkpoint)
                self.containers[request.id] = container
                self._publisher.publish("/tasks/create", events_pb2.TaskCreate(
                    container_id=request.id, bundle=request.bundle, rootfs=request.rootfs,
                    io=events_pb2.TaskIO(
                        stdin=request.stdin, stdout=request.stdout, stderr=request.stderr, terminal=request.terminal
                    ),
                    checkpoint=request.checkpoint, pid=container.init.pid,
                ))
                container.adopt_init()
        finally:
            self._creating.discard(request.id)
        return api.CreateTaskResponse(pid=container.init.pid)

    async def start(self, request: api.StartRequest, context: Context) -> api.StartResponse:
        """Start the container's process or an exec."""
        return await self._carry(self._start(request), f"start {request.id}/{request.exec_id}")

    async def _start(self, request: api.StartRequest) -> api.StartResponse:
        container = self.find(request.id)
        with self._reaper.expecting():
            process = await container.start(request.exec_id)
        return api.StartResponse(pid=process.pid)

    async def delete(self, request: api.DeleteRequest, context: Context) -> api.DeleteResponse:
        """Take a process that has ended away; the init process takes the container along."""
        return await self._carry(self._delete(request), f"delete {request.id}/{request.exec_id}")

    async def _delete(self, request: api.DeleteRequest) -> api.DeleteResponse:
        container = self.find(request.id)
        process = await container.delete(request.exec_id)
        ended = process.exit or Exit(0, 0.0)
        if not request.exec_id:
            self.containers.pop(request.id, None)
            self._publisher.publish("/tasks/delete", events_pb2.TaskDelete(
                container_id=request.id, pid=process.pid, exit_status=ended.status, exited_at=timestamp(ended.at)
            ))
        return api.DeleteResponse(pid=process.pid, exit_status=ended.status, exited_at=timestamp(ended.at))

    async def exec(self, request: api.ExecProcessRequest, context: Context) -> Empty:
        """Add a process."""
        container = self.find(request.id)
        check_identifier(request.exec_id, "exec id")
        addresses = StreamAddresses(request.stdin, request.stdout, request.stderr, request.terminal)
        container.add_exec(request.exec_id, addresses, request.spec.value)
        self._publisher.publish("/tasks/exec-added", events_pb2.TaskExecAdded(
            container_id=request.id, exec_id=request.exec_id
        ))
        return Empty()

    async def state(self, request: api.StateRequest, context: Context) -> api.StateResponse:
        """What is known of a process; never asks the runtime. A daemon that asks is there to take events."""
        self._publisher.nudge()
        container = self.find(request.id)
        process = container.process(request.exec_id)
        addresses = process.io.addresses
        ended = process.exit
        return api.StateResponse(
            id=request.exec_id or container.id, bundle=container.bundle, pid=process.pid,
            status=types.Status.ValueType(int(process.status)),
            stdin=addresses.stdin, stdout=addresses.stdout, stderr=addresses.stderr, terminal=addresses.terminal,
            exit_status=ended.status if ended else 0, exited_at=timestamp(ended.at) if ended else None,
            exec_id=request.exec_id,
        )

    async def pids(self, request: api.PidsRequest, context: Context) -> api.PidsResponse:
        """Every process in the container's cgroup; execs are marked with their names."""
        container = self.find(request.id)
        names = {process.pid: process.exec_id for process in container.execs.values() if process.pid}
        group = container.init.cgroup
        found = group.pids() if group is not None else []
        return api.PidsResponse(processes=[
            types.ProcessInfo(pid=pid, info=any_of(options_pb2.ProcessDetails(exec_id=names[pid])))
            if pid in names else types.ProcessInfo(pid=pid)
            for pid in found
        ])

    async def pause(self, request: api.PauseRequest, context: Context) -> Empty:
        """Freeze the container."""
        return await self._carry(self._pause(request.id), f"pause {request.id}")

    async def _pause(self, container_id: str) -> Empty:
        init = self.find(container_id).init
        async with init.lock:
            await init.init_state.pause(init)
        self._publisher.publish("/tasks/paused", events_pb2.TaskPaused(container_id=container_id))
        return Empty()

    async def resume(self, request: api.ResumeRequest, context: Context) -> Empty:
        """Thaw the container."""
        return await self._carry(self._resume(request.id), f"resume {request.id}")

    async def _resume(self, container_id: str) -> Empty:
        init = self.find(container_id).init
        async with init.lock:
            await init.init_state.resume(init)
        self._publisher.publish("/tasks/resumed", events_pb2.TaskResumed(container_id=container_id))
        return Empty()

    async def kill(self, request: api.KillRequest, context: Context) -> Empty:
        """Send a signal; takes no lock, so nothing that hangs can keep a kill from arriving."""
        container = self.find(request.id)
        process: Process = container.process(request.exec_id)
        signal = int(request.signal)
        if not 0 < signal <= 64:
            raise errors.InvalidArgument(f"signal {signal} does not exist", kind="signal", key=str(signal))
        if request.exec_id:
            execution = container.execs[request.exec_id]
            execution.exec_state.kill(execution, signal, request.all)
        else:
            container.init.init_state.kill(container.init, signal, request.all)
        log.debug("signal %d sent to %s", signal, process.label)
        return Empty()

    async def resize(self, request: api.ResizePtyRequest, context: Context) -> Empty:
        """Set the size of a terminal."""
        container = self.find(request.id)
        process = container.process(request.exec_id)
        if request.exec_id:
            execution = container.execs[request.exec_id]
            execution.exec_state.check_resize(execution)
        process.io.resize(request.width, request.height)
        return Empty()

    async def close_io(self, request: api.CloseIORequest, context: Context) -> Empty:
        """End a process's input."""
        process = self.find(request.id).process(request.exec_id)
        if request.stdin:
            process.io.close_stdin()
        return Empty()

    async def update(self, request: api.UpdateTaskRequest, context: Context) -> Empty:
        """Change limits; `resources` is the runtime specification's LinuxResources in JSON."""
        return await self._carry(self._update(request), f"update {request.id}")

    async def _update(self, request: api.UpdateTaskRequest) -> Empty:
        init = self.find(request.id).init
        async with init.lock:
            await init.init_state.update(init, request.resources.value)
        return Empty()

    async def checkpoint(self, request: api.CheckpointTaskRequest, context: Context) -> Empty:
        """Write the container's state to a folder with criu."""
        return await self._carry(self._checkpoint(request), f"checkpoint {request.id}")

    async def _checkpoint(self, request: api.CheckpointTaskRequest) -> Empty:
        init = self.find(request.id).init
        options = options_pb2.CheckpointOptions()
        if type_name(request.options) == "containerd.runc.v1.CheckpointOptions":
            try:
                options = options_pb2.CheckpointOptions.FromString(request.options.value)
            except DecodeError as error:
                raise errors.InvalidArgument(f"checkpoint options cannot be decoded: {error}") from error
        async with init.lock:
            init.init_state.check_checkpoint(init)
            await init.checkpoint(request.path, options)
        self._publisher.publish("/tasks/checkpointed", events_pb2.TaskCheckpointed(
            container_id=request.id, checkpoint=request.path or options.image_path
        ))
        return Empty()

    async def wait(self, request: api.WaitRequest, context: Context) -> api.WaitResponse:
        """The exit of a process, when there is one."""
        ended = await self.find(request.id).process(request.exec_id).wait_exit()
        return api.WaitResponse(exit_status=ended.status, exited_at=timestamp(ended.at))

    async def stats(self, request: api.StatsRequest, context: Context) -> api.StatsResponse:
        """Metrics of the container's cgroup, straight from its files."""
        group = self.find(request.id).init.cgroup
        if group is None or not group.exists():
            raise errors.NotFound(f"cgroup of container {request.id} does not exist", kind="cgroup", key=request.id)
        return api.StatsResponse(stats=any_of(cgroup_messages.metrics(group)))

    async def connect(self, request: api.ConnectRequest, context: Context) -> api.ConnectResponse:
        """Who we are; as `state`, for a daemon that begins with this."""
        self._publisher.nudge()
        container = self.containers.get(request.id)
        pid = container.init.pid if container is not None else 0
        return api.ConnectResponse(shim_pid=self._config.pid, task_pid=pid)

    async def shutdown(self, request: api.ShutdownRequest, context: Context) -> Empty:
        """End the shim, if it serves no container."""
        if not self.containers and not self._creating:
            asyncio.get_running_loop().call_soon(self._stop)
        return Empty()
