"""Where everything is kept while measuring: a folder, or a file system of its own in a file.

An ext4 without a journal avoids inodes that were deleted in the last minutes, and looks for others
one by one: after an image of many files was removed, making a file takes half a millisecond, most
of what a pull then measures. Daemons that are compared by pulling and removing in turn need a file
system that does not do so, so there the folder is an ext4 with a journal, mounted from a file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.bench.machine import file_system
from tests.bench.measure import say

SIZE = 12 << 30
STATE = "run"
"""Below the folder: a tmpfs, as /run is, for what the daemons keep until a reboot."""


def _journal_missing(folder: Path) -> bool:
    kind, _, device = file_system(folder).partition(" on ")
    if kind != "ext4":
        return False
    name = os.path.basename(os.path.realpath(device))
    return not any(item.name.startswith(f"{name}-") for item in _journals())


def _journals() -> list[Path]:
    try:
        return list(Path("/proc/fs/jbd2").iterdir())
    except FileNotFoundError:
        return []


def _unmount(folder: Path) -> None:
    """Unmount at once, or as soon as nothing uses it."""
    for words in (["umount"], ["umount", "-l"]):
        if subprocess.run([*words, str(folder)], check=False, capture_output=True).returncode == 0:
            return


def _fill(image: Path) -> None:
    """Write the whole file: else whoever is measured first pays for finding its blocks on the disk below."""
    piece = bytes(4 << 20)
    with open(image, "wb", buffering=0) as handle:
        for _ in range(SIZE // len(piece)):
            handle.write(piece)
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def working_folder(parent: str | None) -> Iterator[Path]:
    """A private folder, gone afterwards; its path is short enough for the sockets below it."""
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=parent or "/var/tmp"))
    image = folder.with_suffix(".img")
    mounted = False
    try:
        if _journal_missing(folder) and shutil.which("mkfs.ext4"):
            say(f"{folder} is on an ext4 without a journal: using a file system in {image}")
            _fill(image)
            subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,nodiscard", "-N", "1000000", str(image)], check=True)
            mounted = subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=False).returncode == 0
            if not mounted:
                say("it cannot be mounted: pulls will mostly measure how the file system avoids deleted inodes")
        (folder / STATE).mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=711", "tmpfs", str(folder / STATE)], check=True)
        yield folder
    finally:
        _unmount(folder / STATE)
        if mounted:
            _unmount(folder)
        with contextlib.suppress(FileNotFoundError):
            image.unlink()
        shutil.rmtree(folder, ignore_errors=True)
