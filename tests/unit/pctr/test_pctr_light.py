"""Every light message is, byte for byte, what its generated twin is."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import any_pb2, empty_pb2, field_mask_pb2, timestamp_pb2
from pctr import light, light_transfer, transfer
from pctr.commands import pod_stream

from supervisord_ctr.api.cri.v1 import cri_pb2
from supervisord_ctr.api.services.containers.v1 import containers_pb2
from supervisord_ctr.api.services.content.v1 import content_pb2
from supervisord_ctr.api.services.images.v1 import images_pb2
from supervisord_ctr.api.services.introspection.v1 import introspection_pb2
from supervisord_ctr.api.services.snapshots.v1 import snapshots_pb2
from supervisord_ctr.api.services.streaming.v1 import streaming_pb2
from supervisord_ctr.api.services.tasks.v1 import tasks_pb2
from supervisord_ctr.api.services.transfer.v1 import transfer_pb2 as transfer_service_pb2
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.api.types.task import task_pb2
from supervisord_ctr.api.types.transfer import transfer_pb2

TWINS: list[tuple[type[light.Message], list[Any]]] = [
    (light.Empty, [empty_pb2.Empty]),
    (light.Timestamp, [timestamp_pb2.Timestamp]),
    (light.Any_, [any_pb2.Any]),
    (light.FieldMask, [field_mask_pb2.FieldMask]),
    (light.Descriptor, [types_pb2.Descriptor]),
    (light.Mount, [types_pb2.Mount]),
    (light.Image, [images_pb2.Image]),
    (light.GetImageRequest, [images_pb2.GetImageRequest]),
    (light.GetImageResponse, [images_pb2.GetImageResponse]),
    (light.ReadContentRequest, [content_pb2.ReadContentRequest]),
    (light.ReadContentResponse, [content_pb2.ReadContentResponse]),
    (light.DigestRequest, [content_pb2.InfoRequest]),
    (light.ContentInfo, [content_pb2.Info]),
    (light.InfoResponse, [content_pb2.InfoResponse]),
    (light.PrepareSnapshotRequest, [snapshots_pb2.PrepareSnapshotRequest]),
    (light.PrepareSnapshotResponse, [snapshots_pb2.PrepareSnapshotResponse, snapshots_pb2.MountsResponse]),
    (light.RemoveSnapshotRequest, [snapshots_pb2.RemoveSnapshotRequest, snapshots_pb2.MountsRequest]),
    (light.Runtime, [containers_pb2.Container.Runtime]),
    (light.Container, [containers_pb2.Container]),
    (light.ContainerMessage, [
        containers_pb2.CreateContainerRequest, containers_pb2.CreateContainerResponse,
        containers_pb2.GetContainerResponse, containers_pb2.UpdateContainerResponse]),
    (light.UpdateContainerRequest, [containers_pb2.UpdateContainerRequest]),
    (light.ContainerId, [containers_pb2.GetContainerRequest, containers_pb2.DeleteContainerRequest]),
    (light.CreateTaskRequest, [tasks_pb2.CreateTaskRequest]),
    (light.CreateTaskResponse, [tasks_pb2.CreateTaskResponse]),
    (light.ExecProcessRequest, [tasks_pb2.ExecProcessRequest]),
    (light.ProcessId, [
        tasks_pb2.StartRequest, tasks_pb2.WaitRequest, tasks_pb2.GetRequest, tasks_pb2.DeleteProcessRequest]),
    (light.StartResponse, [tasks_pb2.StartResponse]),
    (light.WaitResponse, [tasks_pb2.WaitResponse]),
    (light.DeleteResponse, [tasks_pb2.DeleteResponse]),
    (light.KillRequest, [tasks_pb2.KillRequest]),
    (light.ResizePtyRequest, [tasks_pb2.ResizePtyRequest]),
    (light.CloseIORequest, [tasks_pb2.CloseIORequest]),
    (light.Process, [task_pb2.Process]),
    (light.GetProcessResponse, [tasks_pb2.GetResponse]),
    (light_transfer.Platform, [types_pb2.Platform]),
    (light_transfer.RegistryResolver, [transfer_pb2.RegistryResolver]),
    (light_transfer.OCIRegistry, [transfer_pb2.OCIRegistry]),
    (light_transfer.ImageReference, [transfer_pb2.ImageReference]),
    (light_transfer.UnpackConfiguration, [transfer_pb2.UnpackConfiguration]),
    (light_transfer.ImageStore, [transfer_pb2.ImageStore]),
    (light_transfer.ImageImportStream, [transfer_pb2.ImageImportStream]),
    (light_transfer.ImageExportStream, [transfer_pb2.ImageExportStream]),
    (light_transfer.Progress, [transfer_pb2.Progress]),
    (light_transfer.Data, [transfer_pb2.Data]),
    (light_transfer.WindowUpdate, [transfer_pb2.WindowUpdate]),
    (light_transfer.AuthRequest, [transfer_pb2.AuthRequest]),
    (light_transfer.AuthResponse, [transfer_pb2.AuthResponse]),
    (light_transfer.StreamInit, [streaming_pb2.StreamInit]),
    (light_transfer.TransferOptions, [transfer_service_pb2.TransferOptions]),
    (light_transfer.TransferRequest, [transfer_service_pb2.TransferRequest]),
    (light_transfer.PluginsRequest, [introspection_pb2.PluginsRequest]),
    (light_transfer.Plugin, [introspection_pb2.Plugin]),
    (light_transfer.PluginsResponse, [introspection_pb2.PluginsResponse]),
    (pod_stream.ExecRequest, [cri_pb2.ExecRequest]),
    (pod_stream.AttachRequest, [cri_pb2.AttachRequest]),
    (pod_stream.PortForwardRequest, [cri_pb2.PortForwardRequest]),
    (pod_stream.UrlResponse, [cri_pb2.ExecResponse, cri_pb2.AttachResponse, cri_pb2.PortForwardResponse]),
]


def _filled(kind: type[light.Message], depth: int = 0) -> light.Message:
    """A message with every field set to something that is not its default."""
    values: dict[str, Any] = {}
    for number, (name, field) in kind.FIELDS.items():
        if field == light.STRING:
            values[name] = f"{name}-ü"
        elif field == light.BYTES:
            values[name] = bytes(range(200))
        elif field == light.UINT:
            values[name] = number + 300
        elif field == light.INT:
            values[name] = -number - 300
        elif field == light.BOOL:
            values[name] = True
        elif field == light.STRINGS:
            values[name] = ["a", "", "b" * 200]
        elif field == light.LABELS:
            values[name] = {"key": "value"}
        elif isinstance(field, list):
            values[name] = [_filled(field[0], depth + 1), field[0]()]
        else:
            values[name] = _filled(field, depth + 1)
    return kind(**values)


@pytest.mark.parametrize(("kind", "twin"), [
    pytest.param(kind, twin, id=f"{kind.__name__}-{twin.DESCRIPTOR.name}") for kind, twins in TWINS for twin in twins
])
def test_same_bytes_both_ways(kind: type[light.Message], twin: Any) -> None:
    message = _filled(kind)
    data = message.SerializeToString()
    read = twin.FromString(data)
    assert read.SerializeToString(deterministic=True) == data
    assert kind.FromString(data) == message
    fields = twin.DESCRIPTOR.fields_by_number
    assert all(fields[number].name == name for number, (name, _) in kind.FIELDS.items())
    assert kind.NAME in ("", twin.DESCRIPTOR.full_name)
    kinds = {name: getattr(read, name) for name, field in kind.FIELDS.values() if field in (light.UINT, light.INT)}
    assert kinds == {name: getattr(message, name) for name in kinds}


def test_every_light_message_has_a_twin() -> None:
    def below(kind: type[light.Message]) -> set[type[light.Message]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    known = {kind for kind, _ in TWINS}
    missing = {kind for kind in below(light.Message) - known if not kind.__name__.startswith("_")} - {light.Message}
    assert not {kind.__name__ for kind in missing}


def test_defaults_are_not_written_and_unknown_fields_are_skipped() -> None:
    assert light.Container().SerializeToString() == b""
    full = task_pb2.Process(container_id="a", exit_status=3)
    full.exited_at.seconds = 5
    assert light.WaitResponse.FromString(full.SerializeToString()).exited_at is None


@pytest.mark.parametrize("data", [b"\x0a", b"\x0a\x05ab", b"\xff" * 11, b"\x0b", b"\x08" + b"\xff" * 12])
def test_what_is_no_message_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        light.Container.FromString(data)


def test_an_unknown_field_name_is_a_mistake() -> None:
    with pytest.raises(TypeError):
        light.Mount(tpye="bind")


def test_kinds_of_credentials_have_their_numbers() -> None:
    assert {name: getattr(light_transfer, name) for name in transfer_pb2.AuthType.keys()} == dict(
        transfer_pb2.AuthType.items())


def test_what_travels_inside_an_any_states_its_name() -> None:
    packed = transfer.pack(light_transfer.Data(data=b"x"))
    assert (packed.type_url, packed.value) == ("containerd.types.transfer.Data", b"\x0a\x01x")
    with pytest.raises(TypeError):
        transfer.pack(light_transfer.Platform(os="linux"))
