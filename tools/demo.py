#!/usr/bin/env python3
"""The demonstration: pull an image from a real registry over HTTP and run it, in folders of its own.

Starts a registry and a daemon below a temporary folder, puts a busybox image into the registry,
pulls it with progress, runs it, shows what there is, and leaves nothing behind. Prints each command
before it runs, so that the output reads as a tour.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

BIN = Path(sys.executable).parent
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
REGISTRY_CONFIG = """version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {folder}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


def digest(data: bytes) -> str:
    """The digest of a blob."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def busybox_layer() -> bytes:
    """A root file system: the machine's static busybox and a link for each applet."""
    buffer = io.BytesIO()
    program = shutil.which("busybox") or sys.exit("demo: no busybox on this machine: apt-get install busybox-static")
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, mode: int = 0o755, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.size, info.linkname = kind, mode, len(data), link
            tar.addfile(info, io.BytesIO(data))

        for folder in ("bin", "dev", "etc", "proc", "root", "sys", "tmp"):
            add(folder, kind=tarfile.DIRTYPE, mode=0o1777 if folder == "tmp" else 0o755)
        add("bin/busybox", Path(program).read_bytes())
        applets = subprocess.run([program, "--list"], check=True, capture_output=True, text=True).stdout.split()
        for applet in applets:
            if applet != "busybox":
                add(f"bin/{applet}", kind=tarfile.LNKTYPE, link="bin/busybox")
        add("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n", mode=0o644)
        add("etc/group", b"root:x:0:\n", mode=0o644)
    return buffer.getvalue()


def write_archive(path: Path, name: str) -> None:
    """An OCI image layout of busybox as a tar archive, as `pctr image import` takes it."""
    import gzip

    layer = busybox_layer()
    packed = gzip.compress(layer, 6, mtime=0)
    config = json.dumps({
        "architecture": ARCHITECTURE, "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": [digest(layer)]},
    }).encode()
    kind = "application/vnd.oci.image"
    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": f"{kind}.manifest.v1+json",
        "config": {"mediaType": f"{kind}.config.v1+json", "digest": digest(config), "size": len(config)},
        "layers": [{"mediaType": f"{kind}.layer.v1.tar+gzip", "digest": digest(packed), "size": len(packed)}],
    }).encode()
    index = json.dumps({
        "schemaVersion": 2, "mediaType": f"{kind}.index.v1+json",
        "manifests": [{
            "mediaType": f"{kind}.manifest.v1+json", "digest": digest(manifest), "size": len(manifest),
            "platform": {"architecture": ARCHITECTURE, "os": "linux"},
            "annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "latest"},
        }],
    }).encode()
    files = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": index}
    files.update({f"blobs/sha256/{digest(blob)[7:]}": blob for blob in (packed, config, manifest)})
    with tarfile.open(path, "w") as tar:
        for member, data in files.items():
            info = tarfile.TarInfo(member)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(stack: ExitStack, command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A server process that ends with `stack`."""
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   start_new_session=True)

    def end() -> None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(end)
    return process


def wait_connect(target: tuple[str, int] | str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until `target` (host and port, or a socket's path) accepts connections."""
    deadline = time.monotonic() + 60
    pause = threading.Event()
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"demo: {shlex.join(map(str, process.args))} ended:\n{log.read_text()[-3000:]}")  # type: ignore[arg-type]
        with socket.socket(socket.AF_UNIX if isinstance(target, str) else socket.AF_INET) as probe:
            try:
                probe.connect(target)
                return
            except OSError:
                pause.wait(0.02)
    sys.exit(f"demo: nothing answers on {target}:\n{log.read_text()[-3000:]}")


class Tour:
    """Runs commands as a user would type them, and shows them."""

    def __init__(self, address: Path) -> None:
        #: One of its own: demonstrations may run side by side.
        self.namespace = f"demo-{os.getpid()}"
        self._environment = {**os.environ, "PCTR_ADDRESS": str(address), "PCTR_NAMESPACE": self.namespace,
                             "PATH": f"{BIN}:{os.environ['PATH']}"}

    def __call__(self, *words: str, shown: bool = True) -> float:
        """Run one command; its duration in seconds. A failure ends the demonstration."""
        if shown:
            print(f"\n$ {shlex.join(words)}", flush=True)
        started = time.monotonic()
        hidden = None if shown else subprocess.PIPE
        result = subprocess.run(words, check=False, env=self._environment, stdin=subprocess.DEVNULL,
                                stdout=hidden, stderr=hidden, text=True)
        if result.returncode:
            print(result.stdout or "", result.stderr or "", file=sys.stderr)
            sys.exit(f"demo: {shlex.join(words)} ended with status {result.returncode}")
        return time.monotonic() - started


def main() -> None:
    if os.geteuid() != 0:
        sys.exit("demo: must run as root: it mounts file systems and makes namespaces")
    started = time.monotonic()
    with ExitStack() as stack:
        base = Path(tempfile.mkdtemp(prefix="pctr-demo-", dir="/tmp"))
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        port = free_port()
        (base / "registry.yml").write_text(REGISTRY_CONFIG.format(folder=base / "registry", port=port))
        registry = start(stack, ["docker-registry", "serve", str(base / "registry.yml")], base / "registry.log")
        folders = ["--root", str(base / "root"), "--state", str(base / "state"), "--address", str(base / "s.sock")]
        daemon = start(stack, [str(BIN / "supervisord-ctr"), *folders], base / "daemon.log")
        wait_connect(("127.0.0.1", port), registry, base / "registry.log")
        wait_connect(str(base / "s.sock"), daemon, base / "daemon.log")
        image = f"127.0.0.1:{port}/library/busybox:latest"  # "localhost" needs a hosts file
        write_archive(base / "busybox.tar", image)
        tour = Tour(base / "s.sock")
        tour("pctr", "image", "import", str(base / "busybox.tar"), shown=False)
        tour("pctr", "image", "push", image, shown=False)
        tour("pctr", "image", "rm", "--sync", image, shown=False)

        pulled = tour("pctr", "image", "pull", image)
        ran = tour("pctr", "run", "--rm", image, "hello", "echo", "hello from a container")
        tour("pctr", "run", "-d", image, "sleeper", "sleep", "1000")
        tour("pctr", "image", "ls")
        tour("pctr", "snapshot", "tree")
        tour("pctr", "task", "ls")
        tour("pctr", "task", "kill", "-s", "KILL", "sleeper", shown=False)
        tour("pctr", "task", "rm", "--force", "sleeper", shown=False)
        tour("pctr", "container", "rm", "sleeper", shown=False)
        tour("pctr", "image", "rm", "--sync", image, shown=False)
        tour("pctr", "namespace", "rm", "--cgroup", tour.namespace, shown=False)
        whole = time.monotonic() - started
        print(f"\npulled in {pulled:.2f} s, ran in {ran:.2f} s, everything in {whole:.2f} s", flush=True)


if __name__ == "__main__":
    main()
