"""Values of `model` to messages of containerd's API and back, for the services that share them."""

from __future__ import annotations

from collections.abc import Iterable

from supervisord_ctr.api.services.containers.v1 import containers_pb2
from supervisord_ctr.api.services.images.v1 import images_pb2
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.model import Container, Descriptor, Image, Mount, Platform, Runtime
from supervisord_ctr.rpc import any_from_value, any_to_value, timestamp


def descriptor_to_message(value: Descriptor) -> types_pb2.Descriptor:
    """An OCI descriptor."""
    return types_pb2.Descriptor(
        media_type=value.media_type, digest=value.digest, size=value.size, annotations=dict(value.annotations)
    )


def descriptor_from_message(message: types_pb2.Descriptor) -> Descriptor:
    """The reverse."""
    return Descriptor(message.media_type, message.digest, message.size, dict(message.annotations))


def platform_to_message(value: Platform) -> types_pb2.Platform:
    """An OCI platform."""
    return types_pb2.Platform(
        os=value.os, architecture=value.architecture, variant=value.variant, os_version=value.os_version
    )


def platform_from_message(message: types_pb2.Platform) -> Platform:
    """The reverse."""
    return Platform(message.os, message.architecture, message.variant, message.os_version)


def mount_to_message(value: Mount) -> types_pb2.Mount:
    """One mount."""
    return types_pb2.Mount(type=value.type, source=value.source, target=value.target, options=value.options)


def mounts_to_messages(values: Iterable[Mount]) -> list[types_pb2.Mount]:
    """Mounts in their order."""
    return [mount_to_message(value) for value in values]


def mounts_from_messages(messages: Iterable[types_pb2.Mount]) -> tuple[Mount, ...]:
    """The reverse."""
    return tuple(Mount(m.type, m.source, tuple(m.options), m.target) for m in messages)


def container_to_message(value: Container) -> containers_pb2.Container:
    """A container record."""
    options = any_from_value(value.runtime.options)
    message = containers_pb2.Container(
        id=value.id, labels=dict(value.labels), image=value.image, snapshotter=value.snapshotter,
        snapshot_key=value.snapshot_key, created_at=timestamp(value.created_at), updated_at=timestamp(value.updated_at),
        sandbox=value.sandbox, spec=any_from_value(value.spec),
        runtime=containers_pb2.Container.Runtime(name=value.runtime.name, options=options),
    )
    for key, extension in value.extensions.items():
        message.extensions[key].type_url = extension.type_url
        message.extensions[key].value = extension.value
    return message


def container_from_message(message: containers_pb2.Container) -> Container:
    """The reverse; times are the store's business."""
    extensions = {key: value for key, any_ in message.extensions.items() if (value := any_to_value(any_)) is not None}
    return Container(
        id=message.id, labels=dict(message.labels), image=message.image,
        runtime=Runtime(message.runtime.name, any_to_value(message.runtime.options)),
        spec=any_to_value(message.spec), snapshotter=message.snapshotter, snapshot_key=message.snapshot_key,
        extensions=extensions, sandbox=message.sandbox,
    )


def image_to_message(value: Image) -> images_pb2.Image:
    """An image record."""
    return images_pb2.Image(
        name=value.name, labels=dict(value.labels), target=descriptor_to_message(value.target),
        created_at=timestamp(value.created_at), updated_at=timestamp(value.updated_at),
    )


def image_from_message(message: images_pb2.Image) -> Image:
    """The reverse; times are the store's business."""
    return Image(message.name, descriptor_from_message(message.target), dict(message.labels))
