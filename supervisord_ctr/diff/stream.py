"""Streams: a layer's bytes on their way to the applier, and the bounds and results that go with it.

Owns inflating and hashing on a thread beside the one that unpacks (S8: the ratio is bounded here).
"""

from __future__ import annotations

import hashlib
import queue
import threading
from dataclasses import dataclass

from supervisord_ctr.diff.compression import Inflater, Readable
from supervisord_ctr.errors import FailedPrecondition, InvalidArgument

_CHUNK = 1 << 20
_QUEUED = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one layer; beyond them it is refused."""

    entries: int = 4_000_000
    depth: int = 512
    name: int = 4095
    size: int = 1 << 40
    #: Unpacked bytes for each packed one, above `ratio_from` unpacked bytes.
    ratio: int = 400
    ratio_from: int = 1 << 30
    seconds: float = 6 * 3600.0


@dataclass(frozen=True, slots=True)
class Applied:
    """What a layer was: `size` is that of the tar stream, `diff_id` its digest.

    `implied` are directories that the layer did not list but needed (without leading slash): where
    parents were not visible, their attributes are still those of the lower layers.
    """

    diff_id: str
    size: int
    entries: int
    implied: tuple[bytes, ...] = ()
    #: Disk that the layer takes and inodes, by accounting (P11); None where entries replaced others.
    usage: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


class NeedsLower(FailedPrecondition):
    """The layer refers to something that only lower layers can have; apply it again with these mounted."""


class LayerStream:
    """Inflates and hashes on a thread of its own, some chunks ahead of the reader."""

    def __init__(self, raw: Readable, limits: Limits) -> None:
        self._limits = limits
        self._raw = raw
        self._hash = hashlib.sha256()
        self.size = 0
        self._full: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()
        self._free = threading.Semaphore(_QUEUED)
        self._stopped = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="inflate", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            inflater = Inflater(self._raw)
            limits = self._limits
            while not self._stopped:
                chunk = inflater.read(_CHUNK)
                self._hash.update(chunk)
                self.size += len(chunk)
                if self.size > limits.ratio_from and self.size > inflater.taken * limits.ratio:
                    raise InvalidArgument(
                        f"layer unpacks to more than {limits.ratio} times its size of {inflater.taken} bytes",
                        kind="layer",
                    )
                self._free.acquire()
                self._full.put(chunk)
                if not chunk:
                    return
        except BaseException as error:
            self._full.put(error)

    def next_chunk(self) -> bytes:
        """The next piece of the tar stream, b"" at its end."""
        if self._ended:
            return b""
        chunk = self._full.get()
        if isinstance(chunk, BaseException):
            self._ended = True
            raise chunk
        self._free.release()
        self._ended = not chunk
        return chunk

    def diff_id(self) -> str:
        """The digest; only after the end."""
        return f"sha256:{self._hash.hexdigest()}"

    def close(self) -> None:
        """Stop the thread; it may still be inside a read of `raw` if that blocks."""
        self._stopped = True
        self._free.release()
        if self._ended:
            self._thread.join()
