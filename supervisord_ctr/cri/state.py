"""The memory of pods and containers, with a durable record behind each.

Owns what lists and statuses are answered from: values in memory, changed on the event loop only,
and the records (`database.cri`) from which they are read again after a restart. Messages that lists
return are built once for each change and reused.

A record is JSON: scalars as they are, CRI messages as base64 of their bytes. Times are nanoseconds
since the epoch, as CRI has them, 0 meaning "not yet".
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.errors import InvalidArgument, NotFound

log = logging.getLogger(__name__)

SANDBOX_KIND = "sandbox"
CONTAINER_KIND = "container"

M = TypeVar("M", bound=Message)


class Records(Protocol):
    """Durable values by kind and ID (`metadata.Database.cri`)."""

    async def put(self, kind: str, id: str, value: bytes) -> None:  # noqa: A002
        """Keep `value`; on disk when this returns."""
        ...

    async def list(self, kind: str) -> list[tuple[str, bytes]]:
        """Every value of a kind."""
        ...

    async def delete(self, kind: str, id: str) -> None:  # noqa: A002
        """Forget a value; none there is no error."""
        ...


def _pack(message: Message) -> str:
    return base64.b64encode(message.SerializeToString()).decode()


def _unpack(kind: type[M], text: str) -> M:
    message = kind()
    message.ParseFromString(base64.b64decode(text))
    return message


@dataclass
class Pod:
    """A sandbox. `stage` is "creating", "ready", "stopping", "stopped" or "removing".

    `selinux` is what its containers' processes are labelled with, "" where nothing is.
    """

    id: str
    name: str
    config: pb.PodSandboxConfig
    handler: str = ""
    stage: str = "creating"
    created_at: int = 0
    addresses: list[str] = field(default_factory=list)
    network_down: bool = False
    pause_pid: int = 0
    pause_start: int = 0
    resources: pb.LinuxContainerResources | None = None
    overhead: pb.LinuxContainerResources | None = None
    runtime: str = ""
    selinux: str = ""
    _item: pb.PodSandbox | None = field(default=None, repr=False)
    _status: pb.PodSandboxStatus | None = field(default=None, repr=False)

    @property
    def ready(self) -> bool:
        """Whether CRI calls it ready."""
        return self.stage == "ready"

    @property
    def namespaces(self) -> pb.NamespaceOption:
        """The pod's namespace options."""
        return self.config.linux.security_context.namespace_options

    @property
    def host_network(self) -> bool:
        """Whether the pod is in the host's network."""
        return self.namespaces.network == pb.NODE

    @property
    def state(self) -> pb.PodSandboxState.ValueType:
        """CRI's word."""
        return pb.SANDBOX_READY if self.ready else pb.SANDBOX_NOTREADY

    def changed(self) -> None:
        """Forget the messages built so far."""
        self._item = self._status = None

    def item(self) -> pb.PodSandbox:
        """What lists return; shared, not to be changed."""
        if self._item is None:
            self._item = pb.PodSandbox(
                id=self.id, metadata=self.config.metadata, state=self.state, created_at=self.created_at,
                labels=self.config.labels, annotations=self.config.annotations, runtime_handler=self.handler,
            )
        return self._item

    def status(self) -> pb.PodSandboxStatus:
        """What statuses return; shared, not to be changed."""
        if self._status is None:
            network = pb.PodSandboxNetworkStatus()
            if self.addresses and not self.host_network and self.ready:
                network.ip = self.addresses[0]
                network.additional_ips.extend(pb.PodIP(ip=address) for address in self.addresses[1:])
            self._status = pb.PodSandboxStatus(
                id=self.id, metadata=self.config.metadata, state=self.state, created_at=self.created_at,
                network=network, linux=pb.LinuxPodSandboxStatus(namespaces=pb.Namespace(options=self.namespaces)),
                labels=self.config.labels, annotations=self.config.annotations, runtime_handler=self.handler,
            )
        return self._status

    def encode(self) -> bytes:
        """The record."""
        value: dict[str, Any] = {
            "v": 1, "id": self.id, "name": self.name, "config": _pack(self.config), "handler": self.handler,
            "stage": self.stage, "created_at": self.created_at, "addresses": self.addresses,
            "network_down": self.network_down, "pause_pid": self.pause_pid, "pause_start": self.pause_start,
            "runtime": self.runtime, "selinux": self.selinux,
        }
        for name in ("resources", "overhead"):
            message = getattr(self, name)
            if message is not None:
                value[name] = _pack(message)
        return json.dumps(value).encode()

    @classmethod
    def decode(cls, data: bytes) -> Pod:
        """The reverse; raises `ValueError` or `KeyError` for what is no record."""
        value = json.loads(data)
        pod = cls(
            value["id"], value["name"], _unpack(pb.PodSandboxConfig, value["config"]), value["handler"],
            value["stage"], value["created_at"], list(value["addresses"]), bool(value["network_down"]),
            value["pause_pid"], value["pause_start"], runtime=value.get("runtime", ""),
            selinux=value.get("selinux", ""),
        )
        for name in ("resources", "overhead"):
            if name in value:
                setattr(pod, name, _unpack(pb.LinuxContainerResources, value[name]))
        return pod


@dataclass
class Container:
    """A container. `stage` is "creating", "created", "starting", "running", "exited" or "unknown".

    `asked` says who asked for the end ("stop", "pod stop", ""), `oom` whether a process of it was
    killed for memory, `oom_level` whose limit that was ("container", "pod", "node"), `signal` what ended
    it, `asked_signal` the last signal that somebody sent it, `removing` that a removal has begun.
    """

    id: str
    name: str
    pod_id: str
    config: pb.ContainerConfig
    image_id: str = ""
    image_digest: str = ""
    image_name: str = ""
    log_path: str = ""
    stop_signal: str = ""
    snapshotter: str = ""
    runtime: str = ""
    cgroup: str = ""
    stage: str = "creating"
    created_at: int = 0
    started_at: int = 0
    finished_at: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    pid: int = 0
    oom: bool = False
    oom_level: str = ""
    asked: str = ""
    signal: int = 0
    asked_signal: int = 0
    removing: bool = False
    checkpoint: str = ""
    uid: int = 0
    gid: int = 0
    groups: list[int] = field(default_factory=list)
    image_mounts: list[str] = field(default_factory=list)
    id_mapped: list[list[str]] = field(default_factory=list)
    resources: pb.LinuxContainerResources | None = None
    _item: pb.Container | None = field(default=None, repr=False)
    _status: tuple[tuple[str, str], pb.ContainerStatus] | None = field(default=None, repr=False)
    _config_text: str = field(default="", repr=False)

    @property
    def state(self) -> pb.ContainerState.ValueType:
        """CRI's word."""
        if self.stage in ("running", "stopping"):
            return pb.CONTAINER_RUNNING
        if self.stage == "exited":
            return pb.CONTAINER_EXITED
        if self.stage == "unknown":
            return pb.CONTAINER_UNKNOWN
        return pb.CONTAINER_CREATED

    @property
    def running(self) -> bool:
        """Whether CRI calls it running."""
        return self.stage == "running"

    def changed(self) -> None:
        """Forget the messages built so far."""
        self._item = self._status = None

    def item(self) -> pb.Container:
        """What lists return; shared, not to be changed."""
        if self._item is None:
            self._item = pb.Container(
                id=self.id, pod_sandbox_id=self.pod_id, metadata=self.config.metadata, image=self.config.image,
                image_ref=self.image_id, image_id=self.image_id, state=self.state, created_at=self.created_at,
                labels=self.config.labels, annotations=self.config.annotations,
            )
        return self._item

    def config_text(self) -> str:
        """The request as JSON, which it takes long to make and which does not change once the container is made."""
        if not self._config_text:
            self._config_text = json_format.MessageToJson(self.config, preserving_proto_field_name=True, indent=None)
        return self._config_text

    def cached_status(self, names: tuple[str, str]) -> pb.ContainerStatus | None:
        """The status built last; None when something changed since, or the image's names are others."""
        return self._status[1] if self._status is not None and self._status[0] == names else None

    def keep_status(self, names: tuple[str, str], status: pb.ContainerStatus) -> None:
        """Remember a status until `changed`."""
        self._status = names, status

    def encode(self) -> bytes:
        """The record."""
        value = {"v": 1, **{name: getattr(self, name) for name in _SCALARS}}
        value["config"] = _pack(self.config)
        if self.resources is not None:
            value["resources"] = _pack(self.resources)
        return json.dumps(value).encode()

    @classmethod
    def decode(cls, data: bytes) -> Container:
        """The reverse; raises `ValueError` or `KeyError` for what is no record."""
        value = json.loads(data)
        known = {name: value[name] for name in _SCALARS if name in value}
        container = cls(**known, config=_unpack(pb.ContainerConfig, value["config"]))
        if "resources" in value:
            container.resources = _unpack(pb.LinuxContainerResources, value["resources"])
        return container


_SCALARS = (
    "id", "name", "pod_id", "image_id", "image_digest", "image_name", "log_path", "stop_signal", "snapshotter",
    "runtime", "cgroup", "stage", "created_at", "started_at", "finished_at", "exit_code", "reason", "message", "pid",
    "oom", "oom_level", "asked", "signal", "asked_signal", "removing", "checkpoint", "uid", "gid", "groups",
    "image_mounts", "id_mapped",
)

E = TypeVar("E", Pod, Container)


class State:
    """All pods and containers. Reads are plain look-ups; `save_…` and `forget_…` write the record."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._pods: dict[str, Pod] = {}
        self._containers: dict[str, Container] = {}
        self._pod_names: dict[str, str] = {}
        self._container_names: dict[str, str] = {}
        self._of_pod: dict[str, dict[str, Container]] = {}

    async def load(self) -> None:
        """Read all records; a damaged one is reported and left where it is."""
        for identity, data in await self._records.list(SANDBOX_KIND):
            try:
                self.add_pod(Pod.decode(data))
            except (ValueError, KeyError, TypeError):
                log.exception("record of sandbox %s is damaged", identity)
        for identity, data in await self._records.list(CONTAINER_KIND):
            try:
                self.add_container(Container.decode(data))
            except (ValueError, KeyError, TypeError):
                log.exception("record of container %s is damaged", identity)

    # -- pods ----------------------------------------------------------------------------------------

    def add_pod(self, pod: Pod) -> None:
        """Take a pod into memory."""
        self._pods[pod.id] = pod
        self._pod_names[pod.name] = pod.id

    def drop_pod(self, pod: Pod) -> None:
        """Take a pod out of memory, its record apart."""
        self._pods.pop(pod.id, None)
        if self._pod_names.get(pod.name) == pod.id:
            del self._pod_names[pod.name]

    async def save_pod(self, pod: Pod) -> None:
        """Write the record; readers see the change from now on."""
        pod.changed()
        await self._records.put(SANDBOX_KIND, pod.id, pod.encode())

    async def forget_pod(self, pod: Pod) -> None:
        """Delete the record, then the memory."""
        await self._records.delete(SANDBOX_KIND, pod.id)
        self._pods.pop(pod.id, None)
        self._of_pod.pop(pod.id, None)
        if self._pod_names.get(pod.name) == pod.id:
            del self._pod_names[pod.name]

    def pods(self) -> Iterable[Pod]:
        """All pods, those being made included."""
        return list(self._pods.values())

    def pod(self, identity: str) -> Pod:
        """The pod of an ID or of a unique beginning of one; raises `NotFound`."""
        return _look_up(self._pods, identity, "sandbox")

    def pod_or_none(self, identity: str) -> Pod | None:
        """The same, None when there is none."""
        try:
            return self.pod(identity)
        except NotFound:
            return None

    def pod_named(self, name: str) -> Pod | None:
        """The pod of that full name."""
        return self._pods.get(self._pod_names.get(name, ""))

    # -- containers ----------------------------------------------------------------------------------

    def add_container(self, container: Container) -> None:
        """Take a container into memory."""
        self._containers[container.id] = container
        self._container_names[container.name] = container.id
        self._of_pod.setdefault(container.pod_id, {})[container.id] = container

    async def save_container(self, container: Container) -> None:
        """Write the record; readers see the change from now on."""
        container.changed()
        await self._records.put(CONTAINER_KIND, container.id, container.encode())

    async def forget_container(self, container: Container) -> None:
        """Delete the record, then the memory."""
        await self._records.delete(CONTAINER_KIND, container.id)
        self._containers.pop(container.id, None)
        self._of_pod.get(container.pod_id, {}).pop(container.id, None)
        if self._container_names.get(container.name) == container.id:
            del self._container_names[container.name]

    def containers(self) -> Iterable[Container]:
        """All containers, those being made included."""
        return list(self._containers.values())

    def containers_of(self, pod_id: str) -> list[Container]:
        """The containers of a pod."""
        return list(self._of_pod.get(pod_id, {}).values())

    def container(self, identity: str) -> Container:
        """The container of an ID or of a unique beginning of one; raises `NotFound`."""
        return _look_up(self._containers, identity, "container")

    def container_or_none(self, identity: str) -> Container | None:
        """The same, None when there is none."""
        try:
            return self.container(identity)
        except NotFound:
            return None

    def container_named(self, name: str) -> Container | None:
        """The container of that full name."""
        return self._containers.get(self._container_names.get(name, ""))


def _look_up(known: Mapping[str, E], identity: str, kind: str) -> E:
    found = known.get(identity)
    if found is not None:
        return found
    if identity:
        matches = [value for key, value in known.items() if key.startswith(identity)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise InvalidArgument(
                f"{kind} id {identity!r} is the beginning of {len(matches)} ids", kind=kind, key=identity
            )
    raise NotFound(f"{kind} {identity!r} not found", kind=kind, key=identity)


def matches_labels(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether every pair of the selector is among the labels."""
    return all(labels.get(key) == value for key, value in selector.items())
