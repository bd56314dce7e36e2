"""A process's standard streams: fifos made for the daemon, and copying between them and our own.

Owns the fifos' folder and every byte on its way. Copies with splice(2) where both ends allow it,
by large reads and writes otherwise; never waits inside a copy, so that one loop serves all streams,
the daemon's connection and signals.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat

from pctr.contexts import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_CHUNK = 1 << 18
_PIPE_SIZE = 1 << 20
_F_SETPIPE_SZ = 1031
#: A terminal or socket takes at least this much once poll says it is writable.
_CAREFUL = 4096
_SPLICE = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE


def runtime_folder() -> str:
    """Where we keep what lives no longer than the machine runs: PCTR_RUNTIME_DIR, /run/pctr, or the user's own."""
    if os.environ.get("PCTR_RUNTIME_DIR"):
        return os.environ["PCTR_RUNTIME_DIR"]
    if os.geteuid() == 0:
        return "/run/pctr"
    return os.path.join(os.environ.get("XDG_RUNTIME_DIR") or "/tmp", f"pctr-{os.geteuid()}")


def fifo_root() -> str:
    """Where fifos are made."""
    return os.path.join(runtime_folder(), "fifo")


class Fifos:
    """The fifos of one process, in a folder of their own (0700). Paths are "" for absent streams."""

    def __init__(self, *, stdin: bool, stdout: bool = True, stderr: bool = True) -> None:
        self.directory = os.path.join(fifo_root(), os.urandom(8).hex())
        os.makedirs(self.directory, 0o700)
        self.stdin = self._make("stdin") if stdin else ""
        self.stdout = self._make("stdout") if stdout else ""
        self.stderr = self._make("stderr") if stderr else ""

    def _make(self, name: str) -> str:
        path = os.path.join(self.directory, name)
        os.mkfifo(path, 0o600)
        return path

    def remove(self) -> None:
        """Take the folder away; who holds a fifo open keeps it."""
        remove_fifos(self.directory)


def remove_fifos(directory: str) -> None:
    """Remove a folder of fifos; what is gone already is fine."""
    for name in ("stdin", "stdout", "stderr"):
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, name))
    with suppress(OSError):
        os.rmdir(directory)


def remove_fifos_of(paths: list[str]) -> None:
    """Remove the folders of these fifos when they are of our making."""
    root = fifo_root()
    for directory in {os.path.dirname(path) for path in paths if path}:
        if os.path.dirname(directory) == root:
            remove_fifos(directory)


def _widen(descriptor: int) -> None:
    with suppress(OSError):
        fcntl.fcntl(descriptor, _F_SETPIPE_SZ, _PIPE_SIZE)


def _spliceable(one: int, other: int) -> bool:
    """Whether splice may be tried: one end a pipe, neither a terminal nor a file opened for appending."""
    modes = [os.fstat(descriptor).st_mode for descriptor in (one, other)]
    if not any(stat.S_ISFIFO(mode) for mode in modes) or any(stat.S_ISCHR(mode) for mode in modes):
        return False
    return not fcntl.fcntl(other, fcntl.F_GETFL) & os.O_APPEND


def _may_block(target: int) -> bool:
    """Whether a large write could wait although poll said that the target is writable."""
    mode = os.fstat(target).st_mode
    if fcntl.fcntl(target, fcntl.F_GETFL) & os.O_NONBLOCK:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(target)


class Pump:
    """Copies from one descriptor to another, a step at a time, without waiting.

    `waits_for` is what to poll before the next `step`: (descriptor, event), or None at the end.
    `gone` becomes true when the reader of the target has gone; the rest is then thrown away.
    """

    def __init__(self, source: int, target: int, *, on_end: Callable[[], None] = lambda: None) -> None:
        self.source = source
        self.target = target
        self.ended = False
        self.gone = False
        self._on_end = on_end
        self._pending = memoryview(b"")
        self._splice = _spliceable(source, target)
        self._careful = _may_block(target)
        self._blocked = False

    @property
    def waits_for(self) -> tuple[int, int] | None:
        """What has to happen before the next step."""
        if self.ended:
            return None
        if self._pending or self._blocked:
            return self.target, select.POLLOUT
        return self.source, select.POLLIN

    @property
    def blocked(self) -> bool:
        """Whether bytes are here that the target does not take yet."""
        return bool(self._pending) or self._blocked

    def step(self) -> int:
        """Move what can be moved once; returns the bytes moved or read."""
        if self.ended:
            return 0
        try:
            if self._pending:
                return self._write()
            if self._splice and not self.gone:
                return self._spliced()
            return self._read()
        except BlockingIOError:
            return 0

    def _spliced(self) -> int:
        try:
            moved = os.splice(self.source, self.target, _CHUNK, flags=_SPLICE)
        except BlockingIOError:
            # Either end may be the reason: empty source, or full target.
            ready = select.poll()
            ready.register(self.source, select.POLLIN)
            self._blocked = bool(ready.poll(0))
            return 0
        except OSError as error:
            if error.errno == errno.EPIPE:
                self._lost()
                return 0
            if error.errno != errno.EINVAL:
                raise
            self._splice = False
            return 0
        self._blocked = False
        if not moved:
            self._end()
        return moved

    def _read(self) -> int:
        try:
            data = os.read(self.source, _CHUNK)
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal that hung up
                raise
            data = b""
        if not data:
            self._end()
        elif not self.gone:
            self._pending = memoryview(data)
            self._write()
        return len(data)

    def _write(self) -> int:
        try:
            size = min(len(self._pending), _CAREFUL) if self._careful else len(self._pending)
            written = os.write(self.target, self._pending[:size])
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self._lost()
            return 0
        self._pending = self._pending[written:]
        return written

    def _lost(self) -> None:
        self.gone = True
        self._blocked = False
        self._pending = memoryview(b"")

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            self._on_end()


def open_output(path: str) -> int:
    """The reading end of an output fifo; does not wait for a writer, and a read sees no end before one came."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    _widen(descriptor)
    return descriptor


def open_input(path: str) -> int:
    """The writing end of an input fifo; open for reading too, which is what keeps Linux from waiting or failing."""
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    _widen(descriptor)
    return descriptor
