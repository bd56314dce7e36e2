"""Exit records: how each process ended, on disk before anybody is told.

One JSON file per process in the bundle: `exit.json` for the container's own process,
`exit-EXEC.json` for an exec. A next daemon, or the clean-up after a dead shim, reads them.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass

from supervisord_ctr import durable, faults

log = logging.getLogger(__name__)

BEFORE = faults.declare("shim.exit.before-record", "a process ended; its exit is known to this process only")
AFTER = faults.declare("shim.exit.after-record", "the exit record is on disk; nobody has been told")


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """`exit_status` is 128 + signal after a signal; times are seconds since the epoch.

    `oom_level` is "container", "pod" or "node" when the kernel killed for lack of memory.
    `asked_signal` and `asked_at` tell of the last Kill before the end.
    """

    id: str
    exec_id: str
    pid: int
    exit_status: int
    exited_at: float
    signal: int = 0
    oom_kills: int = 0
    oom_level: str = ""
    asked_signal: int = 0
    asked_at: float = 0.0


def path_of(bundle: str, exec_id: str = "") -> str:
    """Where the record of a process lies."""
    return os.path.join(bundle, f"exit-{exec_id}.json" if exec_id else "exit.json")


def write(bundle: str, record: ExitRecord) -> None:
    """Put the record on disk. A disk that takes none is logged: the exit is announced all the same."""
    try:
        faults.point(BEFORE)
        durable.write_atomic(path_of(bundle, record.exec_id), json.dumps(asdict(record)).encode())
        faults.point(AFTER)
    except OSError as error:
        log.error("exit record of %s %s: %s", record.id, record.exec_id, error)


def read(bundle: str, exec_id: str = "") -> ExitRecord | None:
    """The record of a process, or None when there is none that can be read."""
    try:
        with open(path_of(bundle, exec_id), encoding="utf-8") as file:
            return ExitRecord(**json.load(file))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        log.error("exit record in %s is damaged: %s", bundle, error)
        return None


def remove(bundle: str, exec_id: str = "") -> None:
    """Forget a record; it may be gone."""
    try:
        os.unlink(path_of(bundle, exec_id))
    except FileNotFoundError:
        return
