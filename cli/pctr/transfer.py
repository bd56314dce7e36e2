"""The transfer service as a client sees it: streams beside the call, progress, credentials, data.

Owns one transfer at a time. A daemon without the service answers `Unimplemented`.
"""

from __future__ import annotations

from pctr import light_transfer as messages
from pctr.command import new_id
from pctr.light import Any_ as Any
from pctr.light import Empty, Message
from pctr.reports import DOCTOR_PART
from pctr.rpc import INTROSPECTION, STREAMING, TRANSFER, Call, Client
from supervisord_ctr import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO, Protocol

    from supervisord_ctr.images.auth import Credentials

    class Sink(Protocol):
        """Where progress goes; `pctr.progress` has two."""

        def update(self, progress: messages.Progress) -> None:
            """One report."""


_DATA_CHUNK = 32 << 10


def pack(message: Message) -> Any:
    """A message as containerd packs it: the type URL is the bare name."""
    if not message.NAME:
        raise TypeError(f"{type(message).__name__} does not state its full name")
    return Any(type_url=message.NAME, value=message.SerializeToString())


def answer(credentials: Credentials, request: messages.AuthRequest) -> messages.AuthResponse:
    """What to tell the daemon about a host; nothing for hosts that no credentials are for (S15)."""
    import asyncio

    found = asyncio.run(credentials.get(request.host))
    if found.header:
        return messages.AuthResponse(authType=messages.HEADER, secret=found.header)
    if not found:
        return messages.AuthResponse(authType=messages.NONE)
    kind = messages.CREDENTIALS if found.username else messages.REFRESH
    return messages.AuthResponse(authType=kind, username=found.username, secret=found.secret)


#: Parts that only daemons have whose transfers heed what a request says of hosts: this one, and containerd from 2.0 on.
_WHOLE = (f"type=={DOCTOR_PART[0]}", "type==io.containerd.image-verifier.v1")


class Transfer:
    """One transfer with its streams. Make streams first, then `run`.

    Unimplemented for a daemon without the service, and for containerd 1.7, whose service would speak
    TLS to every registry and knows nothing of the client's hosts.
    """

    def __init__(self, client: Client) -> None:
        request = messages.PluginsRequest(filters=_WHOLE)
        if not client.unary(INTROSPECTION + "Plugins", request, messages.PluginsResponse).plugins:
            raise errors.Unimplemented("the daemon has no transfer service, or an early one")
        self._client = client
        self._handlers: list[tuple[Call[Any], Callable[[Call[Any], Any], None]]] = []
        self._feeds: list[_Feed] = []

    def open_stream(self, handle: Callable[[Call[Any], Any], None]) -> str:
        """A stream whose messages go to `handle`; returns the id to state in the request."""
        name = f"pctr-{new_id()}"
        call = self._client.stream(STREAMING + "Stream", Any)
        call.send(pack(messages.StreamInit(id=name)))
        call.receive()  # the daemon's acknowledgement
        self._handlers.append((call, handle))
        return name

    def credentials(self, credentials: Credentials) -> str:
        """A stream on which the daemon asks for credentials."""

        def handle(call: Call[Any], message: Any) -> None:
            call.send(pack(answer(credentials, messages.AuthRequest.FromString(message.value))))

        return self.open_stream(handle)

    def reading_into(self, target: BinaryIO) -> str:
        """A stream whose data is written to `target`; the daemon is told how much it may send."""

        def handle(call: Call[Any], message: Any) -> None:
            data = messages.Data.FromString(message.value).data
            target.write(data)
            call.send(pack(messages.WindowUpdate(update=len(data))))

        name = self.open_stream(handle)
        self._handlers[-1][0].send(pack(messages.WindowUpdate(update=2 * _DATA_CHUNK)))
        return name

    def sending_from(self, source: BinaryIO) -> str:
        """A stream that carries `source` to the daemon, as far as it allows."""
        feed = _Feed(source)
        name = self.open_stream(feed.allow)
        feed.call = self._handlers[-1][0]
        self._feeds.append(feed)
        return name

    def run(self, source: Message, destination: Message, sink: Sink | None) -> None:
        """The transfer; returns when it is done, raises what it failed with."""
        options = messages.TransferOptions()
        if sink is not None:
            def show(_: Call[Any], message: Any) -> None:
                sink.update(messages.Progress.FromString(message.value))

            options.progress_stream = self.open_stream(show)
        call = self._client.start(TRANSFER + "Transfer", messages.TransferRequest(
            source=pack(source), destination=pack(destination), options=options), Empty)
        connection = self._client.connection
        try:
            while not call.done:
                self._serve()
                if not call.done:
                    busy = any(feed.step() for feed in self._feeds)
                    connection.pump(0.0 if busy else 0.5)
            call.result()
            self._drain()
        finally:
            for stream, _ in self._handlers:
                stream.cancel()

    def _serve(self) -> None:
        for stream, handle in list(self._handlers):
            while stream.done:
                message = stream.receive()
                if message is None:
                    self._handlers.remove((stream, handle))
                    break
                handle(stream, message)

    def _drain(self) -> None:
        """What the streams still hold once the call has ended: the last progress, the last data."""
        connection = self._client.connection
        for _ in range(100):
            self._serve()
            if not connection.pump(0.01):
                break
        self._serve()


class _Feed:
    """Sends a file within the window that the daemon grants."""

    def __init__(self, source: BinaryIO) -> None:
        self.call: Call[Any] | None = None
        self._source = source
        self._window = 0
        self._ended = False

    def allow(self, _: Call[Any], message: Any) -> None:
        """The daemon grants more."""
        self._window += messages.WindowUpdate.FromString(message.value).update

    def step(self) -> bool:
        """Send one piece if one may be sent."""
        if self._ended or self._window <= 0 or self.call is None:
            return False
        data = self._source.read(min(_DATA_CHUNK, self._window))
        if data:
            self._window -= len(data)
            self.call.send(pack(messages.Data(data=data)))
        else:
            self._ended = True
            self.call.close_send()
        return True
