"""Moving bytes between descriptors on the event loop, without threads and with bounded memory.

`FdWriter` writes to one non-blocking descriptor and keeps what does not fit; `Pump` reads one and
hands on to a sink, and stops reading while the sink is full. Neither knows what it carries.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
from collections.abc import Callable
from typing import Any, Protocol

from pctr_shim.belongings import Belongings, Busy

CHUNK = 65536
#: Reads that one wake-up may do before others get their turn.
_TURNS = 8
_SPLICE_MOVE_NONBLOCK = 3
_SPLICE_SIZE = 1 << 20


class FdWriter:
    """Owns `fd` (non-blocking) and writes to it in order; errors end it.

    `write` says whether everything went out; when it did not, `on_flushed` is called later, once.
    """

    def __init__(self, fd: int) -> None:
        self._loop = asyncio.get_running_loop()
        self.fd = fd
        self._pending: list[bytes] = []
        self.pending_bytes = 0
        self._waiting = False
        self._closing = False
        self.broken = False
        self.on_flushed: Callable[[], None] | None = None

    def write(self, data: bytes) -> bool:
        """Write or keep `data`; False when some of it is still here."""
        if self.broken or self.fd < 0:
            return True
        if not self._pending:
            data = self._try(data)
        if data:
            self._pending.append(data)
            self.pending_bytes += len(data)
            self._wait()
        return not self._pending

    def _try(self, data: bytes) -> bytes:
        try:
            while data:
                data = data[os.write(self.fd, data):]
        except BlockingIOError:
            return data
        except OSError:
            self._break()
            return b""
        return b""

    def wait_writable(self) -> None:
        """Have `on_flushed` called when the descriptor takes bytes again."""
        self._wait()

    def _wait(self) -> None:
        if not self._waiting and self.fd >= 0:
            self._waiting = True
            self._loop.add_writer(self.fd, self._writable)

    def _writable(self) -> None:
        while self._pending and not self.broken:
            data = self._pending[0]
            rest = self._try(data)
            if not self._pending:
                break
            self.pending_bytes -= len(data) - len(rest)
            if rest:
                self._pending[0] = rest
                return
            self._pending.pop(0)
        self._stop_waiting()
        if self._closing:
            self.close()
        if self.on_flushed is not None:
            self.on_flushed()

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting = False
            self._loop.remove_writer(self.fd)

    def _break(self) -> None:
        self.broken = True
        self._pending.clear()
        self.pending_bytes = 0

    def close_when_flushed(self) -> None:
        """Close as soon as everything is out."""
        self._closing = True
        if not self._pending or self.broken:
            self.close()

    def close(self) -> None:
        """Close now; what is pending is dropped."""
        if self.fd >= 0:
            self._stop_waiting()
            os.close(self.fd)
            self.fd = -1
        self._break()


class Sink(Protocol):
    """Where a pump's bytes go. Called on the loop; must not block.

    `write` returns False when the sink is full; it then calls `on_room` once it has room.
    `splice` moves bytes straight from a pipe and returns their number, or None when it cannot.
    """

    on_room: Callable[[], None] | None

    def leave(self, belongings: Belongings) -> dict[str, Any]:
        """Describe itself for the next worker; `Busy` while it holds bytes."""
        ...

    def write(self, data: bytes) -> bool:
        """Take all of `data`."""
        ...

    def splice(self, fd: int) -> int | None:
        """Take bytes from the pipe `fd`: their number, 0 at its end, -1 when full, None when unable."""
        ...

    def flush(self) -> None:
        """Write out what an end of input leaves over."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class Pump:
    """Reads `fd` (owned, non-blocking) until its end and feeds a sink; `tap` sees every chunk first.

    `tap` returns whether it wants the bytes: while nobody does, pipes are spliced.
    """

    def __init__(
        self, fd: int, sink: Sink, *, tap: Callable[[bytes], None], tapped: Callable[[], bool], pipe: bool,
        on_end: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.fd = fd
        self.sink = sink
        self._tap = tap
        self._tapped = tapped
        self._pipe = pipe
        self._on_end = on_end
        self._reading = False
        self.ended = False
        self.moved = 0
        sink.on_room = self._resume

    def start(self) -> None:
        """Begin to read."""
        if not self.ended and not self._reading and self.fd >= 0:
            self._reading = True
            self._loop.add_reader(self.fd, self._readable)

    def leave(self, belongings: Belongings) -> int:
        """For the next worker: its descriptor's number, -1 when it has ended; `Busy` while the sink is full."""
        if self.stalled:
            raise Busy("output waits for its reader")
        return -1 if self.ended else belongings.leave(self.fd)

    @property
    def stalled(self) -> bool:
        """Whether the sink is full at the moment."""
        return not self.ended and not self._reading

    @property
    def behind(self) -> bool:
        """Whether something waits that could be moved now: then it is this process that had no time."""
        if not self._reading or self.fd < 0:
            return False
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self.fd)

    def _resume(self) -> None:
        self.start()

    def _readable(self) -> None:
        for _ in range(_TURNS):
            if not self._step():
                return

    def _step(self) -> bool:
        """One read; False when there is no more to do now."""
        if self._pipe and not self._tapped():
            count = self.sink.splice(self.fd)
            if count is not None:
                if count == 0:
                    self._end()
                elif count < 0:
                    self._pause()
                else:
                    self.moved += count
                return count > 0
        try:
            data = os.read(self.fd, CHUNK)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal whose last user is gone
                raise
            data = b""
        if not data:
            self._end()
            return False
        self.moved += len(data)
        self._tap(data)
        if not self.sink.write(data):
            self._pause()
            return False
        return True

    def _end(self) -> None:
        self.ended = True
        self._pause()
        self.sink.flush()
        self._on_end()

    def close(self) -> None:
        """Stop reading and close the descriptor and the sink."""
        self._pause()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.sink.close()


def splice(source: int, target: int) -> int | None:
    """Move bytes from a pipe: their number, 0 at the end, -1 when `target` is full, None when refused."""
    try:
        return os.splice(source, target, _SPLICE_SIZE, flags=_SPLICE_MOVE_NONBLOCK)
    except BlockingIOError:
        return -1
    except OSError:
        return None


def read_file(path: str) -> bytes:
    """What a file of at most 64 KiB holds."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, CHUNK)
    finally:
        os.close(fd)
