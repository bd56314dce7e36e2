"""Messages of the transfer service, without the protobuf package (see `pctr.light`).

What `pctr image pull`, `push`, `import` and `export` tell and hear. `pctr.transfer.pack` labels those
that state their name.
"""

from __future__ import annotations

from pctr.light import BOOL, BYTES, INT, LABELS, STRING, STRINGS, UINT, Any_, Descriptor, Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar

#: Values of containerd.types.transfer.AuthType.
NONE, CREDENTIALS, REFRESH, HEADER = 0, 1, 2, 3

_TYPES = "containerd.types.transfer."


class Platform(Message):
    """containerd.types.Platform"""

    os: str
    architecture: str
    variant: str
    FIELDS: ClassVar = {1: ("os", STRING), 2: ("architecture", STRING), 3: ("variant", STRING)}


class RegistryResolver(Message):
    """containerd.types.transfer.RegistryResolver"""

    auth_stream: str
    headers: dict[str, str]
    host_dir: str
    default_scheme: str
    FIELDS: ClassVar = {
        1: ("auth_stream", STRING), 2: ("headers", LABELS), 3: ("host_dir", STRING), 4: ("default_scheme", STRING),
    }


class OCIRegistry(Message):
    """containerd.types.transfer.OCIRegistry"""

    NAME: ClassVar[str] = _TYPES + "OCIRegistry"
    reference: str
    resolver: RegistryResolver | None
    FIELDS: ClassVar = {1: ("reference", STRING), 2: ("resolver", RegistryResolver)}


class ImageReference(Message):
    """containerd.types.transfer.ImageReference"""

    name: str
    is_prefix: bool
    allow_overwrite: bool
    add_digest: bool
    skip_named_digest: bool
    FIELDS: ClassVar = {
        1: ("name", STRING), 2: ("is_prefix", BOOL), 3: ("allow_overwrite", BOOL), 4: ("add_digest", BOOL),
        5: ("skip_named_digest", BOOL),
    }


class UnpackConfiguration(Message):
    """containerd.types.transfer.UnpackConfiguration"""

    platform: Platform | None
    snapshotter: str
    FIELDS: ClassVar = {1: ("platform", Platform), 2: ("snapshotter", STRING)}


class ImageStore(Message):
    """containerd.types.transfer.ImageStore"""

    NAME: ClassVar[str] = _TYPES + "ImageStore"
    name: str
    labels: dict[str, str]
    platforms: list[Platform]
    all_metadata: bool
    manifest_limit: int
    extra_references: list[ImageReference]
    unpacks: list[UnpackConfiguration]
    FIELDS: ClassVar = {
        1: ("name", STRING), 2: ("labels", LABELS), 3: ("platforms", [Platform]), 4: ("all_metadata", BOOL),
        5: ("manifest_limit", UINT), 6: ("extra_references", [ImageReference]), 10: ("unpacks", [UnpackConfiguration]),
    }


class ImageImportStream(Message):
    """containerd.types.transfer.ImageImportStream"""

    NAME: ClassVar[str] = _TYPES + "ImageImportStream"
    stream: str
    media_type: str
    force_compress: bool
    FIELDS: ClassVar = {1: ("stream", STRING), 2: ("media_type", STRING), 3: ("force_compress", BOOL)}


class ImageExportStream(Message):
    """containerd.types.transfer.ImageExportStream"""

    NAME: ClassVar[str] = _TYPES + "ImageExportStream"
    stream: str
    media_type: str
    platforms: list[Platform]
    all_platforms: bool
    FIELDS: ClassVar = {
        1: ("stream", STRING), 2: ("media_type", STRING), 3: ("platforms", [Platform]), 4: ("all_platforms", BOOL),
    }


class Progress(Message):
    """containerd.types.transfer.Progress"""

    event: str
    name: str
    parents: list[str]
    progress: int
    total: int
    desc: Descriptor | None
    FIELDS: ClassVar = {
        1: ("event", STRING), 2: ("name", STRING), 3: ("parents", STRINGS), 4: ("progress", INT), 5: ("total", INT),
        6: ("desc", Descriptor),
    }

    @property
    def size(self) -> int:
        """How many bytes there are in all, 0 where nobody knows."""
        return max(0, self.total or (self.desc.size if self.desc is not None else 0))


class Data(Message):
    """containerd.types.transfer.Data"""

    NAME: ClassVar[str] = _TYPES + "Data"
    data: bytes
    FIELDS: ClassVar = {1: ("data", BYTES)}


class WindowUpdate(Message):
    """containerd.types.transfer.WindowUpdate"""

    NAME: ClassVar[str] = _TYPES + "WindowUpdate"
    update: int
    FIELDS: ClassVar = {1: ("update", INT)}


class AuthRequest(Message):
    """containerd.types.transfer.AuthRequest"""

    host: str
    reference: str
    wwwauthenticate: list[str]
    FIELDS: ClassVar = {1: ("host", STRING), 2: ("reference", STRING), 3: ("wwwauthenticate", STRINGS)}


class AuthResponse(Message):
    """containerd.types.transfer.AuthResponse"""

    NAME: ClassVar[str] = _TYPES + "AuthResponse"
    authType: int
    secret: str
    username: str
    FIELDS: ClassVar = {1: ("authType", UINT), 2: ("secret", STRING), 3: ("username", STRING)}


class StreamInit(Message):
    """containerd.services.streaming.v1.StreamInit"""

    NAME: ClassVar[str] = "containerd.services.streaming.v1.StreamInit"
    id: str
    FIELDS: ClassVar = {1: ("id", STRING)}


class TransferOptions(Message):
    """containerd.services.transfer.v1.TransferOptions"""

    progress_stream: str
    FIELDS: ClassVar = {1: ("progress_stream", STRING)}


class TransferRequest(Message):
    """containerd.services.transfer.v1.TransferRequest"""

    source: Any_ | None
    destination: Any_ | None
    options: TransferOptions | None
    FIELDS: ClassVar = {1: ("source", Any_), 2: ("destination", Any_), 3: ("options", TransferOptions)}


class PluginsRequest(Message):
    """containerd.services.introspection.v1.PluginsRequest"""

    filters: list[str]
    FIELDS: ClassVar = {1: ("filters", STRINGS)}


class Plugin(Message):
    """containerd.services.introspection.v1.Plugin"""

    type: str
    id: str
    FIELDS: ClassVar = {1: ("type", STRING), 2: ("id", STRING)}


class PluginsResponse(Message):
    """containerd.services.introspection.v1.PluginsResponse"""

    plugins: list[Plugin]
    FIELDS: ClassVar = {1: ("plugins", [Plugin])}
