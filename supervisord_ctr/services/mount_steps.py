"""What mounts need before the system can perform them: the words before the slash of their types.

Owns `format/` (templates that name earlier mounts), `mkdir/` (directories that options ask for) and
`mkfs/` (a file with an empty file system, to be mounted with the option `loop`), several of them one
after another. Directories and files are made below given roots only. Source: containerd's mount
manager, whose names and options these are.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from supervisord_ctr import faults
from supervisord_ctr.errors import FailedPrecondition, InvalidArgument, Unimplemented, Unknown
from supervisord_ctr.model import Mount

FORMATTED = faults.declare("mounts.formatted", "a file holds a whole file system and does not have its name yet")

_MKDIR = "X-containerd.mkdir."
_MKFS = "X-containerd.mkfs."
_TEMPLATE = re.compile(r"\{\{-?\s*(source|target|mount|overlay)\s+(\d+)(?:\s+(\d+))?\s*-?\}\}")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgtp]?)i?b?", re.IGNORECASE)
_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50}
#: Where programs of the host are looked for, whatever the daemon's own environment says (S16).
_PROGRAMS = "/usr/sbin:/usr/bin:/sbin:/bin"
_MKFS_LIMIT = 120.0


class Active(Protocol):
    """A mount that was performed, for the ones after it."""

    @property
    def mount(self) -> Mount:
        """What was mounted."""

    @property
    def mount_point(self) -> str:
        """Where it is."""


def needs_steps(mounts: Sequence[Mount]) -> int:
    """How many mounts must be performed before the client can do the rest; -1 when it can do all of them."""
    first = -1
    for number, mount in enumerate(mounts):
        word, slash, _ = mount.type.partition("/")
        if slash and word in ("format", "mkdir", "mkfs"):
            first = number
    return first


class Steps:
    """The steps; `roots` are the folders below which they may make something."""

    def __init__(self, roots: Iterable[Path]) -> None:
        self._roots = tuple(os.path.realpath(root) for root in roots)

    def apply(self, mount: Mount, active: Sequence[Active]) -> Mount:
        """The mount that is left when every step of its type is done. Blocks.

        InvalidArgument for options and templates that make no sense, Unimplemented for a place below no root.
        """
        word, slash, rest = mount.type.partition("/")
        while slash:
            if word == "format":
                mount = _formatted(mount, active)
            elif word == "mkdir":
                mount = self._with_folders(mount)
            elif word == "mkfs":
                mount = self._with_file_system(mount)
            else:
                break
            mount = Mount(rest, mount.source, mount.options, mount.target)
            word, slash, rest = mount.type.partition("/")
        return mount

    def _place(self, path: str, step: str) -> str:
        """The path with its folder resolved; Unimplemented outside the roots."""
        parent = os.path.realpath(os.path.dirname(path))
        if not any(parent == root or parent.startswith(f"{root}/") for root in self._roots):
            raise Unimplemented(f'no root "{path}" configured for {step}', kind="mount", key=path)
        name = os.path.basename(path)
        if name in ("", ".", ".."):
            raise InvalidArgument(f'invalid {step} path "{path}"', kind="mount", key=path)
        return os.path.join(parent, name)

    def _with_folders(self, mount: Mount) -> Mount:
        """Make the directories that `X-containerd.mkdir.path=PATH[:MODE[:UID:GID]]` options ask for."""
        kept = []
        for option in mount.options:
            if not option.startswith(_MKDIR):
                kept.append(option)
                continue
            word, _, value = option.removeprefix(_MKDIR).partition("=")
            parts = value.split(":")
            if word != "path" or len(parts) not in (1, 2, 4) or not all(part.isdigit() for part in parts[1:]):
                raise InvalidArgument(f'invalid mkdir option "{option}"', kind="mount", key=option)
            self._make_folder(parts)
        return Mount(mount.type, mount.source, tuple(kept), mount.target)

    def _make_folder(self, parts: list[str]) -> None:
        try:
            mode = int(parts[1], 8) if len(parts) > 1 else 0o700
        except ValueError:
            raise InvalidArgument(f"invalid mode {parts[1]}", kind="mount", key=parts[0]) from None
        where = self._place(parts[0], "mkdir")
        try:
            os.mkdir(where, 0o700)
        except FileExistsError:
            return
        os.chmod(where, mode)
        if len(parts) == 4:
            os.chown(where, int(parts[2]), int(parts[3]), follow_symlinks=False)

    def _with_file_system(self, mount: Mount) -> Mount:
        """Make the source, a file with an empty file system, unless it is there: `X-containerd.mkfs.size=`, `fs=`
        (ext4 by default), `uuid=`."""
        where = self._place(mount.source, "mkfs")
        size, kind, uuid, kept = 0, "ext4", "", []
        for option in mount.options:
            if not option.startswith(_MKFS):
                kept.append(option)
                continue
            key, _, value = option.removeprefix(_MKFS).partition("=")
            if key == "size":
                size = parse_size(value)
            elif key == "fs":
                kind = value
            elif key == "uuid":
                uuid = value
            else:
                raise InvalidArgument(f"unknown mount option {key}", kind="mount", key=option)
        if size == 0:
            raise InvalidArgument("mkfs requires mkfs.size option", kind="mount", key=mount.source)
        if not os.path.lexists(where):
            _make_file_system(where, size, kind, uuid)
        return Mount(mount.type, mount.source, tuple(kept), mount.target)


def parse_size(text: str) -> int:
    """Bytes of "64", "10m", "1.5 GiB"; InvalidArgument."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise InvalidArgument(f'bad option size: invalid size: "{text}"', kind="mount", key=text)
    return int(float(found.group(1)) * (1 << _UNITS[found.group(2).lower()]))


def _make_file_system(where: str, size: int, kind: str, uuid: str) -> None:
    if kind in ("ext2", "ext3", "ext4"):
        arguments = ["-q", *(["-U", uuid] if uuid else [])]
    elif kind == "xfs":
        arguments = ["-q", *(["-m", f"uuid={uuid}"] if uuid else [])]
    else:
        raise InvalidArgument(f'unsupported filesystem "{kind}"', kind="mount", key=kind)
    program = shutil.which(f"mkfs.{kind}", path=_PROGRAMS)
    if program is None:
        raise FailedPrecondition(f"mkfs.{kind} is not installed", kind="mount", key=where)
    # Under a name of its own until it is whole: a file that is there counts as made, also after a kill in between.
    making = f"{where}.making"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(making)
    fd = os.open(making, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
    try:
        os.truncate(fd, size)
        ended = subprocess.run(
            [program, *arguments, making], stdin=subprocess.DEVNULL, capture_output=True, timeout=_MKFS_LIMIT,
            env={"PATH": _PROGRAMS}, check=False,
        )
        if ended.returncode:
            told = (ended.stderr or ended.stdout).decode("utf-8", "replace").strip()[-500:]
            raise Unknown(f'failed format "{where}": mkfs.{kind} failed: {told}', kind="mount", key=where)
        faults.point(FORMATTED)
        os.rename(making, where)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(making)
        if isinstance(error, subprocess.TimeoutExpired):
            told = f"took longer than {_MKFS_LIMIT:g} s"
            raise Unknown(f'failed format "{where}": mkfs.{kind} {told}', kind="mount", key=where) from None
        raise
    finally:
        os.close(fd)


def _formatted(mount: Mount, active: Sequence[Active]) -> Mount:
    """Fill `{{ source N }}`, `{{ target N }}`, `{{ mount N }}` and `{{ overlay FIRST LAST }}` in."""

    def pick(number: int) -> Active:
        if number >= len(active):
            raise InvalidArgument(f"index out of bounds: {number}, has {len(active)} active mounts", kind="mount")
        return active[number]

    def fill(found: re.Match[str]) -> str:
        word, first, last = found.group(1), int(found.group(2)), found.group(3)
        if word == "overlay":
            end = int(last) if last is not None else first
            numbers = range(first, end + 1) if first <= end else range(first, end - 1, -1)
            return ":".join(pick(number).mount_point for number in numbers)
        chosen = pick(first)
        return {"source": chosen.mount.source, "target": chosen.mount.target, "mount": chosen.mount_point}[word]

    def text(value: str) -> str:
        filled = _TEMPLATE.sub(fill, value)
        if "{{" in filled:
            raise InvalidArgument(f'cannot format "{value}"', kind="mount", key=value)
        return filled

    return Mount(mount.type, text(mount.source), tuple(map(text, mount.options)), text(mount.target))
