"""Tar: a streaming reader of archive headers, made for layers.

Reads ustar, star, GNU (long names and links, old sparse files, base-256 numbers) and PAX (names,
sizes, times, owners, `SCHILY.xattr.*`, sparse formats 0.0, 0.1 and 1.0) from chunks of bytes that
somebody else inflates. Names are bytes. Does not touch the file system and trusts nothing: every
length is bounded before anything is read for it (S8).

Source: POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format" and "Sparse
Formats"; Linux' star for `SCHILY.xattr`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from supervisord_ctr.errors import InvalidArgument

REGULAR, LINK, SYMLINK, CHAR, BLOCK, DIRECTORY, FIFO, CONTIGUOUS = (ord(c) for c in "01234567")
OLD_REGULAR = 0
GNU_LONG_NAME, GNU_LONG_LINK, GNU_SPARSE = ord("L"), ord("K"), ord("S")
PAX, PAX_GLOBAL, SOLARIS_PAX = ord("x"), ord("g"), ord("X")

#: Bytes of one extended header (long name or PAX records).
MAX_METADATA = 1 << 20
#: Extents of one sparse file.
MAX_EXTENTS = 65536
#: Extended headers in front of one entry.
MAX_EXTENDED = 16

_BLOCK = 512
_FIELDS = struct.Struct("100s8s8s8s12s12s8sB100s8s32s32s8s8s155s12s")
_ZERO = bytes(_BLOCK)
_SPACES = b" " * 8
_XATTR = b"SCHILY.xattr."


def _invalid(what: str) -> InvalidArgument:
    return InvalidArgument(f"invalid layer archive: {what}", kind="layer")


class Entry:
    """One member. `size` is what the file holds (0 for all but files); `extents` tells where a sparse body goes.

    Times are nanoseconds since the epoch; `atime` is None when not stated.
    """

    __slots__ = (
        "atime", "extents", "gid", "link", "major", "minor", "mode", "mtime", "name", "size", "stored", "type", "uid",
        "xattrs",
    )

    def __init__(self) -> None:
        self.name = b""
        self.link = b""
        self.type = REGULAR
        self.mode = 0
        self.uid = 0
        self.gid = 0
        self.size = 0
        self.stored = 0
        self.mtime = 0
        self.atime: int | None = None
        self.major = 0
        self.minor = 0
        self.xattrs: dict[bytes, bytes] | None = None
        self.extents: list[tuple[int, int]] | None = None


class _Pax:
    """The records of one PAX header; sparse ones keep their order."""

    __slots__ = ("records", "sparse", "xattrs")

    def __init__(self) -> None:
        self.records: dict[bytes, bytes] = {}
        self.xattrs: dict[bytes, bytes] = {}
        self.sparse: list[int] = []


class TarReader:
    """Entries one after another from `next_chunk`, which gives b"" at the end.

    `next()` gives the following entry or None after the end marker; `body()` gives the current
    entry's bytes piece by piece until it is empty. What a caller leaves of a body is skipped.
    """

    def __init__(self, next_chunk: Callable[[], bytes]) -> None:
        self._next_chunk = next_chunk
        self._buffer = b""
        self._view = memoryview(b"")
        self._position = 0
        self._left = 0  # bytes of the current body
        self._padding = 0
        self._numbers: dict[bytes, int] = {}

    # Bytes.

    def _refill(self) -> bool:
        self._buffer = self._next_chunk()
        self._view = memoryview(self._buffer)
        self._position = 0
        return bool(self._buffer)

    def _take(self, count: int) -> bytes:
        """Exactly `count` bytes; fewer only at the end of the stream."""
        position = self._position
        end = position + count
        if end <= len(self._buffer):
            self._position = end
            return self._buffer[position:end]
        parts = [self._buffer[position:]]
        missing = count - len(parts[0])
        while missing and self._refill():
            part = self._buffer[:missing]
            self._position = len(part)
            missing -= len(part)
            parts.append(part)
        return b"".join(parts)

    def _skip(self, count: int) -> None:
        while count:
            available = len(self._buffer) - self._position
            if count <= available:
                self._position += count
                return
            count -= available
            if not self._refill():
                raise _invalid("unexpected end of the stream inside an entry")

    def body(self) -> memoryview:
        """The next piece of the current entry's stored body; empty when it ended."""
        left = self._left
        if not left:
            return self._view[:0]
        position = self._position
        available = len(self._buffer) - position
        if not available:
            if not self._refill():
                raise _invalid("unexpected end of the stream inside an entry")
            position = 0
            available = len(self._buffer)
        count = left if left < available else available
        self._left = left - count
        self._position = position + count
        return self._view[position:position + count]

    def drain(self) -> None:
        """Read the stream to its end, so that whoever hashes it sees all of it."""
        while self._refill():
            pass

    # Headers.

    def next(self) -> Entry | None:
        """The next entry; None at the end marker or where the stream ends between entries."""
        pax: _Pax | None = None
        long_name = long_link = b""
        for _ in range(MAX_EXTENDED):
            if self._left or self._padding:
                self._skip(self._left)
                self._take(self._padding)  # builders that stop behind the last byte (umoci insert) leave it out
                self._left = self._padding = 0
            block = self._take(_BLOCK)
            if len(block) < _BLOCK:
                if block or pax is not None or long_name or long_link:
                    raise _invalid("unexpected end of the stream inside a header")
                return None
            if block == _ZERO:
                self._end_marker()
                return None
            entry, kind = self._header(block)
            if kind == GNU_LONG_NAME:
                long_name = self._metadata(entry.stored).rstrip(b"\0")
            elif kind == GNU_LONG_LINK:
                long_link = self._metadata(entry.stored).rstrip(b"\0")
            elif kind in (PAX, SOLARIS_PAX):
                pax = _records(self._metadata(entry.stored))
            elif kind == PAX_GLOBAL:
                self._metadata(entry.stored)  # as containerd: known and ignored
            else:
                return self._complete(entry, block, pax, long_name, long_link)
        raise _invalid(f"more than {MAX_EXTENDED} extended headers in front of one entry")

    def _end_marker(self) -> None:
        second = self._take(_BLOCK)
        if second and second != _ZERO:
            raise _invalid("a single zero block is followed by data")

    def _metadata(self, size: int) -> bytes:
        if size > MAX_METADATA:
            raise _invalid(f"an extended header of {size} bytes, at most {MAX_METADATA} are allowed")
        data = self._take(size)
        if len(data) < size:
            raise _invalid("unexpected end of the stream inside an extended header")
        self._skip(-size % _BLOCK)
        return data

    def _number(self, field: bytes) -> int:
        found = self._numbers.get(field)
        if found is None:
            found = _parse_number(field)
            if len(self._numbers) > 8192:
                self._numbers.clear()
            self._numbers[field] = found
        return found

    def _header(self, block: bytes) -> tuple[Entry, int]:
        (name, mode, uid, gid, size, mtime, checksum, kind, link, magic, _, _, major, minor, prefix, _) = (
            _FIELDS.unpack(block)
        )
        number = self._number
        if number(checksum) != sum(block) - sum(checksum) + 256 and not _signed_checksum_fits(block, number(checksum)):
            raise _invalid("a header's checksum does not fit")
        entry = Entry()
        entry.name = name.partition(b"\0")[0]
        entry.link = link.partition(b"\0")[0]
        entry.mode = number(mode)
        entry.uid = number(uid)
        entry.gid = number(gid)
        entry.stored = number(size)
        entry.mtime = number(mtime) * 1_000_000_000
        if prefix[0] and magic[:6] == b"ustar\0":
            prefix = block[345:476] if block[508:] == b"tar\0" else prefix
            entry.name = prefix.partition(b"\0")[0] + b"/" + entry.name
        if kind in (CHAR, BLOCK):
            entry.major, entry.minor = number(major), number(minor)
        if entry.stored < 0:
            raise _invalid(f"entry {entry.name!r} has a negative size")
        return entry, kind

    def _complete(self, entry: Entry, block: bytes, pax: _Pax | None, long_name: bytes, long_link: bytes) -> Entry:
        kind = block[156]
        if long_name:
            entry.name = long_name.partition(b"\0")[0]
        if long_link:
            entry.link = long_link.partition(b"\0")[0]
        if pax is not None:
            _merge(entry, pax)
        if kind in (OLD_REGULAR, CONTIGUOUS):
            kind = DIRECTORY if kind == OLD_REGULAR and entry.name.endswith(b"/") else REGULAR
        entry.type = kind
        if kind not in (REGULAR, GNU_SPARSE):
            # The other known kinds have no body, whatever their size says; unknown ones are skipped over.
            if kind in (LINK, SYMLINK, CHAR, BLOCK, DIRECTORY, FIFO):
                entry.stored = 0
            self._left, self._padding = entry.stored, -entry.stored % _BLOCK
            return entry
        self._left, self._padding = entry.stored, -entry.stored % _BLOCK
        entry.size = entry.stored
        if kind == GNU_SPARSE:
            entry.type = REGULAR
            self._old_sparse(entry, block)
        elif pax is not None and any(key.startswith(b"GNU.sparse.") for key in pax.records):
            self._pax_sparse(entry, pax)
        return entry

    # Sparse files.

    def _old_sparse(self, entry: Entry, block: bytes) -> None:
        entry.size = self._number(block[483:495])
        numbers: list[int] = []
        data, extended = block[386:482], block[482]
        while True:
            for start in range(0, len(data) - 23, 24):
                if not data[start] and not data[start + 12]:
                    break
                numbers.append(self._number(data[start:start + 12]))
                numbers.append(self._number(data[start + 12:start + 24]))
            if not extended:
                break
            if len(numbers) > 2 * MAX_EXTENTS:
                raise _invalid(f"sparse entry {entry.name!r} has more than {MAX_EXTENTS} extents")
            more = self._take(_BLOCK)
            if len(more) < _BLOCK:
                raise _invalid("unexpected end of the stream inside a sparse map")
            data, extended = more[:504], more[504]
        entry.extents = _extents(entry, numbers)

    def _pax_sparse(self, entry: Entry, pax: _Pax) -> None:
        records = pax.records
        if b"GNU.sparse.name" in records:
            entry.name = records[b"GNU.sparse.name"]
        real = records.get(b"GNU.sparse.realsize", records.get(b"GNU.sparse.size"))
        if real is None:
            raise _invalid(f"sparse entry {entry.name!r} does not state its size")
        entry.size = _decimal(real)
        if records.get(b"GNU.sparse.major") == b"1":
            numbers = self._sparse_map_in_body(entry)
        elif b"GNU.sparse.map" in records:
            numbers = [_decimal(text) for text in records[b"GNU.sparse.map"].split(b",", 2 * MAX_EXTENTS) if text]
        else:
            numbers = pax.sparse
        entry.extents = _extents(entry, numbers)

    def _sparse_map_in_body(self, entry: Entry) -> list[int]:
        """Format 1.0: decimal numbers, one a line, padded to a block, in front of the data."""
        text = bytearray()
        needed = 1
        while text.count(b"\n") < needed:
            if self._left < _BLOCK or len(text) > MAX_METADATA:
                raise _invalid(f"sparse entry {entry.name!r} has a broken map")
            text += self._take(_BLOCK)
            self._left -= _BLOCK
            if needed == 1 and b"\n" in text:
                count = _decimal(bytes(text.partition(b"\n")[0]))
                if count > MAX_EXTENTS:
                    raise _invalid(f"sparse entry {entry.name!r} has more than {MAX_EXTENTS} extents")
                needed = 1 + 2 * count
        entry.stored = self._left
        return [_decimal(line) for line in bytes(text).split(b"\n")[1:needed]]


def _extents(entry: Entry, numbers: list[int]) -> list[tuple[int, int]]:
    """Pairs of offset and length, checked: in order, inside the file, together the stored bytes."""
    if len(numbers) % 2 or len(numbers) > 2 * MAX_EXTENTS:
        raise _invalid(f"sparse entry {entry.name!r} has a broken map")
    extents = list(zip(numbers[::2], numbers[1::2], strict=True))
    position = total = 0
    for offset, length in extents:
        if offset < position or length < 0 or offset + length > entry.size:
            raise _invalid(f"sparse entry {entry.name!r} has a map outside its size of {entry.size}")
        position = offset + length
        total += length
    if total != entry.stored:
        raise _invalid(f"sparse entry {entry.name!r} stores {entry.stored} bytes where its map says {total}")
    return extents


def _parse_number(field: bytes) -> int:
    """Octal text, or GNU's base-256 when the top bit is set (negative when the next one is set, too)."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big")
        bits = 8 * len(field) - 1
        value &= (1 << bits) - 1
        return value - (1 << bits) if field[0] & 0x40 else value
    text = field.strip(b" \0").partition(b"\0")[0]
    if not text:
        return 0
    if not text.isdigit():
        raise _invalid(f"{text!r} is not an octal number")
    try:
        return int(text, 8)
    except ValueError:
        raise _invalid(f"{text!r} is not an octal number") from None


def _signed_checksum_fits(block: bytes, checksum: int) -> bool:
    """Whether the header was summed as signed bytes, as some old writers did."""
    changed = block[:148] + _SPACES + block[156:]
    return sum(changed) - 256 * sum(byte > 127 for byte in changed) == checksum


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise _invalid(f"{text[:40]!r} is not a number")
    return int(text)


def _time(text: bytes) -> int:
    """A PAX time ("1700000000.123456789", perhaps negative) in nanoseconds."""
    negative = text.startswith(b"-")
    whole, _, fraction = text.lstrip(b"-").partition(b".")
    if not (whole + fraction).isdigit() or len(whole) > 20:
        raise _invalid(f"{text[:40]!r} is not a time")
    value = int(whole or b"0") * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))
    return -value if negative else value


def _records(data: bytes) -> _Pax:
    """PAX records: each `LENGTH KEY=VALUE\\n`, where LENGTH counts the whole record."""
    pax = _Pax()
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 21)
        length_text = data[position:space] if space > 0 else b""
        if not length_text.isdigit():
            if not data[position:].strip(b"\0"):
                break
            raise _invalid("a PAX record without length")
        end = position + int(length_text)
        if end > len(data) or end <= space + 1 or data[end - 1:end] != b"\n":
            raise _invalid("a PAX record that does not end where it says")
        key, equals, value = data[space + 1:end - 1].partition(b"=")
        if not equals or not key or b"\0" in key:
            raise _invalid("a PAX record without a key")
        position = end
        if key.startswith(_XATTR):
            pax.xattrs[key[len(_XATTR):]] = value
        elif key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            pax.sparse.append(_decimal(value))
            pax.records[b"GNU.sparse.used"] = b"1"
        else:
            if key in (b"path", b"linkpath", b"GNU.sparse.name") and b"\0" in value:
                raise _invalid("a name with a NUL byte")
            pax.records[key] = value
    return pax


def _merge(entry: Entry, pax: _Pax) -> None:
    """Let PAX records override the header's fields; an empty value leaves the field as it is."""
    records = pax.records
    if name := records.get(b"path"):
        entry.name = name
    if link := records.get(b"linkpath"):
        entry.link = link
    if size := records.get(b"size"):
        entry.stored = _decimal(size)
    if uid := records.get(b"uid"):
        entry.uid = _decimal(uid)
    if gid := records.get(b"gid"):
        entry.gid = _decimal(gid)
    if mtime := records.get(b"mtime"):
        entry.mtime = _time(mtime)
    if atime := records.get(b"atime"):
        entry.atime = _time(atime)
    if pax.xattrs:
        entry.xattrs = pax.xattrs
