"""Mounts: what containerd's API states in fstab words, done with mount(2) and its newer relatives.

Owns mounting, unmounting, the reading of mountinfo and id-mapped mounts. Does not know snapshots
or containers. Everything here blocks: callers on an event loop use an executor.

All errors are `OSError` with the path in `filename`, or `InvalidArgument` for options that make no
sense. Sources: mount(2), mount_setattr(2), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.linux import files, libc
from supervisord_ctr.model import Mount

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_SYNCHRONOUS = 0x10
MS_REMOUNT = 0x20
MS_MANDLOCK = 0x40
MS_DIRSYNC = 0x80
MS_NOATIME = 0x400
MS_NODIRATIME = 0x800
MS_BIND = 0x1000
MS_REC = 0x4000
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_IDMAP = 0x100000
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 4

_CLONE_FS = 0x200
#: Bytes of options that mount(2) takes: one page less a reserve, as containerd counts.
_DATA_LIMIT = 4096 - 512

_PROPAGATION = MS_SHARED | MS_PRIVATE | MS_SLAVE | MS_UNBINDABLE

#: Option word → (clears, flag).
_WORDS: dict[str, tuple[bool, int]] = {
    "async": (True, MS_SYNCHRONOUS), "atime": (True, MS_NOATIME), "bind": (False, MS_BIND),
    "dev": (True, MS_NODEV), "diratime": (True, MS_NODIRATIME), "dirsync": (False, MS_DIRSYNC),
    "exec": (True, MS_NOEXEC), "mand": (False, MS_MANDLOCK), "noatime": (False, MS_NOATIME),
    "nodev": (False, MS_NODEV), "nodiratime": (False, MS_NODIRATIME), "noexec": (False, MS_NOEXEC),
    "nomand": (True, MS_MANDLOCK), "norelatime": (True, MS_RELATIME), "nostrictatime": (True, MS_STRICTATIME),
    "nosuid": (False, MS_NOSUID), "rbind": (False, MS_BIND | MS_REC), "relatime": (False, MS_RELATIME),
    "remount": (False, MS_REMOUNT), "ro": (False, MS_RDONLY), "rw": (True, MS_RDONLY),
    "strictatime": (False, MS_STRICTATIME), "suid": (True, MS_NOSUID), "sync": (False, MS_SYNCHRONOUS),
    "private": (False, MS_PRIVATE), "rprivate": (False, MS_PRIVATE | MS_REC),
    "shared": (False, MS_SHARED), "rshared": (False, MS_SHARED | MS_REC),
    "slave": (False, MS_SLAVE), "rslave": (False, MS_SLAVE | MS_REC),
    "unbindable": (False, MS_UNBINDABLE), "runbindable": (False, MS_UNBINDABLE | MS_REC),
}


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of mountinfo."""

    id: int
    parent: int
    device: str
    root: str
    target: str
    options: str
    propagation: tuple[str, ...]
    fstype: str
    source: str
    super_options: str


@dataclass(frozen=True, slots=True)
class Options:
    """What a list of option words asks for."""

    flags: int = 0
    propagation: int = 0
    data: tuple[str, ...] = ()
    loop: bool = False
    recursive_read_only: bool = False
    uidmap: str = ""
    gidmap: str = ""


@dataclass(slots=True)
class _Words:
    flags: int = 0
    propagation: int = 0
    data: list[str] = field(default_factory=list)
    maps: dict[str, str] = field(default_factory=dict)
    loop: bool = False
    recursive_read_only: bool = False


def parse_options(words: Sequence[str]) -> Options:
    """Sort option words into flags and file system data, later words over earlier ones.

    `X-containerd.*` words belong to a mount manager and must have been consumed before: they raise
    `InvalidArgument` rather than being dropped.
    """
    found = _Words()
    for word in words:
        name, _, value = word.partition("=")
        if word.startswith("X-containerd."):
            raise InvalidArgument(f"mount option {word!r} is for a mount manager and cannot be mounted", key=word)
        if word in _WORDS:
            clears, flag = _WORDS[word]
            if flag & _PROPAGATION:
                found.propagation |= flag
            elif clears:
                found.flags &= ~flag
            else:
                found.flags |= flag
        elif word == "defaults" or not word:
            continue
        elif word == "rro":
            found.flags |= MS_RDONLY
            found.recursive_read_only = True
        elif word == "loop":
            found.loop = True
        elif name in ("uidmap", "gidmap"):
            found.maps[name] = value
        else:
            found.data.append(word)
    if bool(found.maps.get("uidmap")) != bool(found.maps.get("gidmap")):
        raise InvalidArgument("uidmap= and gidmap= go together: one of them is missing")
    return Options(
        found.flags, found.propagation, tuple(found.data), found.loop, found.recursive_read_only,
        found.maps.get("uidmap", ""), found.maps.get("gidmap", ""),
    )


def with_context(mounts: Sequence[Mount], label: str) -> tuple[Mount, ...]:
    """The mounts with the SELinux label `label` on every file in them, "" being none (mount(8)).

    A bind mount stays as it is: its files have the labels that they have where they come from.
    """
    # In quotes, since commas split options and a label's categories.
    option = f'context="{label}"'
    return tuple(
        entry if not label or parse_options(entry.options).flags & MS_BIND
        else replace(entry, options=(*entry.options, option)) for entry in mounts
    )


def mount(source: str, target: str | os.PathLike[str], fstype: str, flags: int = 0, data: str = "") -> None:
    """mount(2), once, as it is."""
    libc.mount(source or None, os.fspath(target), fstype or None, flags, data or None)


def umount(target: str | os.PathLike[str], flags: int = 0) -> None:
    """umount2(2), once, as it is."""
    libc.umount2(os.fspath(target), flags)


def mount_all(mounts: Sequence[Mount], target: str | os.PathLike[str]) -> None:
    """Mount each of `mounts` onto `target` (or onto its own target inside it), in order.

    When one fails, those before it are taken away again and the error is raised.
    """
    done: list[str] = []
    try:
        for entry in mounts:
            with _place(os.fspath(target), entry.target) as place:
                _mount_one(entry, place)
                done.append(os.readlink(place) if place.startswith("/proc/self/fd/") else place)
    except BaseException:
        for place in reversed(done):
            with contextlib.suppress(OSError):
                umount(place, MNT_DETACH)
        raise


@contextlib.contextmanager
def _place(root: str, inner: str) -> Iterator[str]:
    """The path to mount on: `inner` is resolved inside `root`, whatever links lie there."""
    if not inner.strip("/"):
        yield root
        return
    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = files.openat2(root_fd, inner, os.O_PATH, resolve=files.RESOLVE_IN_ROOT)
    finally:
        os.close(root_fd)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _mount_one(entry: Mount, target: str) -> None:
    options = parse_options(entry.options)
    if entry.type.startswith(("fuse.", "fuse3.")):
        _mount_helper(entry, target)
        return
    with contextlib.ExitStack() as stack:
        userns = stack.enter_context(user_namespace(options.uidmap, options.gidmap)) if options.uidmap else -1
        if userns >= 0 and entry.type == "overlay":
            options = replace(options, data=stack.enter_context(_idmapped_lower(options.data, userns)))
        source = stack.enter_context(_loop_device(entry.source, options)) if options.loop else entry.source
        if not options.flags & MS_REMOUNT or options.data:
            if entry.type == "overlay":
                _mount_overlay(source or "overlay", target, options)
            else:
                mount(source, target, entry.type, options.flags, _join(options.data))
        try:
            if options.propagation:
                mount("", target, "", options.propagation)
            if options.flags & (MS_BIND | MS_RDONLY) == MS_BIND | MS_RDONLY or (
                options.flags & MS_BIND and options.flags & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
            ):
                mount("", target, "", (options.flags & ~MS_REC) | MS_REMOUNT | MS_BIND)
            if options.recursive_read_only:
                set_attributes(target, set_=MOUNT_ATTR_RDONLY, recursive=True)
            if userns >= 0 and entry.type != "overlay":
                # What is mounted onto a copy of a shared mount would cover the source as well.
                mount("", target, "", MS_SLAVE | (options.flags & MS_REC))
                idmap_mount(target, target, userns, recursive=bool(options.flags & MS_REC))
        except BaseException:
            with contextlib.suppress(OSError):
                umount(target, MNT_DETACH)
            raise


def _join(data: Sequence[str]) -> str:
    text = ",".join(data)
    if len(os.fsencode(text)) >= 4096:
        raise InvalidArgument(f"mount options are {len(text)} bytes long, the kernel takes 4095")
    return text


def _mount_helper(entry: Mount, target: str) -> None:
    """A FUSE file system: `mount.fuse` or `mount.fuse3` of the host, by absolute path."""
    kind, _, name = entry.type.partition(".")
    helper = next((path for path in (f"/sbin/mount.{kind}", f"/usr/sbin/mount.{kind}") if os.path.exists(path)), None)
    if helper is None:
        raise FileNotFoundError(errno.ENOENT, f"mount helper for {entry.type} is not installed", f"/sbin/mount.{kind}")
    arguments = [helper, entry.source, target, "-o", ",".join(entry.options), "-t", name]
    pid = os.posix_spawn(helper, arguments, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise OSError(errno.EIO, f"{helper} ended with {status}", target)


def _mount_overlay(source: str, target: str, options: Options) -> None:
    """An overlay; a list of layers too long for one page is stated relative to its common folder.

    The change of folder happens on a thread with a working directory of its own, so neither a fork
    nor the working directory of anybody else is touched.
    """
    data = ",".join(options.data)
    if len(os.fsencode(data)) < _DATA_LIMIT:
        mount(source, target, "overlay", options.flags, data)
        return
    lower = next((word for word in options.data if word.startswith("lowerdir=")), "lowerdir=")
    layers = lower.removeprefix("lowerdir=").split(":")
    common = os.path.commonpath(layers) if len(layers) > 1 and all(map(os.path.isabs, layers)) else ""
    if common in ("", "/"):
        mount(source, target, "overlay", options.flags, _join(options.data))
        return
    short = "lowerdir=" + ":".join(os.path.relpath(layer, common) for layer in layers)
    words = [short if word is lower else word for word in options.data]
    absolute = os.path.abspath(target)

    def in_common() -> None:
        libc.unshare(_CLONE_FS)
        os.chdir(common)
        mount(source, absolute, "overlay", options.flags, _join(words))

    on_thread(in_common)


def on_thread(call: Callable[[], None]) -> None:
    """Run `call` on a thread of its own, whose kernel attributes die with it; its error is raised here."""
    problem: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # handed to the caller below
            problem.append(error)

    thread = threading.Thread(target=run, name="linux-call")
    thread.start()
    thread.join()
    if problem:
        raise problem[0]


def unmount_all(target: str | os.PathLike[str], flags: int = MNT_DETACH) -> None:
    """Take away everything that is mounted on `target`, lazily, however often it is covered.

    A target that is not mounted, or not there, is no error.
    """
    path = os.fspath(target)
    while True:
        try:
            umount(path, flags | UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
                return
            raise


def unmount_below(prefix: str | os.PathLike[str], flags: int = MNT_DETACH) -> int:
    """Take away every mount on or below `prefix`, deepest first; returns how many there were."""
    entries = mounts_below(prefix)
    for entry in reversed(entries):
        try:
            umount(entry.target, flags | UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                raise
    return len(entries)


def _unescape(text: str) -> str:
    if "\\" not in text:
        return text
    return os.fsdecode(os.fsencode(text).decode("unicode_escape").encode("latin-1"))


def parse_mountinfo(text: str) -> list[MountEntry]:
    """Entries in the order of the file, which is the order in which they cover each other."""
    entries = []
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        head, tail = left.split(" "), right.split(" ")
        if not separator or len(head) < 6 or len(tail) < 3:
            continue
        entries.append(MountEntry(
            int(head[0]), int(head[1]), head[2], _unescape(head[3]), _unescape(head[4]), head[5],
            tuple(head[6:]), tail[0], _unescape(tail[1]), " ".join(tail[2:]),
        ))
    return entries


def mount_table(pid: int | str = "self") -> list[MountEntry]:
    """Every mount that process `pid` sees."""
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return parse_mountinfo(file.read())


def mounts_below(prefix: str | os.PathLike[str]) -> list[MountEntry]:
    """Mounts on `prefix` and below it, in the order of the table (covered ones first)."""
    path = os.path.realpath(prefix)
    below = path.rstrip("/") + "/"
    return [entry for entry in mount_table() if entry.target == path or entry.target.startswith(below)]


def is_mountpoint(path: str | os.PathLike[str]) -> bool:
    """Whether something is mounted exactly on `path` (bind mounts of one file system included)."""
    target = os.path.realpath(path)
    return any(entry.target == target for entry in mount_table())


@contextlib.contextmanager
def temp_mount(mounts: Sequence[Mount], folder: str | os.PathLike[str] | None = None) -> Iterator[str]:
    """Mount onto a temporary folder for the length of the block; yields its path.

    The folder is made below `folder` (default: the system's). It is unmounted lazily afterwards
    and removed only when it is empty, so a mount that will not go is never deleted through.
    """
    target = _temporary_folder("pctr-mount-", folder)
    try:
        if mounts:
            mount_all(mounts, target)
        yield target
    finally:
        unmount_all(target)
        os.rmdir(target)


def _temporary_folder(prefix: str, folder: str | os.PathLike[str] | None = None) -> str:
    import tempfile  # half a megabyte that no shim needs but for this

    return tempfile.mkdtemp(prefix=prefix, dir=folder)


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64), ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64), ("userns_fd", ctypes.c_uint64),
    )


def set_attributes(
    target: str | os.PathLike[str], *, set_: int = 0, clear: int = 0, propagation: int = 0, userns: int = 0,
    recursive: bool = False, dir_fd: int = libc.AT_FDCWD,
) -> None:
    """mount_setattr(2) on `target`; an empty target means the descriptor `dir_fd` itself."""
    path = os.fspath(target)
    attributes = _MountAttr(set_, clear, propagation, userns)
    flags = (0 if path else libc.AT_EMPTY_PATH) | (libc.AT_RECURSIVE if recursive else 0)
    libc.syscall(
        libc.SYS_MOUNT_SETATTR, dir_fd, os.fsencode(path), flags, ctypes.byref(attributes),
        ctypes.sizeof(attributes), path=path,
    )


def idmap_mount(
    source: str | os.PathLike[str], target: str | os.PathLike[str], userns: int, *,
    attributes: int = 0, recursive: bool = False, map_below: bool = True,
) -> None:
    """Mount a copy of `source` onto `target` with owners shifted by the user namespace `userns`.

    With `recursive` what is mounted below comes along, its owners shifted too unless `map_below` is false.
    The copy follows what is mounted in `source` later on, never the other way round: where mounts are shared, as
    systemd makes them, what is taken away from below the copy would be taken from `source` as well.
    """
    with _idmapped(source, userns, attributes=attributes, recursive=recursive, map_below=map_below) as tree:
        libc.syscall(
            libc.SYS_MOVE_MOUNT, tree, b"", libc.AT_FDCWD, os.fsencode(target), MOVE_MOUNT_F_EMPTY_PATH, path=target
        )


@contextlib.contextmanager
def _idmapped(
    source: str | os.PathLike[str], userns: int, *, attributes: int = 0, recursive: bool = False,
    map_below: bool = True,
) -> Iterator[int]:
    """The copy of `idmap_mount` as a descriptor; it goes with the block unless it was mounted somewhere."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | libc.AT_EMPTY_PATH | (libc.AT_RECURSIVE if recursive else 0)
    tree = libc.syscall(libc.SYS_OPEN_TREE, libc.AT_FDCWD, os.fsencode(source), flags, path=source)
    try:
        set_attributes("", propagation=MS_SLAVE, recursive=recursive, dir_fd=tree)
        deep = recursive and map_below
        set_attributes("", set_=MOUNT_ATTR_IDMAP | attributes, userns=userns, recursive=deep, dir_fd=tree)
        yield tree
    finally:
        os.close(tree)


@contextlib.contextmanager
def user_namespace(uidmap: str, gidmap: str) -> Iterator[int]:
    """A descriptor of a user namespace with these maps ("CONTAINER:HOST:SIZE", several split by ',')."""
    from supervisord_ctr.linux.namespaces import new_user_namespace

    fd = new_user_namespace(_parse_map(uidmap), _parse_map(gidmap))
    try:
        yield fd
    finally:
        os.close(fd)


def _parse_map(text: str) -> list[tuple[int, int, int]]:
    maps = []
    for part in text.split(","):
        numbers = part.split(":")
        if len(numbers) != 3 or not all(number.isascii() and number.isdigit() for number in numbers):
            raise InvalidArgument(f"id map {text!r} is not CONTAINER:HOST:SIZE", key=text)
        maps.append((int(numbers[0]), int(numbers[1]), int(numbers[2])))
    return maps


@contextlib.contextmanager
def _idmapped_lower(data: tuple[str, ...], userns: int) -> Iterator[tuple[str, ...]]:
    """Overlay options whose lower layers are seen through one temporary id-mapped mount.

    The overlay keeps its own reference, so the temporary mount goes as soon as the overlay stands.
    """
    lower = next((word for word in data if word.startswith("lowerdir=")), "")
    layers = lower.removeprefix("lowerdir=").split(":")
    common = os.path.dirname(layers[0]) if len(layers) == 1 else os.path.commonpath(layers)
    if not lower or common in ("", "/"):
        raise InvalidArgument("an id-mapped overlay needs lower layers below one folder")
    folder = _temporary_folder("pctr-idmap-")
    try:
        idmap_mount(common, folder, userns, attributes=MOUNT_ATTR_RDONLY)
        mapped = ":".join(os.path.join(folder, os.path.relpath(layer, common)) for layer in layers)
        yield tuple(f"lowerdir={mapped}" if word is lower else word for word in data)
    finally:
        unmount_all(folder)
        os.rmdir(folder)


#: Whether the file system of that device can be id-mapped, once it was asked for.
_idmap_supported: dict[int, bool] = {}


def supports_idmap(folder: str | os.PathLike[str]) -> bool:
    """Whether this kernel can, and we may, id-map mounts of the file system that holds `folder`; asked once for each.

    It depends on the file system: ext4 can since Linux 5.12, tmpfs since 6.3 (mount_setattr(2)).
    """
    device = os.stat(folder).st_dev
    if device not in _idmap_supported:
        try:
            with user_namespace("0:65536:1", "0:65536:1") as userns, _idmapped(folder, userns):
                _idmap_supported[device] = True
        except OSError:
            _idmap_supported[device] = False
    return _idmap_supported[device]


_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_SET_FD = 0x4C00
_LOOP_SET_STATUS64 = 0x4C04
_LO_FLAGS_AUTOCLEAR = 4
_LO_FLAGS_READ_ONLY = 1


@contextlib.contextmanager
def _loop_device(image: str, options: Options) -> Iterator[str]:
    """A loop device over the file `image` that goes away by itself with its mount (loop(4))."""
    read_only = bool(options.flags & MS_RDONLY)
    backing = os.open(image, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    try:
        path, device = _attach_loop(image, backing, read_only)
    finally:
        os.close(backing)
    try:
        yield path
    finally:
        os.close(device)


def _attach_loop(image: str, backing: int, read_only: bool) -> tuple[str, int]:
    """Path and descriptor of a free loop device bound to `backing`; others may race for the free one."""
    import fcntl

    flags = _LO_FLAGS_AUTOCLEAR | (_LO_FLAGS_READ_ONLY if read_only else 0)
    info = bytearray(232)  # struct loop_info64, lo_flags at 52
    info[52:56] = flags.to_bytes(4, sys.byteorder)
    for _ in range(64):
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
        finally:
            os.close(control)
        device = os.open(f"/dev/loop{number}", (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        try:
            fcntl.ioctl(device, _LOOP_SET_FD, backing)
            fcntl.ioctl(device, _LOOP_SET_STATUS64, bytes(info))
            return f"/dev/loop{number}", device
        except OSError as error:
            os.close(device)
            if error.errno != errno.EBUSY:
                raise
    raise OSError(errno.EBUSY, "no free loop device", image)
