"""Control groups, version 1, version 2 and both at once ("hybrid": controllers in v1, v2 for naming).

Owns finding a process's groups, their processes, freezing, killing, out-of-memory counts and
metrics. Metrics come out as plain dictionaries whose keys are the field names of
`io.containerd.cgroups.v1.Metrics` and `io.containerd.cgroups.v2.Metrics`, so that
`Metrics(**group.metrics())` makes the message without this floor knowing protobuf.

Reads are of single small files and never walk more than the group's own subtree. Sources: the
kernel's Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from supervisord_ctr.linux import cgroup_metrics, libc, mounts

ROOT = "/sys/fs/cgroup"
_IN_MODIFY = 2
#: v1 controllers in which a container gets a group, as far as the machine has them.
CONTROLLERS = (
    "blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "net_cls", "net_prio",
    "perf_event", "pids", "rdma",
)


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where the machine keeps its control groups.

    `mode` is "v2" when all controllers are in the one v2 tree, "hybrid" when a v2 tree exists but
    the controllers are in v1 trees, "v1" when there is no v2 tree.
    """

    mode: str
    controllers: Mapping[str, str]
    unified: str


@functools.cache
def hierarchy() -> Hierarchy:
    """The machine's arrangement, read from mountinfo once."""
    controllers: dict[str, str] = {}
    unified = ""
    for entry in mounts.mount_table():
        if entry.fstype == "cgroup2" and not unified:
            unified = entry.target
        elif entry.fstype == "cgroup":
            for word in entry.super_options.split(","):
                name = "systemd" if word == "name=systemd" else word
                if name in CONTROLLERS or name == "systemd":
                    controllers.setdefault(name, entry.target)
    has_v1 = any(name in controllers for name in CONTROLLERS)
    mode = "v2" if not has_v1 else "hybrid" if unified else "v1"
    return Hierarchy(mode, controllers, unified)


def path_for(namespace: str, container_id: str) -> str:
    """The cgroup path of a container with the cgroupfs driver: "/NAMESPACE/ID", as containerd has it."""
    return f"/{namespace}/{container_id}"


def systemd_path(slice_name: str, prefix: str, name: str) -> str:
    """Where systemd puts the scope of "SLICE:PREFIX:NAME": "/a.slice/a-b.slice/prefix-name.scope"."""
    parent, path = "", ""
    for part in (slice_name or "system.slice").removesuffix(".slice").split("-"):
        parent = f"{parent}-{part}" if parent else part
        path += f"/{parent}.slice"
    unit = name if name.endswith(".slice") else f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
    return f"{path}/{unit}"


def read(path: str) -> str:
    """The text of a control file without its last newline; "" when the group or the file is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    try:
        parts = []
        while part := os.read(fd, 65536):
            parts.append(part)
        return b"".join(parts).decode("ascii", "replace").rstrip("\n")
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.EOPNOTSUPP, errno.EINVAL):
            return ""
        raise
    finally:
        os.close(fd)


def write(path: str, text: str) -> None:
    """Write a control file in one call, without creating it."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Cgroup:
    """One group: a folder in each v1 tree, or one folder in the v2 tree.

    `folders` maps controllers to folders; in v2 mode it has the single key "".
    """

    folders: Mapping[str, str]

    @property
    def is_v2(self) -> bool:
        """Whether this is a folder of the one v2 tree."""
        return "" in self.folders

    def folder(self, *controllers: str) -> str:
        """The folder of the first of `controllers` that there is; "" when there is none."""
        if self.is_v2:
            return self.folders[""]
        return next((self.folders[name] for name in controllers if name in self.folders), "")

    def exists(self) -> bool:
        """Whether any folder of the group is still there."""
        return any(os.path.isdir(folder) for folder in self.folders.values())

    def pids(self) -> list[int]:
        """Every process in the group and below it, as the caller's PID namespace numbers them."""
        top = self.folder("devices", "pids", "memory", "freezer", *CONTROLLERS)
        found: set[int] = set()
        for folder in _subtree(top):
            found.update(int(word) for word in read(f"{folder}/cgroup.procs").split())
        return sorted(found)

    def populated(self) -> bool:
        """Whether any process is in the group or below it, in whichever tree."""
        return any(
            read(f"{path}/cgroup.procs") for folder in set(self.folders.values()) for path in _subtree(folder)
        )

    def add(self, pid: int) -> None:
        """Move `pid` into every folder of the group."""
        for folder in set(self.folders.values()):
            write(f"{folder}/cgroup.procs", str(pid))

    def signal_all(self, number: int) -> int:
        """Send a signal to every process of the group; returns to how many.

        SIGKILL on v2 is one atomic write; elsewhere the list is read again until nobody new
        appears (a fork bomb is stopped by freezing first).
        """
        if self.is_v2 and number == signal.SIGKILL and os.path.exists(f"{self.folders['']}/cgroup.kill"):
            count = len(self.pids())
            with contextlib.suppress(FileNotFoundError):
                write(f"{self.folders['']}/cgroup.kill", "1")
            return count
        thaw = number == signal.SIGKILL and self._try_freeze()
        sent: set[int] = set()
        try:
            for _ in range(16):
                fresh = [pid for pid in self.pids() if pid not in sent]
                for pid in fresh:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                sent.update(fresh)
                if not fresh or number != signal.SIGKILL:
                    break
        finally:
            if thaw:
                with contextlib.suppress(OSError):
                    self.set_frozen(False)
        return len(sent)

    def _try_freeze(self) -> bool:
        try:
            self.set_frozen(True)
            return True
        except OSError:
            return False

    def set_frozen(self, frozen: bool) -> None:
        """Ask for the processes to be frozen or thawed; `is_frozen` tells when it is done."""
        folder = self.folder("freezer")
        if not folder:
            raise FileNotFoundError(errno.ENOENT, "no freezer control group", "freezer")
        if self.is_v2:
            write(f"{folder}/cgroup.freeze", "1" if frozen else "0")
        else:
            write(f"{folder}/freezer.state", "FROZEN" if frozen else "THAWED")

    def is_frozen(self) -> bool:
        """Whether every process of the group stands still."""
        folder = self.folder("freezer")
        if self.is_v2:
            return "frozen 1" in read(f"{folder}/cgroup.events").splitlines()
        return bool(folder) and read(f"{folder}/freezer.state") == "FROZEN"

    def oom_kills(self) -> int:
        """Processes of this group that the kernel has killed for lack of memory, wherever the limit was."""
        if self.is_v2:
            return _keyed(read(f"{self.folders['']}/memory.events")).get("oom_kill", 0)
        return _keyed(read(f"{self.folder('memory')}/memory.oom_control")).get("oom_kill", 0)

    def parent(self) -> Cgroup | None:
        """The group that this one is in; None in v1 trees, whose groups count for themselves, and for the top."""
        if not self.is_v2 or self.folders[""] == hierarchy().unified:
            return None
        return Cgroup({"": os.path.dirname(self.folders[""])})

    def oom_level(self) -> str:
        """Whose limit memory ran into: "container" (this group's), "pod" (a parent's) or "node"."""
        folder = self.folder("memory")
        if self._hit_limit(folder):
            return "container"
        top = hierarchy().unified if self.is_v2 else hierarchy().controllers.get("memory", ROOT)
        parent = os.path.dirname(folder)
        while len(parent) > len(top):
            if self._hit_limit(parent):
                return "pod"
            parent = os.path.dirname(parent)
        return "node"

    def _hit_limit(self, folder: str) -> bool:
        if self.is_v2:
            return _keyed(read(f"{folder}/memory.events.local")).get("oom", 0) > 0
        return any(
            cgroup_metrics.number(read(f"{folder}/memory.{part}failcnt"))
            # kernels of late leave failcnt at 0; the high-water mark at the limit says the same
            or 0 < cgroup_metrics.number(read(f"{folder}/memory.{part}limit_in_bytes"))
            <= cgroup_metrics.number(read(f"{folder}/memory.{part}max_usage_in_bytes"))
            for part in ("", "memsw.")
        )

    def watch_oom(self) -> int:
        """A descriptor that becomes readable when the group may have run out of memory, or is removed.

        Read and drop what it holds, then compare `oom_kills`. The caller closes it.
        """
        if self.is_v2:
            fd = libc.inotify_init()
            try:
                libc.inotify_add_watch(fd, f"{self.folders['']}/memory.events", _IN_MODIFY)
            except BaseException:
                os.close(fd)
                raise
            return fd
        folder = self.folder("memory")
        event = libc.eventfd(0, os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            control = os.open(f"{folder}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
            try:
                write(f"{folder}/cgroup.event_control", f"{event} {control}")
            finally:
                os.close(control)
        except BaseException:
            os.close(event)
            raise
        return event

    def metrics(self) -> dict[str, object]:
        """Fields of the Metrics message of this group's version; absent controllers are left out.

        `FileNotFoundError` when the whole group is gone.
        """
        if not self.exists():
            raise FileNotFoundError(errno.ENOENT, "control group is gone", next(iter(self.folders.values()), ""))
        if self.is_v2:
            return cgroup_metrics.unified(self.folders[""], read)
        return cgroup_metrics.legacy(self.folders, read)

    def delete(self) -> None:
        """Remove the group and the groups below it; no error when it is gone.

        `OSError` EBUSY while processes are in it.
        """
        for folder in set(self.folders.values()):
            for path in reversed(list(_subtree(folder))):
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(path)


def _subtree(folder: str) -> Iterator[str]:
    """`folder` and every group below it, parents first."""
    if not folder:
        return
    yield folder
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        with os.scandir(folder) as entries:
            names = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        for name in names:
            yield from _subtree(name)


def _keyed(text: str) -> dict[str, int]:
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def parse_membership(text: str) -> dict[str, str]:
    """/proc/PID/cgroup: controller → path inside its tree; the v2 tree has the key ""."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        for name in names.split(","):
            found["systemd" if name == "name=systemd" else name] = path
    return found


def of_pid(pid: int) -> Cgroup:
    """The group that `pid` is in; `ProcessLookupError` when there is no such process."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="ascii", errors="surrogateescape") as file:
            membership = parse_membership(file.read())
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, "no such process", str(pid)) from None
    tree = hierarchy()
    if tree.mode == "v2":
        return Cgroup({"": tree.unified + membership.get("", "/").rstrip("/")})
    return Cgroup({
        name: tree.controllers[name] + path.rstrip("/")
        for name, path in membership.items() if name in tree.controllers and name != "systemd"
    })


def at(path: str) -> Cgroup:
    """The group at `path` ("/default/c1") in every tree, whether it exists or not."""
    inner = "/" + path.strip("/")
    tree = hierarchy()
    if tree.mode == "v2":
        return Cgroup({"": tree.unified + inner})
    return Cgroup({name: top + inner for name, top in tree.controllers.items() if name != "systemd"})


def of_runtime_path(path: str) -> Cgroup:
    """The group of an OCI spec's absolute `cgroupsPath`, or of its form for systemd ("SLICE:PREFIX:NAME")."""
    if path.count(":") == 2 and not path.startswith("/"):
        slice_name, prefix, name = path.split(":")
        return at(systemd_path(slice_name, prefix, name))
    return at(path)


def folders_to_join(path: str) -> list[str]:
    """The folders that a process enters to be in the group at `path`; `FileNotFoundError` when there is none."""
    folders = sorted({folder for folder in at(path).folders.values() if os.path.isdir(folder)})
    if not folders:
        raise FileNotFoundError(errno.ENOENT, "control group is gone", path)
    return folders


def everywhere(path: str) -> list[str]:
    """The folders of the group at `path` in every tree that has it: v1 controllers, systemd's own tree, and v2."""
    inner = "/" + path.strip("/")
    tree = hierarchy()
    tops = dict.fromkeys([*tree.controllers.values(), *([tree.unified] if tree.unified else [])])
    return [top + inner for top in tops if os.path.isdir(top + inner)]


def remove_empty(path: str) -> list[str]:
    """Remove the group at `path` and those below it from every tree; returns the folders that are gone.

    `OSError` EBUSY, and nothing is removed, while a process is in any of them.
    """
    folders = everywhere(path)
    for folder in folders:
        for inner in _subtree(folder):
            if read(f"{inner}/cgroup.procs"):
                raise OSError(errno.EBUSY, "processes are in the control group", inner)
    for folder in folders:
        for inner in reversed(list(_subtree(folder))):
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(inner)
    return folders


def create(path: str) -> Cgroup:
    """Make the group at `path` in every tree; existing parts are kept.

    v1 cpusets take over their parent's processors and memory nodes, without which no process could
    join; v2 parents hand all their controllers down.
    """
    group = at(path)
    tree = hierarchy()
    for name, folder in group.folders.items():
        top = tree.unified if name == "" else tree.controllers[name]
        _make(folder, top, name)
    return group


def _make(folder: str, top: str, controller: str) -> None:
    if folder == top:
        return
    parent = os.path.dirname(folder)
    _make(parent, top, controller)
    if controller == "":
        enabled = read(f"{parent}/cgroup.controllers").split()
        for name in enabled:
            with contextlib.suppress(OSError):
                write(f"{parent}/cgroup.subtree_control", f"+{name}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o755)
    if controller == "cpuset":
        for name in ("cpuset.cpus", "cpuset.mems"):
            if not read(f"{folder}/{name}"):
                write(f"{folder}/{name}", read(f"{parent}/{name}"))


def join(folders: Iterable[str], pid: int) -> None:
    """Move `pid` into each of these cgroup folders (absolute paths)."""
    for folder in folders:
        write(f"{folder}/cgroup.procs", str(pid))


def pass_grace() -> bool:
    """Wait for what the kernel waits for before it moves a process between groups; whether that could be done.

    A move waits until no processor is in the middle of a fork or an exit (an RCU grace period: 5 to 25 ms), unless
    one has passed just before. So a move that is asked for ahead, while an OCI runtime starts, takes that time out
    of the runtime's. This one changes nothing: it is of the calling process into the group that it is in. The second
    one waits for nothing, and makes the effect last for another grace period.
    """
    try:
        procs = _own_procs()
        if not procs:
            return False
        for _ in range(2):
            write(procs, "0")
    except OSError:
        return False
    return True


def _own_procs() -> str:
    """The control file that lists the calling process; "" when it cannot be told for sure.

    Asked each time: who writes to the file of a group that it has left moves there.
    """
    with open("/proc/self/cgroup", encoding="ascii", errors="surrogateescape") as file:
        return _procs_of(os.getpid(), file.read())


@functools.lru_cache(maxsize=1)
def _procs_of(pid: int, membership: str) -> str:
    """The control file that lists `pid`, which has this membership. In other namespaces paths may mean other groups."""
    tree, groups = hierarchy(), parse_membership(membership)
    tops = {"": tree.unified} if tree.mode == "v2" else tree.controllers
    for name, top in tops.items():
        if name in groups and name != "systemd":
            procs = f"{top}{groups[name].rstrip('/')}/cgroup.procs"
            if str(pid) in read(procs).split():
                return procs
    return ""
