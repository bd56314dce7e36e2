"""What this room left behind: bundles, working folders, shims, runtime states and cgroups without a task (P5).

Owns finding them while tasks are made and removed, and taking them away. What runs is never ended
here: a bundle whose shim still serves its container gets its task back, a shim that serves
containers nobody knows is only told of.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from supervisord_ctr import errors
from supervisord_ctr.aio import wait_until
from supervisord_ctr.linux import cgroups, mounts, processes
from supervisord_ctr.model import Finding
from supervisord_ctr.runtime import recovery
from supervisord_ctr.runtime.bundle import Bundle
from supervisord_ctr.runtime.tasks import Tasks

#: Top folders of the cgroup tree that are never a namespace of ours, whatever it is called.
_FOREIGN_GROUPS = frozenset({"docker", "kubepods", "machine", "init.scope"})
#: Seconds that an empty group must have been there: another daemon may be filling it.
_SETTLED = 5.0
_SHIM_NAME = "pctr-shim"
_WORKER_NAME = "pctr-worker"


class TaskOrphans:
    """An examiner (`services.doctor`); `namespaces` lists the names of all API namespaces."""

    def __init__(self, tasks: Tasks, state: Path, namespaces: Callable[[], Awaitable[Sequence[str]]]) -> None:
        self._tasks = tasks
        self._state = state
        self._oci_root = Path(tasks.shims.oci(None)[1])
        self._namespaces = namespaces

    async def find(self) -> list[Finding]:
        """Everything that belongs to no task."""
        before = self._tasks.known()
        names = await self._namespaces()
        found = await self._tasks.run_io(self._look, before, names)
        found += await self._shims()
        return found

    async def repair(self, findings: Sequence[Finding]) -> dict[Finding, str]:
        """Take them away; what could not be, and why."""
        left: dict[Finding, str] = {}
        # A bundle first: its clean-up takes shim, runtime state and cgroup along.
        order = ("bundle", "sandbox-bundle", "runtime-state", "shim", "cgroup", "work-folder")
        for finding in sorted(findings, key=lambda finding: order.index(finding.kind)):
            try:
                await self._repair(finding)
            except (errors.Error, OSError, TimeoutError) as error:
                left[finding] = str(error) or type(error).__name__
        return left

    def _is_known(self, namespace: str, name: str) -> bool:
        return (namespace, name) in self._tasks.known() or self._tasks.sandboxes.holds(namespace, name)

    async def _repair(self, finding: Finding) -> None:
        run_io = self._tasks.run_io
        match finding.kind:
            case "bundle" | "sandbox-bundle":
                path = Path(finding.id)
                bundle = Bundle(path.parent.name, path.name, path)
                if path.name.startswith("."):
                    await run_io(_remove_folder, path)
                elif finding.kind == "bundle":
                    await recovery.reconsider(self._tasks, bundle)
                else:
                    await self._tasks.sandboxes.recheck(bundle)
            case "shim":
                await self._end_shim(finding.id)
            case "runtime-state":
                await self._remove_state(Path(finding.id))
            case "cgroup":
                await run_io(self._remove_cgroup, finding.id)
            case "work-folder":
                path = Path(finding.id)
                if path.name.startswith(".") or not self._is_known(path.parent.name, path.name):
                    await run_io(_remove_folder, path)

    # -- folders, states and cgroups ---------------------------------------------------------------

    def _look(self, before: set[tuple[str, str]], names: Sequence[str]) -> list[Finding]:
        """What can be seen without asking anybody. Blocks. `before` are the tasks known when this began."""
        sandbox_state, sandbox_root = self._tasks.sandboxes.folders
        found = [
            *self._bundles(self._tasks.state_folder, "bundle", "a bundle without a task", before),
            *self._bundles(sandbox_state, "sandbox-bundle", "a bundle without a sandbox", set()),
        ]
        for root, state in ((self._tasks.root_folder, self._tasks.state_folder), (sandbox_root, sandbox_state)):
            for namespace, entry in _entries(root):
                if not os.path.lexists(state / namespace / entry.name):
                    problem = "a working folder without a bundle"
                    found.append(Finding("work-folder", str(entry), problem, "remove", size_of(entry)))
        if self._oci_root.is_relative_to(self._state):
            found += self._states(before)
        found += self._cgroups(names, before)
        return found

    def _bundles(
        self, folder: Path, kind: str, problem: str, before: set[tuple[str, str]]
    ) -> Iterator[Finding]:
        for namespace, entry in _entries(folder):
            hidden = entry.name.startswith(".")
            if not hidden and ((namespace, entry.name) in before or self._is_known(namespace, entry.name)):
                continue
            told = "a bundle whose removal was cut short" if hidden else problem
            if count := len(mounts.mounts_below(entry)):
                told += f", with {count} mount{'s' if count > 1 else ''}"
            yield Finding(kind, str(entry), told, "remove", size_of(entry))

    def _states(self, before: set[tuple[str, str]]) -> Iterator[Finding]:
        for namespace, entry in _entries(self._oci_root):
            if (namespace, entry.name) in before or self._is_known(namespace, entry.name):
                continue
            state = _read_state(entry)
            pid = int(state.get("init_process_pid") or 0)
            started = int(state.get("init_process_start") or 0)
            if pid and processes.is_alive(pid, started):
                problem = f"a container without a task runs as process {pid}"
                yield Finding("runtime-state", str(entry), problem, "hand", size_of(entry))
            else:
                problem = "the runtime's state of a container without a task"
                yield Finding("runtime-state", str(entry), problem, "remove", size_of(entry))

    async def _remove_state(self, path: Path) -> None:
        if self._is_known(path.parent.name, path.name):
            return
        bundle = self._tasks.state_folder / path.parent.name / path.name
        await self._tasks.shims.remove_state(path.parent.name, path.name, bundle)
        await self._tasks.run_io(_remove_folder, path)

    def _cgroups(self, names: Sequence[str], before: set[tuple[str, str]]) -> Iterator[Finding]:
        """Empty groups of the namespaces; those with processes may be another daemon's."""
        for namespace in names:
            if namespace in _FOREIGN_GROUPS or namespace.endswith((".slice", ".scope")):
                continue
            children: set[str] = set()
            for folder in cgroups.at(f"/{namespace}").folders.values():
                with contextlib.suppress(OSError), os.scandir(folder) as entries:
                    children.update(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
            for name in sorted(children):
                if (namespace, name) in before or self._is_known(namespace, name):
                    continue
                path = cgroups.path_for(namespace, name)
                if _is_abandoned(cgroups.at(path)):
                    yield Finding("cgroup", path, "an empty cgroup without a task", "remove")

    def _remove_cgroup(self, path: str) -> None:
        namespace, _, name = path.lstrip("/").partition("/")
        group = cgroups.at(path)
        if not self._is_known(namespace, name) and _is_abandoned(group):
            group.delete()

    # -- shims -------------------------------------------------------------------------------------

    async def _shims(self) -> list[Finding]:
        shims = self._tasks.shims
        # What is being started belongs to a task that will tell of it.
        if shims.starting:
            return []
        listed = await self._tasks.run_io(lambda: sorted(os.listdir(shims.sockets)))
        known = self._tasks.known_sockets()
        found = []
        for path in (str(shims.sockets / name) for name in listed):
            if path in known or path.removesuffix("-2") in shims.starting:
                continue
            try:
                serves = await shims.containers_at(path)
            except errors.NotFound:
                found.append(Finding("shim", path, "the socket of a shim that is dead", "remove"))
            except errors.Error as error:
                found.append(Finding("shim", path, f"a shim without a task does not answer: {error.message}", "hand"))
            else:
                found.append(_stray_shim(path, serves))
        found += await self._tasks.run_io(self._unreachable, {shim.record.pid for shim in shims.all()})
        return found

    def _unreachable(self, known: set[int]) -> Iterable[Finding]:
        """Processes of our shims whose socket is gone: nobody can reach them any more."""
        found = []
        folder = os.path.realpath(self._tasks.shims.sockets)
        listening = _listeners(folder)
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            try:
                with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                    if file.read().strip() != _SHIM_NAME or os.readlink(f"/proc/{pid}/cwd") != folder:
                        continue
                workers, children = _family(pid)
                sockets = {
                    os.readlink(f"/proc/{member}/fd/{fd}") for member in (pid, *workers)
                    for fd in os.listdir(f"/proc/{member}/fd")
                }
            except OSError:
                continue
            if pid in known or any(os.path.exists(path) for inode, path in listening if inode in sockets):
                continue
            problem = "a shim whose socket is gone"
            if children:
                problem += f", with the processes {', '.join(map(str, children[:5]))}"
            found.append(Finding("shim", f"pid {pid}", problem, "hand" if children else "remove"))
        return found

    async def _end_shim(self, name: str) -> None:
        if name.startswith("pid "):
            pid = int(name[4:])
            started = processes.read_start_time(pid)
            again = await self._tasks.run_io(self._unreachable, {shim.record.pid for shim in self._tasks.shims.all()})
            if any(found.id == name and found.remedy == "remove" for found in again):
                processes.send_signal(pid, started, signal.SIGKILL)
                with contextlib.suppress(TimeoutError):
                    await wait_until(
                        lambda: not processes.is_alive(pid, started), self._tasks.config.cleanup_timeout, "shim"
                    )
            return
        if name in self._tasks.known_sockets():
            return
        with contextlib.suppress(errors.NotFound):
            if serves := await self._tasks.shims.containers_at(name):
                raise errors.FailedPrecondition(f"the shim at {name} serves {', '.join(serves)}", kind="shim", key=name)
        await self._tasks.shims.dismiss("default", name)


def _is_abandoned(group: cgroups.Cgroup) -> bool:
    """Whether a group has no processes and is not being filled either."""
    made = 0.0
    for folder in set(group.folders.values()):
        with contextlib.suppress(OSError):
            made = max(made, os.stat(folder).st_mtime)
    return 0 < made < time.time() - _SETTLED and not group.populated()


def _stray_shim(path: str, serves: Sequence[str]) -> Finding:
    if serves:
        return Finding("shim", path, f"a shim without a task serves {', '.join(serves)}", "hand")
    return Finding("shim", path, "a shim without a task", "remove")


def _listeners(folder: str) -> list[tuple[str, str]]:
    """("socket:[INODE]", path) of the unix sockets that listen below `folder`."""
    found = []
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as file:
        for line in file:
            words = line.split()
            if len(words) >= 8 and words[7].startswith(f"{folder}/"):
                found.append((f"socket:[{words[6]}]", words[7]))
    return found


def _family(pid: int) -> tuple[list[int], list[int]]:
    """Children of a shim: its workers, and what it runs."""
    workers: list[int] = []
    others: list[int] = []
    for child in processes.children(pid):
        with contextlib.suppress(OSError), open(f"/proc/{child}/comm", encoding="utf-8", errors="replace") as name:
            (workers if name.read().strip() == _WORKER_NAME else others).append(child)
    return workers, others


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "state.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """(namespace, path) of the folders two levels below `folder`."""
    with contextlib.suppress(FileNotFoundError):
        for namespace in sorted(os.listdir(folder)):
            with contextlib.suppress(OSError):
                for name in sorted(os.listdir(folder / namespace)):
                    path = folder / namespace / name
                    if path.is_dir() and not path.is_symlink():
                        yield namespace, path


def size_of(folder: Path) -> int:
    """Bytes on disk below `folder`, without what is mounted there."""
    total = 0
    try:
        device = os.lstat(folder).st_dev
        for path, folders, files in os.walk(folder):
            kept = []
            for name in [*folders, *files]:
                with contextlib.suppress(OSError):
                    entry = os.lstat(os.path.join(path, name))
                    if entry.st_dev == device:
                        total += entry.st_blocks * 512
                        kept.append(name)
            folders[:] = [name for name in folders if name in kept]
    except OSError:
        return total
    return total


def _remove_folder(path: Path) -> None:
    """Unmount what is below, then remove the folder; it may be gone."""
    mounts.unmount_below(path)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
