"""A light synchronous gRPC client for a daemon on a Unix socket.

Owns calls: messages in and out, deadlines, statuses as `supervisord_ctr.errors`. It works with
generated messages and with those of `pctr.light` alike. `grpc` itself is not used: importing it
takes as long as running a container.
"""

from __future__ import annotations

import os
import struct
import time

from pctr.contexts import suppress
from pctr.http2 import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM, Connection, ConnectionLost, Socket
from supervisord_ctr import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Generic, Protocol, Self, TypeVar

    class Encodable(Protocol):
        """What can be sent."""

        def SerializeToString(self) -> bytes:
            """The message in protobuf's wire format."""

    class Decodable(Protocol):
        """What can be received."""

        @classmethod
        def FromString(cls, data: bytes, /) -> Self:
            """The message in these bytes."""

    M = TypeVar("M", bound=Decodable)
else:
    M = object

    class Generic:
        """Stands for the one of typing, which costs more to load than a call."""

        def __class_getitem__(cls, kind):
            return cls


#: Largest message accepted (containerd's own default is 16 MiB).
MESSAGE_LIMIT = 1 << 28

_PREFIX = "/containerd.services."
CONTAINERS = _PREFIX + "containers.v1.Containers/"
CONTENT = _PREFIX + "content.v1.Content/"
DIFF = _PREFIX + "diff.v1.Diff/"
EVENTS = _PREFIX + "events.v1.Events/"
IMAGES = _PREFIX + "images.v1.Images/"
INTROSPECTION = _PREFIX + "introspection.v1.Introspection/"
LEASES = _PREFIX + "leases.v1.Leases/"
NAMESPACES = _PREFIX + "namespaces.v1.Namespaces/"
SANDBOX_STORE = _PREFIX + "sandbox.v1.Store/"
SANDBOX_CONTROLLER = _PREFIX + "sandbox.v1.Controller/"
SNAPSHOTS = _PREFIX + "snapshots.v1.Snapshots/"
STREAMING = _PREFIX + "streaming.v1.Streaming/"
TASKS = _PREFIX + "tasks.v1.Tasks/"
TRANSFER = _PREFIX + "transfer.v1.Transfer/"
VERSION = _PREFIX + "version.v1.Version/"
CRI_RUNTIME = "/runtime.v1.RuntimeService/"

# HTTP statuses of something that is not a gRPC server (gRPC's http-grpc-status-mapping.md).
_HTTP_CODES = {400: 13, 401: 16, 403: 7, 404: 12, 429: 14, 502: 14, 503: 14, 504: 14}
# Reset codes (PROTOCOL-HTTP2.md, "Errors").
_RESET_CODES = {7: 14, 8: 1, 11: 8, 12: 7}


def _percent_decode(text: str) -> str:
    """grpc-message: UTF-8 with `%XX` for what a header cannot hold; a stray `%` stands for itself."""
    if "%" not in text:
        return text
    result = bytearray()
    at = 0
    while at < len(text):
        if text[at] == "%":
            try:
                result.append(int(text[at + 1:at + 3], 16))
                at += 3
                continue
            except ValueError:
                pass
        result += text[at].encode()
        at += 1
    return result.decode(errors="replace")


class DaemonMissing(errors.Unavailable):
    """Nothing answers on the socket; the message says how to start the daemon."""


class Call(Generic[M]):
    """One call in flight. `send`/`receive` for streams, `result` for calls with one answer.

    Each raises the error class of the status that the daemon gave, `Unavailable` when the
    connection ended, `DeadlineExceeded` when the time given ran out.
    """

    def __init__(self, client: Client, path: str, response: type[M], timeout: float | None) -> None:
        self._connection = client.connection
        self._response = response
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._path = path
        self._stream = self._connection.open(client.headers(path, timeout))

    def send(self, message: Encodable, *, end: bool = False) -> None:
        """Queue a message; waits only while more than a window's worth is queued already."""
        data = message.SerializeToString()
        self._connection.send(self._stream, struct.pack("!BI", 0, len(data)) + data, end=end)
        while sum(map(len, self._stream.outgoing)) > 1 << 20 and not self._stream.ended:
            self._pump()

    def close_send(self) -> None:
        """Say that no more messages come."""
        if not self._stream.finish_sending and not self._stream.ended:
            self._connection.send(self._stream, b"", end=True)

    def flushed(self) -> bool:
        """Whether everything queued has left."""
        return not self._stream.outgoing and not self._connection.wants_write

    @property
    def done(self) -> bool:
        """Whether a message or the end is there, so that `receive` will not wait."""
        return self._stream.ended or self._complete() is not None

    def cancel(self) -> None:
        """Give the call up; the daemon is told."""
        self._connection.cancel(self._stream)

    def receive(self) -> M | None:
        """The next message; None after the last one of a call that went well."""
        while (size := self._complete()) is None:
            if self._stream.ended:
                self._finish()
                return None
            self._connection.grant(self._stream)
            self._pump()
        data = bytes(memoryview(self._stream.received)[5:5 + size])
        del self._stream.received[:5 + size]
        self._connection.grant(self._stream)
        return self._response.FromString(data)

    def __iter__(self) -> Iterator[M]:
        while (message := self.receive()) is not None:
            yield message

    def result(self) -> M:
        """The answer of a call that has one."""
        message = self.receive()
        if message is None:
            raise errors.Internal(f"{self._path}: the daemon gave no answer and no error")
        while self.receive() is not None:
            raise errors.Internal(f"{self._path}: more than one answer")
        return message

    def _pump(self) -> None:
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if left is not None and left <= 0:
            self.cancel()
            raise errors.DeadlineExceeded(f"{self._path.rpartition('/')[2].lower()}: no answer in the time given")
        self._connection.pump(left)

    def _complete(self) -> int | None:
        """Size of the first message when it is there as a whole."""
        received = self._stream.received
        if len(received) < 5:
            return None
        compressed, size = struct.unpack_from("!BI", received)
        if compressed or size > MESSAGE_LIMIT:
            self.cancel()
            what = "compressed answer" if compressed else f"message of {size} bytes"
            raise errors.Internal(f"{self._path}: {what}")
        return int(size) if len(received) >= 5 + size else None

    def _finish(self) -> None:
        stream = self._stream
        fields = dict(stream.headers or ())
        fields.update(stream.trailers or ())
        if "grpc-status" not in fields:
            if stream.reset is not None:
                code = _RESET_CODES.get(stream.reset, 13)
                raise errors.from_code(code, f"stream reset by the daemon ({stream.reset})")
            status = fields.get(":status", "")
            if status and status != "200":
                code = _HTTP_CODES.get(int(status) if status.isdecimal() else 0, 2)
                raise errors.from_code(code, f"no gRPC server here: HTTP status {status}")
            raise errors.Unavailable(self._connection.failure or "the daemon ended the call without a status")
        code = int(fields["grpc-status"]) if fields["grpc-status"].isdecimal() else 2
        if code:
            raise errors.from_code(code, _percent_decode(fields.get("grpc-message", "").encode("latin-1").decode(
                errors="replace")))
        if stream.received:
            raise errors.Internal(f"{self._path}: truncated answer")


class Client:
    """A connection to the daemon at `address`, for one namespace.

    `lease` goes with every call until it is set to "" again. Use it as a context manager.
    """

    def __init__(self, address: str, namespace: str, *, start_hint: str = "") -> None:
        self.address = address
        self.namespace = namespace
        self.lease = ""
        self._start_hint = start_hint
        self._connection: Connection | None = None

    @property
    def connection(self) -> Connection:
        """The connection, made on first use and again after it was lost. Raises `DaemonMissing`."""
        if self._connection is None or self._connection.failure is not None:
            self._connection = Connection(_connect(self.address, self._start_hint))
        return self._connection

    @property
    def established(self) -> Connection | None:
        """The connection when there is one that works; makes none."""
        return self._connection if self._connection is not None and self._connection.failure is None else None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def headers(self, path: str, timeout: float | None) -> list[tuple[str, str]]:
        """The request's header fields."""
        fields = [
            (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost"),
            ("te", "trailers"), ("content-type", "application/grpc"), ("user-agent", "pctr"),
        ]
        if timeout is not None:
            fields.append(("grpc-timeout", _grpc_timeout(timeout)))
        if self.namespace:
            fields.append(("containerd-namespace", self.namespace))
        if self.lease:
            fields.append(("containerd-lease", self.lease))
        return fields

    def unary(self, path: str, request: Encodable, response: type[M], *, timeout: float | None = None) -> M:
        """Call and wait for the one answer."""
        return self.start(path, request, response, timeout=timeout).result()

    def start(self, path: str, request: Encodable, response: type[M], *, timeout: float | None = None) -> Call[M]:
        """Send a request; its answers come while somebody waits on this or another call."""
        call = self.stream(path, response, timeout=timeout)
        call.send(request, end=True)
        return call

    def stream(self, path: str, response: type[M], *, timeout: float | None = None) -> Call[M]:
        """Open a call whose messages are sent one by one."""
        for _ in range(3):
            with suppress(ConnectionLost):
                return Call(self, path, response, timeout)
        raise errors.Unavailable(f"{self.address}: the daemon closes every connection")

    def leased(self, lease: str) -> Leased:
        """Send `lease` with every call inside the block."""
        return Leased(self, lease)


class Leased:
    """A block in which a client names a lease with every call."""

    def __init__(self, client: Client, lease: str) -> None:
        self._client = client
        self._lease = lease
        self._before = ""

    def __enter__(self) -> None:
        self._before, self._client.lease = self._client.lease, self._lease

    def __exit__(self, *_: object) -> None:
        self._client.lease = self._before


def _grpc_timeout(seconds: float) -> str:
    if seconds < 90_000:
        return f"{max(1, int(seconds * 1000))}m"
    return f"{min(int(seconds), 99_999_999)}S"


def _connect(address: str, start_hint: str) -> Socket:
    path = socket_path(address)
    sock = Socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    try:
        sock.connect(path)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        sock.close()
        raise DaemonMissing(
            f"no daemon answers on {path}: start it with '{start_hint or 'supervisord-ctr'}', or name its socket with "
            "--address or PCTR_ADDRESS"
        ) from None
    except PermissionError:
        sock.close()
        raise errors.PermissionDenied(f"{path}: not allowed to talk to the daemon; run pctr as root") from None
    except OSError as error:
        sock.close()
        raise errors.Unavailable(f"{path}: {(error.strerror or str(error)).lower()}") from error
    return sock


def socket_path(address: str) -> str:
    """The path in an address, with or without `unix://`."""
    for prefix in ("unix://", "unix:"):
        if address.startswith(prefix):
            address = address[len(prefix):]
            break
    return os.path.abspath(address)


