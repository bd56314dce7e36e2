"""The OCI runtime's command line: runc, crun and others that share it.

Owns the arguments and the reading of the runtime's JSON log. Every method is one start of the
runtime's program; the shim asks for none that it can answer itself (states and exits it knows,
signals, freezing and metrics it does on pids and cgroups).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pctr_shim import fdio, sealed
from pctr_shim.reaper import Reaper
from supervisord_ctr import errors

_GONE_CHECK = 0.05


@functools.cache
def environment() -> Mapping[str, str]:
    """This process's environment, read once: what changes it clears the cache."""
    return dict(os.environ)


@dataclass(frozen=True, slots=True)
class Runtime:
    """How to run one container's OCI runtime.

    `root` holds the runtime's state for one namespace; `environment` is the program's.
    """

    binary: str
    root: str
    systemd_cgroup: bool
    environment: Mapping[str, str]

    @classmethod
    def find(cls, name: str, root: str, systemd_cgroup: bool, environment: Mapping[str, str]) -> Runtime:
        """`name` is a path or is looked up on the PATH; `NotFound` when it is nowhere."""
        path = name if "/" in name else shutil.which(name, path=environment.get("PATH"))
        if path is None or not os.access(path, os.X_OK):
            raise errors.NotFound(f'oci runtime "{name}": executable file not found in $PATH', kind="runtime", key=name)
        return cls(path, root, systemd_cgroup, environment)

    def _arguments(self, log: str, command: Sequence[str]) -> list[str]:
        arguments = [self.binary, "--root", self.root, "--log", log, "--log-format", "json"]
        if self.systemd_cgroup:
            arguments.append("--systemd-cgroup")
        return [*arguments, *command]

    def start_fifo(self, container_id: str) -> str:
        """The fifo on which a created container waits for its start; "" when there is none to be read by us.

        runc's `start` reads this fifo and removes it, and nothing else (libcontainer, `Container.Exec`); doing
        that here saves a start of the runtime's program, a third of the time from create to running.
        """
        if os.path.basename(self.binary) != "runc":
            return ""
        path = os.path.join(self.root, container_id, "exec.fifo")
        return path if os.path.exists(path) else ""

    def forget(self, container_id: str) -> bool:
        """Remove a container whose process was reaped, as runc's `delete` does; False leaves it to the program.

        That program removes the cgroups and then the container's folder (libcontainer, `destroy`). Whatever else
        it had to do, hooks or a cgroup with processes or groups in it, stays its business; what was done here it
        finds done.
        """
        if os.path.basename(self.binary) != "runc" or self.systemd_cgroup:
            return False
        folder = os.path.join(self.root, container_id)
        try:
            with open(os.path.join(folder, "state.json"), "rb") as file:
                state = json.load(file)
            config = state["config"]
            if (config.get("Hooks") or {}).get("poststop") or state.get("intel_rdt_path"):
                return False
            for path in (state["cgroup_paths"] or {}).values():
                if path:
                    _remove_group(path)
            for name in ("exec.fifo", "state.json"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, name))
            os.rmdir(folder)
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return False
        return True

    async def invoke(
        self, reaper: Reaper, log: str, command: Sequence[str], failing: str,
        descriptors: Mapping[int, int] | None = None,
    ) -> None:
        """Run one command; `failing` starts the message of the error that a failure raises.

        The message is the last error in the runtime's log, as containerd's shim has it. The program runs in the
        log's folder, the bundle, where wrappers of runtimes expect config.json.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink(log)
        status = await reaper.run(
            self._arguments(log, command), self.environment, descriptors or {}, os.path.dirname(log),
            sealed.program(self.binary),
        )
        if status:
            reason = last_error(log) or f"{os.path.basename(self.binary)} ended with status {status}"
            raise classify(f"{failing}: {reason}", reason)


async def release(fifo: str, gone: Callable[[], bool]) -> None:
    """Read the start fifo: the container's program runs when this returns.

    `FailedPrecondition` when `gone` says that the process has ended instead.
    """
    loop = asyncio.get_running_loop()
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(readable.wait(), _GONE_CHECK)
            data = _read_now(fd)
            if data:
                break
            readable.clear()
            if gone():
                raise errors.FailedPrecondition("OCI runtime start failed: container process is already dead")
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fifo)


def _remove_group(path: str) -> None:
    """Remove one cgroup, which may be gone; only empty folders are."""
    if not path.startswith("/sys/fs/cgroup/"):
        raise OSError(f"{path} is no cgroup")
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(path)


def _read_now(fd: int) -> bytes:
    try:
        return os.read(fd, 16)
    except BlockingIOError:
        return b""


def classify(message: str, reason: str) -> errors.Error:
    """The error class for what the runtime said; without a hint it is unknown, as in containerd."""
    text = reason.lower()
    if "does not exist" in text and "container" in text:
        return errors.NotFound(message)
    if "process already finished" in text or "container not running" in text:
        return errors.NotFound(message)
    if "already exists" in text and "container" in text:
        return errors.AlreadyExists(message)
    return errors.Unknown(message)


def last_error(path: str) -> str:
    """The last message of an error in a JSON log; "" when there is none or no log."""
    found = ""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, AttributeError):
                    entry = json.loads(line)
                    if entry.get("level") in ("error", "fatal"):
                        found = str(entry.get("msg", "")).strip()
    except FileNotFoundError:
        return ""
    return found


def read_pid(path: str) -> int:
    """The pid that the runtime wrote; `Internal` when it wrote none."""
    try:
        return int(fdio.read_file(path))
    except (OSError, ValueError) as error:
        raise errors.Internal(f"oci runtime wrote no pid to {path}") from error
