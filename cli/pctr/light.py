"""Messages of the paths that must start fast (`run`, `exec`, `pull`), without the protobuf package.

Importing protobuf and the generated modules takes longer than creating a container, so the few
messages that a run needs are stated here as tables. Fields and numbers are those of `protos/`; the
tests compare every class with its generated twin, byte for byte. Fields not named here are
skipped when reading. All other commands use the generated classes.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self

STRING, BYTES, UINT, INT, BOOL, STRINGS, LABELS = "string", "bytes", "uint", "int", "bool", "strings", "labels"

_DEFAULTS: dict[str, Any] = {STRING: "", BYTES: b"", UINT: 0, INT: 0, BOOL: False}


def _varint(value: int) -> bytes:
    if value < 0:
        value += 1 << 64
    result = bytearray()
    while value >= 128:
        result.append(value & 127 | 128)
        value >>= 7
    result.append(value)
    return bytes(result)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        octet = data[at]
        at += 1
        value |= (octet & 127) << shift
        if octet < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("varint too long")


def _length_delimited(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


class Message:
    """A message; `FIELDS` maps a field's number to its name and kind.

    A kind is one of the words above, a message class (absent is None), or a list of one message
    class (repeated). Values are given by keyword.
    """

    FIELDS: ClassVar[dict[int, tuple[str, Any]]] = {}
    #: The full name, of messages that travel inside an Any.
    NAME: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        for name, kind in self.FIELDS.values():
            if name in values:
                value = values.pop(name)
            elif kind is LABELS:
                value = {}
            elif kind is STRINGS or isinstance(kind, list):
                value = []
            else:
                value = _DEFAULTS.get(kind)
            setattr(self, name, value)
        if values:
            raise TypeError(f"{type(self).__name__} has no field {next(iter(values))!r}")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def SerializeToString(self) -> bytes:
        """Protobuf's wire format, fields in the order of their numbers."""
        result = bytearray()
        for number, (name, kind) in sorted(self.FIELDS.items()):
            value: Any = getattr(self, name)
            if value is None or (not value and not hasattr(kind, "FIELDS")):
                continue
            if kind is STRING:
                result += _length_delimited(number, value.encode())
            elif kind is BYTES:
                result += _length_delimited(number, value)
            elif kind in (UINT, INT, BOOL):
                result += _varint(number << 3) + _varint(int(value))
            elif kind is STRINGS:
                for item in value:
                    result += _length_delimited(number, item.encode())
            elif kind is LABELS:
                for key, item in value.items():
                    entry = _length_delimited(1, key.encode()) + _length_delimited(2, item.encode())
                    result += _length_delimited(number, entry)
            elif isinstance(kind, list):
                for item in value:
                    result += _length_delimited(number, item.SerializeToString())
            else:
                result += _length_delimited(number, value.SerializeToString())
        return bytes(result)

    @classmethod
    def FromString(cls, data: bytes, /) -> Self:
        """The message in these bytes. Raises `ValueError` when they are none."""
        result = cls()
        try:
            at = 0
            while at < len(data):
                tag, at = _read_varint(data, at)
                value: int | bytes
                if tag & 7 == 0:
                    value, at = _read_varint(data, at)
                elif tag & 7 == 2:
                    size, at = _read_varint(data, at)
                    value = data[at:at + size]
                    at += size
                    if at > len(data):
                        raise ValueError("field beyond the message")
                elif tag & 7 in (1, 5):
                    at += 8 if tag & 7 == 1 else 4
                    continue
                else:
                    raise ValueError(f"wire type {tag & 7}")
                field = cls.FIELDS.get(tag >> 3)
                if field is not None:
                    result._take(field[0], field[1], value)
        except IndexError as error:
            raise ValueError(f"{cls.__name__}: truncated") from error
        return result

    def _take(self, name: str, kind: Any, value: Any) -> None:
        if kind is STRING:
            setattr(self, name, value.decode())
        elif kind is BYTES or kind is UINT:
            setattr(self, name, value)
        elif kind is INT:
            setattr(self, name, value - (1 << 64) if value >> 63 else value)
        elif kind is BOOL:
            setattr(self, name, bool(value))
        elif kind is STRINGS:
            getattr(self, name).append(value.decode())
        elif kind is LABELS:
            entry = _Entry.FromString(value)
            getattr(self, name)[entry.key] = entry.value
        elif isinstance(kind, list):
            getattr(self, name).append(kind[0].FromString(value))
        else:
            setattr(self, name, kind.FromString(value))


class _Entry(Message):
    key: str
    value: str
    FIELDS: ClassVar = {1: ("key", STRING), 2: ("value", STRING)}


class Empty(Message):
    """google.protobuf.Empty"""


class Timestamp(Message):
    """google.protobuf.Timestamp"""

    seconds: int
    nanos: int
    FIELDS: ClassVar = {1: ("seconds", UINT), 2: ("nanos", UINT)}


class Any_(Message):
    """google.protobuf.Any"""

    type_url: str
    value: bytes
    FIELDS: ClassVar = {1: ("type_url", STRING), 2: ("value", BYTES)}


class FieldMask(Message):
    """google.protobuf.FieldMask"""

    paths: list[str]
    FIELDS: ClassVar = {1: ("paths", STRINGS)}


class Descriptor(Message):
    """containerd.types.Descriptor"""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str]
    FIELDS: ClassVar = {
        1: ("media_type", STRING), 2: ("digest", STRING), 3: ("size", UINT), 5: ("annotations", LABELS),
    }


class Mount(Message):
    """containerd.types.Mount"""

    type: str
    source: str
    target: str
    options: list[str]
    FIELDS: ClassVar = {1: ("type", STRING), 2: ("source", STRING), 3: ("target", STRING), 4: ("options", STRINGS)}


class Image(Message):
    """containerd.services.images.v1.Image"""

    name: str
    labels: dict[str, str]
    target: Descriptor | None
    FIELDS: ClassVar = {1: ("name", STRING), 2: ("labels", LABELS), 3: ("target", Descriptor)}


class GetImageRequest(Message):
    """containerd.services.images.v1.GetImageRequest"""

    name: str
    FIELDS: ClassVar = {1: ("name", STRING)}


class GetImageResponse(Message):
    """containerd.services.images.v1.GetImageResponse"""

    image: Image | None
    FIELDS: ClassVar = {1: ("image", Image)}


class ReadContentRequest(Message):
    """containerd.services.content.v1.ReadContentRequest"""

    digest: str
    offset: int
    size: int
    FIELDS: ClassVar = {1: ("digest", STRING), 2: ("offset", UINT), 3: ("size", UINT)}


class ReadContentResponse(Message):
    """containerd.services.content.v1.ReadContentResponse"""

    offset: int
    data: bytes
    FIELDS: ClassVar = {1: ("offset", UINT), 2: ("data", BYTES)}


class DigestRequest(Message):
    """containerd.services.content.v1.InfoRequest"""

    digest: str
    FIELDS: ClassVar = {1: ("digest", STRING)}


class ContentInfo(Message):
    """containerd.services.content.v1.Info"""

    digest: str
    size: int
    labels: dict[str, str]
    FIELDS: ClassVar = {1: ("digest", STRING), 2: ("size", UINT), 5: ("labels", LABELS)}


class InfoResponse(Message):
    """containerd.services.content.v1.InfoResponse"""

    info: ContentInfo | None
    FIELDS: ClassVar = {1: ("info", ContentInfo)}


class PrepareSnapshotRequest(Message):
    """containerd.services.snapshots.v1.PrepareSnapshotRequest"""

    snapshotter: str
    key: str
    parent: str
    labels: dict[str, str]
    FIELDS: ClassVar = {1: ("snapshotter", STRING), 2: ("key", STRING), 3: ("parent", STRING), 4: ("labels", LABELS)}


class PrepareSnapshotResponse(Message):
    """containerd.services.snapshots.v1.PrepareSnapshotResponse"""

    mounts: list[Mount]
    FIELDS: ClassVar = {1: ("mounts", [Mount])}


class RemoveSnapshotRequest(Message):
    """containerd.services.snapshots.v1.RemoveSnapshotRequest"""

    snapshotter: str
    key: str
    FIELDS: ClassVar = {1: ("snapshotter", STRING), 2: ("key", STRING)}


class Runtime(Message):
    """containerd.services.containers.v1.Container.Runtime"""

    name: str
    options: Any_ | None
    FIELDS: ClassVar = {1: ("name", STRING), 2: ("options", Any_)}


class Container(Message):
    """containerd.services.containers.v1.Container"""

    id: str
    labels: dict[str, str]
    image: str
    runtime: Runtime | None
    spec: Any_ | None
    snapshotter: str
    snapshot_key: str
    FIELDS: ClassVar = {
        1: ("id", STRING), 2: ("labels", LABELS), 3: ("image", STRING), 4: ("runtime", Runtime), 5: ("spec", Any_),
        6: ("snapshotter", STRING), 7: ("snapshot_key", STRING),
    }


class ContainerMessage(Message):
    """CreateContainerRequest, CreateContainerResponse and GetContainerResponse: a container."""

    container: Container | None
    FIELDS: ClassVar = {1: ("container", Container)}


class UpdateContainerRequest(Message):
    """containerd.services.containers.v1.UpdateContainerRequest"""

    container: Container | None
    update_mask: FieldMask | None
    FIELDS: ClassVar = {1: ("container", Container), 2: ("update_mask", FieldMask)}


class ContainerId(Message):
    """GetContainerRequest and DeleteContainerRequest: a container's id."""

    id: str
    FIELDS: ClassVar = {1: ("id", STRING)}


class CreateTaskRequest(Message):
    """containerd.services.tasks.v1.CreateTaskRequest"""

    container_id: str
    rootfs: list[Mount]
    stdin: str
    stdout: str
    stderr: str
    terminal: bool
    checkpoint: Descriptor | None
    options: Any_ | None
    runtime_path: str
    FIELDS: ClassVar = {
        1: ("container_id", STRING), 3: ("rootfs", [Mount]), 4: ("stdin", STRING), 5: ("stdout", STRING),
        6: ("stderr", STRING), 7: ("terminal", BOOL), 8: ("checkpoint", Descriptor), 9: ("options", Any_),
        10: ("runtime_path", STRING),
    }


class CreateTaskResponse(Message):
    """containerd.services.tasks.v1.CreateTaskResponse"""

    container_id: str
    pid: int
    FIELDS: ClassVar = {1: ("container_id", STRING), 2: ("pid", UINT)}


class ExecProcessRequest(Message):
    """containerd.services.tasks.v1.ExecProcessRequest"""

    container_id: str
    stdin: str
    stdout: str
    stderr: str
    terminal: bool
    spec: Any_ | None
    exec_id: str
    FIELDS: ClassVar = {
        1: ("container_id", STRING), 2: ("stdin", STRING), 3: ("stdout", STRING), 4: ("stderr", STRING),
        5: ("terminal", BOOL), 6: ("spec", Any_), 7: ("exec_id", STRING),
    }


class ProcessId(Message):
    """StartRequest, WaitRequest, GetRequest, DeleteTaskRequest, DeleteProcessRequest: task and exec."""

    container_id: str
    exec_id: str
    FIELDS: ClassVar = {1: ("container_id", STRING), 2: ("exec_id", STRING)}


class StartResponse(Message):
    """containerd.services.tasks.v1.StartResponse"""

    pid: int
    FIELDS: ClassVar = {1: ("pid", UINT)}


class WaitResponse(Message):
    """containerd.services.tasks.v1.WaitResponse"""

    exit_status: int
    exited_at: Timestamp | None
    FIELDS: ClassVar = {1: ("exit_status", UINT), 2: ("exited_at", Timestamp)}


class DeleteResponse(Message):
    """containerd.services.tasks.v1.DeleteResponse"""

    id: str
    pid: int
    exit_status: int
    exited_at: Timestamp | None
    FIELDS: ClassVar = {
        1: ("id", STRING), 2: ("pid", UINT), 3: ("exit_status", UINT), 4: ("exited_at", Timestamp),
    }


class KillRequest(Message):
    """containerd.services.tasks.v1.KillRequest"""

    container_id: str
    exec_id: str
    signal: int
    all: bool
    FIELDS: ClassVar = {
        1: ("container_id", STRING), 2: ("exec_id", STRING), 3: ("signal", UINT), 4: ("all", BOOL),
    }


class ResizePtyRequest(Message):
    """containerd.services.tasks.v1.ResizePtyRequest"""

    container_id: str
    exec_id: str
    width: int
    height: int
    FIELDS: ClassVar = {
        1: ("container_id", STRING), 2: ("exec_id", STRING), 3: ("width", UINT), 4: ("height", UINT),
    }


class CloseIORequest(Message):
    """containerd.services.tasks.v1.CloseIORequest"""

    container_id: str
    exec_id: str
    stdin: bool
    FIELDS: ClassVar = {1: ("container_id", STRING), 2: ("exec_id", STRING), 3: ("stdin", BOOL)}


class Process(Message):
    """containerd.v1.types.Process"""

    container_id: str
    id: str
    pid: int
    status: int
    stdin: str
    stdout: str
    stderr: str
    terminal: bool
    exit_status: int
    exited_at: Timestamp | None
    FIELDS: ClassVar = {
        1: ("container_id", STRING), 2: ("id", STRING), 3: ("pid", UINT), 4: ("status", UINT), 5: ("stdin", STRING),
        6: ("stdout", STRING), 7: ("stderr", STRING), 8: ("terminal", BOOL), 9: ("exit_status", UINT),
        10: ("exited_at", Timestamp),
    }


class GetProcessResponse(Message):
    """containerd.services.tasks.v1.GetResponse"""

    process: Process | None
    FIELDS: ClassVar = {1: ("process", Process)}
