"""The HTTP/1.1 front: reads one request, answers it or hands the connection over.

Owns the limits before the upgrade: head size, time, number of connections. Parsing is h11's. What a
valid request leads to is the server's business (`Router`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Protocol

import h11

log = logging.getLogger(__name__)

#: Longest request head (bytes), and longest time for it to arrive (seconds).
MAX_HEAD = 64 << 10
HEAD_TIMEOUT = 10.0
#: How long a refused client may go on sending before it is cut off (seconds).
LINGER = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """A request's head. Header names are lower case."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]

    def values(self, name: str) -> list[str]:
        """The comma-separated values of a header, from all its lines."""
        found = [value for key, value in self.headers if key == name]
        return [part.strip() for value in found for part in value.split(",") if part.strip()]

    def asks_upgrade(self, protocol: str) -> bool:
        """Whether the request asks to go on in `protocol`."""
        return any("upgrade" in value.lower() for value in self.values("connection")) and any(
            value.lower() == protocol for value in self.values("upgrade")
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """A plain answer; the connection is closed after it."""

    status: int
    text: str
    headers: tuple[tuple[str, str], ...] = ()


class Router(Protocol):
    """What decides about a request."""

    def route(self, request: Request, front: Front) -> Answer | None:
        """An answer, or None when the request was taken over by `front.upgrade…`."""
        ...

    def opened(self, front: Front) -> bool:
        """A connection came; False when there are too many."""
        ...

    def closed(self, front: Front) -> None:
        """A connection left the front: it is closed or was handed over."""
        ...


class Front(asyncio.Protocol):
    """One connection before its upgrade."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._request: Request | None = None
        self._done = False
        self._left = False
        self._fed = 0
        self._rest = b""

    # -- asyncio.Protocol ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A connection came."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if not self._router.opened(self):
            self._done = self._left = True
            transport.abort()
            return
        self._timer = asyncio.get_running_loop().call_later(HEAD_TIMEOUT, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Bytes of the head."""
        if self._done:
            return
        # A head that comes in one piece is no reason to let it be longer than one that comes in many.
        room = MAX_HEAD - self._fed
        data, self._rest = data[:room], data[room:]
        self._fed += len(data)
        try:
            self._http.receive_data(data)
            self._read()
            if self._rest and not self._done:
                self._answer(Answer(431, "request head is too large"))
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint if 400 <= error.error_status_hint < 600 else 400
            self._answer(Answer(status, "bad request"))

    def connection_lost(self, _exc: Exception | None) -> None:
        """The connection is closed."""
        self._leave()

    # -- for the router --------------------------------------------------------------------------

    def take_over(self, headers: tuple[tuple[str, str], ...]) -> tuple[asyncio.Transport, bytes]:
        """Send 101 with `headers`; the transport, and the bytes that came after the head."""
        response = h11.InformationalResponse(
            status_code=101, headers=[(name.encode(), value.encode()) for name, value in headers]
        )
        return self.take_over_raw(self._http.send(response) or b"")

    def take_over_raw(self, response: bytes) -> tuple[asyncio.Transport, bytes]:
        """Send a 101 that somebody else wrote."""
        assert self._transport is not None
        trailing = self._http.trailing_data[0] + self._rest
        self._transport.write(response)
        self._leave()
        return self._transport, trailing

    def abort(self) -> None:
        """End at once."""
        if self._transport is not None:
            self._transport.abort()

    # -- own parts -------------------------------------------------------------------------------

    def _read(self) -> None:
        while not self._done:
            event = self._http.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return
            if isinstance(event, h11.Request):
                self._request = Request(
                    event.method.decode("ascii"), event.target.decode("ascii", "replace"),
                    tuple((name.decode("ascii"), value.decode("latin-1")) for name, value in event.headers),
                )
                if self._http.they_are_waiting_for_100_continue:
                    self._answer(Answer(417, "no body is wanted"))
            elif isinstance(event, h11.Data):
                if event.data:
                    self._answer(Answer(413, "no body is wanted"))
            elif isinstance(event, h11.EndOfMessage) and self._request is not None:
                answer = self._router.route(self._request, self)
                if answer is not None:
                    self._answer(answer)
                return
            elif isinstance(event, h11.ConnectionClosed):
                self.abort()
                return

    def _answer(self, answer: Answer) -> None:
        assert self._transport is not None
        body = answer.text.encode() + b"\n"
        headers = [
            ("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff"),
            ("Content-Length", str(len(body))), ("Connection", "close"), *answer.headers,
        ]
        try:
            head = self._http.send(h11.Response(
                status_code=answer.status, headers=[(name.encode(), value.encode()) for name, value in headers],
                reason=_REASONS.get(answer.status, b""),
            ))
            is_head = self._request is not None and self._request.method == "HEAD"
            rest = b"" if is_head else self._http.send(h11.Data(data=body))
            self._transport.write((head or b"") + (rest or b""))
        except h11.LocalProtocolError as error:
            log.debug("no answer can be sent: %s", error)
        self._done = True
        if not self._transport.can_write_eof():
            self._transport.close()
            return
        # Closing while bytes of the client are unread would throw our answer away.
        with contextlib.suppress(OSError):
            self._transport.write_eof()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(LINGER, self._transport.abort)

    def _leave(self) -> None:
        self._done = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._left:
            self._left = True
            self._router.closed(self)


_REASONS = {
    400: b"Bad Request", 403: b"Forbidden", 404: b"Not Found", 405: b"Method Not Allowed",
    413: b"Content Too Large", 417: b"Expectation Failed", 431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}
