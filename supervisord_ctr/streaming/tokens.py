"""Tokens: what makes a streaming URL good for one connection, for one request, for a minute (S14).

Owns the table of outstanding requests. A token is never logged; log lines show `fingerprint`.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable

from supervisord_ctr.errors import ResourceExhausted
from supervisord_ctr.streaming import Params

#: Outstanding requests at most, as the kubelet's streaming library has it.
MAX_OUTSTANDING = 1000
_TOKEN_BYTES = 24


def fingerprint(token: str) -> str:
    """A short name for a token that gives nothing away."""
    return hashlib.sha256(token.encode()).hexdigest()[:8]


class TokenTable:
    """Outstanding requests by token, oldest first."""

    def __init__(self, lifetime: float = 60.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._lifetime = lifetime
        self._clock = clock
        self._entries: dict[str, tuple[float, Params]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def issue(self, params: Params) -> str:
        """A new URL-safe token for `params`; `ResourceExhausted` when 1,000 are outstanding."""
        self._expire()
        if len(self._entries) >= MAX_OUTSTANDING:
            raise ResourceExhausted("maximum number of in-flight requests exceeded", kind="streaming")
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        self._entries[token] = (self._clock() + self._lifetime, params)
        return token

    def consume(self, token: str, kind: type[Params]) -> Params | None:
        """Take `token` out of the table; its request when it is of `kind` and not expired.

        A token that is presented at the wrong endpoint is spent all the same.
        """
        deadline, params = self._entries.pop(token, (0.0, None))
        if params is None or deadline <= self._clock() or not isinstance(params, kind):
            return None
        return params

    def _expire(self) -> None:
        now = self._clock()
        while self._entries:
            token, (deadline, _) = next(iter(self._entries.items()))
            if deadline > now:
                return
            del self._entries[token]
