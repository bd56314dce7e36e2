"""One end of a ttrpc connection: frames over an asyncio transport, without a task of its own.

Owns the transport, the parser and both directions' flow control. A shim and the daemon hold one such
object for each other for as long as a container lives, so it is small: no reader task, no stream
objects, one receive buffer for all connections of the process.
"""

from __future__ import annotations

import abc
import asyncio
from typing import cast

from supervisord_ctr.ttrpc import wire

#: What every connection receives into: what came is parsed, and copied, before anything else is read.
_RECEIVED = memoryview(bytearray(64 << 10))


class Framed(asyncio.BufferedProtocol, abc.ABC):
    """Frames in by `_take`, frames out by `_send`; `_lost` is told once that the connection is over."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = wire.Parser()
        self._held = False
        #: Exists while the peer does not read what was sent; set when it does again, or is gone.
        self._writable: asyncio.Event | None = None
        self._over = False

    # For subclasses.

    @abc.abstractmethod
    def _take(self, frame: wire.Frame) -> None:
        """One frame has come. May call `_hold`; must not raise."""

    @abc.abstractmethod
    def _lost(self, reason: str) -> None:
        """The connection is over; `reason` is empty for an orderly end."""

    def _hold(self) -> None:
        """Take no more frames and read nothing until `_release`."""
        self._held = True
        if self._transport is not None:
            self._transport.pause_reading()

    def _release(self) -> None:
        """Go on after `_hold`, first with what has come already."""
        if self._held:
            self._held = False
            self._pump()
            if not self._held and self._transport is not None:
                self._transport.resume_reading()

    async def _send(self, data: bytes) -> bool:
        """Send, and wait while the peer does not read; False when the connection is over."""
        transport = self._transport
        if self._over or transport is None or transport.is_closing():
            return False
        transport.write(data)
        if self._writable is not None:
            await self._writable.wait()
        return not self._over

    @property
    def descriptor(self) -> int:
        """The socket's; -1 when there is none any more."""
        found = self._transport.get_extra_info("socket") if self._transport is not None else None
        return found.fileno() if found is not None else -1

    @property
    def _still(self) -> bool:
        """Whether it goes on and no byte of a frame is under way in this process, in or out."""
        transport = self._transport
        return (
            transport is not None and not transport.is_closing() and not self._over and not self._held
            and not self._parser.inside and not transport.get_write_buffer_size()
        )

    @property
    def _clogged(self) -> bool:
        """Whether the peer does not read what was sent."""
        return self._writable is not None

    def hang_up(self) -> None:
        """End the connection when what was sent is on its way."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    # asyncio's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: the transport is there."""
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """asyncio: where to receive."""
        return _RECEIVED

    def buffer_updated(self, nbytes: int) -> None:
        """asyncio: so much was received."""
        self._parser.feed(_RECEIVED[:nbytes])
        self._pump()

    def _pump(self) -> None:
        try:
            while not self._held and (frame := self._parser.next()) is not None:
                self._take(frame)
        except wire.ProtocolError as error:
            self._finish(str(error))
            self.hang_up()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the connection is over."""
        self._finish("connection ended inside a message" if self._parser.inside and not self._held else "")
        self.resume_writing()

    def _finish(self, reason: str) -> None:
        if not self._over:
            self._over = True
            self._held = True
            self._lost(reason)

    def pause_writing(self) -> None:
        """asyncio: the peer does not read."""
        if self._writable is None:
            self._writable = asyncio.Event()

    def resume_writing(self) -> None:
        """asyncio: it does again."""
        waiting, self._writable = self._writable, None
        if waiting is not None:
            waiting.set()
