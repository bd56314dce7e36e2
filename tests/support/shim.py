"""Shims as processes, ours and containerd's, driven over ttrpc by tests.

Owns the laboratory of one test: a private folder with a busybox root file system, bundles, an events
service that notes what it is sent, and the shims that were started; everything is ended by `close`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from supervisord_ctr import errors
from supervisord_ctr.aio import wait_until
from supervisord_ctr.api.events import events_pb2
from supervisord_ctr.api.runc.v1 import options_pb2
from supervisord_ctr.api.runtime.task.v3 import task_pb2 as api
from supervisord_ctr.api.services.ttrpc.events.v1 import events_pb2 as forward_pb2
from supervisord_ctr.api.shim.v1 import shim_pb2
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.linux import mounts
from supervisord_ctr.linux.processes import children
from supervisord_ctr.ttrpc.client import Client, connect_until
from supervisord_ctr.ttrpc.server import Context, Method, Server, listen

M = TypeVar("M", bound=Message)

KINDS = ("zygote", "bootstrap", "containerd")
PATIENCE = 60.0
_APPLETS = "sh echo cat sleep true false dd yes head kill wc ls id env stty ps md5sum touch setsid tail tr seq".split()


def make_rootfs(folder: Path) -> Path:
    """A root file system of busybox, made without privileges."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    shutil.copy("/bin/busybox", folder / "bin/busybox")
    for name in _APPLETS:
        with contextlib.suppress(FileExistsError):
            (folder / "bin" / name).symlink_to("busybox")
    for name in ("proc", "dev", "tmp", "etc", "sys"):
        (folder / name).mkdir(exist_ok=True)
    return folder


def children_named(pid: int, name: str) -> list[int]:
    """Children of a process that have this name; those that end meanwhile are left out."""
    found = []
    for child in children(pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{child}/comm").read_text().strip() == name:
                found.append(child)
    return found


def zygote_of(pid: int) -> int:
    """The zygote of a daemon; 0 when it has none just now."""
    for child in children(pid):
        with contextlib.suppress(OSError):
            if b"pctr_shim.zygote" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
    return 0


class Zygote:
    """A zygote of this test process."""

    def __init__(
        self, environment: Mapping[str, str] | None = None, rest: float = 0.0, stderr: int | None = None
    ) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "pctr_shim.zygote", str(theirs.fileno()), " " * 320, f"rest={rest}", "seal=runc"]
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL,
            stderr=stderr,
        )
        theirs.close()
        self._socket = ours
        self._socket.settimeout(PATIENCE)
        self._serial = 0

    def ask(self, operation: str, **fields: Any) -> dict[str, Any]:
        """One request and its reply."""
        self._serial += 1
        self._socket.send(json.dumps({"op": operation, "serial": self._serial, **fields}).encode())
        reply: dict[str, Any] = json.loads(self._socket.recv(65536))
        assert reply["serial"] == self._serial
        return reply

    def expect(self) -> None:
        """Say that a shim will be asked for."""
        self._socket.send(json.dumps({"op": "expect", "serial": 0}).encode())

    def ask_and_go(self, operation: str, **fields: Any) -> int:
        """A request, and our end is closed before it is read, as when a daemon is killed; the zygote's exit status."""
        os.kill(self.process.pid, signal.SIGSTOP)
        self._socket.send(json.dumps({"op": operation, "serial": 1, **fields}).encode())
        self._socket.close()
        os.kill(self.process.pid, signal.SIGCONT)
        return self.process.wait(PATIENCE)

    def close(self) -> int:
        """Close our end; the zygote's exit status."""
        self._socket.close()
        return self.process.wait(PATIENCE)


class Shim:
    """One running shim and a connection to it; `version` chooses the task service."""

    def __init__(self, client: Client, pid: int, path: str, version: int) -> None:
        self.client = client
        self.pid = pid
        self.path = path
        self.service = f"containerd.task.v{version}.Task"

    async def call(self, method: str, request: Message, response: type[M], timeout: float = PATIENCE) -> M:
        """One call of the task service."""
        return await self.client.call(self.service, method, request, response, timeout=timeout)

    async def start(self, container: str, exec_id: str = "") -> int:
        """Start; the pid."""
        request = api.StartRequest(id=container, exec_id=exec_id)
        return (await self.call("Start", request, api.StartResponse)).pid

    async def wait(self, container: str, exec_id: str = "") -> int:
        """The exit status, when there is one."""
        request = api.WaitRequest(id=container, exec_id=exec_id)
        waiting = self.client.call(self.service, "Wait", request, api.WaitResponse)  # without a limit, as daemons do
        return (await asyncio.wait_for(waiting, PATIENCE)).exit_status

    async def delete(self, container: str, exec_id: str = "") -> api.DeleteResponse:
        """Delete a process."""
        return await self.call("Delete", api.DeleteRequest(id=container, exec_id=exec_id), api.DeleteResponse)

    async def state(self, container: str, exec_id: str = "") -> api.StateResponse:
        """The state."""
        return await self.call("State", api.StateRequest(id=container, exec_id=exec_id), api.StateResponse)

    async def kill(self, container: str, number: int = signal.SIGKILL, exec_id: str = "", everyone: bool = False) -> None:
        """Send a signal."""
        request = api.KillRequest(id=container, exec_id=exec_id, signal=number, all=everyone)
        await self.call("Kill", request, Empty)

    async def exec(self, container: str, exec_id: str, arguments: Sequence[str], **fields: Any) -> None:
        """Add a process."""
        process = {"args": list(arguments), "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}}
        spec = AnyMessage(
            type_url="types.containerd.io/opencontainers/runtime-spec/1/Process", value=json.dumps(process).encode()
        )
        await self.call("Exec", api.ExecProcessRequest(id=container, exec_id=exec_id, spec=spec, **fields), Empty)

    async def shutdown(self, container: str) -> None:
        """Ask the shim to end."""
        with contextlib.suppress(errors.Unavailable):
            await self.call("Shutdown", api.ShutdownRequest(id=container), Empty)


class Lab:
    """Made by `laboratory`."""

    def __init__(self, kind: str, zygote: Zygote | None) -> None:
        self.kind = kind
        self.zygote = zygote
        self.namespace = f"lab{secrets.token_hex(4)}"
        self.folder = Path(tempfile.mkdtemp(prefix="pctr-shim-"))
        #: Where shims of the zygote listen.
        self.sockets = self.folder / "s"
        self.rootfs = make_rootfs(self.folder / "fs")
        self.events: list[tuple[str, Message]] = []
        self.event_times: list[float] = []
        self.refuse_events = False
        self.shims: list[Shim] = []
        self._server: Server | None = None
        self._log_readers: list[int] = []
        self.changed = asyncio.Event()

    # Events

    @property
    def events_path(self) -> str:
        """Where the events service listens."""
        return str(self.folder / "events")

    async def serve_events(self) -> None:
        """Start (again) to take events."""
        self._server = Server({
            "containerd.services.events.ttrpc.v1.Events": {"Forward": Method(forward_pb2.ForwardRequest, self._forward)},
            "pctr.shim.v1.Events": {"ForwardAll": Method(shim_pb2.ForwardAllRequest, self._forward_all)},
        })
        await self._server.serve(listen(self.events_path))

    async def stop_events(self) -> None:
        """Be away, as a daemon that was killed."""
        if self._server is not None:
            await self._server.close()
            self._server = None

    async def _forward(self, request: forward_pb2.ForwardRequest, context: Context) -> Empty:
        self._note(request.envelope)
        return Empty()

    async def _forward_all(self, request: shim_pb2.ForwardAllRequest, context: Context) -> Empty:
        for envelope in request.envelopes:
            self._note(envelope)
        return Empty()

    def _note(self, envelope: types_pb2.Envelope) -> None:
        assert envelope.namespace == self.namespace
        kind = envelope.event.type_url.rpartition("/")[2].rpartition(".")[2]
        message = getattr(events_pb2, kind).FromString(envelope.event.value)
        self.events.append((envelope.topic, message))
        self.changed.set()

    def topics(self, container: str = "") -> list[str]:
        """Topics of the events so far, without "/tasks/"."""
        return [
            topic.removeprefix("/tasks/") for topic, message in self.events
            if not container or getattr(message, "container_id", "") == container
        ]

    async def wait_topics(self, wanted: Callable[[list[str]], bool], container: str = "") -> list[str]:
        """Wait until the topics satisfy `wanted`."""
        await wait_until(lambda: wanted(self.topics(container)), PATIENCE, f"events, so far {self.topics(container)}")
        return self.topics(container)

    # Bundles and shims

    def spec(self, name: str, arguments: Sequence[str], *, terminal: bool = False, pidns: bool = True,
             annotations: Mapping[str, str] | None = None, resources: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A small runtime specification."""
        kinds = (["pid"] if pidns else []) + ["ipc", "uts", "mount", "network"]
        return {
            "ociVersion": "1.0.2", "hostname": "lab", "root": {"path": "rootfs"},
            "process": {"terminal": terminal, "args": list(arguments), "env": ["PATH=/bin"], "cwd": "/",
                        "user": {"uid": 0, "gid": 0},
                        "capabilities": {kind: ["CAP_KILL", "CAP_SYS_ADMIN"] for kind in
                                         ("bounding", "effective", "permitted")}},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance"]},
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
            ],
            "linux": {"cgroupsPath": f"/{self.namespace}/{name}", "namespaces": [{"type": kind} for kind in kinds],
                      "resources": dict(resources or {})},
            "annotations": dict(annotations or {}),
        }

    def bundle(self, name: str, arguments: Sequence[str], **fields: Any) -> str:
        """A bundle of a container."""
        folder = self.folder / "b" / name
        (folder / "rootfs").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.spec(name, arguments, **fields)))
        return str(folder)

    def fifo(self, name: str) -> tuple[str, int]:
        """A fifo and our reading end of it (non-blocking)."""
        path = str(self.folder / f"fifo-{name}")
        os.mkfifo(path)
        return path, os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    async def launch(
        self, name: str, version: int = 2, environment: Mapping[str, str] | None = None, log: str = "",
    ) -> Shim:
        """Start a shim of this laboratory's kind for the bundle `name`."""
        bundle = self.folder / "b" / name
        if self.kind == "zygote":
            assert self.zygote is not None
            self.sockets.mkdir(exist_ok=True)
            reply = self.zygote.ask(
                "fork-shim", namespace=self.namespace, id=name, bundle=str(bundle), socket=str(self.sockets / name),
                events=self.events_path, runtime_root=str(self.folder / "runc"), log=log or str(self.folder / f"{name}.log"),
                debug=True,
            )
            assert "error" not in reply, reply
            address, pid = reply["address"], reply["pid"]
        else:
            address = await asyncio.get_running_loop().run_in_executor(None, self._bootstrap, name, bundle, environment)
            pid = 0
        client = await connect_until(address, PATIENCE)
        shim = Shim(client, pid, address.removeprefix("unix://"), version)
        self.shims.append(shim)
        if not pid:
            shim.pid = (await shim.call("Connect", api.ConnectRequest(id=name), api.ConnectResponse)).shim_pid
        return shim

    def command(self) -> str:
        """The program that a foreign daemon would start."""
        if self.kind == "containerd":
            return "/usr/bin/containerd-shim-runc-v2"
        return str(Path(sys.executable).parent / "containerd-shim-pctr-v1")

    def _bootstrap(self, name: str, bundle: Path, environment: Mapping[str, str] | None) -> str:
        command = [self.command(), "-namespace", self.namespace, "-address", str(self.folder / "c.sock"),
                   "-publish-binary", "/bin/true", "-id", name, "start"]
        settings = {
            "TTRPC_ADDRESS": self.events_path, "PCTR_SHIM_SOCKETS": str(self.folder / "s"),
            "PCTR_SHIM_RUNTIME_ROOT": str(self.folder / "runc"), "MAX_SHIM_VERSION": "2", **(environment or {}),
        }
        log = bundle / "log"
        with contextlib.suppress(FileExistsError):
            os.mkfifo(log)
        self._log_readers.append(os.open(log, os.O_RDWR | os.O_NONBLOCK))
        done = subprocess.run(
            command, cwd=bundle, env={**os.environ, **settings}, stdin=subprocess.DEVNULL, capture_output=True,
            check=False, timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    def options(self, **fields: Any) -> AnyMessage:
        """Runtime options that keep the OCI runtime's state in this laboratory."""
        value = options_pb2.Options(root=str(self.folder / "runc"), **fields)
        return AnyMessage(type_url="containerd.runc.v1.Options", value=value.SerializeToString())

    async def create(self, shim: Shim, name: str, **fields: Any) -> int:
        """Create the task of the bundle `name` on a bind mount of the busybox root; the pid."""
        rootfs = [types_pb2.Mount(type="bind", source=str(self.rootfs), options=["rbind", "ro"])]
        fields.setdefault("options", self.options())
        request = api.CreateTaskRequest(id=name, bundle=str(self.folder / "b" / name), rootfs=rootfs, **fields)
        return (await shim.call("Create", request, api.CreateTaskResponse)).pid

    async def run(self, name: str, arguments: Sequence[str], *, version: int = 2, bundle: Mapping[str, Any] | None = None,
                  **fields: Any) -> Shim:
        """A shim with a created and started task."""
        self.bundle(name, arguments, **(bundle or {}))
        shim = await self.launch(name, version)
        await self.create(shim, name, **fields)
        await shim.start(name)
        return shim

    async def finish(self, shim: Shim, name: str) -> None:
        """Kill, wait, delete, shut down."""
        with contextlib.suppress(errors.NotFound):
            await shim.kill(name)
        await shim.wait(name)
        await shim.delete(name)
        await shim.shutdown(name)
        await asyncio.wait_for(shim.client.wait_closed(), PATIENCE)

    async def close(self) -> None:
        """End every shim and take every trace away."""
        for shim in self.shims:
            await shim.client.close()
            if shim.pid > 1:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(shim.pid, signal.SIGKILL)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(shim.path)
        await self.stop_events()
        for fd in self._log_readers:
            os.close(fd)
        self._remove_containers()
        mounts.unmount_below(self.folder)
        shutil.rmtree(self.folder)

    def _remove_containers(self) -> None:
        root = self.folder / "runc" / self.namespace
        for path in root.iterdir() if root.is_dir() else ():
            command = ["/usr/sbin/runc", "--root", str(root), "delete", "--force", path.name]
            subprocess.run(command, check=False, capture_output=True)
        for folder in Path("/sys/fs/cgroup").glob(f"*/{self.namespace}"):
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.asynccontextmanager
async def laboratory(kind: str, zygote: Zygote | None) -> AsyncIterator[Lab]:
    """A laboratory for one test."""
    lab = Lab(kind, zygote)
    await lab.serve_events()
    try:
        yield lab
    finally:
        await lab.close()


def workers(pid: int) -> list[int]:
    """The workers of a shim: one while it works, none while it rests."""
    return children_named(pid, "pctr-worker")


async def rested(shim: Shim) -> None:
    """Wait until the shim rests, or is gone."""
    await wait_until(lambda: not workers(shim.pid), PATIENCE, "the shim to rest")


async def read_all(fd: int, until: Callable[[bytes], bool] | None = None) -> bytes:
    """Read a non-blocking descriptor to its end, or until `until` holds; closes it."""
    loop = asyncio.get_running_loop()
    data = bytearray()
    ended = asyncio.Event()

    def readable() -> None:
        try:
            part = os.read(fd, 65536)
        except BlockingIOError:
            return
        data.extend(part)
        if not part or (until is not None and until(bytes(data))):
            loop.remove_reader(fd)
            ended.set()

    loop.add_reader(fd, readable)
    try:
        await asyncio.wait_for(ended.wait(), PATIENCE)
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    return bytes(data)
