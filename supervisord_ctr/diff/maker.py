"""Maker: a second process that makes a layer's small files while the first one reads the archive.

Making a file takes four system calls and most of the time of a layer of many files, and two threads of
one interpreter would only wait for each other. So the unpacking process forks once for a layer that is
worth it and hands over files in batches through a pipe; what the maker is too busy for, it makes
itself. A maker only makes what is not there, in directories that are.

    batch    number of files and bytes of names and bodies, then a record for each file, names, bodies
    answer   one byte for each batch that is done, or `E`, an error number, and the name it is about
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import struct
from enum import IntEnum
from typing import NoReturn

from supervisord_ctr.diff.tar import Entry, TarReader
from supervisord_ctr.errors import Error, from_os_error
from supervisord_ctr.linux import files, processes

#: Files of one batch, and bytes of their bodies; a file that is larger is not handed over.
BATCH_FILES = 32
BATCH_BYTES = 64 << 10
#: Batches under way: together they fit into the pipe, so that handing over never waits.
_UNDER_WAY = 8
_PIPE = 1 << 20

_HEAD = struct.Struct("<III")
_FILE = struct.Struct("<HHIIIqq")
_ERROR = struct.Struct("<IH")
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CACHED = 128
#: Names that are remembered; a layer of more goes on in order.
_MAX_SEEN = 500_000

#: What a file is: parent directory, its own name, mode, owner, group, access and modification time, body.
File = tuple[bytes, bytes, int, int, int, tuple[int, int], list[memoryview]]


class Spread(IntEnum):
    """When a maker shares the work on a layer: while a processor is idle, or whatever else runs."""

    NEVER = 0
    IDLE = 1
    ALWAYS = 2


class _Folders:
    """Directories below the root, kept open, and files made in them. The process's umask is 0."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._owner = (os.geteuid(), os.getegid())
        # Path → descriptor, and whether new entries inherit a group.
        self._open: dict[bytes, tuple[int, bool]] = {}

    def _opened(self, head: bytes) -> tuple[int, bool]:
        found = self._open.get(head)
        if found is None:
            if len(self._open) >= _CACHED:
                self.close()
            fd = files.open_in_root(self._root, head, os.O_PATH | os.O_DIRECTORY)
            found = self._open[head] = (fd, os.fstat(fd).st_gid != self._owner[1])
        return found

    def make(self, file: File) -> None:
        """Make one file; `OSError`, also when there is one of its name."""
        head, base, mode, uid, gid, times, body = file
        parent, inherits = self._opened(head)
        fd = os.open(base, _CREATE, mode, dir_fd=parent)
        try:
            for piece in body:
                view = piece
                while (count := os.write(fd, view)) < len(view):
                    view = view[count:]
            if inherits or (uid, gid) != self._owner:
                os.fchown(fd, uid, gid)
            if mode & 0o6000:
                os.fchmod(fd, mode)
            os.utime(fd, ns=times)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the directories."""
        for fd, _ in self._open.values():
            os.close(fd)
        self._open.clear()


class _Load:
    """How busy the processors are: handing work over to a process that must wait for one only costs copies."""

    def __init__(self) -> None:
        self._cores = len(os.sched_getaffinity(0))
        self._fd = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)

    def idle(self, *, maker_busy: bool) -> bool:
        """Whether a processor is free but for the maker's own work (proc_loadavg(5), fourth field)."""
        running = int(os.pread(self._fd, 64, 0).split(b" ")[3].partition(b"/")[0])
        return running - maker_busy < self._cores

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)


class FileMaker:
    """The first process's side. `add` files, `flush` before anything that must find them, `close` in the end.

    With `always` also what an idle processor is not there for. Forks: to be made while the process has one
    thread.
    """

    def __init__(self, root: int, *, always: bool = False) -> None:
        self._always = always
        self._folders = _Folders(root)
        self._load = _Load()
        self._batch: list[File] = []
        self._bytes = 0
        self._under_way = 0
        ends: list[int] = []
        try:
            ends += os.pipe2(os.O_CLOEXEC)
            ends += os.pipe2(os.O_CLOEXEC)
            with contextlib.suppress(OSError):
                fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, _PIPE)
            self._room = fcntl.fcntl(ends[1], fcntl.F_GETPIPE_SZ) // (2 * BATCH_BYTES)
            self._pid = os.fork()
        except BaseException:
            for end in ends:
                os.close(end)
            self._load.close()
            raise
        if not self._pid:
            _main(root, ends[0], ends[3], (ends[1], ends[2]))
        os.close(ends[0])
        os.close(ends[3])
        self._down, self._up = ends[1], ends[2]

    def add(self, file: File, size: int) -> None:
        """Have a file of `size` bytes made, now or soon. `OSError` of this or of an earlier one."""
        self._batch.append(file)
        self._bytes += size + 128
        if len(self._batch) >= BATCH_FILES or self._bytes >= BATCH_BYTES:
            self._hand_over()

    def flush(self) -> None:
        """Return when every file is there."""
        if self._batch:
            self._hand_over()
        while self._under_way:
            self._answer()

    def _hand_over(self) -> None:
        batch, self._batch, self._bytes = self._batch, [], 0
        while self._under_way and select.select([self._up], [], [], 0)[0]:
            self._answer()
        busy = self._under_way >= min(_UNDER_WAY, self._room)
        if busy or not (self._always or self._load.idle(maker_busy=self._under_way > 0)):
            for file in batch:
                self._make(file)
            return
        records, names, bodies = [], [], []
        for head, base, mode, uid, gid, times, body in batch:
            name = head + b"/" + base
            names.append(name)
            bodies += body
            records.append(_FILE.pack(len(name), mode, uid, gid, sum(map(len, body)), *times))
        table, named = b"".join(records), b"".join(names)
        size = sum(map(len, bodies))
        views = [memoryview(_HEAD.pack(len(batch), len(named), size) + table + named), *bodies]
        self._under_way += 1
        try:
            _write_all(self._down, views)
        except BrokenPipeError:
            # It ended: what it has answered says why.
            while True:
                self._answer()

    def _make(self, file: File) -> None:
        try:
            self._folders.make(file)
        except OSError as error:
            error.filename = None
            raise from_os_error(error, f"layer entry {os.fsdecode(file[0] + b'/' + file[1])!r}") from error

    def _answer(self) -> None:
        """Take in one answer."""
        try:
            if _read_exactly(self._up, 1) == b".":
                self._under_way -= 1
                return
            number, length = _ERROR.unpack(_read_exactly(self._up, _ERROR.size))
            name = _read_exactly(self._up, length)
        except EOFError:
            raise Error("the process that makes a layer's files died") from None
        raise from_os_error(OSError(number, os.strerror(number)), f"layer entry {os.fsdecode(name)!r}")

    def close(self) -> None:
        """End the maker and wait until it is gone: nothing is made any more. Twice is fine."""
        pid, self._pid = self._pid, 0
        if not pid:
            return
        os.close(self._down)
        os.close(self._up)
        os.waitpid(pid, 0)
        self._folders.close()
        self._load.close()


class OutOfOrder:
    """Which entries of a layer the maker may make, for a layer that is unpacked into an empty directory.

    May be: a small file without attributes and with a new name, in a directory that this layer made below
    such directories, so that no link leads to it. Everything else is made in its order by the first
    process, after it has waited where it must find what came before. As soon as two names could be one
    (an entry again, a path through a link) the order is kept to the end of the layer.
    """

    def __init__(self, root: int, *, always: bool = False) -> None:
        self.maker = FileMaker(root, always=always)
        self._seen: set[bytes] = set()
        self._plain: set[bytes] = {b""}

    def keeps_order(self, head: bytes, name: bytes, refers: bool) -> bool:
        """Note the entry `name` in the directory `head`; False when the order must be kept from it on.

        `refers` says that it is about other entries too: they are there on return.
        """
        seen = self._seen
        if name in seen or len(seen) > _MAX_SEEN or (head not in self._plain and self.new_below(head) is None):
            return False
        seen.add(name)
        if refers:
            self.maker.flush()
            tail = name[len(head) + 1:] if head else name
            seen.add((head + b"/" if head else b"") + tail.removeprefix(b".wh."))
        return True

    def new_below(self, head: bytes) -> bytes | None:
        """The plain directory below which all of `head` is still to be made; None where something is in the way."""
        above, position = b"", head.find(b"/")
        while position >= 0 and head[:position] in self._plain:
            above, position = head[:position], head.find(b"/", position + 1)
        following = head if position < 0 else head[:position]
        return None if following in self._seen else above

    def made_directory(self, path: bytes) -> None:
        """A directory was made that was not there, so it is below plain ones."""
        self._seen.add(path)
        self._plain.add(path)

    def takes(self, entry: Entry, head: bytes) -> bool:
        """Whether the maker may make the regular file."""
        return (
            head in self._plain and entry.size <= BATCH_BYTES and entry.xattrs is None and entry.extents is None
        )

    def take(self, entry: Entry, head: bytes, base: bytes, times: tuple[int, int], reader: TarReader) -> None:
        """Have the file made, now or soon; its error may come later."""
        body = []
        while piece := reader.body():
            body.append(piece)
        self.maker.add((head, base, entry.mode & 0o7777, entry.uid, entry.gid, times, body), entry.size)


def _write_all(fd: int, views: list[memoryview]) -> None:
    while views:
        count = os.writev(fd, views[:512])
        done = 0
        while done < len(views) and count >= len(views[done]):
            count -= len(views[done])
            done += 1
        views = views[done:]
        if count:
            views[0] = views[0][count:]


def _read_exactly(fd: int, count: int) -> bytes:
    """`count` bytes; `EOFError` at the end of the pipe."""
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = os.readv(fd, [view])
        if not got:
            raise EOFError
        view = view[got:]
    return bytes(data)


def _main(root: int, down: int, up: int, others: tuple[int, int]) -> NoReturn:
    """The maker's life, from the fork to its end; it never returns into what the first process was doing."""
    status = 1
    try:
        parent = os.getppid()
        processes.set_parent_death_signal(signal.SIGKILL)
        for end in others:
            os.close(end)
        if os.getppid() == parent:
            _serve(root, down, up)
            status = 0
    finally:
        os._exit(status)


def _serve(root: int, down: int, up: int) -> None:
    folders = _Folders(root)
    name = b""
    try:
        while True:
            try:
                count, named, size = _HEAD.unpack(_read_exactly(down, _HEAD.size))
            except EOFError:
                return
            table = _read_exactly(down, count * _FILE.size)
            names = _read_exactly(down, named)
            bodies = memoryview(_read_exactly(down, size))
            at = start = 0
            for length, mode, uid, gid, stored, atime, mtime in _FILE.iter_unpack(table):
                name = names[start:start + length]
                start += length
                head, _, base = name.rpartition(b"/")
                body = [bodies[at:at + stored]] if stored else []
                at += stored
                folders.make((head, base, mode, uid, gid, (atime, mtime), body))
            os.write(up, b".")
    except OSError as error:
        os.write(up, b"E" + _ERROR.pack(error.errno or errno.EIO, len(name)) + name)
