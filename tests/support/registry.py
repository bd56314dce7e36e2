"""Debian's `docker-registry` on a free port of 127.0.0.1, with a folder of its own, and pushing into it."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.daemon import wait_until
from tests.support.images import OCI_INDEX, BuiltImage, digest_of
from tests.support.places import SHORT

_CONFIG = """
version: 0.1
log: {{level: error}}
storage: {{filesystem: {{rootdirectory: {folder}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
{auth}
"""


@dataclass(frozen=True)
class RunningRegistry:
    """A registry that answers."""

    address: str
    folder: Path

    def _call(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.address, timeout=60)
        try:
            connection.request(method, path, body=body, headers=headers or {})
            answer = connection.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def push(self, repository: str, tag: str, image: BuiltImage) -> str:
        """Push `image`; returns its reference."""
        for digest, data in image.blobs.items():
            status, headers, _ = self._call("POST", f"/v2/{repository}/blobs/uploads/", b"")
            assert status == 202
            place = headers["location"].split(self.address, 1)[-1]
            joiner = "&" if "?" in place else "?"
            status, _, text = self._call(
                "PUT", f"{place}{joiner}digest={digest}", data, {"Content-Type": "application/octet-stream"}
            )
            assert status == 201, text
        for name, body, media_type in (
            (digest_of(image.manifest), image.manifest, image.manifest_type), (tag, image.index, OCI_INDEX),
        ):
            status, _, text = self._call(
                "PUT", f"/v2/{repository}/manifests/{name}", body, {"Content-Type": media_type}
            )
            assert status == 201, text
        return f"{self.address}/{repository}:{tag}"

    def manifest(self, repository: str, name: str) -> tuple[str, bytes]:
        """Media type and body of a manifest; fails when there is none."""
        accept = f"{OCI_INDEX}, application/vnd.oci.image.manifest.v1+json, */*"
        status, headers, body = self._call("GET", f"/v2/{repository}/manifests/{name}", headers={"Accept": accept})
        assert status == 200, body
        return headers["content-type"], body

    def has_blob(self, repository: str, digest: str) -> bool:
        """Whether the repository has the blob."""
        return self._call("HEAD", f"/v2/{repository}/blobs/{digest}")[0] == 200


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running_registry() -> Iterator[RunningRegistry]:
    """A started registry, stopped and removed at the end."""
    program = shutil.which("docker-registry")
    assert program, "docker-registry is not installed (apt-get install docker-registry)"
    folder = Path(tempfile.mkdtemp(prefix="pctr-registry-", dir=SHORT))
    process: subprocess.Popen[bytes] | None = None
    try:
        for _ in range(5):
            port = _free_port()
            (folder / "config.yml").write_text(_CONFIG.format(folder=folder / "data", port=port, auth=""))
            with open(folder / "log", "ab") as log:
                process = subprocess.Popen(
                    [program, "serve", str(folder / "config.yml")], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            if _started(process, port):
                break
        else:
            raise AssertionError((folder / "log").read_text())
        yield RunningRegistry(f"127.0.0.1:{port}", folder)
    finally:
        if process is not None and process.poll() is None:
            process.terminate()
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _started(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether it came up; False when it ended instead (the port was taken meanwhile)."""
    wait_until(lambda: _answers(port) or process.poll() is not None, "the registry answers")
    return process.poll() is None


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        with socket.create_connection(("127.0.0.1", port), 1):
            return True
    return False
