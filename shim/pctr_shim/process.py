"""The processes of a container: its own (init) and those added to it (exec).

Owns one process's life from the OCI runtime's point of view: starting, signals, its streams, its exit.
Which of that may happen when is said by `states`; the order of exits and events by `container`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal as signals
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from pctr_shim import records, runc, states
from pctr_shim.belongings import Belongings, Busy
from pctr_shim.console import ConsoleSocket
from pctr_shim.stdio import Owner, ProcessIO, StreamAddresses
from supervisord_ctr import errors, faults
from supervisord_ctr.linux import cgroups, files, processes
from supervisord_ctr.model import Exit, TaskStatus

if TYPE_CHECKING:
    from pctr_shim.container import Container

log = logging.getLogger(__name__)

CREATED = faults.declare("shim.create.after-runtime", "the oci runtime made the container; nobody knows its pid")
STARTED = faults.declare("shim.start.after-runtime", "the program runs; the caller has no answer")
EXECED = faults.declare("shim.exec.after-runtime", "the exec runs; the shim has not noted its pid")
KILLED = faults.declare("shim.kill.after-signal", "the signal is sent; the caller has no answer")
DELETING = faults.declare("shim.delete.before-runtime", "the process has ended; the runtime still has the container")
UNMOUNTED = faults.declare("shim.delete.after-unmount", "everything is taken away; the caller has no answer")

_FREEZE_TIMEOUT = 10.0
_FREEZE_ROUND = 0.01
_KILL_TIMEOUT = 10.0


class Process:
    """What init and exec share."""

    state: states.State

    def __init__(self, container: Container, exec_id: str, addresses: StreamAddresses) -> None:
        self.container = container
        self.exec_id = exec_id
        self.pid = 0
        self.exit: Exit | None = None
        self.lock = asyncio.Lock()
        self.io = ProcessIO(
            addresses,
            Owner(container.namespace, container.id, exec_id, container.io_uid, container.io_gid), container.reaper,
        )
        self._done = asyncio.Event()
        self._finishing: asyncio.Task[None] | None = None
        self.asked: tuple[int, float] = (0, 0.0)

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.container.id}/{self.exec_id}" if self.exec_id else self.container.id

    @property
    def status(self) -> TaskStatus:
        """The status that State gives."""
        return self.state.status

    def enter(self, state: states.State) -> None:
        """Change the state. An exit that came in between wins over every state but deletion."""
        if self.exit is not None and state not in (states.DELETED, states.EXEC_DELETED):
            state = state.exited()
        self.state = state

    def enter_if(self, expected: states.State, state: states.State) -> None:
        """Change the state unless something else has happened meanwhile."""
        if self.state is expected:
            self.enter(state)

    def set_exited(self, ended: Exit) -> None:
        """The end, known to whoever asks from now on."""
        if self.exit is None:
            self.exit = ended
            self.state = self.state.exited()
            self._done.set()
            self._finishing = self.container.tasks.start(self._finish(ended), f"finish {self.label}")

    async def _finish(self, ended: Exit) -> None:
        await self.io.drain()
        self.io.finish(ended)

    async def wait_exit(self) -> Exit:
        """The exit, when there is one."""
        await self._done.wait()
        assert self.exit is not None
        return self.exit

    async def close_io(self) -> None:
        """Deliver what there is (bounded) and close the streams."""
        if self._finishing is not None:
            await asyncio.shield(self._finishing)
        await self.io.close()

    def note_asked(self, number: int) -> None:
        """Remember who asked the process to end: the exit record tells."""
        self.asked = (number, time.time())

    async def _run(self, log_path: str, command: Sequence[str], failing: str) -> None:
        """Start the program by way of the runtime, with pipes or a terminal."""
        runtime = self.container.runtime
        await self.io.prepare()
        try:
            if not self.io.addresses.terminal:
                await runtime.invoke(self.container.reaper, log_path, command, failing, self.io.descriptors)
                self.io.begin()
                return
            with ConsoleSocket(self.container.bundle) as console:
                where = ["--console-socket", console.path]
                arguments = [command[0], *where, *command[1:]]
                await runtime.invoke(self.container.reaper, log_path, arguments, failing)
                self.io.begin_terminal(console.receive())
        except BaseException:
            await self.io.close()
            raise


class InitProcess(Process):
    """The container's own process."""

    state: states.State = states.CREATED

    def __init__(self, container: Container, addresses: StreamAddresses, checkpoint: str, parent: str) -> None:
        super().__init__(container, "", addresses)
        self._checkpoint = checkpoint
        self._parent_checkpoint = parent
        self.cgroup: cgroups.Cgroup | None = None
        if checkpoint:
            self.state = states.CREATED_FROM_CHECKPOINT

    def leave(self, belongings: Belongings) -> dict[str, Any]:
        """Describe it for the next worker; `Busy` in a state that passes, or while somebody works on it."""
        if self.state not in states.LASTING or self.lock.locked():
            raise Busy(f"{self.label} is {self.state.name} or changes")
        if self._finishing is not None and not self._finishing.done():
            raise Busy(f"the last output of {self.label}")
        addresses = self.io.addresses
        return {
            "pid": self.pid, "state": self.state.name, "asked": self.asked, "io": self.io.leave(belongings),
            "addresses": [addresses.stdin, addresses.stdout, addresses.stderr, addresses.terminal],
            "exit": self.exit is not None and [self.exit.status, self.exit.at, self.exit.pid],
            "cgroup": dict(self.cgroup.folders) if self.cgroup is not None else None,
        }

    @classmethod
    def resume(cls, container: Container, left: Mapping[str, Any], belongings: Belongings) -> InitProcess:
        """What `leave` described."""
        process = cls(container, StreamAddresses(*left["addresses"]), "", "")
        process.pid, process.asked = left["pid"], tuple(left["asked"])
        process.state = next(state for state in states.LASTING if state.name == left["state"])
        process.io.resume(left["io"], belongings)
        if left["exit"]:
            process.exit = Exit(*left["exit"])
            process._done.set()
        if left["cgroup"] is not None:
            process.cgroup = cgroups.Cgroup(left["cgroup"])
        return process

    @property
    def init_state(self) -> states.InitState:
        """The state, as one of an init process."""
        return cast(states.InitState, self.state)

    @property
    def pid_file(self) -> str:
        """Where the runtime writes the pid; the clean-up after a dead shim reads it."""
        return self.container.path("init.pid")

    async def create(self) -> None:
        """Have the runtime make the container, or prepare for a restore."""
        if self._checkpoint:
            await self.io.prepare()
            return
        options = self.container.options
        flags = ["--no-pivot"] if options.no_pivot_root else []
        flags += ["--no-new-keyring"] if options.no_new_keyring else []
        command = ["create", "--bundle", self.container.bundle, "--pid-file", self.pid_file, *flags, self.container.id]
        await self._run(self.container.path("log.json"), command, "OCI runtime create failed")
        faults.point(CREATED)
        self._take_pid()

    def _take_pid(self) -> None:
        self.pid = runc.read_pid(self.pid_file)
        with contextlib.suppress(ProcessLookupError):
            self.cgroup = cgroups.of_pid(self.pid)

    async def do_start(self) -> None:
        """Let the created container run its program."""
        fifo = "" if self.container.has_poststart_hooks else self.container.runtime.start_fifo(self.container.id)
        if fifo:
            await runc.release(fifo, lambda: self.container.has_held_exit(self))
        else:
            await self.container.invoke(["start", self.container.id], "OCI runtime start failed")
        faults.point(STARTED)

    async def do_restore(self) -> None:
        """Bring a checkpointed process back to life in this bundle."""
        work = self.container.options.criu_work_path or self.container.path("work")
        os.makedirs(work, mode=0o711, exist_ok=True)
        command = [
            "restore", "--image-path", self._checkpoint, "--work-path", work, "--pid-file", self.pid_file,
            "--detach", "--no-subreaper", "--bundle", self.container.bundle,
        ]
        if self._parent_checkpoint:
            command += ["--parent-path", self._parent_checkpoint]
        if self.container.options.no_pivot_root:
            command.append("--no-pivot")
        log_path = self.container.path("restore.json")
        try:
            await self._restore([*command, self.container.id], log_path)
        except errors.Error as error:
            kept = _keep_log(work, "restore.log", self.container.path("criu-restore.log"))
            raise type(error)(f"{error.message} (criu's log: {kept})" if kept else error.message) from error
        self._take_pid()

    async def _restore(self, command: Sequence[str], log_path: str) -> None:
        failing = "OCI runtime restore failed"
        if self.io.addresses.terminal:
            with ConsoleSocket(self.container.bundle) as console:
                arguments = [command[0], "--console-socket", console.path, *command[1:]]
                await self.container.runtime.invoke(self.container.reaper, log_path, arguments, failing)
                self.io.begin_terminal(console.receive())
            return
        await self.container.runtime.invoke(self.container.reaper, log_path, command, failing, self.io.descriptors)
        self.io.begin()

    def send(self, number: int, everyone: bool) -> None:
        """Signal the process, which is our child and so cannot be another one, or all processes."""
        self.note_asked(number)
        if everyone and self.cgroup is not None:
            self.cgroup.signal_all(number)
        else:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                raise errors.NotFound(f"process already finished: {self.label}", kind="process") from None
            except OSError as error:
                raise errors.from_os_error(error, f"signal {number} to {self.label}") from error
        if number == signals.SIGKILL and self.state in (states.PAUSED, states.PAUSING) and self.cgroup is not None:
            # a frozen v1 group takes SIGKILL only when it thaws
            with contextlib.suppress(OSError):
                self.cgroup.set_frozen(False)
        faults.point(KILLED)

    def send_to_leftovers(self, number: int) -> None:
        """Signal what the ended process left behind in its cgroup."""
        if self.cgroup is not None and self.cgroup.exists():
            self.cgroup.signal_all(number)

    async def do_kill_created(self) -> None:
        """End a container that never ran, and wait for its exit to be noted."""
        if self.exit is None and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signals.SIGKILL)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wait_exit(), _KILL_TIMEOUT)

    async def do_freeze(self, frozen: bool) -> None:
        """Freeze or thaw through the cgroup; by way of the runtime where there is no freezer for us."""
        if self.cgroup is None or not self.cgroup.folder("freezer"):
            verb = "pause" if frozen else "resume"
            await self.container.invoke([verb, self.container.id], f"OCI runtime {verb} failed")
            return
        try:
            await self._freeze(self.cgroup, frozen)
        except OSError as error:
            raise errors.from_os_error(error, f"freeze container {self.container.id}") from error

    async def _freeze(self, group: cgroups.Cgroup, frozen: bool) -> None:
        """Freeze or thaw and wait until it is so.

        In a v1 group, threads that freeze before the execve(2) of another thread of theirs could end them
        keep that one from freezing for ever, and processes born meanwhile need another round: so now and
        then everything is let go for a moment.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _FREEZE_TIMEOUT
        delay = 0.0005
        group.set_frozen(frozen)
        while group.is_frozen() != frozen and self.exit is None:
            if loop.time() > deadline:
                group.set_frozen(not frozen)
                raise errors.DeadlineExceeded(f"container {self.container.id} did not freeze within 10 s")
            await asyncio.sleep(delay)
            delay *= 2
            if frozen and not group.is_v2:
                if delay > _FREEZE_ROUND:
                    delay = 0.0005
                    group.set_frozen(False)
                    await asyncio.sleep(_FREEZE_ROUND)
                group.set_frozen(True)
            delay = min(delay, 0.05)

    async def do_update(self, resources: bytes) -> None:
        """Hand new limits (the runtime specification's linux.resources in JSON) to the runtime."""
        try:
            json.loads(resources)
        except ValueError as error:
            raise errors.InvalidArgument(f"resources of container {self.container.id} are not json: {error}") from error
        path = self.container.path("update.json")
        with open(path, "wb") as file:
            file.write(resources)
        try:
            command = ["update", "--resources", path, self.container.id]
            await self.container.invoke(command, "OCI runtime update failed")
        finally:
            os.unlink(path)

    async def checkpoint(self, path: str, options: Any) -> None:
        """Write the process's state to the folder `path` with criu; `options` is CheckpointOptions."""
        work = options.work_path or self.container.path("criu-work")
        image = path or options.image_path
        if not image:
            raise errors.InvalidArgument(f"checkpoint of {self.label} needs an image path")
        for folder in (work, image):
            os.makedirs(folder, mode=0o700, exist_ok=True)
        command = ["checkpoint", "--image-path", image, "--work-path", work]
        flags = {
            "--leave-running": not options.exit, "--tcp-established": options.open_tcp,
            "--ext-unix-sk": options.external_unix_sockets, "--shell-job": options.terminal,
            "--file-locks": options.file_locks,
        }
        command += [flag for flag, wanted in flags.items() if wanted]
        for kind in options.empty_namespaces:
            command += ["--empty-ns", kind]
        if options.cgroups_mode:
            command += ["--manage-cgroups-mode", options.cgroups_mode]
        try:
            await self.container.runtime.invoke(
                self.container.reaper, self.container.path("checkpoint.json"), [*command, self.container.id],
                "OCI runtime checkpoint failed",
            )
        except errors.Error as error:
            kept = _keep_log(work, "dump.log", self.container.path("criu-dump.log"))
            first = error.message.splitlines()[0]
            raise type(error)(f"{first} (criu's log: {kept})" if kept else first) from error
        finally:
            if not options.work_path:
                shutil.rmtree(work, ignore_errors=True)

    async def do_delete(self) -> None:
        """Deliver the output, remove the container from the runtime, unmount the root file system."""
        await self.close_io()
        faults.point(DELETING)
        known = not isinstance(self.state, states.CreatedFromCheckpoint)
        if known and not (self.exit is not None and self.container.runtime.forget(self.container.id)):
            try:
                await self.container.invoke(["delete", self.container.id], "failed to delete task")
            except errors.NotFound:
                log.debug("the runtime no longer knows %s", self.container.id)
            except errors.Error:
                await self.container.invoke(["delete", "--force", self.container.id], "failed to delete task")
        try:
            self.container.unmount()
        except OSError as error:
            raise errors.from_os_error(error, "unmount root file system") from error
        faults.point(UNMOUNTED)


class ExecProcess(Process):
    """A process added to a running container."""

    state: states.State = states.EXEC_CREATED

    def __init__(self, container: Container, exec_id: str, addresses: StreamAddresses, spec: bytes) -> None:
        super().__init__(container, exec_id, addresses)
        self._spec = spec

    @property
    def exec_state(self) -> states.ExecState:
        """The state, as one of an exec."""
        return cast(states.ExecState, self.state)

    @property
    def status(self) -> TaskStatus:
        """A paused container's execs are paused with it."""
        whole = self.container.init.status
        if whole in (TaskStatus.PAUSED, TaskStatus.PAUSING) and self.state is states.EXEC_RUNNING:
            return whole
        return self.state.status

    async def do_start(self) -> None:
        """Run the program inside the container."""
        base = self.container.path(f"exec-{self.exec_id}")
        try:
            files.write_file(f"{base}.spec", self._spec)
            command = [
                "exec", "--process", f"{base}.spec", "--detach", "--pid-file", f"{base}.pid", self.container.id
            ]
            await self._run(f"{base}.log", command, "OCI runtime exec failed")
            faults.point(EXECED)
            self.pid = runc.read_pid(f"{base}.pid")
        except BaseException:
            if self.exit is None:  # waiters must not hang; no exit event is sent for what never ran
                self.exit = Exit(255, time.time())
                self.state = states.EXEC_FAILED
                self._done.set()
            raise
        finally:
            for suffix in (".spec", ".pid", ".log"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(base + suffix)

    def send(self, number: int, everyone: bool) -> None:
        """Signal the process; `everyone`: and what descends from it or shares its session."""
        self.note_asked(number)
        targets = [self.pid]
        group = self.container.init.cgroup
        if everyone and group is not None:
            targets = processes.children_of(group.pids(), self.pid)
        for target in targets:
            try:
                os.kill(target, number)
            except ProcessLookupError:
                if target == self.pid:
                    raise errors.NotFound(f"process already finished: {self.label}", kind="process") from None
            except OSError as error:
                raise errors.from_os_error(error, f"signal {number} to {self.label}") from error
        faults.point(KILLED)

    async def do_delete(self) -> None:
        """Deliver its output and forget it."""
        await self.close_io()
        records.remove(self.container.bundle, self.exec_id)


def _keep_log(work: str, name: str, target: str) -> str:
    """Copy criu's log to the bundle, where it outlives the work folder; its path, or "" when there is none."""
    try:
        shutil.copyfile(os.path.join(work, name), target)
        return target
    except OSError:
        return ""
