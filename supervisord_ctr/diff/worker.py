"""Worker: the program that unpacks layers for the daemon, one after another, in a process of its own.

Owns one end of a packet socket (`pool` holds the other) and nothing else. A process for each
unpacking, because two threads that make files pass the interpreter lock to and fro at every system
call; and because what parses hostile archives should not be what holds everybody's containers. It
dies with its parent, has its memory bounded, and imports no more than it needs: it starts in a few
hundredths of a second.

Packets to the worker:
    J + JSON, with the descriptors of the blob and of the target directory: begin a job
    A + 8 bytes   so many bytes of the blob may be read by now (little-endian)
    E + 8 bytes   the blob ends there
    X             the blob will not be completed
Packets from the worker: any number of `M` and one `R`, which together are one JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import threading

from supervisord_ctr.diff.apply import LayerApplier, Limits, NeedsLower
from supervisord_ctr.diff.maker import Spread
from supervisord_ctr.errors import Code, Error
from supervisord_ctr.linux import processes

#: Bytes of address space, stacks and libraries included.
MEMORY = 4 << 30
#: Bytes of one packet of a result.
PACKET = 64 << 10


class GrowingFile:
    """A blob that somebody else still writes: reads wait for the packets that say how far it is."""

    def __init__(self, control: socket.socket, fd: int) -> None:
        self._control = control
        self._fd = fd
        self._lock = threading.Lock()
        self._offset = 0
        self._available = 0
        self._ended = False
        self.aborted = False

    def _packet(self, *, wait: bool) -> bool:
        """Take in one packet; False when there is none or no more to come."""
        with self._lock:
            if self._ended:
                return False
            try:
                data = self._control.recv(64, 0 if wait else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            kind, number = data[:1], int.from_bytes(data[1:9], "little")
            if kind == b"A":
                self._available = max(self._available, number)
            elif kind == b"E":
                self._available = number
                self._ended = True
            else:
                self._ended = self.aborted = True
            return True

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, b"" at the end; `OSError` ECANCELED after an abort."""
        while self._packet(wait=False):
            pass
        while self._offset >= self._available and self._packet(wait=True):
            pass
        if self.aborted:
            raise Error("the layer is not completed")
        count = min(size, self._available - self._offset)
        if count <= 0:
            return b""
        data = os.pread(self._fd, count, self._offset)
        self._offset += len(data)
        return data

    def settle(self) -> None:
        """Take packets until the job's last one."""
        while self._packet(wait=True):
            pass


def main(control_fd: int) -> None:
    """Serve jobs until the daemon closes its end."""
    processes.set_parent_death_signal(signal.SIGKILL)
    processes.set_name("pctr-unpack")
    os.umask(0)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=control_fd) as control:
        while True:
            data, fds, _, _ = socket.recv_fds(control, PACKET, 2, socket.MSG_CMSG_CLOEXEC)
            if not data:
                return
            _serve(control, json.loads(data[1:]), fds)


def _serve(control: socket.socket, job: dict[str, object], fds: list[int]) -> None:
    blob, target = fds
    source = GrowingFile(control, blob)
    try:
        result = _run(source, job, target)
    finally:
        os.close(target)
    try:
        text = json.dumps(result).encode()
        for start in range(0, len(text), PACKET):
            last = start + PACKET >= len(text)
            control.send((b"R" if last else b"M") + text[start:start + PACKET])
        source.settle()
    finally:
        os.close(blob)


def _run(source: GrowingFile, job: dict[str, object], target: int) -> dict[str, object]:
    try:
        applied = LayerApplier(exact_umask=True).apply(
            source, target, limits=Limits(**job["limits"]),  # type: ignore[arg-type]
            style=str(job["style"]), userxattr=bool(job["userxattr"]), complete=bool(job["complete"]),
            spread=Spread(int(str(job["spread"]))),
        )
    except NeedsLower as error:
        return {"needs_lower": error.message}
    except Error as error:
        return {"code": error.code, "error": error.message}
    except MemoryError:
        return {"code": Code.RESOURCE_EXHAUSTED, "error": "layer needs too much memory to be unpacked"}
    except OSError as error:
        return {"code": Code.UNKNOWN, "error": f"layer could not be unpacked: {error}"}
    return {
        "diff_id": applied.diff_id, "size": applied.size, "entries": applied.entries, "notes": applied.notes,
        "usage": applied.usage,
        "implied": [os.fsdecode(path) for path in applied.implied],
    }
