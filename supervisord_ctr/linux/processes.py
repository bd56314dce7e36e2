"""Processes: who they are beyond the reuse of their number, how they ended, what they may do.

Owns prctl(2), pidfd and /proc/PID facts. Does not start programs and does not know containers.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import signal
import socket
import struct
from collections.abc import Iterable, Iterator

from supervisord_ctr.linux import libc

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_SECCOMP_MODE_FILTER = 2
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CAPABILITY_VERSION_3 = 0x20080522

#: prctl(2) with a small number or a text: a function object of its own, which asks no types (each would be a page more
#: of a fork's own).
_prctl_plain = libc.libc["prctl"]
_WRITING = os.O_WRONLY | os.O_CLOEXEC


def set_child_subreaper(enabled: bool = True) -> None:
    """Become the parent of orphaned descendants (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    libc.check(_prctl_plain(PR_SET_CHILD_SUBREAPER, int(enabled), 0, 0, 0))


def set_parent_death_signal(number: int) -> None:
    """Be sent `number` when the thread that forked us ends; 0 turns it off."""
    libc.prctl(PR_SET_PDEATHSIG, number)


def set_name(name: str) -> None:
    """The name that /proc/PID/comm shows; cut at 15 bytes."""
    libc.check(_prctl_plain(PR_SET_NAME, name.encode()[:15], 0, 0, 0))


def set_title(*words: str) -> None:
    """The arguments that /proc/PID/cmdline, and so ps, shows from now on; cut at the room that the first ones took.

    The kernel shows what lies where execve(2) put the arguments, zero bytes behind it included; when the last
    byte there is not zero, it shows one text up to the first zero byte instead (proc(5)), which is left alone here.
    """
    write_title("\0".join(words).encode())


def write_title(words: bytes) -> None:
    """The same, with zero bytes between the words."""
    start, end = argument_area()
    if end - start < 2:
        return
    text = words[:end - start - 1].ljust(end - start, b"\0")
    try:
        memory = os.open("/proc/self/mem", _WRITING)
    except OSError:  # in another user namespace
        ctypes.memmove(start, text, len(text))
        return
    try:
        os.pwrite(memory, text, start)
    finally:
        os.close(memory)


@contextlib.contextmanager
def kept_title() -> Iterator[None]:
    """What is done to the title inside is undone."""
    start, end = argument_area()
    before = ctypes.string_at(start, end - start)
    try:
        yield
    finally:
        ctypes.memmove(start, before, len(before))


@functools.cache
def argument_area() -> tuple[int, int]:
    """Where `set_title` writes: addresses of the first byte of our arguments and of the byte after the last.

    (0, 0) when they are not told. A fork inherits the answer.
    """
    try:
        start, end = (int(field) for field in stat_fields(os.getpid())[45:47])
    except (OSError, ValueError):
        return 0, 0
    return start, end


def set_no_new_privileges() -> None:
    """execve(2) grants nothing any more; cannot be undone."""
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1)


def set_dumpable(enabled: bool) -> None:
    """Whether others of our uid may trace us and read our /proc files."""
    libc.prctl(PR_SET_DUMPABLE, int(enabled))


class _SockFilter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_uint16), ("filter", ctypes.POINTER(_SockFilter)))


def allow_only_syscalls(numbers: Iterable[int], *, otherwise_errno: int = errno.EPERM) -> None:
    """Install a seccomp filter (seccomp(2)): listed numbers run, all others fail with the errno.

    Needs `set_no_new_privileges` first. Numbers are those of this machine's native architecture;
    a call by another one (int 0x80 on x86-64) kills the process.
    """
    load, jump_equal, give = 0x20, 0x15, 0x06
    listed = sorted(set(numbers))
    program = [(load, 0, 0, 4), (jump_equal, 1, 0, _AUDIT_ARCH[os.uname().machine]), (give, 0, 0, 0x80000000)]
    program += [(load, 0, 0, 0)]
    program += [(jump_equal, len(listed) - index, 0, number) for index, number in enumerate(listed)]
    program += [(give, 0, 0, 0x00050000 | otherwise_errno), (give, 0, 0, 0x7FFF0000)]
    array = (_SockFilter * len(program))(*[_SockFilter(*row) for row in program])
    libc.prctl(
        PR_SET_SECCOMP, _SECCOMP_MODE_FILTER,
        ctypes.cast(ctypes.byref(_SockFprog(len(program), array)), ctypes.c_void_p).value or 0,
    )


def drop_capabilities() -> None:
    """Give up every capability: bounding, ambient, inheritable, permitted and effective."""
    for number in range(64):
        try:
            libc.prctl(PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break
    with contextlib.suppress(OSError):
        libc.prctl(PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = bytes(24)
    libc.syscall(_SYS_CAPSET[os.uname().machine], header, data)


def send_signal(pid: int, start_time: int, number: int) -> bool:
    """Send a signal to exactly the process that `(pid, start_time)` names; False when it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if start_time and read_start_time(pid) != start_time:
            return False
        signal.pidfd_send_signal(fd, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on (state is 0, ppid 1, session 3, start time 19).

    `ProcessLookupError` when there is no such process.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(errno.ESRCH, "no such process", str(pid)) from None
    return text[text.rindex(b")") + 2:].decode("ascii").split()


def read_start_time(pid: int) -> int:
    """Clock ticks after boot at which `pid` started; 0 when it is gone.

    Together with the number it names a process beyond reuse of the number (within one boot).
    """
    try:
        return int(stat_fields(pid)[19])
    except ProcessLookupError:
        return 0


def is_alive(pid: int, start_time: int = 0) -> bool:
    """Whether the process runs (a zombie does not); with `start_time`, whether it is still the same."""
    try:
        fields = stat_fields(pid)
    except ProcessLookupError:
        return False
    return fields[0] not in ("Z", "X") and (not start_time or int(fields[19]) == start_time)


def read_oom_score_adj(pid: int) -> int:
    """oom_score_adj (proc(5))."""
    with open(f"/proc/{pid}/oom_score_adj", encoding="ascii") as file:
        return int(file.read())


def set_oom_score_adj(pid: int, value: int) -> int:
    """Set oom_score_adj as near to `value` as the kernel allows; returns what is in force.

    Without CAP_SYS_RESOURCE it cannot go below its lowest earlier value: it then stays where it is.
    """
    path = f"/proc/{pid}/oom_score_adj"
    wanted = max(-1000, min(1000, value))
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(PermissionError):
            os.write(fd, b"%d" % wanted)
            return wanted
        return int(os.pread(fd, 32, 0))
    finally:
        os.close(fd)


def peer_credentials(connection: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the process that connected (unix(7), SO_PEERCRED)."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", data)
    return pid, uid, gid


def is_trusted_peer(connection: socket.socket) -> bool:
    """Whether root or our own user is at the other end."""
    return peer_credentials(connection)[1] in (0, os.geteuid())


def exit_of(wait_status: int) -> tuple[int, int]:
    """(exit status, signal) of a wait(2) status: the status is 128 + signal after a signal."""
    code = os.waitstatus_to_exitcode(wait_status)
    return (code, 0) if code >= 0 else (128 - code, -code)


def children(pid: int) -> list[int]:
    """The processes whose parent `pid` is, zombies included, in ascending order.

    Found by looking at every process. `/proc/PID/task/TID/children` is faster, but leaves some out when others end
    while it is read (proc(5)).
    """
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(ProcessLookupError):
                if int(stat_fields(int(name))[1]) == pid:
                    found.append(int(name))
    return sorted(found)


def children_of(pids: Iterable[int], root: int) -> list[int]:
    """Those of `pids` that descend from `root` or share its session, `root` itself first."""
    parents: dict[int, int] = {}
    sessions: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            fields = stat_fields(pid)
            parents[pid], sessions[pid] = int(fields[1]), int(fields[3])
    found = [root]
    for pid in parents:
        ancestor, steps = pid, 0
        while ancestor in parents and ancestor != root and steps < 4096:
            ancestor, steps = parents[ancestor], steps + 1
        if pid != root and (ancestor == root or sessions[pid] == root):
            found.append(pid)
    return found
