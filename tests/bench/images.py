"""Images to measure with, made from this machine's own files, and a registry that serves them.

Four images: `bench/busybox` (one small layer), `bench/many-files` (two layers of some ten
thousand small files), `bench/large` (two layers of libraries and programs, some 600 MiB) and
`bench/layers` (41 layers). Layers are gzip at level 6, what image builders write.
`bench/pause` is the smallest program that does nothing, for runtimes that need one per pod.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import platform
import random
import shutil
import socket
import stat
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.waiting import wait_for_port

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MEBI = 1 << 20

MACHINE_CODE = {
    # pause(2) for ever: mov $34,%eax; syscall; jmp back
    "amd64": (62, bytes.fromhex("b8220000000f05ebf7")),
    # ppoll(0,0,0,0) for ever: x0..x3 = 0, x8 = 73, svc, branch back
    "arm64": (183, bytes.fromhex("000080d2010080d2020080d2030080d2280980d2010000d4faffff17")),
}


def pause_program() -> bytes:
    """A static ELF program of one page that waits for ever."""
    machine, code = MACHINE_CODE[ARCHITECTURE]
    base, size = 0x400000, 64 + 56 + len(MACHINE_CODE[ARCHITECTURE][1])
    header = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, base + 120, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)
    return header + segment + code


class _Tee(io.RawIOBase):
    """A tar's bytes on their way into a gzip file, hashed on both sides."""

    def __init__(self, target: io.BufferedWriter) -> None:
        self._target = target
        self._deflate = zlib.compressobj(6, zlib.DEFLATED, 31)
        self._plain, self._packed = hashlib.sha256(), hashlib.sha256()
        self.plain_size = self.packed_size = 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.plain_size

    def write(self, data: Any) -> int:
        size = len(data)
        self._plain.update(data)
        self.plain_size += size
        self._out(self._deflate.compress(data))
        return size

    def _out(self, data: bytes) -> None:
        self._packed.update(data)
        self.packed_size += len(data)
        self._target.write(data)

    def finish(self) -> None:
        """Write what the compressor still holds."""
        self._out(self._deflate.flush())

    def digests(self) -> tuple[str, str]:
        """Digest of the tar and of the gzip file."""
        return f"sha256:{self._plain.hexdigest()}", f"sha256:{self._packed.hexdigest()}"


@dataclass(frozen=True)
class LayerFile:
    """A packed layer on disk."""

    path: Path
    digest: str
    diff_id: str
    size: int
    unpacked: int


@dataclass(frozen=True)
class BuiltImage:
    """An image as pushed: what a client needs to know to import it by itself."""

    name: str
    config: bytes
    manifest: bytes
    layers: tuple[LayerFile, ...]

    @property
    def unpacked(self) -> int:
        """Bytes of all layers' tars."""
        return sum(layer.unpacked for layer in self.layers)


Filler = Callable[[tarfile.TarFile], None]


def pack(folder: Path, name: str, fill: Filler) -> LayerFile:
    """Write what `fill` puts into a tar as FOLDER/NAME, gzip-compressed."""
    path = folder / name
    with open(path, "wb") as handle:
        tee = _Tee(handle)
        with io.BufferedWriter(tee, MEBI) as buffer:
            with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
                fill(tar)
        tee.finish()
    diff_id, digest = tee.digests()
    return LayerFile(path, digest, diff_id, tee.packed_size, tee.plain_size)


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, mode: int = 0o644,
        link: str = "") -> None:
    """One entry with a fixed owner and time."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.size = kind, mode, link, len(data)
    tar.addfile(info, io.BytesIO(data) if data else None)


def busybox_filler(busybox: str) -> Filler:
    """A root file system with busybox and a hard link for each of its applets."""

    def fill(tar: tarfile.TarFile) -> None:
        for name, mode in (("bin", 0o755), ("dev", 0o755), ("etc", 0o755), ("proc", 0o755), ("root", 0o700),
                           ("sys", 0o755), ("tmp", 0o1777)):
            add(tar, name, kind=tarfile.DIRTYPE, mode=mode)
        add(tar, "bin/busybox", Path(busybox).read_bytes(), mode=0o755)
        listing = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout
        for applet in sorted(set(listing.split()) - {"busybox"}):
            add(tar, f"bin/{applet}", kind=tarfile.LNKTYPE, mode=0o755, link="bin/busybox")
        add(tar, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
        add(tar, "etc/group", b"root:x:0:\n")

    return fill


def _regular_files(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    for where, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = os.path.join(where, name)
            try:
                status = os.lstat(path)
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode):
                yield path, status


def folder_filler(folder: str, prefix: str, limit: int) -> Filler:
    """Regular files below `folder`, in order of their names, until `limit` bytes."""

    def fill(tar: tarfile.TarFile) -> None:
        for path, status in _regular_files(folder):
            if tar.offset > limit:
                return
            info = tarfile.TarInfo(prefix + os.path.relpath(path, folder))
            info.mode = stat.S_IMODE(status.st_mode)
            with open(path, "rb") as handle:
                data = handle.read()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    return fill


def noise_filler(number: int, size: int) -> Filler:
    """One file of bytes that do not compress, the same in every run."""

    def fill(tar: tarfile.TarFile) -> None:
        add(tar, f"layer-{number}", random.Random(number).randbytes(size))

    return fill


def bench_fillers(busybox: str) -> dict[str, list[Filler]]:
    """Layers of every image of the benchmark."""
    base = busybox_filler(busybox)
    libraries = f"/usr/lib/{platform.machine()}-linux-gnu"
    pause = pause_program()
    return {
        "bench/busybox": [base],
        "bench/pause": [lambda tar: add(tar, "pause", pause, mode=0o755)],
        "bench/many-files": [base, folder_filler("/usr/share", "opt/share/", 160 * MEBI),
                             folder_filler("/usr/include", "opt/include/", 60 * MEBI)],
        "bench/large": [base, folder_filler(libraries if os.path.isdir(libraries) else "/usr/lib", "opt/lib/", 400 * MEBI),
                        folder_filler("/usr/bin", "opt/bin/", 200 * MEBI)],
        "bench/layers": [base, *(noise_filler(number, 256 * 1024) for number in range(40))],
    }


def image_config(name: str) -> dict[str, Any]:
    """The part of an image's configuration that a runtime reads."""
    if name == "bench/pause":
        return {"Entrypoint": ["/pause"]}
    return {"Env": [PATH], "Cmd": ["/bin/sh"]}


class Pusher:
    """The push half of the OCI distribution protocol, over plain HTTP."""

    def __init__(self, address: str) -> None:
        self.address = address

    def _call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.address, timeout=300)
        try:
            connection.request(method, path, body=body, headers=headers or {})
            answer = connection.getresponse()
            answer.read()
            return answer.status, answer.getheader("Location") or ""
        finally:
            connection.close()

    def blob(self, repository: str, digest: str, size: int, body: Any) -> None:
        """Upload one blob; `body` is bytes or an open file."""
        status, location = self._call("POST", f"/v2/{repository}/blobs/uploads/", b"")
        if status != 202:
            raise RuntimeError(f"registry {self.address} refused an upload to {repository}: {status}")
        location = location.split(self.address, 1)[-1]
        location += ("&" if "?" in location else "?") + f"digest={digest}"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        status, _ = self._call("PUT", location, body, headers)
        if status != 201:
            raise RuntimeError(f"registry {self.address} refused blob {digest} of {repository}: {status}")

    def manifest(self, repository: str, tag: str, data: bytes, kind: str) -> None:
        """Upload one manifest or index."""
        status, _ = self._call("PUT", f"/v2/{repository}/manifests/{tag}", data, {"Content-Type": kind})
        if status != 201:
            raise RuntimeError(f"registry {self.address} refused manifest {tag} of {repository}: {status}")


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def push(pusher: Pusher, name: str, layers: list[LayerFile]) -> BuiltImage:
    """Push one image behind an index, as images of several platforms are stored."""
    config = json.dumps({
        "created": "2020-01-01T00:00:00Z", "architecture": ARCHITECTURE, "os": "linux", "config": image_config(name),
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created": "2020-01-01T00:00:00Z", "created_by": "bench"} for _ in layers]}).encode()
    for layer in {layer.digest: layer for layer in layers}.values():
        with open(layer.path, "rb") as body:
            pusher.blob(name, layer.digest, layer.size, body)
    pusher.blob(name, _digest(config), len(config), config)
    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": _digest(config), "size": len(config)},
        "layers": [{"mediaType": LAYER, "digest": item.digest, "size": item.size} for item in layers]}).encode()
    pusher.manifest(name, _digest(manifest), manifest, MANIFEST)
    index = json.dumps({
        "schemaVersion": 2, "mediaType": INDEX,
        "manifests": [{"mediaType": MANIFEST, "digest": _digest(manifest), "size": len(manifest),
                       "platform": {"architecture": ARCHITECTURE, "os": "linux"}}]}).encode()
    pusher.manifest(name, "latest", index, INDEX)
    return BuiltImage(name, config, manifest, tuple(layers))


def build(address: str, folder: Path, wanted: set[str]) -> dict[str, BuiltImage]:
    """Build and push the images in `wanted`; packed layers stay in `folder`."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise RuntimeError("busybox is not installed (Debian's busybox-static): images are made from it")
    fillers = {name: fill for name, fill in bench_fillers(busybox).items() if name in wanted}
    pusher, made = Pusher(address), {}
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        jobs = {name: [pool.submit(pack, folder, f"{name.replace('/', '-')}-{number}", fill)
                       for number, fill in enumerate(layers)] for name, layers in fillers.items()}
        for name, futures in jobs.items():
            made[name] = push(pusher, name, [future.result() for future in futures])
    return made


class Registry:
    """A registry of our own on a free loopback port, with its files in `folder`."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("docker-registry") or shutil.which("registry")
        if program is None:
            raise RuntimeError("docker-registry is not installed: nothing could serve the images")
        folder.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"localhost:{port}"
        settings = folder / "config.yml"
        settings.write_text(
            "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
            f"storage: {{filesystem: {{rootdirectory: {folder / 'data'}}}}}\n"
            f'http: {{addr: "127.0.0.1:{port}"}}\n', encoding="utf-8")
        with open(folder / "log", "wb") as log:
            self._process = subprocess.Popen([program, "serve", str(settings)], stdout=log, stderr=log)
        wait_for_port(port, self._process)

    def close(self) -> None:
        """End the process; its files are the caller's to remove."""
        self._process.terminate()
        self._process.wait(30)
