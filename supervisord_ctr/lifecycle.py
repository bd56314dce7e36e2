"""What surrounds the daemon's work: its folders, the lock on them, signals and systemd.

Owns being the only daemon on a root, and telling the outside when it is ready and when it stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import fcntl
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import sdnotify

from supervisord_ctr.aio import TaskOwner
from supervisord_ctr.errors import FailedPrecondition, from_os_error
from supervisord_ctr.linux import heap, mounts


def make_private_folder(path: Path, mode: int = 0o700) -> None:
    """Make `path` owned by root with `mode`; one that exists is tightened (S12).

    Raises the translated `OSError`, and `FailedPrecondition` when something else has that name.
    """
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        os.chmod(path, mode)
        os.chown(path, 0, 0)
    except (FileExistsError, NotADirectoryError):
        raise FailedPrecondition(f"{path} exists and is not a directory", kind="folder", key=str(path)) from None
    except OSError as error:
        raise from_os_error(error, "cannot make folder") from error


def make_empty_folder(path: Path) -> None:
    """Make the private folder `path`; what a killed daemon had mounted or left there goes. Blocks."""
    make_private_folder(path)
    mounts.unmount_below(path)
    for entry in list(path.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _memory() -> tuple[int, int]:
    """Bytes of memory that are the process's own, and bytes of files that it has mapped (proc(5), statm)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        resident, files = (int(word) * os.sysconf("SC_PAGE_SIZE") for word in file.read().split()[1:3])
    return resident - files, files


@contextlib.asynccontextmanager
async def slim(period: float = 5.0, most: int = 4 << 20, busy: float = 0.02) -> AsyncIterator[None]:
    """Give back what bursts leave: free memory of the heap, and the pages of programs that only they needed.

    Starting is the first burst: enter when all has started. Looked at every `period` seconds, when `most` bytes of a
    kind came on; at programs only when the process used less than `busy` of a processor since the last time.
    """
    owner = TaskOwner("slim")

    async def look(own: int, files: int) -> None:
        used = time.process_time()
        while True:
            await asyncio.sleep(period)
            before, used = used, time.process_time()
            now_own, now_files = _memory()
            if now_own > own + most and heap.free_bytes() > most:
                await asyncio.to_thread(heap.give_back)
                now_own = own = _memory()[0]
            if now_files > files + most and used - before < busy * period:
                await asyncio.to_thread(heap.forget_text)
                now_files = files = _memory()[1]
            own, files = min(own, now_own), min(files, now_files)

    heap.forget_text()
    owner.start(look(*_memory()), "look")
    try:
        yield
    finally:
        await owner.close()


@contextlib.contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Be the only daemon on `root`.

    The lock belongs to the open file, so that the kernel drops it however its holder ends: a file
    left by a killed daemon stops nobody. Raises `FailedPrecondition` that names the holder.
    """
    path = root / "lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise FailedPrecondition(
                f"another daemon (pid {holder}) runs on {root}: stop it, or choose another --root", kind="root",
                key=str(root),
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


class Notifier:
    """`sd_notify`: does nothing where no service manager listens."""

    def __init__(self) -> None:
        self._notifier = sdnotify.SystemdNotifier()

    def ready(self, address: Path) -> None:
        """Clients can connect."""
        self._notifier.notify(f"READY=1\nSTATUS=listening on {address}\nMAINPID={os.getpid()}")

    def stopping(self) -> None:
        """The graceful stop began; containers run on."""
        self._notifier.notify("STOPPING=1\nSTATUS=stopping; containers keep running")


@contextlib.contextmanager
def stop_signals(stop: asyncio.Event) -> Iterator[None]:
    """Set `stop` on SIGTERM and SIGINT; SIGUSR1 writes every thread's stack to standard error."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGUSR1)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
