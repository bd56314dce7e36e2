"""ttrpc's framing: ten bytes of header, then a message (containerd/ttrpc, PROTOCOL.md).

    bytes 0-3   length of the data, big-endian, at most 4 MiB
    bytes 4-7   stream, big-endian; odd when the client opened it
    byte  8     type: 1 request, 2 response, 3 data
    byte  9     flags: 1 remote closed, 2 remote open, 4 no data

Owns frames and their parser, without any IO. A frame that is too long is skipped and reported with
its header, so one mistaken caller does not take the connection along; a header that makes no sense
ends it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from supervisord_ctr.errors import Error, InvalidArgument, ResourceExhausted

MAX_MESSAGE = 4 << 20
HEADER = struct.Struct(">IIBB")

REQUEST = 1
RESPONSE = 2
DATA = 3

REMOTE_CLOSED = 1
REMOTE_OPEN = 2
NO_DATA = 4

#: A header may announce an over-long message up to this size and have it skipped; beyond that it is garbage.
_SKIPPABLE = 64 << 20


class Frame(NamedTuple):
    """One message. `error` is set when its data was too long and has been dropped."""

    stream: int
    kind: int
    flags: int
    data: bytes
    error: Error | None = None


class ProtocolError(Exception):
    """The peer does not speak ttrpc; the connection is worth nothing any more."""


class Parser:
    """Bytes in, frames out: `feed` what has come, then take frames from `next` until it gives None."""

    __slots__ = ("_drop", "_dropped", "_pending")

    def __init__(self) -> None:
        self._pending = bytearray()
        #: Bytes of an over-long message that are still to come, and the frame that stands for it.
        self._drop = 0
        self._dropped: Frame | None = None

    @property
    def inside(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self._pending) or self._dropped is not None

    def feed(self, data: bytes | memoryview) -> None:
        """Add what has come."""
        self._pending += data

    def next(self) -> Frame | None:
        """The next whole frame; None when more bytes are needed. `ProtocolError` for a broken header."""
        pending = self._pending
        if self._dropped is None:
            if len(pending) < HEADER.size:
                return None
            length, stream, kind, flags = HEADER.unpack_from(pending)
            if kind not in (REQUEST, RESPONSE, DATA) or length > _SKIPPABLE:
                raise ProtocolError(f"not a ttrpc header: {pending[:HEADER.size].hex()}")
            if length <= MAX_MESSAGE:
                end = HEADER.size + length
                if len(pending) < end:
                    return None
                data = bytes(memoryview(pending)[HEADER.size:end])
                del pending[:end]
                return Frame(stream, kind, flags, data)
            problem = ResourceExhausted(f"message length {length} exceed maximum message size of {MAX_MESSAGE}")
            self._drop, self._dropped = length, Frame(stream, kind, flags, b"", problem)
            del pending[:HEADER.size]
        count = min(self._drop, len(pending))
        del pending[:count]
        self._drop -= count
        if self._drop:
            return None
        skipped, self._dropped = self._dropped, None
        return skipped


def pack(stream: int, kind: int, flags: int, data: bytes) -> bytes:
    """One frame; `ResourceExhausted` when `data` is longer than 4 MiB."""
    if len(data) > MAX_MESSAGE:
        raise ResourceExhausted(f"message length {len(data)} exceed maximum message size of {MAX_MESSAGE}")
    return HEADER.pack(len(data), stream, kind, flags) + data


def socket_path(address: str) -> str:
    """The path of "unix:///path", "ttrpc+unix:///path" or a bare path; abstract sockets are refused."""
    path = address.removeprefix("ttrpc+").removeprefix("unix://")
    if not path.startswith("/") and not path.startswith("./"):
        raise InvalidArgument(f"address {address!r} is not a socket path", key=address)
    return path
