"""The OCI runtime's command line: runc, crun and others that share it.

Owns the arguments and the reading of the runtime's JSON log. Every method is one start of the
runtime's program; the shim asks for none that it can answer itself (states and exits it knows,
signals, freezing and metrics it does on pids and cgroups).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pctr_shim.reaper import Reaper
from supervisord_ctr import errors


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
            raise errors.NotFound(f"oci runtime {name!r} is not installed", kind="runtime", key=name)
        return cls(path, root, systemd_cgroup, environment)

    def _arguments(self, log: str, command: Sequence[str]) -> list[str]:
        arguments = [self.binary, "--root", self.root, "--log", log, "--log-format", "json"]
        if self.systemd_cgroup:
            arguments.append("--systemd-cgroup")
        return [*arguments, *command]

    async def invoke(
        self, reaper: Reaper, log: str, command: Sequence[str], failing: str,
        descriptors: Mapping[int, int] | None = None,
    ) -> None:
        """Run one command; `failing` starts the message of the error that a failure raises.

        The message is the last error in the runtime's log, as containerd's shim has it.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink(log)
        status = await reaper.run(self._arguments(log, command), self.environment, descriptors or {})
        if status:
            reason = last_error(log) or f"{os.path.basename(self.binary)} ended with status {status}"
            raise classify(f"{failing}: {reason}", reason)


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
    """The last message of level error in a JSON log; "" when there is none or no log."""
    found = ""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, AttributeError):
                    entry = json.loads(line)
                    if entry.get("level") == "error":
                        found = str(entry.get("msg", "")).strip()
    except FileNotFoundError:
        return ""
    return found


def read_pid(path: str) -> int:
    """The pid that the runtime wrote; `Internal` when it wrote none."""
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read().strip())
    except (OSError, ValueError) as error:
        raise errors.Internal(f"oci runtime wrote no pid to {path}") from error
