"""Device nodes of the host as OCI device objects and cgroup rules.

Source: OCI runtime specification, config-linux.md, "Devices" and "Allowed Device list".
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import Any, NamedTuple

from supervisord_ctr.errors import InvalidArgument

#: Folders of /dev that a container has of its own, or that no container should have.
_SKIPPED = frozenset({"pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"})
_PERMISSIONS = frozenset("rwm")


class Device(NamedTuple):
    """One node: kind is "b", "c" or "p"."""

    path: str
    kind: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int

    def to_spec(self) -> dict[str, Any]:
        """An entry of `linux.devices`."""
        return {
            "path": self.path, "type": self.kind, "major": self.major, "minor": self.minor,
            "fileMode": self.mode, "uid": self.uid, "gid": self.gid,
        }

    def rule(self, access: str = "rwm") -> dict[str, Any]:
        """The entry of `linux.resources.devices` that allows it."""
        return {"allow": True, "type": self.kind, "major": self.major, "minor": self.minor, "access": access}


def from_path(path: str, *, follow: bool = False) -> Device:
    """The device at a host path; `InvalidArgument` when there is none or it is something else."""
    try:
        status = os.stat(path) if follow else os.lstat(path)
    except OSError as error:
        raise InvalidArgument(f"device {path}: {(error.strerror or '').lower()}", kind="device", key=path) from error
    kind = _kind(status.st_mode)
    if not kind:
        raise InvalidArgument(f"{path} is not a device node", kind="device", key=path)
    return Device(
        path, kind, os.major(status.st_rdev), os.minor(status.st_rdev), stat.S_IMODE(status.st_mode),
        status.st_uid, status.st_gid,
    )


def _kind(mode: int) -> str:
    if stat.S_ISBLK(mode):
        return "b"
    if stat.S_ISCHR(mode):
        return "c"
    return "p" if stat.S_ISFIFO(mode) else ""


def below(path: str, inside: str = "") -> list[Device]:
    """The device at `path`, or all in the folder `path`; `inside` is its path in the container."""
    if not os.path.isdir(path):
        device = from_path(path, follow=True)
        return [_renamed(device, inside or path)]
    found: list[Device] = []
    for entry in sorted(os.scandir(path), key=lambda item: item.name):
        target = os.path.join(inside, entry.name) if inside else entry.path
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in _SKIPPED:
                with contextlib.suppress(OSError):
                    found.extend(below(entry.path, target))
        elif entry.name != "console":
            with contextlib.suppress(InvalidArgument):
                device = from_path(entry.path)
                if device.kind != "p":
                    found.append(_renamed(device, target))
    return found


def _renamed(device: Device, path: str) -> Device:
    return Device(path, device.kind, device.major, device.minor, device.mode, device.uid, device.gid)


def host_devices() -> list[Device]:
    """Every device of the host's /dev, for privileged containers."""
    return below("/dev")


def parse(text: str) -> tuple[list[Device], str]:
    """`HOST[:INSIDE[:rwm]]`, as command lines write it, to the devices and their access."""
    parts = text.split(":")
    if not parts[0].startswith("/") or len(parts) > 3:
        raise InvalidArgument(f"invalid device {text!r}: want /path[:/path][:rwm]", kind="device", key=text)
    host, inside, access = parts[0], parts[0], "rwm"
    for part in parts[1:]:
        if part.startswith("/"):
            inside = part
        elif part and set(part) <= _PERMISSIONS:
            access = part
        else:
            raise InvalidArgument(f"invalid device {text!r}: want /path[:/path][:rwm]", kind="device", key=text)
    return below(host, inside), access
