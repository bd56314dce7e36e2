"""The process that holds a pod's PID namespace when its containers share one (design D7).

Number 1 of a new PID namespace: it reaps and does nothing else. A fork of the zygote, stripped before it
serves: private mount namespace with an empty read-only root, no descriptors, no capabilities,
no_new_privs, not dumpable, a seccomp filter that leaves waiting and reaping. Where SELinux is in force, it has
the label of its pod, whose containers see it as number 1.

It must not be able to do anything useful for somebody who takes it over, so what a new feature would
need here is a reason against the feature.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from supervisord_ctr.linux import cgroups, libc, mounts, namespaces, processes
from supervisord_ctr.model import Mount

#: rt_sigreturn rt_sigprocmask rt_sigaction rt_sigtimedwait wait4 exit exit_group futex mmap munmap brk madvise
#: getpid gettid restart_syscall clock_nanosleep, and write and close for the report: no descriptor is left after it
_ALLOWED = {
    "x86_64": (15, 14, 13, 128, 61, 60, 231, 202, 9, 11, 12, 28, 39, 186, 219, 230, 1, 3),
    "aarch64": (139, 135, 134, 137, 260, 93, 94, 98, 222, 215, 214, 233, 172, 178, 128, 115, 64, 57),
}
_SIGNALS = frozenset({signal.SIGCHLD, signal.SIGTERM, signal.SIGINT})


@dataclass(frozen=True)
class Labels:
    """SELinux labels of the process and of its root; "" is none."""

    process: str = ""
    mount: str = ""


def become(
    enter: Sequence[tuple[str, int]], hostname: str, groups: Sequence[str], labels: Labels, report: int
) -> None:
    """Turn the calling process (a fresh fork with one thread) into a parent of the pause process.

    Enters the namespaces, joins the cgroups, forks once into a new PID namespace, writes the pid (as the
    caller's namespace numbers it) to the descriptor `report` once the process is stripped, and ends.
    """
    cgroups.join(groups, os.getpid())
    opened = [(os.open(path, os.O_RDONLY | os.O_CLOEXEC), kind) for path, kind in enter if path]
    for fd, kind in opened:
        libc.setns(fd, kind)
        os.close(fd)
        if kind == namespaces.CLONE_NEWUSER:
            # Root of the pod's own user namespace from here on: the new PID namespace belongs to it.
            os.setgroups([])
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
    if hostname and not any(kind == namespaces.CLONE_NEWUTS and path for path, kind in enter):
        import socket

        libc.unshare(namespaces.CLONE_NEWUTS)
        socket.sethostname(hostname)
    libc.unshare(namespaces.CLONE_NEWPID)
    ready, stripped = os.pipe2(os.O_CLOEXEC)
    pid = libc.fork()
    if pid == 0:
        try:
            label = _open_label() if labels.process else -1
            _strip(labels.mount, {stripped, label})
            _serve(stripped, label, labels.process)
        except BaseException as error:
            os.write(stripped, f"{type(error).__name__}: {error}".encode()[:400])
        os._exit(1)
    os.close(stripped)
    said = b""
    while part := os.read(ready, 512):  # to the end: it has let go of its last descriptor then
        said += part
    os.write(report, b"%d" % pid if said == b"ok" else b"error " + (said or b"the pause process ended early"))
    os._exit(0)


def _open_label() -> int:
    """What the label of this process is written to, opened while there is a /proc."""
    return os.open("/proc/thread-self/attr/current", os.O_WRONLY | os.O_CLOEXEC)


def _strip(mount_label: str, keep: Iterable[int]) -> None:
    os.setsid()
    processes.set_name("pctr-pause")
    processes.set_title("pctr-pause")
    processes.set_parent_death_signal(0)
    _empty_root(mount_label)
    first = 0
    for fd in sorted(fd for fd in keep if fd >= 0):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, 1 << 16)
    os.setgroups([])
    processes.set_no_new_privileges()
    processes.drop_capabilities()


def _empty_root(label: str) -> None:
    """An empty, read-only file system as the only one (pivot_root(2), "pivot_root(".", ".")")."""
    libc.unshare(namespaces.CLONE_NEWNS | namespaces.CLONE_FS)
    mounts.mount("", "/", "", mounts.MS_REC | mounts.MS_PRIVATE)
    flags = mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC
    root = Mount("tmpfs", "tmpfs", ("nosuid", "nodev", "noexec", "size=4k", "nr_inodes=2", "mode=555"))
    mounts.mount_all(mounts.with_context((root,), label), "/tmp")
    os.chdir("/tmp")
    pivot = {"x86_64": 155, "aarch64": 41}[os.uname().machine]
    libc.syscall(pivot, b".", b".", path="/tmp")
    mounts.umount(".", mounts.MNT_DETACH)
    os.chdir("/")
    mounts.mount("", "/", "", flags | mounts.MS_REMOUNT | mounts.MS_RDONLY | mounts.MS_BIND)


def _serve(report: int, label_fd: int, label: str) -> None:
    """Say that all is done, lock the door, reap for ever. SIGTERM and SIGINT end the namespace."""
    wanted = label.encode()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    allowed = _ALLOWED[os.uname().machine]
    wait, reap, leave = signal.sigwaitinfo, os.waitpid, os._exit
    processes.set_dumpable(False)
    processes.allow_only_syscalls(allowed)
    os.write(report, b"ok")
    if label_fd >= 0:
        # Last, since under its label it may not write to the pipe; a policy that refuses keeps it as it was.
        try:
            os.write(label_fd, wanted)
        except OSError:
            pass
        os.close(label_fd)
    os.close(report)
    while True:
        number = wait(_SIGNALS).si_signo
        if number != signal.SIGCHLD:
            leave(0)
        try:
            while reap(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            continue
