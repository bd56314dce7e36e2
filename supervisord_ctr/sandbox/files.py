"""The files of a pod: `hostname`, `hosts`, `resolv.conf` and its `/dev/shm`.

Owns their content and where they lie. Everything that comes from a request is checked for control
bytes before it is written (S10). The kubelet mounts its own `/etc/hosts` over ours.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from supervisord_ctr.errors import FailedPrecondition, InvalidArgument
from supervisord_ctr.linux import mounts
from supervisord_ctr.model import Mount
from supervisord_ctr.names import check_line

#: Size of a pod's own /dev/shm in bytes, as elsewhere.
SHM_SIZE = 64 << 20


@dataclass(frozen=True)
class Dns:
    """What goes into resolv.conf."""

    servers: Sequence[str] = ()
    searches: Sequence[str] = ()
    options: Sequence[str] = ()

    def text(self) -> str:
        """The file; raises `InvalidArgument` for control bytes."""
        for word in (*self.servers, *self.searches, *self.options):
            check_line(word, "dns setting")
        lines: list[str] = []
        if self.searches:
            lines.append("search " + " ".join(self.searches))
        lines += [f"nameserver {server}" for server in self.servers]
        if self.options:
            lines.append("options " + " ".join(self.options))
        return "".join(line + "\n" for line in lines)


@dataclass(frozen=True)
class PodFiles:
    """Where the files of one pod lie, below the folder of the pod."""

    folder: Path

    @property
    def hostname(self) -> Path:
        """Becomes /etc/hostname."""
        return self.folder / "hostname"

    @property
    def hosts(self) -> Path:
        """Becomes /etc/hosts where the kubelet gives none."""
        return self.folder / "hosts"

    @property
    def resolv(self) -> Path:
        """Becomes /etc/resolv.conf."""
        return self.folder / "resolv.conf"

    @property
    def shm(self) -> Path:
        """Mount point of the pod's /dev/shm."""
        return self.folder / "shm"


def check_hostname(name: str) -> str:
    """Return `name` when the kernel and a line of a file take it; raises `InvalidArgument`."""
    check_line(name, "hostname")
    if len(name.encode()) > 64:
        raise InvalidArgument(f"hostname {name[:64]!r}… is longer than 64 bytes", kind="hostname", key=name)
    return name


def write_files(files: PodFiles, hostname: str, dns: Dns | None) -> None:
    """Write the three files; without `dns` the host's resolv.conf is copied. Blocking, a few kilobytes."""
    files.folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    _write(files.hostname, check_hostname(hostname or socket.gethostname()) + "\n")
    _write(files.hosts, _read(Path("/etc/hosts")))
    _write(files.resolv, _read(Path("/etc/resolv.conf")) if dns is None else dns.text())


def mount_shm(files: PodFiles, size: int = SHM_SIZE, owner: int = 0) -> None:
    """Mount the pod's /dev/shm; nothing happens when it is mounted."""
    files.shm.mkdir(mode=0o700, exist_ok=True)
    if not mounts.is_mountpoint(files.shm):
        options = ["nosuid", "nodev", "noexec", "mode=1777", f"size={size}"]
        if owner:
            options += [f"uid={owner}", f"gid={owner}"]
        mounts.mount_all([Mount("tmpfs", "shm", tuple(options))], files.shm)


def require_host_shm() -> None:
    """Raise `FailedPrecondition` when the host has no /dev/shm for pods that share its IPC namespace."""
    if not os.path.isdir("/dev/shm"):
        raise FailedPrecondition("host \"/dev/shm\" is not available for host ipc", kind="path", key="/dev/shm")


def unmount_shm(files: PodFiles) -> None:
    """Unmount the pod's /dev/shm; nothing happens when it is not mounted."""
    if files.shm.exists():
        mounts.unmount_all(files.shm)


def _write(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape") as handle:
        handle.write(text)
    os.chmod(path, 0o644)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
