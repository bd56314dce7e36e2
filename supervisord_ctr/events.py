"""Events: bounded publish and subscribe inside the daemon.

Owns the fan-out. Publishing never waits: a subscriber that does not keep up is cut off with
ResourceExhausted and harms nobody else (P9). Topics and messages are containerd's
(`/containers/create` with `containerd.events.ContainerCreate`, …).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from google.protobuf import symbol_database
from google.protobuf.message import DecodeError, Message

from supervisord_ctr import filters
from supervisord_ctr.errors import Error, InvalidArgument, ResourceExhausted, Unavailable
from supervisord_ctr.model import Event, TypedValue
from supervisord_ctr.names import check_identifier

#: Events that may wait for one subscriber before it is cut off.
QUEUE = 4096


def pack(message: Message) -> TypedValue:
    """The message with its type URL as containerd writes it: the full name alone, without a prefix."""
    return TypedValue(message.DESCRIPTOR.full_name, message.SerializeToString())


def check_topic(topic: str) -> str:
    """Return `topic` when it is `/` and identifiers separated by `/`; else InvalidArgument."""
    if not topic:
        raise InvalidArgument("topic must not be empty", kind="topic")
    if not topic.startswith("/"):
        raise InvalidArgument(f"topic {topic!r} must start with '/'", kind="topic", key=topic)
    if topic == "/":
        raise InvalidArgument(f"topic {topic!r} must have at least one component", kind="topic", key=topic)
    for part in topic[1:].split("/"):
        check_identifier(part, f"component of topic {topic!r}")
    return topic


class Subscription:
    """An asynchronous iterator over the events that match, from the moment of subscribing."""

    def __init__(self, matching: filters.Filter, limit: int) -> None:
        self._filter = matching
        self._limit = limit
        self._queue: deque[Event] = deque()
        self._ready = asyncio.Event()
        self._end: Error | None = None
        self._closed = False

    def offer(self, event: Event, adaptor: filters.Adaptor) -> None:
        """Hand over one event; called by the exchange on the loop's thread."""
        if self._end is not None or self._closed or not self._filter.matches(adaptor):
            return
        if len(self._queue) >= self._limit:
            self._end = ResourceExhausted(
                f"subscriber is too slow: {self._limit} events wait for it, cut off", kind="subscription"
            )
            self._queue.clear()
        else:
            self._queue.append(event)
        self._ready.set()

    def end(self, error: Error | None) -> None:
        """End the iteration after what is queued: with `error`, or silently."""
        if error is not None and self._end is None:
            self._end = error
        self._closed = True
        self._ready.set()

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        while not self._queue:
            if self._end is not None:
                raise self._end
            if self._closed:
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()
        return self._queue.popleft()


class Exchange:
    """The daemon's one place of events. All methods belong to the event loop's thread."""

    def __init__(self, *, limit: int = QUEUE, clock: Callable[[], float] = time.time) -> None:
        self._limit = limit
        self._clock = clock
        self._subscribers: set[Subscription] = set()
        self._closed = False

    def publish(self, namespace: str, topic: str, message: Message) -> None:
        """Tell of something that happened just now; InvalidArgument for a bad namespace or topic."""
        self.forward(Event(self._clock(), namespace, topic, pack(message)))

    def forward(self, event: Event) -> None:
        """Hand on an event that somebody else published (a shim, a client)."""
        check_identifier(event.namespace, "namespace")
        check_topic(event.topic)
        if not event.timestamp:
            raise InvalidArgument("timestamp must be set on a forwarded event", kind="event", key=event.topic)
        if not self._subscribers:
            return
        adaptor = _adapt(event)
        for subscriber in tuple(self._subscribers):
            subscriber.offer(event, adaptor)

    @contextlib.asynccontextmanager
    async def subscribe(self, filter_texts: Sequence[str] = ()) -> AsyncIterator[Subscription]:
        """Events from now on that match any of the filters (fields `topic`, `namespace`, `event.FIELD…`)."""
        if self._closed:
            raise Unavailable("events: the daemon is stopping", kind="subscription")
        subscription = Subscription(filters.parse(filter_texts), self._limit)
        self._subscribers.add(subscription)
        try:
            yield subscription
        finally:
            self._subscribers.discard(subscription)
            subscription.end(None)

    def close(self) -> None:
        """End every subscription; further ones are refused."""
        self._closed = True
        for subscriber in self._subscribers:
            subscriber.end(None)

    def __len__(self) -> int:
        return len(self._subscribers)


def unpack(value: TypedValue) -> Message | None:
    """The message in `value` when its type is known to this process and its bytes are sound."""
    name = value.type_url.rpartition("/")[2]
    try:
        message = symbol_database.Default().GetSymbol(name)()
        message.ParseFromString(value.value)
    except (KeyError, DecodeError):
        return None
    assert isinstance(message, Message)
    return message


def _adapt(event: Event) -> filters.Adaptor:
    decoded: list[Message | None] = []

    def field(path: Sequence[str]) -> tuple[str, bool]:
        match path[0] if path else "":
            case "namespace":
                return event.namespace, bool(event.namespace)
            case "topic":
                return event.topic, bool(event.topic)
            case "event":
                if not decoded:
                    decoded.append(unpack(event.event))
                return ("", False) if decoded[0] is None else _field(decoded[0], path[1:])
            case _:
                return "", False

    return field


def _field(message: Message, path: Sequence[str]) -> tuple[str, bool]:
    """The text of a field of a message, as containerd's generated accessors give it: text and maps of text only."""
    if not path or path[0] not in message.DESCRIPTOR.fields_by_name:
        return "", False
    descriptor = message.DESCRIPTOR.fields_by_name[path[0]]
    value = getattr(message, path[0])
    if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
        key = ".".join(path[1:])
        return (str(value[key]), True) if key in value else ("", False)
    if descriptor.message_type is not None:
        if isinstance(value, Message):
            return _field(value, path[1:])
        return "", False
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return "", False
    text = value if isinstance(value, str) else str(value) if value else ""
    return text, bool(text)
