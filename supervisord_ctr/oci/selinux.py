"""SELinux labels: those that the policy means for containers, the categories of a pod, and labels of files.

A label is "USER:ROLE:TYPE" and, where the policy has levels, ":LEVEL". Containers differ by the categories in
their level: a process may use the files of its own ones only. Owns reading `lxc_contexts`, drawing categories,
what a request changes in a label, and relabelling. All calls but those on plain values block.

Sources: selinux(8), selinux_config(5), lxc_contexts(5), and the kernel's `selinuxfs`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import random
import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from supervisord_ctr import errors
from supervisord_ctr.linux import files, libc

log = logging.getLogger(__name__)

SELINUXFS = "/sys/fs/selinux"
CONFIG = "/etc/selinux/config"
POLICIES = "/etc/selinux"
#: Where a distribution's policy for containers keeps what stands before the base policy's file.
CONTAINER_CONTEXTS = "/usr/share/containers/selinux/contexts"

#: Categories that policies have: c0 to c1023.
CATEGORIES = 1024
_XATTR = "security.selinux"
_TRIES = 64
_DEPTH = 1024

_NAME = re.compile(r"[A-Za-z0-9_.-]+\Z")
_LEVEL = re.compile(r"s\d{1,2}(-s\d{1,2})?(:c\d{1,4}(\.c\d{1,4})?(,c\d{1,4}(\.c\d{1,4})?)*)?\Z")

#: Folders that the host needs with the labels they have: no container gets them for its own.
_KEPT = frozenset({
    "/", "/bin", "/boot", "/dev", "/etc", "/etc/passwd", "/etc/pki", "/etc/shadow", "/home", "/lib", "/lib64",
    "/media", "/opt", "/proc", "/root", "/run", "/sbin", "/srv", "/sys", "/tmp", "/usr", "/var", "/var/lib", "/var/log",
})


@dataclass(frozen=True)
class Context:
    """A label in its parts; `level` is "" where the policy has none."""

    user: str
    role: str
    type: str
    level: str = ""

    @classmethod
    def parse(cls, text: str) -> Context:
        """The parts of a label; raises `InvalidArgument` for what is none."""
        parts = text.split(":", 3)
        if len(parts) < 3 or not all(parts[:3]):
            raise errors.InvalidArgument(f"{text!r} is not an selinux label", kind="selinux", key=text)
        return cls(*parts)

    def __str__(self) -> str:
        return ":".join((self.user, self.role, self.type, *([self.level] if self.level else [])))


@dataclass(frozen=True)
class Defaults:
    """What the policy means for the processes and the files of containers."""

    process: Context
    file: Context


@dataclass(frozen=True)
class Asked:
    """What a request wants in place of the default, "" leaving a part alone."""

    user: str = ""
    role: str = ""
    type: str = ""
    level: str = ""

    def __bool__(self) -> bool:
        return bool(self.user or self.role or self.type or self.level)

    def check(self) -> None:
        """Raise `InvalidArgument` for what cannot be a part of a label; labels become options of mounts."""
        for name, shape in (("user", _NAME), ("role", _NAME), ("type", _NAME), ("level", _LEVEL)):
            value: str = getattr(self, name)
            if value and not shape.match(value):
                raise errors.InvalidArgument(f"selinux {name} {value!r} is malformed", kind="selinux", key=value)


@dataclass(frozen=True)
class Labels:
    """The labels of a container, its processes' and its files'; "" is none."""

    process: str
    mount: str


def enabled() -> bool:
    """Whether the kernel runs with SELinux and lets this process use it.

    In a container of somebody else's its files are not there or read-only, and the labels are that one's to give.
    """
    try:
        return not os.statvfs(f"{SELINUXFS}/enforce").f_flag & os.ST_RDONLY
    except OSError:
        return False


def known(label: str) -> bool:
    """Whether the loaded policy has the parts of a label, and in this combination; true where it cannot tell."""
    try:
        with open(f"{SELINUXFS}/context", "wb", buffering=0) as handle:
            handle.write(label.encode())
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


def check_known(*labels: str) -> None:
    """Raise `InvalidArgument` now for what would keep a container from starting; "" is no label."""
    for label in labels:
        if label and not known(label):
            raise errors.InvalidArgument(
                f"selinux label {label!r} does not exist in the policy of this host", kind="selinux", key=label
            )


def defaults() -> Defaults | None:
    """The policy's labels for containers; None, told once, where it has none: containers then run without a label."""
    path = _contexts_file()
    try:
        found = parse_contexts(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        _tell_of_no_labels(f"{path}: {getattr(error, 'strerror', None) or error}")
        return None
    try:
        process, file = (Context.parse(found.get(name, "")) for name in ("process", "file"))
    except errors.InvalidArgument:
        _tell_of_no_labels(f"{path} does not state labels for process and file")
        return None
    for context in (process, file):
        if not known(str(context)):
            _tell_of_no_labels(f"{path} states {context}, which the loaded policy does not have")
            return None
    return Defaults(process, file)


def _contexts_file() -> str:
    if os.path.exists(CONTAINER_CONTEXTS):
        return CONTAINER_CONTEXTS
    return os.path.join(POLICIES, policy_type(), "contexts", "lxc_contexts")


@functools.lru_cache(maxsize=16)
def _tell_of_no_labels(why: str) -> None:
    log.warning("containers run without selinux labels: %s", why)


def policy_type() -> str:
    """SELINUXTYPE of the host's configuration, the name of its policy's folder; "targeted" where nothing is stated."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in Path(CONFIG).read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition("=")
            if name.strip() == "SELINUXTYPE" and value.strip():
                return value.strip().strip('"')
    return "targeted"


def parse_contexts(text: str) -> dict[str, str]:
    """Labels by name of a file of lines `NAME = "LABEL"`; comments begin with '#' or ';'."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.lstrip().startswith(("#", ";")):
            found[name.strip()] = value.strip().strip('"')
    return found


def draw_level(taken: Collection[str], categories: int = CATEGORIES) -> str:
    """A level of two categories below `categories` that is not in `taken`; raises `ResourceExhausted`."""
    for _ in range(_TRIES):
        level = _level(*random.sample(range(categories), 2))
        if level not in taken:
            return level
    for first, second in combinations(range(categories), 2):
        if _level(first, second) not in taken:
            return _level(first, second)
    raise errors.ResourceExhausted(f"all pairs of {categories} selinux categories are taken", kind="selinux")


def _level(first: int, second: int) -> str:
    low, high = sorted((first, second))
    return f"s0:c{low},c{high}"


def pod_label(found: Defaults, asked: Asked, level: str) -> Context:
    """What the processes of a pod run as; `level` is the one drawn for it."""
    return Context(
        asked.user or found.process.user, asked.role or found.process.role, asked.type or found.process.type,
        asked.level or (level if found.process.level else ""),
    )


def container_labels(found: Defaults, pod: Context, asked: Asked) -> Labels:
    """The labels of a container: those of its pod unless it asks for its own, where the categories stay the pod's.

    They stay because the pod's files carry them, and every container of the pod has to read those.
    """
    process = pod_label(found, asked, pod.level) if asked else pod
    mount = replace(found.file, level=process.level)
    if process.user != found.process.user:
        mount = replace(mount, user=process.user)
    return Labels(str(process), str(mount))


def relabel(path: str, label: str) -> None:
    """Give `label` to what is at `path`, a path without links, and everything below; links are labelled, not followed.

    Every entry is held open while it is looked at and labelled, so whoever writes to the folder meanwhile cannot have
    something else labelled. Where a file system has no labels nothing happens. Raises `FailedPrecondition` for a folder
    of the host's, and `errors.Error` for what cannot be labelled.
    """
    short = path.rstrip("/") or "/"
    if short in _KEPT or short == os.environ.get("HOME", "").rstrip("/"):
        raise errors.FailedPrecondition(
            f"{path!r} is a folder of the host, which keeps its selinux label", kind="mount", key=path
        )
    try:
        root = files.openat2(libc.AT_FDCWD, path, os.O_PATH, resolve=files.RESOLVE_NO_SYMLINKS)
        _relabel_tree(root, label.encode())
    except OSError as error:
        raise errors.from_os_error(error, f"failed to relabel {path!r}:") from error


def _relabel_tree(root: int, label: bytes) -> None:
    """Label what `root` holds and, unless its file system has no labels, everything below; closes `root`."""
    held: list[tuple[int, Iterator[str]]] = [(root, iter(()))]
    try:
        if _set_label(root, label):
            held = [(root, _names(root))]
        while held:
            folder, names = held[-1]
            name = next(names, None)
            if name is None:
                os.close(held.pop()[0])
                continue
            try:
                entry = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            except FileNotFoundError:
                continue
            held.append((entry, iter(())))
            if len(held) > _DEPTH:
                raise errors.ResourceExhausted(f"folders are nested deeper than {_DEPTH}", kind="mount")
            _set_label(entry, label)
            held[-1] = (entry, _names(entry))
    finally:
        for fd, _ in held:
            os.close(fd)


def _names(fd: int) -> Iterator[str]:
    """What is in an open folder; nothing in what is none."""
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        return iter(())
    readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    try:
        return iter(os.listdir(readable))
    finally:
        os.close(readable)


def _set_label(fd: int, label: bytes) -> bool:
    """Label what `fd` holds; whether its file system has labels.

    Goes through /proc, since fsetxattr(2) refuses a descriptor that only holds; a link that it holds is not followed.
    """
    place = f"/proc/self/fd/{fd}"
    with contextlib.suppress(OSError):
        if os.getxattr(place, _XATTR).rstrip(b"\0") == label:
            return True
    try:
        os.setxattr(place, _XATTR, label)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return False
        if error.errno != errno.ENOENT:
            raise
    return True
