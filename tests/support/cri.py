"""A CRI client for tests: a daemon with networks of its own, a small registry with one image, short calls.

Owns what every CRI suite needs: an image made of the machine's static busybox, served by a registry
in this process, a CNI network that nobody else uses, and words for the usual requests.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import secrets
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.api.cri.v1.cri_pb2_grpc import ImageServiceStub, RuntimeServiceStub
from tests.support.daemon import DaemonProcess, mounts_below, wait_until
from tests.support.images import OCI_INDEX, BuiltImage
from tests.support.places import SHORT

BUSYBOX = "/bin/busybox"
PASSWD = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home:/bin/sh\n"
GROUP = "root:x:0:\nuser:x:1000:\nextra:x:50000:user\n"
_APPLETS = ("sh", "id", "cat", "echo", "sleep", "ls", "hostname", "nc", "dd", "mkdir", "touch", "stat", "env", "true",
            "false", "kill", "ps", "head", "yes", "printf", "wc", "grep", "test", "rm")


def _layer(extra: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, mode: int = 0o644, link: str = "",
                owner: int = 0) -> None:
            entry = tarfile.TarInfo(name)
            entry.type, entry.size, entry.mode, entry.linkname, entry.uid, entry.gid = (
                kind, len(data), mode, link, owner, owner)
            archive.addfile(entry, io.BytesIO(data) if data else None)

        for folder in ("bin", "etc", "proc", "sys", "dev", "root", "home", "data"):
            add(folder, kind=tarfile.DIRTYPE, mode=0o755)
        add("tmp", kind=tarfile.DIRTYPE, mode=0o1777)
        add("data/sub", kind=tarfile.DIRTYPE, mode=0o750, owner=1000)
        add("data/sub/file", b"content of the image\n", owner=1000)
        add("bin/busybox", Path(BUSYBOX).read_bytes(), mode=0o755)
        for applet in _APPLETS:
            add(f"bin/{applet}", kind=tarfile.SYMTYPE, link="busybox")
        add("etc/passwd", PASSWD.encode())
        add("etc/group", GROUP.encode())
        for name, data in extra.items():
            add(name, data)
    return buffer.getvalue()


class Registry:
    """Serves images by name and tag; every one is made on the spot."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}
        self._manifests: dict[str, tuple[str, bytes]] = {}
        self.requests: list[str] = []
        self.login = ""
        registry = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                registry.requests.append(format % args)

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, *, body: bool) -> None:
                status, kind, data = registry.find(self.path)
                wanted = "Basic " + base64.b64encode(registry.login.encode()).decode()
                if registry.login and self.headers.get("Authorization") != wanted:
                    status, kind, data = 401, "application/json", b"{}"
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                if status == 401:
                    self.send_header("WWW-Authenticate", 'Basic realm="test"')
                if status == 200 and "/manifests/" in self.path:
                    self.send_header("Docker-Content-Digest", _digest(data))
                self.end_headers()
                if body:
                    self.wfile.write(data)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        self.host = f"localhost:{self._server.server_address[1]}"

    def find(self, path: str) -> tuple[int, str, bytes]:
        """Status, media type and body for a path of the registry's API."""
        if path in ("/v2/", "/v2"):
            return 200, "application/json", b"{}"
        name = path.removeprefix("/v2/").replace("/manifests/", ":").replace(":sha256:", "@sha256:")
        if name in self._manifests:
            return 200, *self._manifests[name]
        digest = path.rpartition("/")[2]
        if digest in self._blobs:
            return 200, "application/octet-stream", self._blobs[digest]
        return 404, "application/json", b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"unknown"}]}'

    def add(self, name: str, config: dict[str, Any] | None = None, files: dict[str, bytes] | None = None) -> str:
        """Make an image and return the reference to pull it by."""
        layer = _layer(files or {})
        packed = gzip.compress(layer, 1, mtime=0)
        machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
        document = json.dumps({
            "architecture": machine, "os": "linux", "config": config or {},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        }).encode()
        manifest = json.dumps({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _descriptor("application/vnd.oci.image.config.v1+json", document),
            "layers": [_descriptor("application/vnd.oci.image.layer.v1.tar+gzip", packed)],
        }).encode()
        for blob in (packed, document, manifest):
            self._blobs[_digest(blob)] = blob
        entry = ("application/vnd.oci.image.manifest.v1+json", manifest)
        repository = name.partition(":")[0]
        self._manifests[name] = self._manifests[f"{repository}@{_digest(manifest)}"] = entry
        return f"{self.host}/{name}"

    def publish(self, name: str, image: BuiltImage) -> str:
        """Serve an image that was made elsewhere, behind its index; returns the reference to pull it by."""
        repository = name.partition(":")[0]
        self._blobs.update(image.blobs)
        for kind, data in ((OCI_INDEX, image.index), (image.manifest_type, image.manifest)):
            self._manifests[f"{repository}@{_digest(data)}"] = (kind, data)
        self._manifests[name] = (OCI_INDEX, image.index)
        return f"{self.host}/{name}"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _descriptor(kind: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": kind, "digest": _digest(data), "size": len(data)}


class Network:
    """A bridge network of its own below a folder, with addresses from a range picked at random."""

    def __init__(self, base: Path) -> None:
        mark = secrets.token_hex(3)
        self.bridge = f"ct{mark}"
        self.name = f"test-{mark}"
        self.folder = base / "net.d"
        self.leases = base / "ipam"
        self.folder.mkdir()
        second, third = 100 + secrets.randbelow(100), secrets.randbelow(250)
        (self.folder / "10-test.conflist").write_text(json.dumps({
            "cniVersion": "1.0.0", "name": self.name, "plugins": [
                {"type": "bridge", "bridge": self.bridge, "isGateway": True, "ipMasq": False, "ipam": {
                    "type": "host-local", "dataDir": str(self.leases),
                    "ranges": [[{"subnet": f"10.{second}.{third}.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}],
                }},
                {"type": "portmap", "capabilities": {"portMappings": True}},
            ],
        }))

    def leased(self) -> list[str]:
        """Addresses that are given out."""
        folder = self.leases / self.name
        if not folder.is_dir():
            return []
        return sorted(entry.name for entry in folder.iterdir() if entry.name[0].isdigit())

    def remove(self) -> None:
        """Take the bridge away."""
        from pyroute2 import IPRoute

        with IPRoute() as route:
            for index in route.link_lookup(ifname=self.bridge):
                route.link("del", index=index)


class Cri:
    """Calls of one daemon."""

    def __init__(self, daemon: DaemonProcess, registry: Registry, network: Network) -> None:
        self.daemon = daemon
        self.registry = registry
        self.network = network
        self.logs = daemon.base / "logs"
        self.logs.mkdir(exist_ok=True)
        self.image = registry.add("test/busybox:1")
        self._channel: grpc.Channel | None = None
        self.connect()

    def connect(self) -> None:
        """Connect anew, after a restart. A channel that was not ready yet would fail its first call at once."""
        if self._channel is not None:
            self._channel.close()
        self._channel = grpc.insecure_channel(f"unix:{self.daemon.address}")
        grpc.channel_ready_future(self._channel).result(timeout=60)
        self.runtime = RuntimeServiceStub(self._channel)
        self.images = ImageServiceStub(self._channel)

    def close(self) -> None:
        """Hang up."""
        if self._channel is not None:
            self._channel.close()

    def pull(self, image: str = "", **auth: str) -> str:
        """Pull and return the ID."""
        request = pb.PullImageRequest(image=pb.ImageSpec(image=image or self.image), auth=pb.AuthConfig(**auth))
        return str(self.images.PullImage(request, timeout=120).image_ref)

    def pod_config(self, name: str = "", **fields: Any) -> pb.PodSandboxConfig:
        """A pod's config; `pid` chooses the mode of the PID namespace."""
        name = name or f"pod-{secrets.token_hex(4)}"
        folder = self.logs / name
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, namespace="tests", uid=f"uid-{name}"), log_directory=str(folder),
            hostname="pod-host", labels={"suite": "cri"},
        )
        config.linux.security_context.namespace_options.pid = fields.pop("pid", pb.CONTAINER)
        config.MergeFrom(pb.PodSandboxConfig(**fields))
        return config

    def run_pod(self, config: pb.PodSandboxConfig | None = None, handler: str = "") -> tuple[str, pb.PodSandboxConfig]:
        """A running pod and its config."""
        config = config or self.pod_config()
        request = pb.RunPodSandboxRequest(config=config, runtime_handler=handler)
        return str(self.runtime.RunPodSandbox(request, timeout=120).pod_sandbox_id), config

    def container_config(self, script: str, name: str = "main", **fields: Any) -> pb.ContainerConfig:
        """A container that runs a shell script."""
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name), image=pb.ImageSpec(image=self.image),
            command=["/bin/sh", "-c", script], log_path=f"{name}.log",
        )
        config.linux.security_context.namespace_options.pid = fields.pop("pid", pb.CONTAINER)
        config.MergeFrom(pb.ContainerConfig(**fields))
        return config

    def create(self, pod: str, pod_config: pb.PodSandboxConfig, config: pb.ContainerConfig) -> str:
        """A container that does not run yet."""
        request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=config, sandbox_config=pod_config)
        return str(self.runtime.CreateContainer(request, timeout=120).container_id)

    def start(self, container: str) -> None:
        """Start it."""
        self.runtime.StartContainer(pb.StartContainerRequest(container_id=container), timeout=120)

    def run(self, pod: str, pod_config: pb.PodSandboxConfig, script: str, **fields: Any) -> str:
        """A started container."""
        container = self.create(pod, pod_config, self.container_config(script, **fields))
        self.start(container)
        return container

    def status(self, container: str) -> pb.ContainerStatus:
        """What it is doing."""
        return self.runtime.ContainerStatus(pb.ContainerStatusRequest(container_id=container), timeout=60).status

    def pod_status(self, pod: str) -> pb.PodSandboxStatus:
        """What the pod is."""
        return self.runtime.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod), timeout=60).status

    def wait_exited(self, container: str) -> pb.ContainerStatus:
        """The status once it has ended."""
        wait_until(
            lambda: self.status(container).state == pb.CONTAINER_EXITED, f"container {container[:12]} ended", 120
        )
        return self.status(container)

    def exec(self, container: str, *argv: str, timeout: int = 60) -> pb.ExecSyncResponse:
        """Run a command in it."""
        request = pb.ExecSyncRequest(container_id=container, cmd=argv, timeout=timeout)
        return self.runtime.ExecSync(request, timeout=120)

    def stop(self, container: str, grace: int = 0) -> None:
        """Stop it."""
        self.runtime.StopContainer(pb.StopContainerRequest(container_id=container, timeout=grace), timeout=120)

    def remove(self, container: str) -> None:
        """Remove it."""
        self.runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=container), timeout=120)

    def stop_pod(self, pod: str) -> None:
        """Stop the pod."""
        self.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=120)

    def remove_pod(self, pod: str) -> None:
        """Remove the pod."""
        self.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=120)

    def log(self, pod_config: pb.PodSandboxConfig, name: str = "main") -> list[tuple[str, str, str]]:
        """(stream, tag, text) of each line of a container's log."""
        path = Path(pod_config.log_directory) / f"{name}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        found = []
        for line in lines:
            _, stream, tag, text = line.split(" ", 3)
            found.append((stream, tag, text))
        return found

    def sweep(self) -> None:
        """Remove every pod."""
        for pod in self.runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=60).items:
            self.remove_pod(pod.id)

    def leaks(self) -> list[str]:
        """What is there although no pod is: mounts, addresses, folders of pods."""
        found = [f"mount {point}" for point in mounts_below(self.daemon.base)]
        found += [f"address {address}" for address in self.network.leased()]
        for folder in ("sandboxes", "image-volumes", "exec"):
            path = self.daemon.state / "cri" / folder
            if path.is_dir():
                found += [f"folder {entry}" for entry in path.iterdir()]
        return found


@contextlib.contextmanager
def running_cri(
    settings: str = "", environment: dict[str, str] | None = None, extra: str = "", cni: str = ""
) -> Iterator[Cri]:
    """A daemon that serves CRI, with registry and network; all gone after the block, with a check for leaks."""
    base = Path(tempfile.mkdtemp(prefix="pctr-c-", dir=SHORT))
    # Users of a mapped namespace pass through it to their root file systems.
    os.chmod(base, 0o711)
    registry, network = Registry(), Network(base)
    daemon = DaemonProcess(base, f"""
[cri]
{settings}
[cri.cni]
conf_dir = "{network.folder}"
bin_dirs = ["{base}/plugins", "/usr/lib/cni", "/opt/cni/bin"]
{cni}
{extra}
""", environment)
    try:
        daemon.start()
        cri = Cri(daemon, registry, network)
        try:
            yield cri
            cri.sweep()
            wait_until(lambda: not cri.leaks(), f"nothing left behind: {cri.leaks()}", 30)
        finally:
            cri.close()
        assert daemon.stop() == 0, daemon.log_tail()
    finally:
        daemon.clean()
        registry.close()
        network.remove()
        shutil.rmtree(base, ignore_errors=True)
