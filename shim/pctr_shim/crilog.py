"""Log files in the format of CRI: `TIME STREAM TAG LINE`, one record a line.

    2024-01-02T03:04:05.000000006Z stdout F a whole line
    2024-01-02T03:04:05.000000006Z stderr P a part of a longer line

Owns formatting, rotation at line ends, re-opening, and what happens when the disk is full: the
container is never held up; what cannot be written is dropped and counted, and the next line that
can be written tells how much. One `LogFile` serves both streams of a container.

Address: `cri-log:///ABSOLUTE/PATH?max_size=BYTES&max_files=N&max_rate=BYTES_PER_SECOND&max_line=BYTES`.
Without `max_size` the file is rotated by others (a kubelet), who then ask for `reopen`. Lines longer
than `max_line` (16 KiB) are split into parts. Rotation renames PATH to PATH.1, PATH.1 to PATH.2 and so on.

Source: Kubernetes' design for CRI logs; the part size is containerd's default.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pctr_shim.belongings import Belongings
from supervisord_ctr import errors

log = logging.getLogger(__name__)

PART = 16 * 1024


@dataclass(frozen=True, slots=True)
class LogAddress:
    """A parsed `cri-log://` address; 0 means "no limit"."""

    path: str
    max_size: int = 0
    max_files: int = 5
    max_rate: int = 0
    max_line: int = PART

    @classmethod
    def parse(cls, text: str) -> LogAddress:
        """`InvalidArgument` for anything but an absolute path and known numbers."""
        parts = urllib.parse.urlsplit(text)
        path = urllib.parse.unquote(parts.path)
        if parts.scheme != "cri-log" or parts.netloc or not os.path.isabs(path):
            raise errors.InvalidArgument(f"log address {text!r} is not cri-log:///absolute/path", key=text)
        if "\x00" in path or ".." in path.split("/"):
            raise errors.InvalidArgument(f"log path {path!r} must not hold '..'", key=text)
        numbers: dict[str, int] = {}
        for name, value in urllib.parse.parse_qsl(parts.query, keep_blank_values=True):
            if name not in ("max_size", "max_files", "max_rate", "max_line") or not value.isdigit():
                raise errors.InvalidArgument(f"log address {text!r}: {name}={value} is not understood", key=text)
            numbers[name] = int(value)
        if numbers.get("max_line") == 0:
            raise errors.InvalidArgument(f"log address {text!r}: max_line must not be 0", key=text)
        return cls(path, **numbers)


class LogFile:
    """One file, opened for appending, shared by the streams of a container."""

    def __init__(self, address: LogAddress, fd: int = -1) -> None:
        """`fd`: the file, open for appending already."""
        self.address = address
        self.dropped = 0
        self._untold = 0
        self._users = 0
        self._fd = fd
        self._size = 0
        self._second = 0
        self._spent = 0
        if fd < 0:
            self._open()

    def leave(self, belongings: Belongings) -> dict[str, Any]:
        """For the next worker."""
        return {"fd": belongings.leave(self._fd), "size": self._size, "dropped": self.dropped, "untold": self._untold}

    @classmethod
    def resume(cls, address: LogAddress, left: Mapping[str, Any], belongings: Belongings) -> LogFile:
        """What `leave` described."""
        file = cls(address, belongings.take(left["fd"]))
        file._size, file.dropped, file._untold = left["size"], left["dropped"], left["untold"]
        return file

    def _open(self) -> None:
        os.makedirs(os.path.dirname(self.address.path), mode=0o755, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self.address.path, flags, 0o640)
        self._size = os.fstat(self._fd).st_size

    def reopen(self) -> None:
        """Open the path anew; the old file is kept when that fails, and the `OSError` raised."""
        before = self._fd
        self._open()
        if before >= 0:
            os.close(before)

    def use(self) -> None:
        """One more stream writes here."""
        self._users += 1

    def release(self) -> None:
        """One stream less; the last one closes the file."""
        self._users -= 1
        if self._users <= 0:
            self.close()

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def append(self, data: bytes) -> None:
        """Write whole records. Never raises: what the disk refuses is dropped and counted."""
        if self._fd < 0 or self._over_rate(len(data)):
            self._drop(len(data))
            return
        if self._untold:
            data = self._notice() + data
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view):]
        except OSError as error:
            self._cut_back()
            if not self.dropped:
                log.error("log %s: %s", self.address.path, error)
            self._drop(len(data))
            return
        self._size += len(data)
        if self.address.max_size and self._size >= self.address.max_size:
            self._rotate()

    def _cut_back(self) -> None:
        """Take a half-written record away, so that the next one starts on its own line."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, self._size)

    def _drop(self, count: int) -> None:
        self.dropped += count
        self._untold += count

    def _notice(self) -> bytes:
        text = b"%s stderr F [supervisord-ctr: %d bytes of output were dropped here]\n" % (_now(), self._untold)
        self._untold = 0
        return text

    def _over_rate(self, count: int) -> bool:
        if not self.address.max_rate:
            return False
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._spent = second, 0
        self._spent += count
        return self._spent > self.address.max_rate

    def _rotate(self) -> None:
        path = self.address.path
        try:
            for number in range(self.address.max_files - 1, 0, -1):
                source = path if number == 1 else f"{path}.{number - 1}"
                with contextlib.suppress(FileNotFoundError):
                    os.rename(source, f"{path}.{number}")
            if self.address.max_files <= 1:
                os.unlink(path)
            self.reopen()
        except OSError as error:
            log.error("rotating log %s: %s", path, error)


def _now() -> bytes:
    nanoseconds = time.time_ns()
    moment = time.gmtime(nanoseconds // 1_000_000_000)
    return b"%04d-%02d-%02dT%02d:%02d:%02d.%09dZ" % (*moment[:6], nanoseconds % 1_000_000_000)


class CriLogSink:
    """A `Sink` that turns one stream into records of a `LogFile`."""

    def __init__(self, file: LogFile, stream: str, rest: bytes = b"") -> None:
        """`rest`: the beginning of a line whose end has not come yet."""
        self.on_room: Callable[[], None] | None = None
        self._file = file
        self._stream = stream.encode()
        self._rest = rest
        self._part = file.address.max_line
        self._closed = False
        file.use()

    def write(self, data: bytes) -> bool:
        """Write the whole lines of `data`, and parts of longer ones; keep the beginning of a line."""
        head, newline, tail = data.rpartition(b"\n")
        stamp = _now() + b" " + self._stream
        records = b""
        if newline:
            records = self._whole(self._rest + head, stamp)
            self._rest = tail
        else:
            self._rest += tail
        size = self._part
        if len(self._rest) > size:
            # A line of exactly this length is whole: its end may come with the next write.
            cut = (len(self._rest) - 1) // size * size
            prefix = stamp + b" P "
            records += b"".join(
                prefix + self._rest[start:start + size] + b"\n" for start in range(0, cut, size)
            )
            self._rest = self._rest[cut:]
        if records:
            self._file.append(records)
        return True

    def _whole(self, lines: bytes, stamp: bytes) -> bytes:
        full, size = stamp + b" F ", self._part
        if len(lines) <= size:
            return full + lines.replace(b"\n", b"\n" + full) + b"\n"
        part = stamp + b" P "
        out = []
        for line in lines.split(b"\n"):
            while len(line) > size:
                out.append(part + line[:size] + b"\n")
                line = line[size:]
            out.append(full + line + b"\n")
        return b"".join(out)

    def leave(self, belongings: Belongings) -> dict[str, Any]:
        """For the next worker; the file is not the sink's to leave."""
        return {"kind": "cri-log", "rest": self._rest.hex()}

    def splice(self, fd: int) -> int | None:
        """Never: lines have to be seen."""
        return None

    def flush(self) -> None:
        """Write the last line that had no end, as a part."""
        if self._rest:
            self._file.append(_now() + b" " + self._stream + b" P " + self._rest + b"\n")
            self._rest = b""

    def close(self) -> None:
        """Flush and let go of the file."""
        if not self._closed:
            self._closed = True
            self.flush()
            self._file.release()
