"""Leases of pulls: what protects their work while they run, and what arrived of those that did not end well.

A pull that fails, that its caller gives up or that dies with the daemon leaves a lease for its reference, which
protects the blobs that arrived whole (unfinished ones have a life of their own) for a day: the next pull
of the same reference starts from them and gives that lease up (P2). Unpacked layers are not kept: they can be
made again without the network, and take the most space.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from supervisord_ctr.errors import FailedPrecondition, InvalidArgument, NotFound
from supervisord_ctr.names import LABEL_GC_EXPIRE

if TYPE_CHECKING:
    from supervisord_ctr.metadata import Database

#: Of a lease while its pull runs, and of what a pull left. The value is the reference, empty for work without one.
LABEL_PULL = "io.supervisord-ctr/pull"
_LIFE = 24 * 3600.0


def _expiring(reference: str) -> dict[str, str]:
    expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + _LIFE))
    return {LABEL_GC_EXPIRE: expires, LABEL_PULL: reference or "-"}


def leftover_id(reference: str) -> str:
    """The lease of what arrived of `reference`: one, however often its pull fails."""
    return f"unfinished-{hashlib.sha256(reference.encode()).hexdigest()[:16]}"


class PullLeases:
    """Leases that end with the work they are for, or with the daemon's next start."""

    def __init__(self, database: Database) -> None:
        self._leases = database.leases
        self._namespaces = database.namespaces

    async def recover(self) -> None:
        """Settle the leases of work that a daemon died in; what they protected goes with the next collection.

        Before the first `hold`.
        """
        for namespace in await self._namespaces.list():
            for lease in await self._leases.list(namespace.name, [f'labels."{LABEL_PULL}"']):
                reference = lease.labels[LABEL_PULL]
                if lease.id != leftover_id(reference):
                    known = "" if reference == "-" else reference
                    await self._set_aside(namespace.name, lease.id, known, collect=False)

    @contextlib.asynccontextmanager
    async def hold(self, namespace: str, given: str = "", reference: str = "") -> AsyncIterator[str]:
        """The lease `given`, or one for the length of the block.

        After a failure it goes at once, with all it protected, but for the blobs of `reference`; they go
        too when the image itself is what was wrong (InvalidArgument, FailedPrecondition).
        """
        if given:
            yield given
            return
        name = f"{time.time_ns() % 1_000_000_000}-{secrets.token_urlsafe(3)}"
        try:
            # Inside: a caller that is cancelled now has asked for the lease, and the release comes after it.
            # Not synced, and nor is its end: what it protects comes after it in the log, and it expires by itself.
            await self._leases.create(namespace, name, _expiring(reference), durable=False)
            yield name
        except (InvalidArgument, FailedPrecondition):
            await asyncio.shield(self._give_up(namespace, name, reference, collect=True))
            raise
        except BaseException:
            await asyncio.shield(self._set_aside(namespace, name, reference))
            raise
        await asyncio.shield(self._give_up(namespace, name, reference))

    async def _give_up(self, namespace: str, name: str, reference: str, *, collect: bool = False) -> None:
        """End a lease, and what earlier pulls of `reference` left: the image protects it now, or nothing shall."""
        with contextlib.suppress(NotFound):
            also = leftover_id(reference) if reference else ""
            await self._leases.delete(namespace, name, also=also, sync=collect, durable=False)

    async def _set_aside(self, namespace: str, name: str, reference: str, *, collect: bool = True) -> None:
        """End a lease but for the blobs of `reference`; what it protected beside them is garbage."""
        with contextlib.suppress(NotFound):
            if not reference:
                await self._leases.delete(namespace, name, sync=collect, durable=False)
                return
            await self._leases.reduce(
                namespace, name, leftover_id(reference), "content", _expiring(reference), sync=collect, durable=False
            )
