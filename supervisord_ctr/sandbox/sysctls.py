"""Sysctls of a pod: which ones belong to its namespaces, and writing them there.

Only values that live in the IPC, network or UTS namespace may be set for a pod, because any other
would change the host; a value for a namespace that the pod shares with the host is refused for the
same reason. The list of prefixes is the one of runc's validator and of the kubelet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from supervisord_ctr.errors import InvalidArgument, from_os_error
from supervisord_ctr.names import check_line

_IPC_NAMES = frozenset({
    "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax",
    "kernel.shmmni", "kernel.shm_rmid_forced",
})


def namespace_of(name: str) -> str:
    """"ipc", "network" or "uts" for a sysctl; raises `InvalidArgument` when it belongs to no namespace."""
    dotted = normalise(name)
    if dotted in _IPC_NAMES or dotted.startswith("fs.mqueue."):
        return "ipc"
    if dotted.startswith("net."):
        return "network"
    if dotted in ("kernel.domainname", "kernel.hostname"):
        return "uts"
    raise InvalidArgument(f"sysctl {name!r} is not in a separate kernel namespace", kind="sysctl", key=name)


def normalise(name: str) -> str:
    """The dotted form; in the slash form dots belong to interface names ("net/ipv4/conf/eth0.1/forwarding")."""
    first = next((char for char in name if char in "./"), ".")
    if first == ".":
        return name
    return name.translate(str.maketrans("./", "/."))


def path_of(name: str) -> str:
    """The file below /proc/sys; raises `InvalidArgument` for names that would leave it."""
    check_line(name, "sysctl")
    parts = [part.replace("/", ".") for part in normalise(name).split(".")]
    if not all(parts) or ".." in parts:
        raise InvalidArgument(f"sysctl name {name!r} is not valid", kind="sysctl", key=name)
    return "/proc/sys/" + "/".join(parts)


def check(values: Mapping[str, str], own: frozenset[str]) -> None:
    """Raise `InvalidArgument` for a value that the namespaces `own` of the pod do not hold."""
    for name, value in values.items():
        path_of(name)
        check_line(value, f"value of sysctl {name}")
        kind = namespace_of(name)
        if kind not in own:
            raise InvalidArgument(
                f"sysctl {name!r} is not allowed in the host's {kind} namespace", kind="sysctl", key=name
            )


def write(values: Mapping[str, str]) -> None:
    """Write `values` in the namespaces of the calling thread. Raises the error class of the errno."""
    for name, value in values.items():
        try:
            fd = os.open(path_of(name), os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise from_os_error(error, f"failed to write sysctl {name} = {value!r}:") from error
