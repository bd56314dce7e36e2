"""SPDY/3.1 on the wire: numbers, frame layouts and header blocks; no state but the two zlib streams.

Sources: SPDY Protocol draft 3 (sections 2.2, 2.6 and 2.6.10) and draft 3.1 (session flow control).
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Mapping

VERSION = 3
MAX_STREAM_ID = 0x7FFF_FFFF
MAX_WINDOW = 0x7FFF_FFFF
INITIAL_WINDOW = 64 << 10
#: Longest payload of a frame that is kept whole before it is read (everything but DATA).
MAX_CONTROL = 64 << 10
#: Longest header block once inflated, and most headers in it.
MAX_HEADER_BLOCK = 64 << 10
MAX_HEADERS = 256

FLAG_FIN = 0x01
FLAG_UNIDIRECTIONAL = 0x02


class Kind(enum.IntEnum):
    """Types of control frames (2.6)."""

    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    HEADERS = 8
    WINDOW_UPDATE = 9


class ResetStatus(enum.IntEnum):
    """Why a stream was reset (2.6.3)."""

    PROTOCOL_ERROR = 1
    INVALID_STREAM = 2
    REFUSED_STREAM = 3
    UNSUPPORTED_VERSION = 4
    CANCEL = 5
    INTERNAL_ERROR = 6
    FLOW_CONTROL_ERROR = 7
    STREAM_IN_USE = 8
    STREAM_ALREADY_CLOSED = 9
    INVALID_CREDENTIALS = 10
    FRAME_TOO_LARGE = 11


class GoAwayStatus(enum.IntEnum):
    """Why a session ended (2.6.6)."""

    OK = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


class Setting(enum.IntEnum):
    """The settings that mean something here (2.6.4)."""

    MAX_CONCURRENT_STREAMS = 4
    INITIAL_WINDOW_SIZE = 7


class ProtocolError(Exception):
    """The peer broke the protocol; the session cannot go on."""


_WORDS = (
    "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age "
    "allow authorization cache-control connection content-base content-encoding content-language content-length "
    "content-location content-md5 content-range content-type date etag expect expires from host if-match "
    "if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma "
    "proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade "
    "user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie "
    "keep-alive origin"
)
_TAIL = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized"
    "403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,"
    "text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)


def _dictionary() -> bytes:
    words = [word.replace("_", " ").encode() for word in _WORDS.split()]
    return b"".join(struct.pack(">I", len(word)) + word for word in words) + _TAIL.encode()


#: What both zlib streams are primed with (2.6.10.1); its Adler-32 is 0xe3c6a7c2.
DICTIONARY = _dictionary()


class HeaderWriter:
    """The sending half of the session's header compression."""

    def __init__(self) -> None:
        # A 2 KiB window covers the dictionary and keeps the memory of a session small.
        self._zlib = zlib.compressobj(6, zlib.DEFLATED, 11, 5, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)

    def pack(self, headers: Mapping[str, str]) -> bytes:
        """A compressed block; several values of one name are joined by NUL already."""
        parts = [struct.pack(">I", len(headers))]
        for name, value in headers.items():
            raw_name, raw_value = name.lower().encode("latin-1"), value.encode("latin-1")
            parts += [struct.pack(">I", len(raw_name)), raw_name, struct.pack(">I", len(raw_value)), raw_value]
        return self._zlib.compress(b"".join(parts)) + self._zlib.flush(zlib.Z_SYNC_FLUSH)


class HeaderReader:
    """The receiving half: bounded in size, so that a small frame cannot fill the memory (S8)."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(15, DICTIONARY)

    def unpack(self, block: bytes) -> dict[str, str]:
        """Headers by lower-case name; several values of one name stay joined by NUL.

        Raises `ProtocolError` when the block is damaged, too large or not exactly one header list.
        """
        try:
            data = self._zlib.decompress(block, MAX_HEADER_BLOCK)
        except zlib.error as error:
            raise ProtocolError(f"header block: {error}") from error
        if self._zlib.unconsumed_tail:
            raise ProtocolError(f"header block is larger than {MAX_HEADER_BLOCK} bytes")
        if self._zlib.eof:
            raise ProtocolError("header compression ended")
        return _parse_headers(data)


def _parse_headers(data: bytes) -> dict[str, str]:
    if len(data) < 4:
        raise ProtocolError("header block is cut short")
    (count,) = struct.unpack_from(">I", data)
    if count > MAX_HEADERS:
        raise ProtocolError(f"header block holds {count} headers, at most {MAX_HEADERS} are allowed")
    headers: dict[str, str] = {}
    at = 4
    for _ in range(count):
        name, at = _parse_text(data, at)
        value, at = _parse_text(data, at)
        name = name.lower()
        if not name or name in headers:
            raise ProtocolError(f"header {name!r} is empty or repeated")
        headers[name] = value
    if at != len(data):
        raise ProtocolError("header block has bytes after its last header")
    return headers


def _parse_text(data: bytes, at: int) -> tuple[str, int]:
    if at + 4 > len(data):
        raise ProtocolError("header block is cut short")
    (size,) = struct.unpack_from(">I", data, at)
    end = at + 4 + size
    if end > len(data):
        raise ProtocolError("header block is cut short")
    return data[at + 4 : end].decode("latin-1"), end


def control_frame(kind: Kind, flags: int, payload: bytes) -> bytes:
    """A whole control frame (2.2.1)."""
    return struct.pack(">HHI", 0x8000 | VERSION, kind, flags << 24 | len(payload)) + payload


def data_header(stream_id: int, size: int, fin: bool) -> bytes:
    """The eight bytes before the payload of a DATA frame (2.2.2)."""
    return struct.pack(">II", stream_id, (FLAG_FIN << 24 if fin else 0) | size)
