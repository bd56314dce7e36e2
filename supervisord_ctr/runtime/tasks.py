"""Tasks: the running processes of containers, by namespace and id.

The one entrance to the room. Mutations of one task run one after the other under a lock for its
key and belong to the daemon: a client that hangs up never leaves half a task. Nothing here is
written to the database; what must outlive the daemon stands in bundles and is held by shims.

Errors are those of containerd's task service: NotFound for a container without a task,
AlreadyExists for a second one, FailedPrecondition for the wrong state (told by the shim).
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError

from supervisord_ctr import errors, faults, filters
from supervisord_ctr.aio import Executors, KeyedLock, TaskOwner, shielded
from supervisord_ctr.api.events import events_pb2
from supervisord_ctr.api.shim.v1 import shim_pb2
from supervisord_ctr.linux import processes
from supervisord_ctr.linux.mounts import with_context
from supervisord_ctr.model import Container, Event, Exit, Mount, TypedValue
from supervisord_ctr.names import check_identifier
from supervisord_ctr.runtime import bundle as bundles
from supervisord_ctr.runtime import metrics, recovery
from supervisord_ctr.runtime.attach import AttachConnection
from supervisord_ctr.runtime.bundle import Bundle, Record, make_passable
from supervisord_ctr.runtime.forward import EventServer
from supervisord_ctr.runtime.haste import Haste
from supervisord_ctr.runtime.sandboxes import Sandboxes
from supervisord_ctr.runtime.shims import UNKNOWN_EXIT, Launch, Shim, Shims, socket_path
from supervisord_ctr.runtime.spec import read_spec
from supervisord_ctr.runtime.task import Events, Store, Streams, Task
from supervisord_ctr.runtime.values import ProcessInfo, RuntimeConfig, TaskMetric, TaskState
from supervisord_ctr.runtime.zygote import Zygote

log = logging.getLogger(__name__)
T = TypeVar("T")
P = ParamSpec("P")

_RECORDED = faults.declare("runtime.shim.recorded", "the bundle tells of its shim, the shim knows no task yet")
_CREATED = faults.declare("runtime.task.created", "the shim made the container, the client has no answer yet")
_STARTED = faults.declare("runtime.task.started", "the process runs, the client has no answer yet")
_DELETED = faults.declare("runtime.task.deleted", "the shim took the container away, its bundle still exists")

_SHIM_SERVICE = "pctr.shim.v1.Shim"
#: Seconds between attempts to clean up after a dead shim when one fails, doubled each time.
_FIRST_RETRY = 1.0
_LONGEST_RETRY = 60.0


class Tasks:
    """All tasks of this daemon. `recover` is called once before anything else; `close` leaves them running."""

    def __init__(
        self, state_dir: Path, root_dir: Path, database: Store, exchange: Events, zygote: Zygote, executors: Executors,
        config: RuntimeConfig | None = None, *, address: str = "",
        adjust_spec: Callable[[dict[str, Any]], Sequence[str]] | None = None,
    ) -> None:
        """`address` is the daemon's gRPC socket, for foreign shims. `adjust_spec` changes a spec to what this
        machine can do and returns a line for each change (`oci.limits.clamp`)."""
        self._adjust_spec = adjust_spec
        self.config = config or RuntimeConfig()
        self._state = state_dir / "tasks"
        self._root = root_dir / "tasks"
        #: Folder for checkpoint images that are unpacked for a restore; a task's goes with the task.
        self.scratch = state_dir / "checkpoints"
        self._database = database
        self._exchange = exchange
        self._executors = executors
        self._owner = TaskOwner("tasks")
        self._haste = Haste(self._owner, executors)
        self._locks = KeyedLock()
        self._tasks: dict[tuple[str, str], Task] = {}
        self._zygote = zygote
        events_path = state_dir / "ttrpc.sock"
        self.shims = Shims(
            state_dir, zygote, self.config, self._owner, executors, grpc_address=address, events=str(events_path)
        )
        self.shims.on_lost = self._shim_lost
        self.sandboxes = Sandboxes(self, state_dir, root_dir)
        # Shims get the path that stays when the address changes; clients of containerd look beside the address.
        served = [events_path, *([Path(f"{address}.ttrpc")] if address else [])]
        self._event_server = EventServer(served, exchange, self._observe)

    # -- life of the room --------------------------------------------------------------------------

    async def recover(self) -> None:
        """Adopt what a former daemon left running, clean up after what died, and take events of shims."""
        await self._executors.run_io(self._prepare)
        await self._event_server.start()
        await self.sandboxes.recover()
        await recovery.recover(self)

    def _prepare(self) -> None:
        for folder in (self._state, self._root):
            make_passable(folder)
        # Restores that did not come to their start are lost with the daemon; their images are input only.
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.shims.prepare()

    async def close(self) -> None:
        """Let go of every shim; containers run on."""
        await self.shims.close()
        await self._event_server.close()
        await self._owner.close()

    # -- for recovery, and mutations ---------------------------------------------------------------

    @property
    def state_folder(self) -> Path:
        """Where bundles are."""
        return self._state

    @property
    def root_folder(self) -> Path:
        """Where working folders are."""
        return self._root

    async def run_io(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call on the daemon's threads."""
        return await self._executors.run_io(call, *args, **kwargs)

    def own(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run `work` as this room's own until `close`."""
        return self._owner.start(work, name)

    async def container(self, namespace: str, container_id: str) -> Container:
        """The container's record."""
        return await self._database.containers.get(namespace, container_id)

    def adopt(self, bundle: Bundle, record: Record) -> Task:
        """List the task of a bundle, its state unknown so far."""
        task = Task(bundle, record, None, created=True, trouble="its shim was not asked yet")
        self._tasks[bundle.namespace, bundle.id] = task
        return task

    def holds(self, task: Task) -> bool:
        """Whether `task` is still the one under its name."""
        return self._tasks.get((task.namespace, task.id)) is task

    async def discard(self, bundle: Bundle, record: Record) -> None:
        """Remove a task that was never made, whatever its shim got to, and the shim."""
        self.shims.watch_log(bundle, record)
        await self.shims.dismiss(bundle.namespace, socket_path(record.address))
        with contextlib.suppress(errors.Error, TimeoutError):
            await self.shims.clean_up(bundle, record)
        self.shims.forget_log(bundle)
        await self._executors.run_io(bundle.delete)

    def lock(self, task: Task | Bundle) -> AbstractAsyncContextManager[None]:
        """The lock that mutations of a task hold."""
        return self._locks.hold((task.namespace, task.id))

    async def drop(self, task: Task) -> None:
        """Remove a task that its shim does not know."""
        async with self._locks.hold((task.namespace, task.id)):
            shim = task.shim
            if shim is not None:
                await self.shims.release(shim, task.id)
                task.shim = None
            with contextlib.suppress(errors.Error, TimeoutError):
                await self.shims.clean_up(task.bundle, task.record)
            await self._forget(task)

    def known(self) -> set[tuple[str, str]]:
        """Namespace and id of every task, those being made or removed included."""
        return set(self._tasks)

    def known_sockets(self) -> set[str]:
        """Socket paths of shims that some task needs."""
        addresses = {task.record.address for task in self._tasks.values() if task.record.address}
        addresses.update(shim.record.address for shim in self.shims.all())
        return {socket_path(address) for address in addresses}

    async def _mutate(self, key: tuple[str, str], work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `work` under the lock of `key` as the daemon's own, whatever becomes of the caller."""

        async def locked() -> T:
            async with self._locks.hold(key):
                return await work()

        return await shielded(self._owner, locked(), f"{key[0]}/{key[1]}")

    # -- create ------------------------------------------------------------------------------------

    def expect(self, namespace: str, runtime: str, group: str = "") -> None:
        """A task is likely to be made soon, in the sandbox `group` if it is not "": prepare. Only a hint."""
        self.shims.expect(namespace, runtime, group)

    async def create(
        self, namespace: str, container_id: str, *, rootfs: Sequence[Mount] | None, stdin: str = "", stdout: str = "",
        stderr: str = "", terminal: bool = False, checkpoint: Path | None = None, options: TypedValue | None = None,
        runtime_path: str = "",
    ) -> int:
        """Make the task of a container up to its waiting init; returns that process's pid.

        `rootfs` None stands for the container's own snapshot. `options` beat the record's runtime
        options, `runtime_path` its runtime. `checkpoint` is a folder of a CRIU image to restore.
        """
        streams = Streams(stdin, stdout, stderr, terminal)

        async def work() -> int:
            return await self._create(namespace, container_id, rootfs, streams, checkpoint, options, runtime_path)

        return await self._mutate((namespace, container_id), work)

    async def _create(
        self, namespace: str, container_id: str, rootfs: Sequence[Mount] | None, streams: Streams,
        checkpoint: Path | None, options: TypedValue | None, runtime_path: str,
    ) -> int:
        container = await self._database.containers.get(namespace, container_id)
        if (namespace, container_id) in self._tasks:
            raise errors.AlreadyExists(f"task {container_id}: already exists", kind="task", key=container_id)
        check_identifier(container_id, "task id")
        chosen = options if options is not None and options.value else container.runtime.options
        runtime = runtime_path or container.runtime.name
        self.shims.resolve(runtime)
        self._haste.ahead()
        parts = read_spec(container, self._adjust_spec)
        if rootfs is None:
            rootfs = ()
            if container.snapshot_key:
                snapshotter = self._database.snapshotter(container.snapshotter)
                rootfs = with_context(
                    await snapshotter.mounts(namespace, container.snapshot_key), parts.mount_label
                )
        bundle = Bundle(namespace, container_id, self._state / namespace / container_id)
        if bundle.path.exists():
            # What a failed removal left: no task is known under this name, and we hold its lock.
            await self._executors.run_io(bundle.delete)
        task = Task(bundle, Record(runtime), None, checkpoint=checkpoint)
        self._tasks[namespace, container_id] = task
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self._undo, task)
            # Forking the shim and making the bundle do not wait for each other.
            making = self._owner.start(
                self._executors.run_io(
                    Bundle.create, self._state, self._root, namespace, container_id, parts.data, gid=parts.gid
                ), f"bundle {container_id}",
            )
            try:
                task.shim = await self.shims.launch(Launch(bundle, runtime, chosen, parts.group), making)
            finally:
                await asyncio.wait((making,))
            await making
            task.record = replace(task.shim.record, runtime=runtime or self.config.default, sandbox=False)
            faults.point(_RECORDED)
            try:
                task.pid = await task.shim.service.create(
                    container_id, bundle=str(bundle.path), rootfs=rootfs, terminal=streams.terminal,
                    stdin=streams.stdin, stdout=streams.stdout, stderr=streams.stderr,
                    checkpoint=str(checkpoint or ""), options=chosen,
                )
            except errors.Error as error:
                raise type(error)(f"failed to create shim task: {error.message}", key=container_id) from error
            faults.point(_CREATED)
            task.created = True
            undo.pop_all()
        return task.pid

    async def _undo(self, task: Task) -> None:
        """Take back a task that could not be made, step by step, each bounded."""
        shim = task.shim
        if shim is not None and not shim.lost:
            with contextlib.suppress(errors.Error):
                await shim.service.delete(task.id, "", timeout=self.config.cleanup_timeout)
            await self.shims.release(shim, task.id)
        elif shim is not None:
            shim.tasks.discard(task.id)
            with contextlib.suppress(errors.Error, TimeoutError):
                await self.shims.clean_up(task.bundle, task.record)
        await self._forget(task)

    async def _forget(self, task: Task) -> None:
        """Drop a task and its bundle."""
        self.shims.forget_log(task.bundle)
        if task.checkpoint is not None and task.checkpoint.parent == self.scratch:
            await self._executors.run_io(shutil.rmtree, task.checkpoint, ignore_errors=True)
        try:
            left = await self._executors.run_io(task.bundle.withdraw)
            self._owner.start(self._executors.run_io(bundles.remove_all, left), f"remove {task.id}")
        except errors.Error as error:
            log.error("task %s in %s: %s", task.id, task.namespace, error)
        if self._tasks.get((task.namespace, task.id)) is task:
            del self._tasks[task.namespace, task.id]
        task.bury()

    # -- looking up --------------------------------------------------------------------------------

    async def _find(self, namespace: str, container_id: str) -> Task:
        """The task, whatever becomes of its shim; the errors of containerd when there is none."""
        task = self._tasks.get((namespace, container_id))
        if task is None or not task.created:
            await self._database.containers.get(namespace, container_id)
            raise errors.NotFound(f"task {container_id} not found", kind="task", key=container_id)
        return task

    async def _get(self, namespace: str, container_id: str) -> tuple[Task, Shim]:
        """The task and its shim, which must be there."""
        task = await self._find(namespace, container_id)
        if task.shim is None:
            raise errors.Unavailable(f"task {container_id} is being recovered: {task.trouble}", kind="task")
        return task, task.shim

    def _all(self, namespace: str) -> list[Task]:
        return [task for (space, _), task in self._tasks.items() if space == namespace and task.created]

    def __len__(self) -> int:
        return len(self._tasks)

    # -- the process's life ------------------------------------------------------------------------

    async def start(self, namespace: str, container_id: str, exec_id: str = "") -> int:
        """Start the task, or an exec; returns its pid."""
        task, shim = await self._get(namespace, container_id)
        if exec_id:
            self._haste.ahead()
        pid = await shielded(self._owner, shim.service.start(container_id, exec_id), f"start {container_id}")
        faults.point(_STARTED)
        if not exec_id:
            task.pid = pid or task.pid
        return pid

    async def exec(
        self, namespace: str, container_id: str, exec_id: str, *, spec: TypedValue, stdin: str = "", stdout: str = "",
        stderr: str = "", terminal: bool = False,
    ) -> None:
        """Add a process (`spec` is an OCI `process` in JSON); `start` runs it."""
        if not exec_id:
            raise errors.InvalidArgument("exec id cannot be empty", kind="exec")
        _, shim = await self._get(namespace, container_id)
        check_identifier(exec_id, "exec id")
        await shielded(self._owner, shim.service.exec(
            container_id, exec_id, spec=spec, terminal=terminal, stdin=stdin, stdout=stdout, stderr=stderr
        ), f"exec {container_id}/{exec_id}")

    async def kill(
        self, namespace: str, container_id: str, exec_id: str = "", signal: int = 15, all_: bool = False,
    ) -> None:
        """Send a signal to a process, with `all_` to every process of the container."""
        _, shim = await self._get(namespace, container_id)
        await shim.service.kill(container_id, exec_id, signal, all_)

    async def wait(self, namespace: str, container_id: str, exec_id: str = "") -> Exit:
        """How a process ended, as soon as it has. An exit that a dead shim left behind is found, too."""
        task = await self._find(namespace, container_id)
        while not task.buried:
            shim = task.shim
            if shim is not None:
                try:
                    found = await shim.service.wait(container_id, exec_id)
                    return found if exec_id else replace(found, pid=task.pid)
                except errors.Unavailable:
                    if not shim.service.client.closed:
                        raise
            await task.wait_settled(shim)
        return task.exited or Exit(UNKNOWN_EXIT, time.time(), task.pid)

    async def delete(self, namespace: str, container_id: str, exec_id: str = "") -> Exit:
        """Take a stopped process away; for the task itself shim, bundle and mounts go, too."""
        if exec_id:
            return await self.delete_exec(namespace, container_id, exec_id)

        async def work() -> Exit:
            return await self._delete(namespace, container_id)

        return await self._mutate((namespace, container_id), work)

    async def delete_exec(self, namespace: str, container_id: str, exec_id: str) -> Exit:
        """Take a stopped exec away."""
        _, shim = await self._get(namespace, container_id)
        if not exec_id:
            # The shim would take this for the task itself; no process has an empty name.
            raise errors.NotFound(f"task {container_id} has no process {exec_id!r}", kind="exec", key=exec_id)
        return await shielded(self._owner, shim.service.delete(container_id, exec_id), f"delete {exec_id}")

    async def require(self, namespace: str, container_id: str) -> None:
        """NotFound when the container has no task."""
        await self._get(namespace, container_id)

    async def _delete(self, namespace: str, container_id: str) -> Exit:
        task, shim = await self._get(namespace, container_id)
        failed: errors.Error | None = None
        found = Exit(UNKNOWN_EXIT, time.time(), task.pid)
        try:
            found = await shim.service.delete(container_id, "")
        except errors.Unavailable:
            # The shim died meanwhile: then this is the clean-up that its loss would start.
            if not await self._bury(task):
                raise
            return task.exited or found
        except errors.NotFound as error:
            failed = error
        faults.point(_DELETED)
        shim.tasks.discard(container_id)
        ending = self._owner.start(self.shims.release(shim, container_id), f"release {container_id}")
        await self._forget(task)
        if task.record.binary:
            await ending  # only our own shims are known to have let go of everything by now
        if failed is not None:
            raise failed
        return found

    async def state(self, namespace: str, container_id: str, exec_id: str = "") -> TaskState:
        """What a process is doing; UNKNOWN for a task whose shim does not answer yet."""
        task = self._tasks.get((namespace, container_id))
        if task is not None and task.created and task.shim is None and not exec_id:
            return TaskState(container_id, pid=task.pid, bundle=str(task.bundle.path))
        _, shim = await self._get(namespace, container_id)
        try:
            return await shim.service.state(container_id, exec_id)
        except errors.Unavailable as error:
            raise errors.NotFound(f"task {container_id} not found: its shim ended", kind="task") from error

    async def list(self, namespace: str) -> list[TaskState]:
        """Every task of a namespace; one whose shim does not answer in time is UNKNOWN and never left out (P6)."""
        tasks = self._all(namespace)
        found = await asyncio.gather(*(self._listed(task) for task in tasks))
        return [state for state in found if state is not None]

    async def _listed(self, task: Task) -> TaskState | None:
        unknown = TaskState(task.id, pid=task.pid, bundle=str(task.bundle.path))
        if task.shim is None:
            return unknown
        try:
            return await task.shim.service.state(task.id, "", timeout=self.config.state_timeout)
        except errors.NotFound:
            return None if task.buried else unknown
        except errors.Error as error:
            log.warning("state of task %s in %s: %s", task.id, task.namespace, error)
            return None if task.buried else unknown

    # -- the rest of the task API ------------------------------------------------------------------

    async def pids(self, namespace: str, container_id: str) -> builtins.list[ProcessInfo]:
        """Every process inside."""
        _, shim = await self._get(namespace, container_id)
        return await shim.service.pids(container_id)

    async def pause(self, namespace: str, container_id: str) -> None:
        """Freeze the task."""
        _, shim = await self._get(namespace, container_id)
        await shielded(self._owner, shim.service.pause(container_id), f"pause {container_id}")

    async def resume(self, namespace: str, container_id: str) -> None:
        """Thaw it."""
        _, shim = await self._get(namespace, container_id)
        await shielded(self._owner, shim.service.resume(container_id), f"resume {container_id}")

    async def checkpoint(self, namespace: str, container_id: str, path: str, options: TypedValue | None = None) -> None:
        """Write a CRIU image of the task to the folder `path`."""
        _, shim = await self._get(namespace, container_id)
        await shielded(self._owner, shim.service.checkpoint(container_id, path, options), f"checkpoint {container_id}")

    async def update(
        self, namespace: str, container_id: str, resources: TypedValue | None, annotations: Mapping[str, str],
    ) -> None:
        """Change limits of the running task."""
        _, shim = await self._get(namespace, container_id)
        await shielded(self._owner, shim.service.update(container_id, resources, dict(annotations)), "update")

    async def resize(self, namespace: str, container_id: str, exec_id: str, width: int, height: int) -> None:
        """Tell a terminal its size in characters."""
        _, shim = await self._get(namespace, container_id)
        await shim.service.resize(container_id, exec_id, width, height)

    async def close_io(self, namespace: str, container_id: str, exec_id: str = "", stdin: bool = True) -> None:
        """Close standard input once what was written is read."""
        _, shim = await self._get(namespace, container_id)
        await shim.service.close_io(container_id, exec_id, stdin)

    async def metrics(self, namespace: str, filter_texts: Sequence[str] = ()) -> builtins.list[TaskMetric]:
        """Cgroup numbers of the tasks that match (fields `id` and `namespace`); those that fail are left out."""
        wanted = filters.parse(filter_texts)
        tasks = [task for task in self._all(namespace) if task.shim is not None and wanted.matches(_adapt(task))]
        found = await asyncio.gather(*(self._measured(task) for task in tasks))
        return [metric for metric in found if metric is not None]

    async def _measured(self, task: Task) -> TaskMetric | None:
        at = time.time()
        assert task.shim is not None
        try:
            data = await self.run_io(metrics.read, task) if not task.record.binary else None
            if data is None:
                data = await task.shim.service.stats(task.id, timeout=self.config.state_timeout)
        except errors.Error as error:
            log.debug("metrics of task %s in %s: %s", task.id, task.namespace, error)
            return None
        return TaskMetric(task.id, at, data) if data is not None else None

    async def attach(
        self, namespace: str, container_id: str, exec_id: str = "", *, stdin: bool = False, stdout: bool = True,
        stderr: bool = True,
    ) -> AttachConnection:
        """Connect to the streams of a running process of our own shim."""
        task, _ = await self._get(namespace, container_id)
        return await AttachConnection.open(
            task.bundle.path / "attach.sock", container_id, exec_id, stdin=stdin, stdout=stdout, stderr=stderr
        )

    async def reopen_log(self, namespace: str, container_id: str) -> None:
        """Make our shim open the CRI log's path anew, after it was moved away."""
        _, shim = await self._get(namespace, container_id)
        request = shim_pb2.ReopenLogRequest(id=container_id)
        await shim.service.call_service(_SHIM_SERVICE, "ReopenLog", request, Empty)

    async def exit_records(self, namespace: str, container_id: str) -> builtins.list[Any]:
        """`pctr.shim.v1.ExitRecord`s of a task and its execs: signal, out-of-memory kills, who asked."""
        _, shim = await self._get(namespace, container_id)
        request = shim_pb2.ExitRecordsRequest(id=container_id)
        answer = await shim.service.call_service(_SHIM_SERVICE, "ExitRecords", request, shim_pb2.ExitRecordsResponse)
        return list(answer.records)

    # -- death of shims ----------------------------------------------------------------------------

    def _observe(self, event: Event) -> None:
        """Learn from a shim's event before others do."""
        if event.topic.startswith("/tasks/"):
            concerned = events_pb2.TaskPaused()  # the container is field 1 in all of them
            with contextlib.suppress(DecodeError):
                concerned.ParseFromString(event.event.value)
            task = self._tasks.get((event.namespace, concerned.container_id))
            if task is not None and task.shim is not None:
                task.shim.service.note()
        if event.topic == "/tasks/exit" and event.event.type_url.endswith("TaskExit"):
            told = events_pb2.TaskExit()
            with contextlib.suppress(Exception):
                told.ParseFromString(event.event.value)
            if told.id == told.container_id:
                log.info("task %s in %s exited with %d", told.container_id, event.namespace, told.exit_status)

    async def _shim_lost(self, shim: Shim) -> None:
        """Clean up after every task of a shim whose connection ended."""
        for container_id in sorted(shim.tasks):
            task = self._tasks.get((shim.namespace, container_id))
            if task is not None and task.shim is shim and task.created:
                log.warning("the connection to the shim of task %s in %s ended", container_id, shim.namespace)
                self._owner.start(recovery.attend_again(self, task, shim), f"attend {container_id}")

    async def bury_until_done(self, task: Task) -> None:
        """Clean up after a dead shim, again and again until it works; the task stays listed meanwhile."""
        pause = _FIRST_RETRY
        while True:
            async with self._locks.hold((task.namespace, task.id)):
                if self._tasks.get((task.namespace, task.id)) is not task or await self._bury(task):
                    return
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_RETRY)

    async def _bury(self, task: Task) -> bool:
        """One attempt: kill what is left, tell of the exit, remove the bundle. The caller holds the lock."""
        try:
            found = await self.shims.clean_up(task.bundle, task.record)
        except (errors.Error, TimeoutError, OSError) as error:
            log.error("cleaning up after the shim of task %s in %s: %s", task.id, task.namespace, error)
            if task.pid and processes.is_alive(task.pid):
                task.attach_shim(None, f"its shim ended and cleaning up failed: {error}")
                return False
            found = Exit(UNKNOWN_EXIT, time.time(), task.pid)
        pid = found.pid or task.pid
        task.exited = Exit(found.status, found.at or time.time(), pid)
        if task.shim is not None:
            task.shim.tasks.discard(task.id)
        await self._forget(task)
        self._tell_exit(task, task.exited)
        return True

    def _tell_exit(self, task: Task, found: Exit) -> None:
        exited = events_pb2.TaskExit(
            container_id=task.id, id=task.id, pid=found.pid, exit_status=found.status
        )
        exited.exited_at.FromNanoseconds(int(found.at * 1e9))
        self._exchange.publish(task.namespace, "/tasks/exit", exited)
        deleted = events_pb2.TaskDelete(container_id=task.id, pid=found.pid, exit_status=found.status)
        deleted.exited_at.CopyFrom(exited.exited_at)
        self._exchange.publish(task.namespace, "/tasks/delete", deleted)


def _adapt(task: Task) -> filters.Adaptor:
    def field_of(path: Sequence[str]) -> tuple[str, bool]:
        if list(path) == ["id"]:
            return task.id, True
        if list(path) == ["namespace"]:
            return task.namespace, True
        return "", False

    return field_of
