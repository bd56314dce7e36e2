"""ttrpc's framing: ten bytes of header, then a message (containerd/ttrpc, PROTOCOL.md).

    bytes 0-3   length of the data, big-endian, at most 4 MiB
    bytes 4-7   stream, big-endian; odd when the client opened it
    byte  8     type: 1 request, 2 response, 3 data
    byte  9     flags: 1 remote closed, 2 remote open, 4 no data

Owns reading and writing of frames on asyncio streams. A frame that is too long is skipped and
reported with its header, so one mistaken caller does not take the connection along; a header that
makes no sense ends it.
"""

from __future__ import annotations

import asyncio
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


def pack(stream: int, kind: int, flags: int, data: bytes) -> bytes:
    """One frame; `ResourceExhausted` when `data` is longer than 4 MiB."""
    if len(data) > MAX_MESSAGE:
        raise ResourceExhausted(f"message length {len(data)} exceed maximum message size of {MAX_MESSAGE}")
    return HEADER.pack(len(data), stream, kind, flags) + data


async def read_frame(reader: asyncio.StreamReader) -> Frame | None:
    """The next frame, or None at an orderly end between two frames.

    `ProtocolError` on a broken header or an end inside a frame.
    """
    try:
        header = await reader.readexactly(HEADER.size)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise ProtocolError("connection ended inside a header") from None
        return None
    except ConnectionError:
        return None
    length, stream, kind, flags = HEADER.unpack(header)
    if kind not in (REQUEST, RESPONSE, DATA) or length > _SKIPPABLE:
        raise ProtocolError(f"not a ttrpc header: {header.hex()}")
    try:
        if length > MAX_MESSAGE:
            await _skip(reader, length)
            problem = ResourceExhausted(f"message length {length} exceed maximum message size of {MAX_MESSAGE}")
            return Frame(stream, kind, flags, b"", problem)
        return Frame(stream, kind, flags, await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        raise ProtocolError("connection ended inside a message") from None


async def _skip(reader: asyncio.StreamReader, length: int) -> None:
    while length:
        length -= len(await reader.readexactly(min(length, 65536)))


def socket_path(address: str) -> str:
    """The path of "unix:///path", "ttrpc+unix:///path" or a bare path; abstract sockets are refused."""
    path = address.removeprefix("ttrpc+").removeprefix("unix://")
    if not path.startswith("/") and not path.startswith("./"):
        raise InvalidArgument(f"address {address!r} is not a socket path", key=address)
    return path


