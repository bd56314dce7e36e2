"""Linux capabilities by name: the default set, what the kernel knows, adding and dropping.

Names are upper case with the `CAP_` prefix, as the OCI runtime specification wants them. Inputs may
leave the prefix away and use any case. Source: capabilities(7).
"""

from __future__ import annotations

from supervisord_ctr.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: Every capability in the order of its bit, from linux/capability.h.
NAMES: tuple[str, ...] = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL",
    "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT",
    "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE",
    "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG",
    "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
)

#: What a container gets unless it asks for something else.
DEFAULT: tuple[str, ...] = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL",
    "CAP_AUDIT_WRITE",
)

_KNOWN = frozenset(NAMES)


def normalise(name: str) -> str:
    """`net_raw` and `CAP_NET_RAW` become `CAP_NET_RAW`; `InvalidArgument` for what no kernel knows."""
    upper = name.upper()
    full = upper if upper.startswith("CAP_") else f"CAP_{upper}"
    if full not in _KNOWN:
        raise InvalidArgument(f"unknown capability {name!r}", kind="capability", key=name)
    return full


def of_process(field: str = "CapEff", status: str = "/proc/self/status") -> tuple[str, ...]:
    """The capabilities of a mask in a `status` file (proc(5)): `CapEff`, `CapBnd`, `CapPrm` …"""
    with open(status, encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith(f"{field}:"):
                mask = int(line.split()[1], 16)
                return tuple(name for bit, name in enumerate(NAMES) if mask >> bit & 1)
    return ()


def current() -> tuple[str, ...]:
    """What a privileged container gets: the effective set of this process."""
    return of_process("CapEff")


def change(base: Iterable[str], *, add: Iterable[str] = (), drop: Iterable[str] = ()) -> list[str]:
    """`base` with `add` appended and `drop` taken away; "ALL" stands for every effective capability.

    An explicit name beats "ALL" of the other list: dropping ALL and adding one leaves just that one.
    """
    added, dropped = list(add), list(drop)
    all_added = any(name.upper() == "ALL" for name in added)
    all_dropped = any(name.upper() == "ALL" for name in dropped)
    plus = [normalise(name) for name in added if name.upper() != "ALL"]
    minus = {normalise(name) for name in dropped if name.upper() != "ALL"}
    start: Iterable[str] = base
    if all_dropped:
        start = ()
    elif all_added:
        start = current()
    result: list[str] = []
    for name in (*start, *plus):
        if name not in minus and name not in result:
            result.append(name)
    return result


def sets(names: Iterable[str]) -> dict[str, list[str]]:
    """The `process.capabilities` object: bounding, effective and permitted alike, nothing inheritable.

    The inheritable and ambient sets stay empty (S7): what is inheritable would survive into
    programs with file capabilities although the user was changed.
    """
    listed = list(names)
    return {"bounding": listed, "effective": list(listed), "permitted": list(listed)}
