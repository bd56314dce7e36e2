"""The default seccomp profile and profiles from files.

The default is the profile that containers under containerd get: everything fails with EPERM but
the calls listed here, some of them only with a capability or an argument. Held as words, one line
for each family, so that a reader can check it against syscalls(2).
"""

from __future__ import annotations

import errno
import os
import struct

from supervisord_ctr.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

ENOSYS = 38
_AF_ALG = 38
_AF_VSOCK = 40
#: Flags of clone(2) that make namespaces: NEWNS NEWCGROUP NEWUTS NEWIPC NEWUSER NEWPID NEWNET.
_CLONE_NEW = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000

_ALLOWED = """
accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg recvmmsg_time64 recvmsg
send sendmmsg sendmsg sendto setsockopt shutdown socketcall socketpair

access chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64
fadvise64_64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync flock fstat
fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 getcwd getdents getdents64 ioctl lchown lchown32 link
linkat _llseek lseek lstat lstat64 mkdir mkdirat mknod mknodat name_to_handle_at newfstatat open openat openat2 pipe
pipe2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv rename renameat
renameat2 rmdir sendfile sendfile64 splice stat stat64 statfs statfs64 statx symlink symlinkat sync sync_file_range
syncfs tee truncate truncate64 umask unlink unlinkat utime utimensat utimensat_time64 utimes futimesat vmsplice write
writev listmount statmount

fgetxattr flistxattr fremovexattr fsetxattr getxattr getxattrat lgetxattr listxattr listxattrat llistxattr
lremovexattr lsetxattr removexattr removexattrat setxattr setxattrat

epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2
fanotify_mark inotify_add_watch inotify_init inotify_init1 inotify_rm_watch _newselect poll ppoll ppoll_time64
pselect6 pselect6_time64 select signalfd signalfd4 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime
timerfd_settime64

io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit ioprio_get ioprio_set

brk cachestat madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap mmap2
mprotect mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_mrelease
remap_file_pages

execve execveat exit exit_group fork getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getpgid
getpgrp getpid getppid getpriority getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid gettid
getuid getuid32 kill pidfd_open pidfd_send_signal prctl prlimit64 setfsgid setfsgid32 setfsuid setfsuid32 setgid
setgid32 setgroups setgroups32 setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32
setreuid setreuid32 setrlimit setsid setuid setuid32 tgkill tkill ugetrlimit vfork wait4 waitid waitpid capget capset

futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake get_robust_list set_robust_list get_thread_area
set_thread_area set_tid_address rseq restart_syscall getcpu

sched_getaffinity sched_getattr sched_getparam sched_get_priority_max sched_get_priority_min sched_getscheduler
sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler
sched_yield

pause rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
rt_sigtimedwait_time64 rt_tgsigqueueinfo sigaltstack sigprocmask sigreturn

adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64
clock_nanosleep clock_nanosleep_time64 getitimer gettimeofday nanosleep setitimer time timer_create timer_delete
timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 times

ipc mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink
msgctl msgget msgrcv msgsnd semctl semget semop semtimedop semtimedop_time64 shmat shmctl shmdt shmget

getrandom landlock_add_rule landlock_create_ruleset landlock_restrict_self lsm_get_self_attr lsm_list_modules
lsm_set_self_attr seccomp sysinfo uname uretprobe
"""

_BY_ARCH: dict[str, str] = {
    "ppc64le": "sync_file_range2 swapcontext",
    "aarch64": "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls",
    "armv7l": "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls",
    "x86_64": "arch_prctl modify_ldt",
    "i686": "modify_ldt",
    "s390x": "s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr",
    "riscv64": "riscv_flush_icache riscv_hwprobe",
}

_BY_CAPABILITY: dict[str, str] = {
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_SYS_ADMIN": "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr "
                     "move_mount open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog "
                     "umount umount2 unshare",
    "CAP_SYS_BOOT": "reboot",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "delete_module init_module finit_module",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace",
    "CAP_SYS_RAWIO": "iopl ioperm",
    "CAP_SYS_TIME": "settimeofday stime clock_settime clock_settime64",
    "CAP_SYS_TTY_CONFIG": "vhangup",
    "CAP_SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    "CAP_SYSLOG": "syslog",
    "CAP_BPF": "bpf",
    "CAP_PERFMON": "perf_event_open",
}

_ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"),
    "aarch64": ("SCMP_ARCH_ARM", "SCMP_ARCH_AARCH64"),
    "s390x": ("SCMP_ARCH_S390", "SCMP_ARCH_S390X"),
    "riscv64": ("SCMP_ARCH_RISCV64",),
    "loongarch64": ("SCMP_ARCH_LOONGARCH64",),
    "mips64": ("SCMP_ARCH_MIPS", "SCMP_ARCH_MIPS64", "SCMP_ARCH_MIPS64N32"),
}

#: An ELF file of 32 bits, little-endian, with one program header (elf(5)).
_HEADER = struct.Struct("<16sHHIIIIIHHHHHH")
_SEGMENT = struct.Struct("<8I")
_ET_EXEC, _PT_INTERP, _EM_X86_64 = 2, 3, 62
#: Whether the kernel runs 32-bit programs for a machine, once that was asked.
_runs: dict[int, bool] = {}

#: Values of personality(2) that change nothing that matters: Linux, UNAME26, LINUX32 and asking.
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)


def _allow(names: str | list[str], *conditions: tuple[int, int, int, str]) -> dict[str, Any]:
    listed = names.split() if isinstance(names, str) else names
    rule: dict[str, Any] = {"names": listed, "action": "SCMP_ACT_ALLOW"}
    if conditions:
        rule["args"] = [
            {"index": index, "value": value, "valueTwo": second, "op": op} if second or op == "SCMP_CMP_MASKED_EQ"
            else {"index": index, "value": value, "op": op}
            for index, value, second, op in conditions
        ]
    return rule


def runs_x32(machine: int = _EM_X86_64) -> bool:
    """Whether this kernel runs x32 programs (32-bit ELF files for `machine`); True where that cannot be found out.

    Asked with execve(2) of a program whose interpreter does not exist. The kernel looks at a file's class and
    machine first and fails with ENOEXEC when it cannot run them; only then it looks for the interpreter, which
    fails with ENOENT. Either way nothing has been replaced yet, and nothing runs: also no handler of binfmt_misc,
    which cannot be given a file that closes on exec.
    """
    if (known := _runs.get(machine)) is not None:
        return known
    interpreter = b"/proc/no such interpreter\0"
    at = _HEADER.size + _SEGMENT.size
    sizes = _HEADER.size, _SEGMENT.size, 1, 0, 0, 0
    image = _HEADER.pack(b"\x7fELF\1\1\1", _ET_EXEC, machine, 1, at, _HEADER.size, 0, 0, *sizes)
    image += _SEGMENT.pack(_PT_INTERP, at, 0, 0, len(interpreter), len(interpreter), 4, 1) + interpreter
    try:
        file = os.memfd_create("x32", os.MFD_CLOEXEC)
    except OSError:
        return True
    try:
        os.write(file, image)
        os.execve(file, ["x32"], {})
    except OSError as error:
        _runs[machine] = error.errno != errno.ENOEXEC
    finally:
        os.close(file)
    return _runs[machine]


def default_profile(capabilities: Iterable[str], arch: str = "") -> dict[str, Any]:
    """The `linux.seccomp` object for a process with these bounding `capabilities`.

    `arch` is a machine name as uname(2) gives it. Without it the profile is this machine's, and leaves out
    an architecture that this kernel cannot run: the filter for x32 doubles what runc takes to make all of them.
    """
    machine = arch or os.uname().machine
    architectures = list(_ARCHITECTURES.get(machine, ()))
    if not arch and machine == "x86_64" and not runs_x32():
        architectures.remove("SCMP_ARCH_X32")
    held = list(capabilities)
    rules = [_allow(_ALLOWED)]
    # Three separate ranges: two "not equal" conditions in one rule would be joined by OR in libseccomp
    # and allow both of the families that are kept out (AF_ALG, AF_VSOCK).
    rules.append(_allow("socket", (0, _AF_ALG, 0, "SCMP_CMP_LT")))
    rules.append(_allow("socket", (0, _AF_ALG + 1, 0, "SCMP_CMP_EQ")))
    rules.append(_allow("socket", (0, _AF_VSOCK, 0, "SCMP_CMP_GT")))
    rules.extend(_allow("personality", (0, value, 0, "SCMP_CMP_EQ")) for value in _PERSONALITIES)
    # Safe since 4.8, where seccomp filters run after ptrace's changes; older kernels are not supported.
    rules.append(_allow("process_vm_readv process_vm_writev ptrace"))
    if machine in _BY_ARCH:
        rules.append(_allow(_BY_ARCH[machine]))
    rules.extend(_allow(_BY_CAPABILITY[name]) for name in held if name in _BY_CAPABILITY)
    if "CAP_SYS_ADMIN" not in held:
        flags_at = 1 if machine == "s390x" else 0
        rules.append(_allow("clone", (flags_at, _CLONE_NEW, 0, "SCMP_CMP_MASKED_EQ")))
        # clone3 hides its flags behind a pointer; ENOSYS makes libc fall back to clone.
        rules.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS})
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": architectures,
        "syscalls": rules,
    }


def load_profile(path: str | os.PathLike[str], *, limit: int = 4 << 20) -> dict[str, Any]:
    """The `linux.seccomp` object in a JSON file, at most `limit` bytes long.

    Raises `InvalidArgument` when it is not there, too large or not an object with a default action.
    """
    import json

    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InvalidArgument(f"cannot load seccomp profile {os.fspath(path)}: {error.strerror}") from error
    if len(data) > limit:
        raise InvalidArgument(f"seccomp profile {os.fspath(path)} is larger than {limit} bytes")
    try:
        profile = json.loads(data)
    except ValueError as error:
        raise InvalidArgument(f"seccomp profile {os.fspath(path)} is not JSON: {error}") from error
    if not isinstance(profile, dict) or not isinstance(profile.get("defaultAction"), str):
        raise InvalidArgument(f"seccomp profile {os.fspath(path)} states no default action")
    return profile
