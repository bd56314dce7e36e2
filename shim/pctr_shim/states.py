"""The states of a process, each a class that says what may be done in it.

An init process: created (or created from a checkpoint) → running ⇄ paused → stopped → deleted.
An exec: created → running → stopped → deleted. What a state does not allow is `FailedPrecondition`; a
signal to a process that has ended is `NotFound`, as containerd's shim has it.

States hold nothing: the process they are asked about is an argument.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from supervisord_ctr import errors
from supervisord_ctr.model import TaskStatus

if TYPE_CHECKING:
    from pctr_shim.process import ExecProcess, InitProcess, Process


class State:
    """What every state answers; by default everything is refused."""

    name = "unknown"
    status = TaskStatus.UNKNOWN

    def _refuse(self, verb: str, process: Process) -> NoReturn:
        raise errors.FailedPrecondition(
            f"cannot {verb} a {self.name} process: {process.label}", kind="process", key=process.label
        )

    def exited(self) -> State:
        """The state after the process's end."""
        return STOPPED


class InitState(State):
    """States of a container's own process."""

    async def start(self, process: InitProcess) -> None:
        """Let the created process run its program."""
        self._refuse("start", process)

    async def delete(self, process: InitProcess) -> None:
        """Take everything of the process away."""
        self._refuse("delete", process)

    async def pause(self, process: InitProcess) -> None:
        """Freeze all processes of the container."""
        self._refuse("pause", process)

    async def resume(self, process: InitProcess) -> None:
        """Thaw them."""
        self._refuse("resume", process)

    async def update(self, process: InitProcess, resources: bytes) -> None:
        """Change the limits."""
        self._refuse("update", process)

    def check_checkpoint(self, process: InitProcess) -> None:
        """Whether a checkpoint may be taken."""
        self._refuse("checkpoint", process)

    def check_exec(self, process: InitProcess) -> None:
        """Whether another process may be added."""
        self._refuse("exec in", process)

    def kill(self, process: InitProcess, signal: int, everyone: bool) -> None:
        """Send a signal to the process, or to all processes of the container."""
        process.send(signal, everyone)


class Created(InitState):
    """The process exists and waits for `start`."""

    name = "created"
    status = TaskStatus.CREATED

    async def start(self, process: InitProcess) -> None:
        await process.do_start()
        process.enter(RUNNING)

    async def delete(self, process: InitProcess) -> None:
        await process.do_kill_created()
        await process.do_delete()
        process.enter(DELETED)

    async def update(self, process: InitProcess, resources: bytes) -> None:
        await process.do_update(resources)

    def check_exec(self, process: InitProcess) -> None:
        return


class CreatedFromCheckpoint(Created):
    """Nothing runs yet; `start` restores the process."""

    async def start(self, process: InitProcess) -> None:
        await process.do_restore()
        process.enter(RUNNING)

    async def delete(self, process: InitProcess) -> None:
        await process.do_delete()
        process.enter(DELETED)

    async def update(self, process: InitProcess, resources: bytes) -> None:
        self._refuse("update", process)

    def check_exec(self, process: InitProcess) -> None:
        self._refuse("exec in", process)

    def kill(self, process: InitProcess, signal: int, everyone: bool) -> None:
        raise errors.FailedPrecondition(f"process not created: {process.label}", kind="process", key=process.label)


class Running(InitState):
    """The program runs."""

    name = "running"
    status = TaskStatus.RUNNING

    async def pause(self, process: InitProcess) -> None:
        process.enter(PAUSING)
        try:
            await process.do_freeze(True)
        except BaseException:
            process.enter_if(PAUSING, RUNNING)
            raise
        process.enter_if(PAUSING, PAUSED)

    async def update(self, process: InitProcess, resources: bytes) -> None:
        await process.do_update(resources)

    def check_checkpoint(self, process: InitProcess) -> None:
        return

    def check_exec(self, process: InitProcess) -> None:
        return


class Pausing(InitState):
    """Freezing has begun."""

    name = "pausing"
    status = TaskStatus.PAUSING


class Paused(InitState):
    """Frozen."""

    name = "paused"
    status = TaskStatus.PAUSED

    async def resume(self, process: InitProcess) -> None:
        await process.do_freeze(False)
        process.enter_if(PAUSED, RUNNING)

    async def update(self, process: InitProcess, resources: bytes) -> None:
        await process.do_update(resources)

    def check_checkpoint(self, process: InitProcess) -> None:
        return


class Stopped(InitState):
    """The process has ended; its exit is known."""

    name = "stopped"
    status = TaskStatus.STOPPED

    async def delete(self, process: InitProcess) -> None:
        await process.do_delete()
        process.enter(DELETED)

    def kill(self, process: InitProcess, signal: int, everyone: bool) -> None:
        if everyone:
            process.send_to_leftovers(signal)
            return
        raise errors.NotFound(f"process already finished: {process.label}", kind="process", key=process.label)

    def exited(self) -> State:
        return self


class Deleted(InitState):
    """Nothing is left."""

    name = "deleted"
    status = TaskStatus.STOPPED

    def kill(self, process: InitProcess, signal: int, everyone: bool) -> None:
        raise errors.NotFound(f"process already finished: {process.label}", kind="process", key=process.label)

    def exited(self) -> State:
        return self


class ExecState(State):
    """States of an added process."""

    async def start(self, process: ExecProcess) -> None:
        """Run its program."""
        self._refuse("start", process)

    async def delete(self, process: ExecProcess) -> None:
        """Take everything of it away."""
        self._refuse("delete", process)

    def kill(self, process: ExecProcess, signal: int, everyone: bool) -> None:
        """Send it a signal; `everyone`: to what it started, too."""
        process.send(signal, everyone)

    def check_resize(self, process: ExecProcess) -> None:
        """Whether its terminal may be resized."""

    def exited(self) -> State:
        return EXEC_STOPPED


class ExecCreated(ExecState):
    """Added; nothing runs."""

    name = "created"
    status = TaskStatus.CREATED

    async def start(self, process: ExecProcess) -> None:
        await process.do_start()
        process.enter_if(EXEC_CREATED, EXEC_RUNNING)

    async def delete(self, process: ExecProcess) -> None:
        await process.do_delete()
        process.enter(EXEC_DELETED)

    def kill(self, process: ExecProcess, signal: int, everyone: bool) -> None:
        raise errors.FailedPrecondition(f"process not created: {process.label}", kind="process", key=process.label)


class ExecRunning(ExecState):
    """The program runs."""

    name = "running"
    status = TaskStatus.RUNNING


class ExecStopped(ExecState):
    """Ended; its exit is known."""

    name = "stopped"
    status = TaskStatus.STOPPED

    async def delete(self, process: ExecProcess) -> None:
        await process.do_delete()
        process.enter(EXEC_DELETED)

    def kill(self, process: ExecProcess, signal: int, everyone: bool) -> None:
        raise errors.NotFound(f"process already finished: {process.label}", kind="process", key=process.label)

    def check_resize(self, process: ExecProcess) -> None:
        self._refuse("resize", process)

    def exited(self) -> State:
        return self


class ExecFailed(ExecStopped):
    """It could not be started. That is told as "created", as containerd's shim has it; it can only be deleted."""

    name = "failed"
    status = TaskStatus.CREATED


class ExecDeleted(ExecStopped):
    """Nothing is left."""

    name = "deleted"

    async def delete(self, process: ExecProcess) -> None:
        self._refuse("delete", process)


CREATED = Created()
CREATED_FROM_CHECKPOINT = CreatedFromCheckpoint()
RUNNING = Running()
PAUSING = Pausing()
PAUSED = Paused()
STOPPED = Stopped()
DELETED = Deleted()
#: Those of an init process in which nothing goes on in the shim.
LASTING = (CREATED, RUNNING, PAUSED, STOPPED)
EXEC_CREATED = ExecCreated()
EXEC_RUNNING = ExecRunning()
EXEC_STOPPED = ExecStopped()
EXEC_FAILED = ExecFailed()
EXEC_DELETED = ExecDeleted()
