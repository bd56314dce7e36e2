"""Small conversions between protobuf's well-known types and plain values."""

from __future__ import annotations

from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp


def timestamp(seconds: float) -> Timestamp | None:
    """Seconds since the epoch as a Timestamp; None for 0.0, which is "not set"."""
    if not seconds:
        return None
    whole = int(seconds)
    return Timestamp(seconds=whole, nanos=min(999_999_999, max(0, int((seconds - whole) * 1e9))))


def any_of(message: Message) -> Any:
    """An Any with the bare message name as its type, as containerd's typeurl writes it."""
    return Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def type_name(value: Any) -> str:
    """The message name of an Any, with or without a "types.googleapis.com/" before it."""
    return value.type_url.rpartition("/")[2]
