"""A shim's streams as tests read them: records of a CRI log, and a client of attach.sock."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

from tests.support.shim import PATIENCE, Lab, Zygote, laboratory

RECORD = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z (stdout|stderr) ([FP]) (.*)")


def parse_log(path: Path) -> list[tuple[bytes, bytes, bytes]]:
    """Records of a CRI log; a line that is none fails."""
    found = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        match = RECORD.fullmatch(line)
        assert match is not None, line
        found.append((match[1], match[2], match[3]))
    return found


class AttachedClient:
    """A client of attach.sock."""

    opened: ClassVar[list[AttachedClient]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.opened.append(self)

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    @classmethod
    async def connect(cls, bundle: Path, **wanted: Any) -> AttachedClient:
        reader, writer = await asyncio.open_unix_connection(str(bundle / "attach.sock"))
        writer.write(json.dumps(wanted).encode() + b"\n")
        return cls(reader, writer)

    def send(self, channel: int, payload: bytes) -> None:
        self.writer.write(struct.pack(">BI", channel, len(payload)) + payload)

    async def frame(self) -> tuple[int, bytes] | None:
        try:
            channel, length = struct.unpack(">BI", await asyncio.wait_for(self.reader.readexactly(5), PATIENCE))
            return channel, await asyncio.wait_for(self.reader.readexactly(length), PATIENCE)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def until(self, text: bytes) -> None:
        data = b""
        while text not in data:
            frame = await self.frame()
            assert frame is not None
            data += frame[1]

    async def rest(self) -> tuple[dict[int, bytes], list[dict[str, Any]]]:
        streams: dict[int, bytes] = {}
        control = []
        while (frame := await self.frame()) is not None:
            if frame[0] == 3:
                control.append(json.loads(frame[1]))
            else:
                streams[frame[0]] = streams.get(frame[0], b"") + frame[1]
        self.writer.close()
        return streams, control


@contextlib.asynccontextmanager
async def laboratory_with_clients(zygote: Zygote) -> AsyncIterator[Lab]:
    """A laboratory of forked shims, at whose end attached clients are closed."""
    async with laboratory("zygote", zygote) as made:
        yield made
        for client in AttachedClient.opened:
            await client.close()
        AttachedClient.opened.clear()
