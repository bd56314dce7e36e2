"""A daemon with one pod and one busybox container, for streaming tests through CRI.

Owns a registry of one image on loopback (made from this machine's busybox) and the configuration of
the pods' network: a `ptp` link without a bridge, so that nothing of it outlives the pod.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import platform
import secrets
import socket
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import grpc

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.api.cri.v1 import cri_pb2_grpc
from supervisord_ctr.linux import namespaces
from tests.support.daemon import DaemonProcess, running_daemon, wait_until
from tests.support.places import SHORT

T = TypeVar("T")

_APPLETS = ("sh", "cat", "dd", "echo", "false", "head", "kill", "ps", "sleep", "stty", "tar", "test", "true", "wc", "yes")
_OCI = "application/vnd.oci.image"
CALL_TIMEOUT = 60.0


def _layer() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for folder in ("bin", "dev", "etc", "proc", "sys", "tmp"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            archive.addfile(entry)
        program = Path("/bin/busybox").read_bytes()
        entry = tarfile.TarInfo("bin/busybox")
        entry.size, entry.mode = len(program), 0o755
        archive.addfile(entry, io.BytesIO(program))
        for applet in _APPLETS:
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(entry)
    return buffer.getvalue()


def _image() -> tuple[dict[str, bytes], str]:
    """Blobs by digest, and the manifest's digest."""

    def digest(data: bytes) -> str:
        return "sha256:" + hashlib.sha256(data).hexdigest()

    plain = _layer()
    layer = gzip.compress(plain, 1, mtime=0)
    machine = platform.machine()
    config = json.dumps({
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine), "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]}, "rootfs": {"type": "layers", "diff_ids": [digest(plain)]},
    }).encode()
    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": f"{_OCI}.manifest.v1+json",
        "config": {"mediaType": f"{_OCI}.config.v1+json", "digest": digest(config), "size": len(config)},
        "layers": [{"mediaType": f"{_OCI}.layer.v1.tar+gzip", "digest": digest(layer), "size": len(layer)}],
    }).encode()
    return {digest(blob): blob for blob in (layer, config, manifest)}, digest(manifest)


@contextlib.contextmanager
def one_image_registry() -> Iterator[str]:
    """`HOST:PORT` of a registry that serves `busybox:latest` to read."""
    blobs, manifest = _image()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.rsplit("/", 1)[-1].replace("%3A", ":")
            found = blobs.get(manifest if name == "latest" else name)
            body = found if found is not None else b"{}" if self.path == "/v2/" else b""
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            if "/manifests/" in self.path:
                self.send_header("Content-Type", f"{_OCI}.manifest.v1+json")
                self.send_header("Docker-Content-Digest", manifest)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"localhost:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Pod:
    """One pod of a running daemon and what tests ask of it."""

    def __init__(self, daemon: DaemonProcess, image: str, logs: Path) -> None:
        self.daemon = daemon
        self.image = image
        self._logs = logs
        self.channel = grpc.insecure_channel(f"unix:{daemon.address}")
        self.runtime = cri_pb2_grpc.RuntimeServiceStub(self.channel)
        self.images = cri_pb2_grpc.ImageServiceStub(self.channel)
        self.images.PullImage(pb.PullImageRequest(image=pb.ImageSpec(image=image)), timeout=CALL_TIMEOUT)
        self._uid = secrets.token_hex(4)
        self._config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name="streaming", namespace="t", uid=self._uid),
            log_directory=str(logs), linux=pb.LinuxPodSandboxConfig(),
        )
        self.id = self.runtime.RunPodSandbox(
            pb.RunPodSandboxRequest(config=self._config), timeout=CALL_TIMEOUT
        ).pod_sandbox_id

    def run(
        self, *command: str, stdin: bool = False, stdin_once: bool = False, tty: bool = False, name: str = ""
    ) -> str:
        """A started container; its id."""
        name = name or f"c{secrets.token_hex(3)}"
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name), image=pb.ImageSpec(image=self.image), command=command,
            stdin=stdin, stdin_once=stdin_once, tty=tty, log_path=f"{name}.log",
        )
        request = pb.CreateContainerRequest(pod_sandbox_id=self.id, config=config, sandbox_config=self._config)
        container: str = self.runtime.CreateContainer(request, timeout=CALL_TIMEOUT).container_id
        self.runtime.StartContainer(pb.StartContainerRequest(container_id=container), timeout=CALL_TIMEOUT)
        return container

    def exec_url(self, container: str, *argv: str, stdin: bool = False, tty: bool = False) -> str:
        """The URL of an exec."""
        request = pb.ExecRequest(container_id=container, cmd=argv, stdin=stdin, stdout=True, stderr=not tty, tty=tty)
        return str(self.runtime.Exec(request, timeout=CALL_TIMEOUT).url)

    def attach_url(self, container: str, *, stdin: bool = False, tty: bool = False) -> str:
        """The URL of an attach."""
        request = pb.AttachRequest(container_id=container, stdin=stdin, stdout=True, stderr=not tty, tty=tty)
        return str(self.runtime.Attach(request, timeout=CALL_TIMEOUT).url)

    def forward_url(self) -> str:
        """The URL of a port-forward."""
        return str(self.runtime.PortForward(pb.PortForwardRequest(pod_sandbox_id=self.id), timeout=CALL_TIMEOUT).url)

    def exec_sync(self, container: str, *argv: str) -> bytes:
        """Standard output of a command."""
        request = pb.ExecSyncRequest(container_id=container, cmd=argv, timeout=60)
        return bytes(self.runtime.ExecSync(request, timeout=CALL_TIMEOUT).stdout)

    def state(self, container: str) -> int:
        """A container's state."""
        request = pb.ContainerStatusRequest(container_id=container)
        return int(self.runtime.ContainerStatus(request, timeout=CALL_TIMEOUT).status.state)

    def stop(self, container: str) -> None:
        """End a container at once."""
        self.runtime.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0), timeout=CALL_TIMEOUT)

    def pid(self, container: str) -> int:
        """The container's first process."""
        request = pb.ContainerStatusRequest(container_id=container, verbose=True)
        return int(json.loads(self.runtime.ContainerStatus(request, timeout=CALL_TIMEOUT).info["info"])["pid"])

    def in_network(self, container: str, call: Callable[[], T]) -> T:
        """The result of `call`, run inside the pod's network namespace."""
        return namespaces.in_netns(f"/proc/{self.pid(container)}/ns/net", call)

    def listen(self, container: str, family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
        """A listening socket on the pod's loopback."""
        address = "127.0.0.1" if family == socket.AF_INET else "::1"
        return self.in_network(container, lambda: socket.create_server((address, 0), family=family, backlog=512))

    def remove(self) -> None:
        """Take the pod away; repeated, as a kubelet would, while a shim that was killed is being recovered."""

        def stopped() -> bool:
            try:
                self.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=self.id), timeout=CALL_TIMEOUT)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
                return False
            return True

        wait_until(stopped, "pod to stop")
        self.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=self.id), timeout=CALL_TIMEOUT)
        self.channel.close()


def pod_config(base: Path) -> str:
    """Configuration of a daemon whose pods have a network of their own, with CNI files below `base`."""
    conf = base / "cni"
    conf.mkdir()
    subnet = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(256)}.0/24"
    (conf / "10-test.conflist").write_text(json.dumps({"cniVersion": "1.0.0", "name": f"t{secrets.token_hex(3)}", "plugins": [{
        "type": "ptp",
        "ipam": {"type": "host-local", "dataDir": str(base / "ipam"), "ranges": [[{"subnet": subnet}]]},
    }]}))
    return f'[cri.cni]\nconf_dir = "{conf}"\nbin_dirs = ["/usr/lib/cni", "/opt/cni/bin"]\n'


@contextlib.contextmanager
def running_pod() -> Iterator[Pod]:
    """A daemon with a pod; both are gone afterwards, and nothing is left behind."""
    with tempfile.TemporaryDirectory(prefix="pctr-s-", dir=SHORT) as folder, one_image_registry() as registry:
        base = Path(folder)
        os.mkdir(base / "logs")
        with running_daemon(pod_config(base)) as daemon:
            pod = Pod(daemon, f"{registry}/busybox:latest", base / "logs")
            try:
                yield pod
            finally:
                pod.remove()
