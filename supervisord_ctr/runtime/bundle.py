"""Bundles: the folder of a task, `<state>/tasks/<namespace>/<id>`, and what stands in it.

    config.json     the OCI spec, as the runtime reads it
    rootfs/         where the shim mounts the root file system
    work            link to `<root>/tasks/<namespace>/<id>`, which survives a reboot
    bootstrap.json  how to reach the shim: {"version", "address", "protocol"}
    address         the address alone, as shims of the v2 API read it
    runtime.json    who serves it: a `Record`
    shim-binary-path  the program of a foreign shim

Nothing here is fsynced: after a power cut no task runs. Names with a leading dot are being removed.
All calls block; callers use an executor.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from supervisord_ctr import errors, faults
from supervisord_ctr.linux import files, mounts
from supervisord_ctr.names import check_identifier

_MADE = faults.declare("runtime.bundle.made", "the bundle's folders and config.json exist, no shim was asked for")
_REMOVING = faults.declare("runtime.bundle.removing", "the task is gone from its shim, its bundle still exists")


@dataclass(frozen=True, slots=True)
class Record:
    """Who serves a task; enough to find or clean up after it without the database.

    `binary` is the program of a foreign shim, empty for ours. `pid` and `start_time` (field 22 of
    /proc/PID/stat) name the process of our own shim. `group` is the id whose shim it is, the
    sandbox's for containers of a pod. `oci_runtime` and `oci_root` are what the shim drives.
    """

    runtime: str
    binary: str = ""
    address: str = ""
    protocol: str = "ttrpc"
    version: int = 3
    pid: int = 0
    start_time: int = 0
    group: str = ""
    oci_runtime: str = ""
    oci_root: str = ""
    sandbox: bool = False


@dataclass(frozen=True, slots=True)
class Bundle:
    """One bundle; making the value touches nothing."""

    namespace: str
    id: str
    path: Path

    @property
    def rootfs(self) -> Path:
        """Where the root file system is mounted."""
        return self.path / "rootfs"

    @classmethod
    def create(
        cls, state: Path, root: Path, namespace: str, container: str, spec: bytes | None, *, gid: int = 0,
    ) -> Bundle:
        """Make the folders and write the spec; `AlreadyExists` when there is one.

        `gid` is the host's group of the container's root group in a user namespace: that group may
        pass (0710), nobody else (0700, S12).
        """
        check_identifier(container, "task id")
        check_identifier(namespace, "namespace")
        bundle = cls(namespace, container, state / namespace / container)
        work = root / namespace / container
        try:
            make_passable(bundle.path.parent)
            try:
                bundle.path.mkdir(mode=0o700)
            except FileExistsError:
                raise errors.AlreadyExists(
                    f"task {container}: bundle {bundle.path} already exists", kind="task", key=container
                ) from None
            try:
                if gid:
                    os.chown(bundle.path, -1, gid)
                    bundle.path.chmod(0o710)
                    let_pass(state.parent)
                make_passable(bundle.rootfs)
                make_passable(work.parent)
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(work)
                make_passable(work)
                os.symlink(work, bundle.path / "work")
                if spec is not None:
                    files.write_file(f"{bundle.path}/config.json", spec)
            except BaseException:
                bundle.delete()
                raise
        except OSError as error:
            raise errors.from_os_error(error, f"make bundle of task {container}") from error
        faults.point(_MADE)
        return bundle

    def write_record(self, record: Record) -> None:
        """Write how to reach the shim, before the shim makes anything.

        A foreign shim's program reads `bootstrap.json` and `address`, too; ours needs neither.
        """
        found = {name: getattr(record, name) for name in Record.__dataclass_fields__}
        files.write_file(f"{self.path}/runtime.json", json.dumps(found).encode())
        if record.binary:
            bootstrap = {"version": record.version, "address": record.address, "protocol": record.protocol}
            files.write_file(f"{self.path}/bootstrap.json", json.dumps(bootstrap).encode())
            files.write_file(f"{self.path}/shim-binary-path", record.binary.encode())
            if not os.path.exists(f"{self.path}/address"):
                files.write_file(f"{self.path}/address", record.address.encode())

    def read_record(self) -> Record | None:
        """What `write_record` wrote, the address alone when the rest is damaged; None when nothing is left of it."""
        found = _object(self.path / "runtime.json")
        if not found.get("address"):
            found = _object(self.path / "bootstrap.json")
        known = {key: value for key, value in found.items() if key in Record.__dataclass_fields__}
        return replace(Record(""), **known) if known.get("address") else None

    def spec(self) -> dict[str, Any]:
        """The spec in it, empty when there is none."""
        return _object(self.path / "config.json")

    def delete(self) -> None:
        """Unmount the root file system and remove the folders; may be repeated after any failure."""
        remove_all(self.withdraw())

    def withdraw(self) -> list[str]:
        """Unmount and free the names at once; returns the folders that are left to remove.

        A daemon that dies in between finds them by their leading dot.
        """
        faults.point(_REMOVING)
        path = str(self.path)
        left: list[str] = []
        try:
            with contextlib.suppress(FileNotFoundError):
                left.append(_hide(os.readlink(f"{path}/work")))
            if os.path.isdir(path):
                mounts.unmount_all(f"{path}/rootfs")
                left.append(_hide(path))
        except OSError as error:
            raise errors.from_os_error(error, f"remove bundle of task {self.id}") from error
        return left


def remove_all(folders: Iterable[str]) -> None:
    """Remove what `withdraw` left; what cannot be removed is swept by the next daemon."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def make_passable(folder: Path) -> None:
    """Make a folder that others may pass but not list (0711), whatever the umask."""
    try:
        folder.mkdir(mode=0o711)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_passable(folder.parent)
        folder.mkdir(mode=0o711)
    folder.chmod(0o711)


def let_pass(folder: Path) -> None:
    """Let others pass a folder that they still may not list: id-mapped users must reach their root file system."""
    mode = folder.stat().st_mode & 0o7777
    if not mode & 0o001:
        folder.chmod(mode | 0o011)


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty when there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _hide(path: str) -> str:
    """Rename a folder so that nobody ever sees half of it under its own name; returns the new one."""
    parent, _, name = path.rpartition("/")
    hidden = f"{parent}/.{name}-{secrets.token_hex(4)}"
    os.rename(path, hidden)
    return hidden


def find_all(state: Path) -> list[Bundle]:
    """Every bundle below `state`; removals that were cut short are finished on the way."""
    found: list[Bundle] = []
    with contextlib.suppress(FileNotFoundError):
        for namespace in sorted(os.scandir(state), key=lambda entry: entry.name):
            if not namespace.is_dir(follow_symlinks=False) or namespace.name.startswith("."):
                continue
            for entry in sorted(os.scandir(namespace.path), key=lambda entry: entry.name):
                if not entry.is_dir(follow_symlinks=False):
                    continue
                if entry.name.startswith("."):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    found.append(Bundle(namespace.name, entry.name, Path(entry.path)))
    return found


def sweep_work(state: Path, root: Path) -> None:
    """Remove working folders without a bundle: those of before a reboot."""
    with contextlib.suppress(FileNotFoundError):
        for namespace in os.scandir(root):
            if namespace.is_dir(follow_symlinks=False):
                for entry in os.scandir(namespace.path):
                    if not (state / namespace.name / entry.name).exists():
                        shutil.rmtree(entry.path, ignore_errors=True)
