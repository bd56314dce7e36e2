"""A pod's environment: its pinned namespaces, its sysctls and its files, made and taken down.

Owns the folder of a pod below the state folder and everything mounted in it. All calls block (run
them on the `io` threads), are safe to repeat, and leave nothing behind when they fail. No process
is started here: a shared PID namespace is `pause.py`'s, the network `network.py`'s.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from supervisord_ctr import errors
from supervisord_ctr.linux import mounts, namespaces
from supervisord_ctr.linux.idmaps import IdMap
from supervisord_ctr.names import check_identifier
from supervisord_ctr.sandbox import sysctls
from supervisord_ctr.sandbox.files import (
    Dns,
    PodFiles,
    check_hostname,
    mount_shm,
    require_host_shm,
    unmount_shm,
    write_files,
)


@dataclass(frozen=True)
class Wanted:
    """What a pod's environment is made of; a namespace that is not `own` is the host's."""

    id: str
    hostname: str = ""
    dns: Dns | None = None
    own_network: bool = True
    own_ipc: bool = True
    own_uts: bool = True
    sysctls: Mapping[str, str] = field(default_factory=dict)
    uids: tuple[IdMap, ...] = ()
    gids: tuple[IdMap, ...] = ()

    @property
    def own_user(self) -> bool:
        """Whether the pod has a user namespace."""
        return bool(self.uids)

    def check(self) -> None:
        """Raise `InvalidArgument` for what cannot be made, before anything is."""
        check_identifier(self.id, "sandbox")
        check_hostname(self.hostname)
        if self.dns is not None:
            self.dns.text()
        own = {"ipc"} if self.own_ipc else set()
        if self.own_network:
            own.add("network")
        if self.own_uts:
            own.add("uts")
        sysctls.check(self.sysctls, frozenset(own))


class Environments:
    """The environments below one folder, by pod ID."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def files(self, pod_id: str) -> PodFiles:
        """Where the pod's files lie."""
        return PodFiles(self._folder / check_identifier(pod_id, "sandbox"))

    def namespace(self, pod_id: str, kind: str) -> Path:
        """Where the pod's namespace of `kind` ("net", "ipc", "uts", "user") is pinned."""
        return self.files(pod_id).folder / "ns" / kind

    def make_network_namespace(self, wanted: Wanted) -> None:
        """First step: the folder, the user namespace and the network namespace, so that CNI can begin."""
        folder = self.files(wanted.id).folder
        (folder / "ns").mkdir(mode=0o711, parents=True, exist_ok=True)
        if wanted.own_user:
            self._pin_user(wanted)
        if wanted.own_network:
            self._pin(wanted, "net")
            self._write_sysctls(wanted, "network", "net", namespaces.CLONE_NEWNET)

    def make_rest(self, wanted: Wanted) -> None:
        """Second step: IPC and UTS namespaces, sysctls, files and /dev/shm."""
        if wanted.own_ipc:
            self._pin(wanted, "ipc")
            self._write_sysctls(wanted, "ipc", "ipc", namespaces.CLONE_NEWIPC)
        if wanted.own_uts:
            self._pin(wanted, "uts")
            self._write_sysctls(wanted, "uts", "uts", namespaces.CLONE_NEWUTS)
        files = self.files(wanted.id)
        write_files(files, wanted.hostname, wanted.dns)
        if wanted.own_ipc:
            mount_shm(files, owner=wanted.uids[0].outside if wanted.own_user else 0)
        else:
            require_host_shm()

    def _pin_user(self, wanted: Wanted) -> None:
        path = self.namespace(wanted.id, "user")
        if namespaces.is_pinned(path):
            return
        try:
            fd = namespaces.new_user_namespace(
                [(entry.inside, entry.outside, entry.size) for entry in wanted.uids],
                [(entry.inside, entry.outside, entry.size) for entry in wanted.gids],
            )
        except OSError as error:
            raise errors.from_os_error(error, f"failed to make the user namespace of sandbox {wanted.id}:") from error
        try:
            path.touch(mode=0o600)
            mounts.mount(f"/proc/self/fd/{fd}", str(path), "", mounts.MS_BIND)
        finally:
            os.close(fd)

    def _pin(self, wanted: Wanted, kind: str) -> None:
        path = self.namespace(wanted.id, kind)
        userns = -1
        if wanted.own_user:
            userns = os.open(self.namespace(wanted.id, "user"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            hostname = wanted.hostname if kind == "uts" else ""
            try:
                namespaces.pin(kind, path, hostname=hostname, userns=userns)
            except FileExistsError:
                if not namespaces.is_pinned(path):
                    path.unlink()
                    namespaces.pin(kind, path, hostname=hostname, userns=userns)
        except OSError as error:
            doing = f"failed to make the {kind} namespace of sandbox {wanted.id}"
            if error.errno is None:
                raise errors.FailedPrecondition(f"{doing}: {error}", kind="sandbox", key=wanted.id) from error
            raise errors.from_os_error(error, doing) from error
        finally:
            if userns >= 0:
                os.close(userns)

    def _write_sysctls(self, wanted: Wanted, belongs: str, kind: str, flag: int) -> None:
        values = {name: value for name, value in wanted.sysctls.items() if sysctls.namespace_of(name) == belongs}
        if values:
            namespaces.call_in(self.namespace(wanted.id, kind), flag, lambda: sysctls.write(values))

    def intact(self, wanted: Wanted) -> bool:
        """Whether every namespace of the pod is still there (a reboot takes them)."""
        kinds = [
            kind for kind, own in (
                ("net", wanted.own_network), ("ipc", wanted.own_ipc), ("uts", wanted.own_uts), ("user", wanted.own_user)
            ) if own
        ]
        if not self.files(wanted.id).folder.is_dir():
            return False
        pinned = {entry.target for entry in mounts.mounts_below(self.files(wanted.id).folder) if entry.fstype == "nsfs"}
        return all(os.path.realpath(self.namespace(wanted.id, kind)) in pinned for kind in kinds)

    def network_is_open(self, pod_id: str) -> bool:
        """Whether the pod's network namespace is there."""
        return namespaces.is_pinned(self.namespace(pod_id, "net"))

    def drop(self, pod_id: str) -> None:
        """Let go of namespaces and /dev/shm; the files stay, since containers that ended still name them."""
        unmount_shm(self.files(pod_id))
        for kind in ("net", "ipc", "uts", "user"):
            namespaces.unpin(self.namespace(pod_id, kind))

    def remove(self, pod_id: str) -> None:
        """Take everything down; what is gone already is no error."""
        files = self.files(pod_id)
        if _remove_dropped(files):
            return
        folder = files.folder
        self.drop(pod_id)
        for entry in mounts.mounts_below(folder):
            mounts.unmount_all(entry.target)
        _remove_folder(folder)

    def known(self) -> list[str]:
        """IDs that have a folder, whatever is in it."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(entry.name for entry in os.scandir(self._folder) if entry.is_dir(follow_symlinks=False))
        return []


def _remove_dropped(files: PodFiles) -> bool:
    """Remove the folder of a pod of which `drop` left only the files; False when more is in it, or mounted there."""
    try:
        # A mount point is busy and a pinned namespace is an entry, so these go only when nothing is left.
        for empty in (files.folder / "ns", files.shm):
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(empty)
        for path in (files.hostname, files.hosts, files.resolv):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(files.folder)
    except OSError:
        return False
    return True


def _remove_folder(folder: Path) -> None:
    """Remove the folder of a pod; EBUSY of a mount that is just going away is left for the next pass."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise errors.from_os_error(error, "failed to remove") from error
        raise errors.Unavailable(f"{folder} is still in use", kind="path", key=str(folder)) from error
