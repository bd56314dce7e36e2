"""Logs of foreign shims: the named pipe `log` in a bundle, read into the daemon's own log.

Programs of containerd's shim library write there and expect a reader before they start. Held open
for reading and writing, so that neither side ever meets an end of file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os

from supervisord_ctr.aio import TaskOwner
from supervisord_ctr.runtime.bundle import Bundle

log = logging.getLogger(__name__)

_CHUNK = 16384


class ShimLogs:
    """The pipes that are read now, by bundle."""

    def __init__(self, owner: TaskOwner) -> None:
        self._owner = owner
        self._open: dict[tuple[str, str], int] = {}

    def open(self, bundle: Bundle) -> None:
        """Make the pipe where there is none and read it until `close`."""
        key = (bundle.namespace, bundle.id)
        if key in self._open:
            return
        path = bundle.path / "log"
        try:
            with contextlib.suppress(FileExistsError):
                os.mkfifo(path, 0o700)
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            log.warning("cannot read the shim log %s: %s", path, error)
            return
        self._open[key] = fd
        asyncio.get_running_loop().add_reader(fd, self._read, fd, bundle)

    def _read(self, fd: int, bundle: Bundle) -> None:
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("reading the shim log of %s/%s: %s", bundle.namespace, bundle.id, error)
            self.close(bundle)
            return
        for line in data.decode("utf-8", "replace").splitlines():
            if line.strip():
                level = logging.DEBUG if "level=info" in line or "level=debug" in line else logging.WARNING
                log.log(level, "shim of %s/%s: %s", bundle.namespace, bundle.id, line)

    def close(self, bundle: Bundle) -> None:
        """Stop reading one pipe."""
        fd = self._open.pop((bundle.namespace, bundle.id), None)
        if fd is not None:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)

    def close_all(self) -> None:
        """Stop reading all."""
        loop = asyncio.get_running_loop()
        for fd in self._open.values():
            loop.remove_reader(fd)
            os.close(fd)
        self._open.clear()
