"""One container in the shim: its mounts, its processes, and the order in which their ends are told.

Owns the bundle's files, the OCI runtime to use, out-of-memory counting and these rules:

- an exit is on disk before anybody hears of it, and visible to State before its event is sent;
- the exit of the container's own process is the last one told; when it shared its PID namespace, what
  it left behind is killed first;
- an exit that comes while its start is still being answered is told after the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from google.protobuf.message import DecodeError, Message

from pctr_shim import attach, records
from pctr_shim.belongings import Belongings, Busy
from pctr_shim.config import ShimConfig
from pctr_shim.oom import OomCount
from pctr_shim.process import ExecProcess, InitProcess, Process
from pctr_shim.reaper import Reaper
from pctr_shim.runc import Runtime, environment
from pctr_shim.states import EXEC_CREATED
from pctr_shim.stdio import StreamAddresses
from pctr_shim.values import timestamp
from supervisord_ctr import errors, faults
from supervisord_ctr.aio import TaskOwner
from supervisord_ctr.api.events import events_pb2
from supervisord_ctr.api.runc.v1 import options_pb2
from supervisord_ctr.linux import files, mounts
from supervisord_ctr.model import Exit, Mount, TaskStatus

log = logging.getLogger(__name__)

MOUNTED = faults.declare("shim.create.after-mount", "the root file system is mounted; the runtime knows nothing")

#: Seconds from taking an overlay away to the end of its file system.
_SYNC_DELAY = 0.05

Publish = Callable[[str, Message], None]


class Container:
    """Made by `create`; everything it does runs on the shim's loop."""

    init: InitProcess

    def __init__(
        self, config: ShimConfig, reaper: Reaper, tasks: TaskOwner, publish: Publish, container_id: str, bundle: str,
        options: options_pb2.Options, oom_told: dict[str, int], program: str = "",
    ) -> None:
        """`program`: the OCI runtime's path, known already; it need not be there at the moment."""
        self.id = container_id
        self.namespace = config.namespace
        self.bundle = bundle
        self.reaper = reaper
        self.tasks = tasks
        self.publish = publish
        self.options = options
        self.io_uid, self.io_gid = options.io_uid, options.io_gid
        self.rootfs = os.path.join(bundle, "rootfs")
        self._mounts: Sequence[Mount] = ()
        self.execs: dict[str, ExecProcess] = {}
        self.timings: dict[str, int] = {}
        self._own_pid_namespace = False
        self.has_poststart_hooks = False
        self._oom: OomCount | None = None
        self._oom_told = oom_told
        self._oom_fd = -1
        self._held: dict[Process, tuple[Exit, int] | None] = {}
        self._running_execs: set[ExecProcess] = set()
        self._init_ended: tuple[Exit, int] | None = None
        self._attach: attach.AttachSocket | None = None
        root = options.root or config.runtime_root
        how = os.path.join(root, config.namespace), options.systemd_cgroup, environment()
        self.runtime = Runtime(program, *how) if program else Runtime.find(options.binary_name or config.runtime, *how)

    @property
    def oom_kills(self) -> int:
        """Processes that the kernel has killed for lack of memory."""
        return self._oom.kills if self._oom is not None else 0

    @property
    def oom_level(self) -> str:
        """Whose limit that was: "container", "pod", "node", or "" without a kill."""
        return self._oom.level if self._oom is not None else ""

    def path(self, name: str) -> str:
        """A file in the bundle."""
        return os.path.join(self.bundle, name)

    async def invoke(self, command: Sequence[str], failing: str) -> None:
        """Run one command of the OCI runtime for the whole container."""
        await self.runtime.invoke(self.reaper, self.path("log.json"), command, failing)

    # Creating

    async def create(
        self, rootfs: Sequence[Mount], addresses: StreamAddresses, checkpoint: str, parent_checkpoint: str
    ) -> None:
        """Mount the root file system and have the container made; on failure nothing is left."""
        self.init = InitProcess(self, addresses, checkpoint, parent_checkpoint)
        self._write_options()
        begun = time.perf_counter()
        try:
            if rootfs:
                self._mount(rootfs)
            faults.point(MOUNTED)
            self._time("mount", begun)
            begun = time.perf_counter()
            await self._create_init()
            self._time("create", begun)
            self._watch_oom()
        except BaseException:
            await self._undo_create()
            raise

    async def _create_init(self) -> None:
        """Have the runtime make the process; what nobody needs before that is done while the runtime works."""
        meanwhile = asyncio.get_running_loop().call_soon(self._prepare_meanwhile)
        try:
            await self.init.create()
        finally:
            meanwhile.cancel()
        if self._attach is None:
            self._attach = attach.AttachSocket(self.bundle, self._find_attachable)
            self._read_specification()

    def _prepare_meanwhile(self) -> None:
        with contextlib.suppress(OSError):  # it is tried once more, when its failure can be told
            self._attach = attach.AttachSocket(self.bundle, self._find_attachable)
            self._read_specification()

    def _time(self, name: str, begun: float) -> None:
        self.timings[name] = int((time.perf_counter() - begun) * 1e6)

    def _write_options(self) -> None:
        """What the clean-up after a dead shim has to know (containerd's shim keeps the same files)."""
        facts = {"binary_name": self.options.binary_name, "root": self.options.root,
                 "systemd_cgroup": self.options.systemd_cgroup}
        for name, text in (("options.json", json.dumps(facts)), ("runtime", self.options.binary_name)):
            files.write_file(self.path(name), text.encode())

    def _mount(self, rootfs: Sequence[Mount]) -> None:
        try:
            os.makedirs(self.rootfs, mode=0o711, exist_ok=True)
            mounts.mount_all(rootfs, self.rootfs)
        except OSError as error:
            raise errors.from_os_error(error, "mount rootfs component") from error
        self._mounts = tuple(rootfs)

    def unmount(self) -> None:
        """Take the root file system away; content when it was, or when there is none.

        The end of an overlay syncs the whole file system below it, which may take long: it comes when nobody
        waits. Only without an index, which would refuse the same layers to the next container until then.
        """
        if not self._mounts:
            return
        if all(entry.type == "overlay" and "index=off" in entry.options and not entry.target for entry in self._mounts):
            with contextlib.suppress(OSError):
                kept = os.open(self.rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                closing = threading.Thread(target=os.close, args=(kept,), daemon=True)
                asyncio.get_running_loop().call_later(_SYNC_DELAY, closing.start)
        mounts.unmount_below(self.rootfs)
        self._mounts = ()

    async def _undo_create(self) -> None:
        self.close()
        await self.init.io.close()
        if self.init.pid or os.path.exists(self.init.pid_file):
            try:
                await self.invoke(["delete", "--force", self.id], "undo create")
            except errors.Error as error:
                log.warning("%s: %s", self.id, error.message)
        self.unmount()

    def _find_attachable(self, container_id: str, exec_id: str) -> attach.Attachable:
        if container_id != self.id:
            raise errors.NotFound(f"container {container_id} is not here", kind="container", key=container_id)
        return self.process(exec_id).io

    # Processes

    def process(self, exec_id: str) -> Process:
        """The init process for "", else the exec of that name; `NotFound`."""
        if not exec_id:
            return self.init
        process = self.execs.get(exec_id)
        if process is None:
            raise errors.NotFound(f"process does not exist {exec_id}", kind="process", key=exec_id)
        return process

    def add_exec(self, exec_id: str, addresses: StreamAddresses, spec: bytes) -> ExecProcess:
        """Add a process; it runs when it is started. `AlreadyExists`, `FailedPrecondition`."""
        if exec_id in self.execs:
            raise errors.AlreadyExists(f"id {exec_id}: already exists", kind="process", key=exec_id)
        self.init.init_state.check_exec(self.init)
        try:
            content = json.loads(spec)
            if content.get("terminal", False) is not addresses.terminal:
                content["terminal"] = addresses.terminal
                spec = json.dumps(content).encode()
            process = ExecProcess(self, exec_id, addresses, spec)
        except (ValueError, AttributeError) as error:
            raise errors.InvalidArgument(f"process specification of {exec_id} is not json: {error}") from error
        self.execs[exec_id] = process
        return process

    async def start(self, exec_id: str) -> Process:
        """Start the init process or an exec, and tell of it. An exit meanwhile is told afterwards."""
        process = self.process(exec_id)
        if isinstance(process, ExecProcess):
            return await self._start_exec(process)
        async with self.init.lock:
            begun = time.perf_counter()
            restoring = self.init.pid == 0
            self._held[self.init] = None
            try:
                await self.init.init_state.start(self.init)
                self._time("start", begun)
                if restoring:
                    self._watch_oom()
                    self.reaper.adopt(self.init.pid, self._exit_of(self.init))
                self.publish("/tasks/start", events_pb2.TaskStart(container_id=self.id, pid=self.init.pid))
            finally:
                self._release(self.init)
        return self.init

    async def _start_exec(self, process: ExecProcess) -> Process:
        async with process.lock:
            if self._init_ended is not None and process.state is EXEC_CREATED:
                raise errors.FailedPrecondition(f"container {self.id} init process is not running", key=self.id)
            self._running_execs.add(process)
            self._held[process] = None
            try:
                await process.exec_state.start(process)
                self.publish("/tasks/exec-started", events_pb2.TaskExecStarted(
                    container_id=self.id, exec_id=process.exec_id, pid=process.pid,
                ))
                self.reaper.adopt(process.pid, self._exit_of(process))
            except BaseException:
                if not process.pid:
                    self._exec_gone(process)
                raise
            finally:
                self._release(process)
        return process

    def adopt_init(self) -> None:
        """From now on the end of the created process is noticed (also when it has come already)."""
        if self.init.pid:
            self.reaper.adopt(self.init.pid, self._exit_of(self.init))

    # Rest

    def leave(self, belongings: Belongings) -> dict[str, Any]:
        """Describe the container for the next worker of its shim; `Busy` while anything goes on."""
        if self.execs or self._held or self._running_execs:
            raise Busy(f"{self.id} has added processes")
        ended = self._init_ended
        return {
            "id": self.id, "bundle": self.bundle, "program": self.runtime.binary,
            "options": self.options.SerializeToString().hex(),
            "init": self.init.leave(belongings),
            "mounts": [[mount.type, mount.source, list(mount.options), mount.target] for mount in self._mounts],
            "timings": self.timings, "pid_namespace": self._own_pid_namespace, "poststart": self.has_poststart_hooks,
            "oom": self._oom.leave() if self._oom is not None else None, "oom_fd": belongings.leave(self._oom_fd),
            "attach": belongings.leave(self._attach.descriptor if self._attach is not None else -1),
            "ended": [ended[0].status, ended[0].at, ended[0].pid, ended[1]] if ended is not None else None,
        }

    def resume(self, left: Mapping[str, Any], belongings: Belongings) -> None:
        """Go on with what `leave` described."""
        self.init = InitProcess.resume(self, left["init"], belongings)
        self._mounts = tuple(
            Mount(kind, source, tuple(options), target) for kind, source, options, target in left["mounts"]
        )
        self.timings = left["timings"]
        self._own_pid_namespace, self.has_poststart_hooks = left["pid_namespace"], left["poststart"]
        if left["ended"] is not None:
            *ended, number = left["ended"]
            self._init_ended = (Exit(*ended), number)
        if left["oom"] is not None and self.init.cgroup is not None:
            self._oom = OomCount.resume(self.init.cgroup, self._oom_told, left["oom"])
            if left["oom_fd"] >= 0:
                self._oom_fd = belongings.take(left["oom_fd"])
                asyncio.get_running_loop().add_reader(self._oom_fd, self._oom_woke)
        if left["attach"] >= 0:
            self._attach = attach.AttachSocket(self.bundle, self._find_attachable, belongings.take(left["attach"]))
        if self._init_ended is None:
            self.adopt_init()

    # Exits

    def _exit_of(self, process: Process) -> Callable[[Exit, int], None]:
        return lambda ended, number: self._ended(process, ended, number)

    def _ended(self, process: Process, ended: Exit, number: int) -> None:
        if process in self._held:
            self._held[process] = (ended, number)
        elif isinstance(process, InitProcess):
            self._init_ended = (ended, number)
            self._end_init()
        else:
            self._tell_exit(process, ended, number)
            assert isinstance(process, ExecProcess)
            self._exec_gone(process)

    def has_held_exit(self, process: Process) -> bool:
        """Whether the process that is being started has ended already."""
        return self._held.get(process) is not None or process.exit is not None

    def _release(self, process: Process) -> None:
        held = self._held.pop(process, None)
        if held is not None:
            self._ended(process, *held)

    def _end_init(self) -> None:
        """The container's own process is gone: end the others, then tell (last)."""
        if self.init.status in (TaskStatus.PAUSED, TaskStatus.PAUSING) and self.init.cgroup is not None:
            with contextlib.suppress(OSError):
                self.init.cgroup.set_frozen(False)  # what is frozen cannot end
        if not self._own_pid_namespace and self.init.cgroup is not None:
            try:
                self.init.cgroup.signal_all(9)
            except OSError as error:
                log.warning("%s: killing what init left: %s", self.id, error)
        self._tell_init_if_last()

    def _exec_gone(self, process: ExecProcess) -> None:
        self._running_execs.discard(process)
        self._tell_init_if_last()

    def _tell_init_if_last(self) -> None:
        if self._init_ended is not None and not self._running_execs and self.init.exit is None:
            self._tell_exit(self.init, *self._init_ended)

    def _tell_exit(self, process: Process, ended: Exit, number: int) -> None:
        if process is self.init:
            self._count_oom(killed=ended.status == 128 + signal.SIGKILL and process.asked[0] != signal.SIGKILL)
            self._close_oom()
        records.write(self.bundle, records.ExitRecord(
            self.id, process.exec_id, ended.pid, ended.status, ended.at, number, self.oom_kills,
            self.oom_level, *process.asked,
        ))
        process.set_exited(ended)
        self.publish("/tasks/exit", events_pb2.TaskExit(
            container_id=self.id, id=process.exec_id or self.id, pid=ended.pid, exit_status=ended.status,
            exited_at=timestamp(ended.at),
        ))

    def _read_specification(self) -> None:
        """What the order of things depends on. What cannot be read is the runtime's to complain about."""
        try:
            with open(self.path("config.json"), "rb") as file:
                spec = json.load(file)
            kinds = (spec.get("linux") or {}).get("namespaces") or []
            self._own_pid_namespace = any(kind.get("type") == "pid" and not kind.get("path") for kind in kinds)
            self.has_poststart_hooks = bool((spec.get("hooks") or {}).get("poststart"))
        except (OSError, ValueError, AttributeError) as error:
            log.warning("%s: reading its specification: %s", self.id, error)

    # Memory

    def _watch_oom(self) -> None:
        if self.init.cgroup is None or not self.init.cgroup.folder("memory"):
            return
        self._oom = OomCount(self.init.cgroup, self._oom_told)
        try:
            self._oom_fd = self.init.cgroup.watch_oom()
            os.set_blocking(self._oom_fd, False)
            asyncio.get_running_loop().add_reader(self._oom_fd, self._oom_woke)
        except OSError as error:
            log.warning("%s: out-of-memory events are not watched: %s", self.id, error)

    def _oom_woke(self) -> None:
        try:
            os.read(self._oom_fd, 4096)
        except BlockingIOError:
            return
        self._count_oom()
        if self.init.cgroup is not None and not self.init.cgroup.exists():
            self._close_oom()

    def _count_oom(self, *, killed: bool = False) -> None:
        """Tell of kills that nobody has been told of."""
        if self._oom is not None and self._oom.update(killed=killed):
            self.publish("/tasks/oom", events_pb2.TaskOOM(container_id=self.id))

    def _close_oom(self) -> None:
        if self._oom_fd >= 0:
            asyncio.get_running_loop().remove_reader(self._oom_fd)
            os.close(self._oom_fd)
            self._oom_fd = -1

    # Ending

    async def delete(self, exec_id: str) -> Process:
        """Delete a process that has ended (or never ran); the init process takes the container along."""
        process = self.process(exec_id)
        async with process.lock:
            if isinstance(process, ExecProcess):
                await process.exec_state.delete(process)
                self.execs.pop(exec_id, None)
                return process
            await self.init.init_state.delete(self.init)
            for other in self.execs.values():
                await other.io.close()
            self.close()
        return process

    def close(self) -> None:
        """Let go of what is open for the whole container."""
        self._close_oom()
        if self._attach is not None:
            self._attach.close()
            self._attach = None

    @property
    def ended(self) -> bool:
        """Whether the container's own process has ended."""
        return self.init.status == TaskStatus.STOPPED


def parse_options(type_name: str, value: bytes) -> options_pb2.Options:
    """The runtime options of a create request; kinds that are not runc's have nothing for us."""
    if type_name not in ("containerd.runc.v1.Options", "runtimeoptions.v1.Options", ""):
        raise errors.InvalidArgument(f"runtime options of type {type_name} are not understood", key=type_name)
    if type_name != "containerd.runc.v1.Options":
        return options_pb2.Options()
    try:
        return options_pb2.Options.FromString(value)
    except DecodeError as error:
        raise errors.InvalidArgument(f"runtime options cannot be decoded: {error}") from error
