"""Settings: everything that can be configured, as plain values with their defaults.

Owns names, types, defaults and meaning; `config.py` reads them from TOML and from the command
line and remembers where each came from. A field's docstring line in `metadata["help"]` is what
`supervisord-ctr config show --comments` prints. Times are seconds, sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def _setting(default: Any, text: str) -> Any:
    if isinstance(default, dict | list):
        kind = type(default)
        return field(default_factory=lambda: kind(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def _section(kind: type[Any], text: str) -> Any:
    return field(default_factory=kind, metadata={"help": text})


@dataclass(frozen=True)
class GrpcSettings:
    """The socket that clients speak to."""

    uid: int = _setting(0, "owner of the socket")
    gid: int = _setting(0, "group of the socket; a group other than 0 makes the socket 0660")
    max_receive_size: int = _setting(16 << 20, "largest request in bytes")
    max_send_size: int = _setting(16 << 20, "largest answer in bytes")


@dataclass(frozen=True)
class RegistrySettings:
    """Where images come from."""

    config_path: str = _setting("/etc/supervisord-ctr/certs.d", "folder of HOST/hosts.toml files")
    max_concurrent_downloads: int = _setting(4, "layers of one pull that download side by side")
    connect_timeout: float = _setting(10.0, "longest wait for a connection to a registry host")
    header_timeout: float = _setting(30.0, "longest wait for the first header of an answer")
    stall_timeout: float = _setting(30.0, "longest pause between two pieces of a body")
    minimum_rate: int = _setting(1024, "bytes a second below which a transfer counts as stalled")
    push_chunk_size: int = _setting(
        0, "bytes of one request when a blob is pushed; 0 sends it whole, unless the registry finds that too large"
    )
    retries: int = _setting(5, "attempts for one blob at one host, each resuming where the last ended")


@dataclass(frozen=True)
class ContentSettings:
    """Blobs."""

    sharing_policy: str = _setting(
        "shared", "shared: a namespace that names a digest gets the blob another one has; isolated: it must send it all"
    )


@dataclass(frozen=True)
class SnapshotSettings:
    """Where root file systems are kept."""

    default: str = _setting("overlayfs", "snapshotter used when a request names none")
    sync: bool = _setting(False, "a pull returns only when the unpacked files are on disk, not just the blobs")


@dataclass(frozen=True)
class RuntimeClass:
    """One runtime handler: what CRI calls `runtime_handler`, and clients a runtime's options."""

    type: str = _setting("io.containerd.runc.v2", "runtime name as clients send it, or the path of a shim")
    binary: str = _setting("", "OCI runtime program; empty means runc")
    root: str = _setting("", "the OCI runtime's own state folder; empty means below the state folder")
    systemd_cgroup: bool = _setting(False, "let systemd make the cgroups")
    snapshotter: str = _setting("", "snapshotter of this handler; empty means the default")
    privileged_without_host_devices: bool = _setting(False, "privileged containers get no host devices")
    pod_annotations: list[str] = _setting([], "pod annotations handed to the OCI runtime (exact names or NAME.*)")
    container_annotations: list[str] = _setting([], "container annotations handed to the OCI runtime")
    own_shim: bool = _setting(True, "serve io.containerd.runc.v2 by our own shim")


@dataclass(frozen=True)
class RuntimeSettings:
    """How containers are run."""

    default: str = _setting("runc", "handler used when a request names none")
    classes: Mapping[str, RuntimeClass] = field(
        default_factory=lambda: {"runc": RuntimeClass(), "crun": RuntimeClass(binary="crun")},
        metadata={"help": "handlers by name: [runtime.classes.NAME]"},
    )
    shim_debug: bool = _setting(False, "shims log at debug level")
    shim_rest: float = _setting(
        2.0, "seconds without anything to do after which a shim gives its memory back until it is needed; 0: never"
    )
    shim_page_merging: bool = _setting(
        True, "offer the memory of shims to the kernel's ksmd, which merges equal pages where an administrator runs it"
    )


@dataclass(frozen=True)
class CniSettings:
    """The network of pods."""

    conf_dir: str = _setting("/etc/cni/net.d", "folder of CNI configurations, watched")
    bin_dirs: list[str] = _setting(["/opt/cni/bin", "/usr/lib/cni"], "folders of CNI plugins, in order")
    max_conf_num: int = _setting(1, "how many configurations a pod joins; 0 means all")
    plugin_timeout: float = _setting(60.0, "longest run of one plugin")
    skip_idle_plugins: bool = _setting(
        True, "do not start portmap and bandwidth for pods that ask nothing of them; false runs every plugin"
    )
    embedded_bridge: bool = _setting(False, "without CNI configuration, attach pods to the embedded bridge")
    bridge_subnet: str = _setting("10.88.0.0/16", "subnet of the embedded bridge")
    bridge_name: str = _setting("pctr0", "interface name of the embedded bridge")


@dataclass(frozen=True)
class StreamingSettings:
    """The server behind CRI's exec, attach and port-forward."""

    address: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(0, "port to listen on; 0 takes a free one")
    tls_certificate: str = _setting("", "PEM file; with tls_key it switches TLS on")
    tls_key: str = _setting("", "PEM file of the private key")
    tls_client_ca: str = _setting("", "PEM file: clients must show a certificate of this authority")
    idle_timeout: float = _setting(4 * 3600.0, "a session without traffic ends after this")
    creation_timeout: float = _setting(30.0, "longest wait for a client to open its streams")
    token_lifetime: float = _setting(60.0, "a handed-out URL is good for so long, once")


@dataclass(frozen=True)
class CriSettings:
    """Kubernetes' container runtime interface."""

    enabled: bool = _setting(True, "serve runtime.v1")
    cgroup_driver: str = _setting("cgroupfs", "cgroupfs or systemd")
    max_log_line: int = _setting(16 << 10, "longest part of a line in a container's log file, 256 bytes to 1 MiB")
    exec_sync_limit: int = _setting(16 << 20, "most output of one ExecSync, a stream")
    drain_exec_io_timeout: float = _setting(2.0, "how long to read on after an exec's process ended")
    stop_timeout_slack: float = _setting(10.0, "how long a killed container may take to be gone")
    enable_selinux: bool = _setting(True, "label containers for SELinux where the kernel runs with it")
    selinux_category_range: int = _setting(1024, "pods get two SELinux categories below this number")
    cdi_dirs: list[str] = _setting(["/etc/cdi", "/var/run/cdi"], "folders of CDI device descriptions")
    seccomp_default: bool = _setting(False, "containers without a seccomp profile get the default one")
    checkpoint: bool = _setting(False, "allow CheckpointContainer and creation from checkpoints")
    image_pull_progress_timeout: float = _setting(60.0, "a pull without progress for so long fails")
    cni: CniSettings = _section(CniSettings, "the network of pods")
    streaming: StreamingSettings = _section(StreamingSettings, "exec, attach and port-forward")
    pinned_images: list[str] = _setting([], "images that a kubelet must not collect")


@dataclass(frozen=True)
class GcSettings:
    """When garbage is collected."""

    interval: float = _setting(300.0, "seconds between two passes when nothing else asks for one; 0 never")
    deletion_threshold: int = _setting(0, "deletions after which a pass is due; 0 means any deletion")
    mutation_threshold: int = _setting(100, "changes after which a pass is due")
    schedule_delay: float = _setting(0.1, "wait before a due pass, so that several changes share one")
    startup_delay: float = _setting(1.0, "wait before the first pass after a start")


@dataclass(frozen=True)
class RestartSettings:
    """Containers with restart labels (`nerdctl run --restart`)."""

    interval: float = _setting(10.0, "seconds between two looks at them; 0 never looks")


@dataclass(frozen=True)
class ProxyPlugin:
    """A snapshotter that another process serves over gRPC."""

    type: str = _setting("snapshot", "snapshot; content stores of other processes are not supported")
    address: str = _setting("", "path of its socket")


@dataclass(frozen=True)
class MetricsSettings:
    """Prometheus."""

    address: str = _setting("", "HOST:PORT that serves /metrics; empty means none")


@dataclass(frozen=True)
class Settings:
    """Everything, as the daemon was told."""

    root: str = _setting("/var/lib/supervisord-ctr", "folder of what must survive a reboot")
    state: str = _setting("/run/supervisord-ctr", "folder of what a reboot may take")
    address: str = _setting("/run/supervisord-ctr/supervisord-ctr.sock", "path of the socket")
    log_level: str = _setting("info", "debug, info, warning or error")
    log_format: str = _setting("text", "text or json")
    grpc: GrpcSettings = _section(GrpcSettings, "the socket")
    registry: RegistrySettings = _section(RegistrySettings, "registries")
    content: ContentSettings = _section(ContentSettings, "blobs")
    snapshots: SnapshotSettings = _section(SnapshotSettings, "snapshots")
    runtime: RuntimeSettings = _section(RuntimeSettings, "runtimes")
    cri: CriSettings = _section(CriSettings, "Kubernetes")
    gc: GcSettings = _section(GcSettings, "garbage collection")
    restart: RestartSettings = _section(RestartSettings, "containers that are started again")
    metrics: MetricsSettings = _section(MetricsSettings, "metrics")
    proxy_plugins: Mapping[str, ProxyPlugin] = field(
        default_factory=dict, metadata={"help": "plugins by name: [proxy_plugins.NAME]"}
    )
