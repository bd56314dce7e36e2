"""Kernel namespaces: made, pinned as files, entered for one call.

Owns the thread tricks: a thread that unshares or enters a namespace is thrown away afterwards, so
the process itself never moves and never forks. User namespaces cannot be made by a thread of a
process that has several (unshare(2), EINVAL), so they come from a small helper program.

Does not know pods; `sandbox/` decides which namespaces exist and where their pins lie.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from supervisord_ctr.linux import libc, mounts

T = TypeVar("T")

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_FS = 0x200

#: Kind, as /proc/PID/ns spells it, → clone flag. Kinds that `pin` can make: net, ipc, uts.
KINDS = {
    "mnt": CLONE_NEWNS, "cgroup": CLONE_NEWCGROUP, "uts": CLONE_NEWUTS, "ipc": CLONE_NEWIPC,
    "user": CLONE_NEWUSER, "pid": CLONE_NEWPID, "net": CLONE_NEWNET,
}
_PINNABLE = ("net", "ipc", "uts")
#: Answers with the kind of a namespace file, and with ENOTTY for any other (linux/nsfs.h).
_NS_GET_NSTYPE = 0xB703
_UNSHARE = "/usr/bin/unshare"
_CAT = "/bin/cat"


def pin(kind: str, path: str | os.PathLike[str], *, hostname: str = "", userns: int = -1) -> None:
    """Make a namespace of `kind` ("net", "ipc", "uts") and keep it as a bind mount on the file `path`.

    The file is created (mode 0600) and must not exist yet (`FileExistsError`). A new network
    namespace has its loopback interface up. `hostname` is set in a new UTS namespace. With
    `userns` (a descriptor) the new namespace belongs to that user namespace.
    Whatever fails, neither file nor mount stays.
    """
    if kind not in _PINNABLE:
        raise ValueError(f"namespaces of kind {kind!r} cannot be pinned by a thread")
    target = os.fspath(path)
    os.close(os.open(target, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

    def make() -> None:
        if userns >= 0:
            _enter_for_thread(userns, CLONE_NEWUSER)
        libc.unshare(KINDS[kind])
        if kind == "uts" and hostname:
            _set_hostname(hostname)
        if kind == "net":
            loopback_up()
        if userns < 0:
            mounts.mount(f"/proc/thread-self/ns/{kind}", target, "", mounts.MS_BIND)

    try:
        if userns < 0:
            mounts.on_thread(make)
        else:
            _pin_in_user_namespace(kind, target, userns, hostname)
    except BaseException:
        mounts.unmount_all(target)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)
        raise


def _enter_for_thread(fd: int, kind: int) -> None:
    libc.setns(fd, kind)


def _set_hostname(name: str) -> None:
    import socket

    socket.sethostname(name)


def _pin_in_user_namespace(kind: str, target: str, userns: int, hostname: str) -> None:
    """Through helper programs: only a process with one thread may enter a user namespace."""
    letter = {"net": "--net", "ipc": "--ipc", "uts": "--uts"}[kind]
    arguments = ["/usr/bin/nsenter", f"--user=/proc/self/fd/{userns}", _UNSHARE, letter, _CAT]
    with _helper(arguments, keep=(userns,)) as pid:
        ours = os.stat(f"/proc/self/ns/{kind}").st_ino
        _await_change(pid, kind, ours)
        source = f"/proc/{pid}/ns/{kind}"
        mounts.mount(source, target, "", mounts.MS_BIND)
    if kind == "uts" and hostname:
        call_in(target, CLONE_NEWUTS, lambda: _set_hostname(hostname))
    if kind == "net":
        call_in(target, CLONE_NEWNET, loopback_up)


def unpin(path: str | os.PathLike[str]) -> None:
    """Let go of a pinned namespace: the mount and its file; both may be gone already."""
    mounts.unmount_all(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def is_pinned(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a namespace file and not the plain file that a crash or a reboot leaves (ioctl_ns(2))."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return bool(fcntl.ioctl(fd, _NS_GET_NSTYPE))
    except OSError:
        return False
    finally:
        os.close(fd)


def call_in(path: str | os.PathLike[str], kind: int, call: Callable[[], T]) -> T:
    """The result of `call`, run on a thread inside the namespace at `path`. Blocks."""
    result: list[T] = []
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def enter() -> None:
        libc.setns(fd, kind)
        result.append(call())

    try:
        mounts.on_thread(enter)
    finally:
        os.close(fd)
    return result[0]


def in_netns(path: str | os.PathLike[str], call: Callable[[], T]) -> T:
    """The result of `call`, run inside the network namespace at `path`.

    A socket made there stays in that namespace wherever it is used later. Blocks.
    """
    return call_in(path, CLONE_NEWNET, call)


_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


def loopback_up() -> None:
    """Bring up `lo` in the calling thread's network namespace (netdevice(7))."""
    import fcntl
    import socket
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        request = struct.pack("16sH22x", b"lo", 0)
        flags = struct.unpack("16sH22x", fcntl.ioctl(control, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))


@contextlib.contextmanager
def _helper(arguments: Sequence[str], keep: Sequence[int] = ()) -> Iterator[int]:
    """A small program that waits on its standard input; ends and is reaped with the block."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    actions: list[tuple[int, ...]] = [(os.POSIX_SPAWN_DUP2, reader, 0)]
    actions += [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in keep]
    try:
        pid = os.posix_spawn(arguments[0], list(arguments), {"PATH": "/usr/bin:/bin"}, file_actions=actions)
    finally:
        os.close(reader)
    try:
        yield pid
    finally:
        os.close(writer)
        os.waitpid(pid, 0)


def _await_change(pid: int, kind: str, ours: int) -> None:
    """Wait until the helper left our namespace; `ChildProcessError` when it ended before."""
    watch = os.pidfd_open(pid)
    try:
        for _ in range(2000):
            try:
                if os.stat(f"/proc/{pid}/ns/{kind}").st_ino != ours:
                    return
            except OSError as error:
                raise ChildProcessError(f"helper for a {kind} namespace ended early") from error
            if select.select([watch], [], [], 0.005)[0]:
                raise ChildProcessError(f"helper for a {kind} namespace ended early")
        raise TimeoutError(f"helper made no {kind} namespace within 10 s")
    finally:
        os.close(watch)


def new_user_namespace(uids: Sequence[tuple[int, int, int]], gids: Sequence[tuple[int, int, int]]) -> int:
    """A descriptor of a fresh user namespace with maps of (inside, outside, count) (user_namespaces(7))."""
    ours = os.stat("/proc/self/ns/user").st_ino
    with _helper([_UNSHARE, "--user", _CAT]) as pid:
        _await_change(pid, "user", ours)
        for name, maps in (("uid_map", uids), ("gid_map", gids)):
            text = "".join(f"{inside} {outside} {count}\n" for inside, outside, count in maps)
            Path(f"/proc/{pid}/{name}").write_text(text)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


def same_namespace(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Whether two namespace files are one namespace."""
    a, b = os.stat(first), os.stat(second)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
