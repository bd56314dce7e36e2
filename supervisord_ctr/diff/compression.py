"""Compression: what a layer is packed with, and streams that unpack and pack it.

Owns detection by the first bytes, inflating (igzip through `isal`, zstd) and deflating. All heavy
calls let go of the interpreter lock. Libraries are imported when first needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO, Protocol, cast

from supervisord_ctr.errors import InvalidArgument

GZIP, ZSTD, NONE = "gzip", "zstd", ""

#: Bytes that `detect` wants to see.
MAGIC_LENGTH = 10
#: Largest zstd window (2^27 is what `zstd` itself accepts without being asked).
MAX_WINDOW = 1 << 27
_READ = 512 << 10


class Readable(Protocol):
    """A source of bytes: `read(n)` gives at most n, b"" at the end."""

    def read(self, size: int, /) -> bytes: ...


def detect(head: bytes) -> str:
    """The compression that the first bytes of a stream show: GZIP, ZSTD or NONE.

    bzip2 and xz, which no image specification allows, are InvalidArgument instead of a broken tar.
    """
    if head.startswith(b"\x1f\x8b\x08"):
        return GZIP
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        return ZSTD
    if head.startswith((b"BZh", b"\xfd7zXZ\x00")):
        raise InvalidArgument("layer is packed with bzip2 or xz, which image layers may not be", kind="layer")
    return NONE


class _Source:
    """A readable with its first bytes put back, that counts what was taken."""

    def __init__(self, head: bytes, raw: Readable) -> None:
        self._head = head
        self._raw = raw
        self.taken = 0
        self.frames: _ZstdFrames | None = None

    def read(self, size: int = -1, /) -> bytes:
        if size < 0:
            size = _READ
        if self._head:
            part, self._head = self._head[:size], self._head[size:]
        else:
            part = self._raw.read(size)
        self.taken += len(part)
        if self.frames is not None:
            self.frames.feed(part)
        return part

    def readinto(self, target: Any, /) -> int:
        part = self.read(len(target))
        target[:len(part)] = part
        return len(part)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    @property
    def closed(self) -> bool:
        return False


class _ZstdFrames:
    """Follows the frames of a zstd stream by their headers: the library does not tell that a stream was cut.

    Source: RFC 8878, sections 3.1.1 and 3.1.2.
    """

    def __init__(self) -> None:
        self._state: Callable[[bytes], None] = self._magic
        self._need = 4
        self._held = b""
        self._skip = 0
        self._checksum = False

    @property
    def complete(self) -> bool:
        """Whether the stream stands between frames."""
        return self._state == self._magic and not self._held and not self._skip

    def feed(self, data: bytes) -> None:
        """Take in the next bytes."""
        position = 0
        while position < len(data):
            if self._skip:
                step = min(self._skip, len(data) - position)
                self._skip -= step
                position += step
                continue
            step = min(self._need - len(self._held), len(data) - position)
            self._held += data[position:position + step]
            position += step
            if len(self._held) == self._need:
                held, self._held = self._held, b""
                self._state(held)

    def _next(self, state: Callable[[bytes], None], need: int) -> None:
        self._state, self._need = state, need

    def _magic(self, head: bytes) -> None:
        if head == b"\x28\xb5\x2f\xfd":
            self._next(self._descriptor, 1)
        else:
            self._next(self._skippable, 4)

    def _skippable(self, head: bytes) -> None:
        self._skip = int.from_bytes(head, "little")
        self._next(self._magic, 4)

    def _descriptor(self, head: bytes) -> None:
        flags = head[0]
        self._checksum = bool(flags & 4)
        single = bool(flags & 0x20)
        size = (1 if single else 0, 2, 4, 8)[flags >> 6]
        self._skip = (0 if single else 1) + (0, 1, 2, 4)[flags & 3] + size
        self._next(self._block, 3)

    def _block(self, head: bytes) -> None:
        value = int.from_bytes(head, "little")
        self._skip = 1 if (value >> 1) & 3 == 1 else value >> 3
        if value & 1:
            if self._checksum:
                self._skip += 4
            self._next(self._magic, 4)


class Inflater:
    """The unpacked bytes of `raw`, whatever it is packed with; `taken` counts packed bytes so far."""

    def __init__(self, raw: Readable) -> None:
        head = b""
        while len(head) < MAGIC_LENGTH and (part := raw.read(_READ)):
            head += part
        self.compression = detect(head)
        self._source = _Source(head, raw)
        self._read: Callable[[int], bytes] = self._source.read
        if self.compression == GZIP:
            from isal import isal_zlib

            # The class behind `igzip.open`, without the second buffer and the modules that `igzip` loads.
            self._read = isal_zlib._GzipReader(cast(BinaryIO, self._source), _READ).read
        elif self.compression == ZSTD:
            import zstandard

            self._source.frames = _ZstdFrames()
            self._read = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(
                cast(BinaryIO, self._source), read_size=_READ, read_across_frames=True
            ).read

    @property
    def taken(self) -> int:
        """Packed bytes read so far."""
        return self._source.taken

    def read(self, size: int) -> bytes:
        """At most `size` unpacked bytes; b"" at the end. InvalidArgument for a damaged or cut stream."""
        try:
            data = self._read(size)
            if not data and self._source.frames is not None and not self._source.frames.complete:
                raise EOFError
            return data
        except EOFError:
            raise InvalidArgument("layer ends in the middle of its compressed stream", kind="layer") from None
        except MemoryError:
            raise InvalidArgument("layer needs too much memory to be unpacked", kind="layer") from None
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise InvalidArgument(f"layer's {self.compression} stream is damaged: {error}", kind="layer") from error
        except Exception as error:
            # The libraries' own error types share no base class.
            if type(error).__module__.startswith(("isal", "zstd", "zlib")):
                raise InvalidArgument(
                    f"layer's {self.compression} stream is damaged: {error}", kind="layer"
                ) from error
            raise


class Deflater:
    """Packs what is written into it and hands the result to `sink`; `finish` writes the end.

    gzip output carries no name and no time, so the same input gives the same bytes.
    """

    def __init__(self, compression: str, sink: Callable[[bytes], object], level: int | None = None) -> None:
        self._sink = sink
        self._object: Any = None
        if compression == GZIP:
            import zlib

            self._object = zlib.compressobj(6 if level is None else level, zlib.DEFLATED, -15)
            self._crc: Callable[[bytes, int], int] = zlib.crc32
            sink(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff")
        elif compression == ZSTD:
            import zstandard

            packer = zstandard.ZstdCompressor(level=3 if level is None else level, write_checksum=True)
            self._object = packer.compressobj()
        elif compression != NONE:
            raise InvalidArgument(f"unknown compression {compression!r}", kind="layer")
        self._gzip = compression == GZIP
        self._sum = self._length = 0

    def write(self, data: bytes) -> int:
        """Pack `data`."""
        if self._object is None:
            self._sink(data)
            return len(data)
        if self._gzip:
            self._sum = self._crc(data, self._sum)
            self._length += len(data)
        if packed := self._object.compress(data):
            self._sink(packed)
        return len(data)

    def finish(self) -> None:
        """Write what is left and the trailer."""
        if self._object is None:
            return
        self._sink(self._object.flush())
        if self._gzip:
            self._sink(self._sum.to_bytes(4, "little") + (self._length & 0xFFFFFFFF).to_bytes(4, "little"))
