"""Tar writer: archives with nothing in them but what is told, so that equal trees give equal bytes.

Writes ustar headers, and PAX records where a value does not fit (long or non-ASCII names, large numbers,
parts of seconds, attributes). No user names, no access times, no padding to tape records.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from supervisord_ctr.errors import FailedPrecondition

_BLOCK = 512
_COPY = 1 << 20
_TYPES = {
    stat.S_IFREG: b"0", stat.S_IFLNK: b"2", stat.S_IFCHR: b"3", stat.S_IFBLK: b"4", stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}


class TarWriter:
    """Writes entries to `sink`, one after another; `finish` ends the archive."""

    def __init__(self, sink: Callable[[bytes], object]) -> None:
        self._sink = sink

    def add(
        self, name: bytes, kind: int, *, mode: int = 0, uid: int = 0, gid: int = 0, size: int = 0, mtime: int = 0,
        link: bytes = b"", device: int = 0, xattrs: dict[bytes, bytes] | None = None,
    ) -> None:
        """One header; `kind` is an S_IF constant, `mtime` nanoseconds. A body of `size` bytes must follow."""
        self._header(_TYPES[kind], name, mode, uid, gid, size, mtime, link, device, xattrs or {})

    def add_hard_link(self, name: bytes, target: bytes, status: os.stat_result, mtime: int) -> None:
        """Another name of an entry that was written."""
        self._header(
            b"1", name, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, 0, mtime, target, 0, {}
        )

    def body(self, fd: int, size: int) -> None:
        """The `size` bytes of the entry just added, from `fd`; FailedPrecondition when the file shrank meanwhile."""
        left = size
        while left:
            data = os.read(fd, min(left, _COPY))
            if not data:
                raise FailedPrecondition("a file became shorter while its layer was made", kind="layer")
            self._sink(data)
            left -= len(data)
        self.pad(size)

    def data(self, data: bytes) -> None:
        """The whole body of the entry just added."""
        self._sink(data)
        self.pad(len(data))

    def pad(self, size: int) -> None:
        """Fill the last block of a body of `size` bytes that the caller wrote to the sink."""
        if size % _BLOCK:
            self._sink(bytes(-size % _BLOCK))

    def finish(self) -> None:
        """Write the end marker."""
        self._sink(bytes(2 * _BLOCK))

    def _header(
        self, kind: bytes, name: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, link: bytes,
        device: int, xattrs: dict[bytes, bytes],
    ) -> None:
        records: dict[bytes, bytes] = {}
        seconds, fraction = divmod(mtime, 1_000_000_000)
        if len(name) > 100 or not name.isascii():
            records[b"path"] = name
        if len(link) > 100 or not link.isascii():
            records[b"linkpath"] = link
        for key, value, digits in ((b"uid", uid, 7), (b"gid", gid, 7), (b"size", size, 11)):
            if value >= 8**digits:
                records[key] = b"%d" % value
        if fraction or not 0 <= seconds < 8**11:
            records[b"mtime"] = _decimal(mtime)
        for key, attribute in xattrs.items():
            records[b"SCHILY.xattr." + key] = attribute
        if records:
            data = b"".join(_record(key, records[key]) for key in sorted(records))
            self._sink(_block(b"x", _short(b"PaxHeaders/" + name.rstrip(b"/").rpartition(b"/")[2]), 0o644, 0, 0,
                              len(data), 0, b"", 0))
            self.data(data)
        self._sink(_block(kind, _short(name), mode, uid, gid, size, seconds, _short(link), device))


def _short(text: bytes) -> bytes:
    """What of a name fits the old field; the whole one stands in a PAX record then."""
    return text.decode("ascii", "replace").encode("ascii", "replace")[:100]


def _decimal(nanoseconds: int) -> bytes:
    sign = b"-" if nanoseconds < 0 else b""
    seconds, fraction = divmod(abs(nanoseconds), 1_000_000_000)
    return sign + (b"%d.%09d" % (seconds, fraction)).rstrip(b"0").rstrip(b".")


def _record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return b"%d" % length + rest


def _octal(value: int, digits: int) -> bytes:
    return b"%0*o\0" % (digits, value if 0 <= value < 8**digits else 0)


def _block(
    kind: bytes, name: bytes, mode: int, uid: int, gid: int, size: int, seconds: int, link: bytes, device: int
) -> bytes:
    head = b"".join((
        name.ljust(100, b"\0"), _octal(mode, 7), _octal(uid, 7), _octal(gid, 7), _octal(size, 11), _octal(seconds, 11),
    ))
    tail = b"".join((
        kind, link.ljust(100, b"\0"), b"ustar\x0000", bytes(64), _octal(os.major(device), 7),
        _octal(os.minor(device), 7), bytes(155 + 12),
    ))
    checksum = sum(head) + sum(tail) + 8 * ord(" ")
    return head + b"%06o\0 " % checksum + tail
