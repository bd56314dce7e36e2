"""Pool: worker processes that unpack layers, started when there is work and gone when there is none.

Owns the processes and the protocol's daemon side (`worker` has the other and describes it). A job
may begin before its blob is complete: the pull tells how far the file has grown, and unpacking runs
along. Does not know snapshots; the target is a directory's descriptor.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys

from supervisord_ctr.aio import TaskOwner
from supervisord_ctr.diff.maker import Spread
from supervisord_ctr.diff.stream import Applied, Limits, NeedsLower
from supervisord_ctr.errors import Cancelled, Unavailable, from_code

log = logging.getLogger(__name__)

_CORES = len(os.sched_getaffinity(0))
#: Bytes of a blob from which on a second process pays.
_SPREAD = 4 << 20
#: The folder that holds our package: an editable installation finds it by a hook that a worker does not load.
_HOME = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2].split(':'); from supervisord_ctr.diff.worker import main; "
    "main(int(sys.argv[1]))"
)


class _Worker:
    """One process and its socket."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            path = ":".join(dict.fromkeys([_HOME, *(os.path.abspath(folder) for folder in sys.path if folder)]))
            environment = {name: os.environ[name] for name in ("PCTR_FAULTS", "LD_LIBRARY_PATH") if name in os.environ}
            # The parent-death signal follows the thread that forks: this must be the loop's, which lives longest.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM, str(theirs.fileno()), path],
                stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), cwd="/", env=environment,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self.socket = ours
        self.idle_timer: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """End it at once."""
        self._process.send_signal(signal.SIGKILL)

    async def wait_gone(self) -> int:
        """Wait for the process's end, and that of a maker that it may have; returns how it ended."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        status = await loop.run_in_executor(None, self._process.wait)
        # A maker holds the other end of the socket too, and is killed with its parent: a moment later.
        with contextlib.suppress(ConnectionError):
            while await loop.sock_recv(self.socket, 128 << 10):
                pass
        self.socket.close()
        return status

    def send(self, packet: bytes) -> bool:
        """Send without waiting; False when the worker has too much to read (a later packet says the same)."""
        try:
            self.socket.send(packet)
        except BlockingIOError:
            return False
        except OSError:
            return True  # it died; reading the result tells
        return True

    async def send_all(self, packet: bytes) -> None:
        """Send, waiting for room."""
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            await asyncio.get_running_loop().sock_sendall(self.socket, packet)

    async def receive(self) -> dict[str, object]:
        """The result; Unavailable when the process died."""
        text = b""
        while True:
            try:
                packet = await asyncio.get_running_loop().sock_recv(self.socket, 128 << 10)
            except ConnectionError:
                packet = b""
            if not packet:
                raise Unavailable("the process that unpacked the layer died", kind="layer")
            text += packet[1:]
            if packet[:1] == b"R":
                result = json.loads(text)
                assert isinstance(result, dict)
                return result


class Job:
    """One layer being unpacked. Call `available` as the blob grows, then `end`; `result` waits for both.

    `abort` (also what cancelling `result` leads to) returns when nothing writes into the target any more.
    """

    def __init__(self, pool: UnpackPool, blob_fd: int, target_fd: int, request: bytes) -> None:
        self._pool = pool
        self._fds = [os.dup(blob_fd), os.dup(target_fd)]
        self._request = request
        self._available = 0
        self._end: int | None = None
        self._worker: _Worker | None = None
        self._task = pool.owner.start(self._run(), "unpack")

    def available(self, size: int) -> None:
        """The first `size` bytes of the blob can be read."""
        self._available = size
        if self._worker is not None and self._end is None:
            self._worker.send(b"A" + size.to_bytes(8, "little"))

    async def end(self, size: int) -> None:
        """The blob is complete with `size` bytes."""
        self._end = self._available = size
        if self._worker is not None:
            await self._worker.send_all(b"E" + size.to_bytes(8, "little"))

    async def result(self) -> Applied:
        """What was unpacked; the layer's error, NeedsLower, or Unavailable when the worker died."""
        return await asyncio.shield(self._task)

    async def abort(self) -> None:
        """Stop; fine when it has ended already."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> Applied:
        try:
            async with self._pool.slots:
                worker = self._pool.take()
                try:
                    return await self._unpack(worker)
                except BaseException:
                    # Whatever state it is in: it must not write on.
                    if self._worker is not None:
                        worker.kill()
                        await asyncio.shield(self._pool.owner.start(self._pool.discard(worker), "discard"))
                    raise
        except asyncio.CancelledError:
            raise Cancelled("unpacking was called off", kind="layer") from None
        finally:
            self._close()

    async def _unpack(self, worker: _Worker) -> Applied:
        self._worker = worker
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            socket.send_fds(worker.socket, [b"J" + self._request], self._fds)
        self._close()
        if self._end is None:
            worker.send(b"A" + self._available.to_bytes(8, "little"))
        else:
            await worker.send_all(b"E" + self._end.to_bytes(8, "little"))
        result = await worker.receive()
        self._worker = None
        if self._end is None:
            self._end = self._available
            await worker.send_all(b"X")
        self._pool.give_back(worker)
        return _applied(result)

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


def _applied(result: dict[str, object]) -> Applied:
    if "needs_lower" in result:
        raise NeedsLower(str(result["needs_lower"]), kind="layer")
    if "error" in result:
        raise from_code(int(str(result["code"])), str(result["error"]))
    implied, notes, usage = result["implied"], result["notes"], result["usage"]
    assert isinstance(implied, list)
    assert isinstance(notes, list)
    assert usage is None or isinstance(usage, list)
    return Applied(
        str(result["diff_id"]), int(str(result["size"])), int(str(result["entries"])),
        tuple(os.fsencode(path) for path in implied), None if usage is None else (usage[0], usage[1]), tuple(notes),
    )


class UnpackPool:
    """At most `size` workers, each kept for `idle` seconds after its last job. Belongs to the event loop.

    Two processes share the work on a large layer while a processor is free; with `always_spread` on every
    layer, whatever else runs.
    """

    def __init__(self, size: int | None = None, *, idle: float = 5.0, always_spread: bool = False) -> None:
        self._always_spread = always_spread
        self.slots = asyncio.Semaphore(size or max(2, min(8, os.cpu_count() or 2)))
        self.owner = TaskOwner("unpack")
        self._idle = idle
        self._free: list[_Worker] = []

    def start(
        self, blob_fd: int, target_fd: int, *, size: int = 0, style: str = "plain", userxattr: bool = False,
        complete: bool = True, limits: Limits | None = None,
    ) -> Job:
        """Begin to unpack the blob behind `blob_fd` into the directory `target_fd` (both are duplicated).

        `size` is what the blob will have, as far as that is known.
        """
        spread = Spread.IDLE if size >= _SPREAD and _CORES > 1 else Spread.NEVER
        request = json.dumps({
            "style": style, "userxattr": userxattr, "complete": complete,
            "spread": Spread.ALWAYS if self._always_spread else spread,
            "limits": dataclasses.asdict(limits or Limits()),
        }).encode()
        return Job(self, blob_fd, target_fd, request)

    async def apply(
        self, blob_fd: int, size: int, target_fd: int, *, style: str = "plain", userxattr: bool = False,
        complete: bool = True, limits: Limits | None = None,
    ) -> Applied:
        """Unpack a blob that is complete; when cancelled, nothing writes into the target any more."""
        job = self.start(
            blob_fd, target_fd, size=size, style=style, userxattr=userxattr, complete=complete, limits=limits
        )
        try:
            await job.end(size)
            return await job.result()
        except BaseException:
            await job.abort()
            raise

    def warm(self) -> None:
        """Have a worker ready: it starts while a pull is still asking for the manifest."""
        if not self._free and not self.slots.locked():
            self.give_back(_Worker())

    def take(self) -> _Worker:
        """A free worker, or a new one."""
        if not self._free:
            return _Worker()
        worker = self._free.pop()
        if worker.idle_timer is not None:
            worker.idle_timer.cancel()
        return worker

    def give_back(self, worker: _Worker) -> None:
        """Keep it for the next job, for a while."""
        self._free.append(worker)
        worker.idle_timer = asyncio.get_running_loop().call_later(self._idle, self._retire, worker)

    def _retire(self, worker: _Worker) -> None:
        if worker in self._free:
            self._free.remove(worker)
            self.owner.start(self.discard(worker), "retire")

    async def discard(self, worker: _Worker) -> None:
        """Let a worker go, and wait until it is gone."""
        status = await worker.wait_gone()
        if status not in (0, -signal.SIGKILL):
            log.warning("unpack worker ended badly", extra={"pid": worker.pid, "status": status})

    @property
    def pids(self) -> list[int]:
        """The idle workers' processes (for reports)."""
        return [worker.pid for worker in self._free]

    async def close(self) -> None:
        """End jobs and workers."""
        await self.owner.close()
        workers, self._free = self._free, []
        for worker in workers:
            if worker.idle_timer is not None:
                worker.idle_timer.cancel()
        await asyncio.gather(*(self.discard(worker) for worker in workers))
