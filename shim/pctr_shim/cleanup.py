"""What a dead shim leaves behind, taken away: a container without anybody who watches it.

Used by the zygote's `cleanup` and by `containerd-shim-pctr-v1 delete`. Runs in a process of its own
and may block. Safe to repeat: each step is content when there is nothing left to do.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import shutil
import signal
import time

from pctr_shim import records
from supervisord_ctr.linux import cgroups, mounts, processes

log = logging.getLogger(__name__)

_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def clean_up(namespace: str, container_id: str, bundle: str, runtime: str, runtime_root: str) -> records.ExitRecord:
    """Kill, delete, unmount; the exit as recorded, or 137 now when the shim had recorded none.

    A runtime that the dead shim had just started is ended first: it must not finish making the
    container after we have looked.
    """
    options = _options(bundle)
    program = str(options.get("binary_name") or runtime)
    root = os.path.join(str(options.get("root") or runtime_root), namespace)
    pid = _init_pid(bundle)
    group = _cgroup(pid, container_id)
    _end_runtime_programs(container_id, root)
    pid = pid or _init_pid(bundle)
    oom_kills, oom_level = _oom(group)
    if group is not None:
        with contextlib.suppress(OSError):
            group.signal_all(signal.SIGKILL)
    _runtime_delete(program, root, container_id, bundle, bool(options.get("systemd_cgroup")))
    _remove_cgroup(bundle)
    mounts.unmount_below(os.path.join(bundle, "rootfs"))
    recorded = records.read(bundle)
    if recorded is not None:
        return recorded
    record = records.ExitRecord(
        container_id, "", pid, 128 + signal.SIGKILL, time.time(), signal.SIGKILL, oom_kills, oom_level
    )
    if os.path.isdir(bundle):
        records.write(bundle, record)
    return record


def _options(bundle: str) -> dict[str, object]:
    try:
        with open(os.path.join(bundle, "options.json"), encoding="utf-8") as file:
            found = json.load(file)
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _init_pid(bundle: str) -> int:
    try:
        with open(os.path.join(bundle, "init.pid"), encoding="ascii") as file:
            return int(file.read().strip() or "0")
    except (OSError, ValueError):
        return 0


def _cgroup(pid: int, container_id: str) -> cgroups.Cgroup | None:
    """The cgroup of the init process, when the pid still is a process of this container."""
    if not pid:
        return None
    try:
        group = cgroups.of_pid(pid)
    except ProcessLookupError:
        return None
    return group if any(container_id in folder for folder in group.folders.values()) else None


def _oom(group: cgroups.Cgroup | None) -> tuple[int, str]:
    if group is None or not group.exists():
        return 0, ""
    count = group.oom_kills()
    return count, group.oom_level() if count else ""


def _remove_cgroup(bundle: str) -> None:
    """Remove the cgroup that the bundle's specification names: a killed runtime forgets it."""
    try:
        with open(os.path.join(bundle, "config.json"), "rb") as file:
            path = str((json.load(file).get("linux") or {}).get("cgroupsPath") or "")
    except (OSError, ValueError, AttributeError):
        return
    if path.count(":") == 2:
        path = cgroups.systemd_path(*path.split(":"))
    if not path.startswith("/") or not path.strip("/"):
        return
    group = cgroups.at(path)
    deadline = time.monotonic() + 5.0
    while group.exists():
        try:
            group.signal_all(signal.SIGKILL)
            group.delete()
        except OSError as error:
            if time.monotonic() > deadline:
                log.error("cgroup %s stays: %s", path, error)
                return
            select.select([], [], [], 0.01)


def _end_runtime_programs(container_id: str, root: str) -> None:
    """Kill runs of the OCI runtime for this container that their dead shim can no longer wait for."""
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                arguments = os.fsdecode(file.read()).split("\0")
        except OSError:
            continue
        if "--root" in arguments and root in arguments and container_id in arguments:
            pid = int(name)
            started = processes.read_start_time(pid)
            if processes.send_signal(pid, started, signal.SIGKILL):
                log.info("ended a left-over run of the oci runtime, pid %d", pid)
                _await_end(pid, started)


def _await_end(pid: int, started: int, timeout: float = 5.0) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if processes.read_start_time(pid) == started:
            select.select([fd], [], [], timeout)
    finally:
        os.close(fd)


def _runtime_delete(program: str, root: str, container_id: str, bundle: str, systemd: bool) -> None:
    path = program if "/" in program else shutil.which(program)
    if path is None:
        log.error("oci runtime %s is not installed: %s stays in %s", program, container_id, root)
        return
    log_path = os.path.join(bundle, "log.json") if os.path.isdir(bundle) else "/dev/null"
    arguments = [path, "--root", root, "--log", log_path, "--log-format", "json"]
    arguments += ["--systemd-cgroup"] if systemd else []
    null = [(os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_RDWR, 0) for number in (0, 1, 2)]
    pid = os.posix_spawn(
        path, [*arguments, "delete", "--force", container_id], os.environ, file_actions=null,
        setsigmask=(), setsigdef=_DEFAULT_SIGNALS,
    )
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        log.warning("oci runtime delete of %s ended with %d", container_id, status)
