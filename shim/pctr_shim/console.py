"""The console socket: how an OCI runtime hands over the terminal it made.

Source: runc, docs/terminals.md. The socket lies in the bundle; when that path is too long for a
socket address the runtime is given it by way of our own /proc entry.
"""

from __future__ import annotations

import contextlib
import os
import socket

from pctr_shim.attach import listen_below
from supervisord_ctr import errors

_LIMIT = 100
_TIMEOUT = 10.0


class ConsoleSocket:
    """Context manager: `path` is for `--console-socket`, `receive` gives the terminal's descriptor."""

    def __init__(self, bundle: str) -> None:
        self._name = f"pty-{os.urandom(4).hex()}.sock"
        self._bundle = bundle
        self._listener = listen_below(bundle, self._name, 1)
        self._folder = os.open(bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        plain = os.path.join(bundle, self._name)
        self.path = plain if len(plain) < _LIMIT else f"/proc/{os.getpid()}/fd/{self._folder}/{self._name}"

    def receive(self) -> int:
        """The terminal's descriptor. Call it after the runtime has ended well: it was sent by then."""
        self._listener.settimeout(_TIMEOUT)
        try:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(_TIMEOUT)
                _, descriptors, _, _ = socket.recv_fds(connection, 4096, 4)
        except TimeoutError:
            raise errors.Internal("oci runtime sent no terminal") from None
        for extra in descriptors[1:]:
            os.close(extra)
        if not descriptors:
            raise errors.Internal("oci runtime sent no terminal")
        os.set_inheritable(descriptors[0], False)
        return descriptors[0]

    def __enter__(self) -> ConsoleSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        os.close(self._folder)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._bundle, self._name))
