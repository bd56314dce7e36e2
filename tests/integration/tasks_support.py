"""Containers for task tests: a busybox root, specs, and the native API in few words."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from supervisord_ctr.api.services.containers.v1 import containers_pb2, containers_pb2_grpc
from supervisord_ctr.api.services.events.v1 import events_pb2, events_pb2_grpc
from supervisord_ctr.api.services.tasks.v1 import tasks_pb2, tasks_pb2_grpc
from supervisord_ctr.api.types.task import task_pb2
from supervisord_ctr.oci.spec import PROCESS_TYPE_URL, TYPE_URL, SpecBuilder
from tests.support.daemon import DaemonProcess, wait_until
from tests.support.places import SHORT
from tests.support.shim import workers

#: Served by our own shim, and by Debian's.
OWN = "io.containerd.runc.v2"
FOREIGN = "/usr/bin/containerd-shim-runc-v2"
TIMEOUT = 60.0

_APPLETS = ("sh", "true", "false", "sleep", "echo", "cat", "id", "ls", "ps", "head", "kill", "dd", "stty", "tty", "wc",
            "touch", "test", "pwd", "env", "seq", "trap")


def busybox_root() -> Path:
    """A root file system with busybox, for the caller to remove."""
    root = Path(tempfile.mkdtemp(prefix="pctr-fs-", dir=SHORT))
    root.chmod(0o755)
    for folder in ("bin", "dev", "etc", "proc", "run", "sys", "tmp"):
        (root / folder).mkdir()
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for applet in _APPLETS:
        os.symlink("busybox", root / "bin" / applet)
    return root


class Client:
    """One client of a daemon, in the daemon's test namespace."""

    def __init__(self, daemon: DaemonProcess, root: Path, runtime: str = OWN) -> None:
        self.daemon = daemon
        self.root = root
        self.runtime = runtime
        self.output = Path(tempfile.mkdtemp(prefix="pctr-out-", dir=SHORT))
        self.made: set[str] = set()
        self.connect()

    def connect(self) -> None:
        """A new connection, after the daemon was restarted."""
        self.channel = grpc.insecure_channel(f"unix:{self.daemon.address}")
        self.containers = containers_pb2_grpc.ContainersStub(self.channel)
        self.tasks = tasks_pb2_grpc.TasksStub(self.channel)
        self.events = events_pb2_grpc.EventsStub(self.channel)
        self.metadata = self.daemon.metadata()

    def close(self) -> None:
        """Hang up and remove what was written; what a failed test left running goes, so that only it fails."""
        for name in list(self.made):
            for step in (self.kill, self.wait, self.delete, self.remove):
                with contextlib.suppress(grpc.RpcError, ValueError):
                    step(name)
        self.channel.close()
        shutil.rmtree(self.output, ignore_errors=True)

    def call(self, method: Any, request: Any, timeout: float = TIMEOUT) -> Any:
        """One call."""
        return method(request, metadata=self.metadata, timeout=timeout)

    # -- containers --------------------------------------------------------------------------------

    def container(self, args: Sequence[str], name: str = "", **changes: Any) -> str:
        """A container record; `changes` go into the spec's top level objects (`process`, `linux`, …)."""
        name = name or f"c{secrets.token_hex(4)}"
        builder = SpecBuilder(self.daemon.namespace, name).with_args(args).with_env(["PATH=/bin"])
        builder.with_root(str(self.root)).with_default_devices()
        for part, values in changes.items():
            builder.spec.setdefault(part, {}).update(values)
        self.made.add(name)
        container = containers_pb2.Container(id=name)
        container.runtime.name = self.runtime
        container.spec.type_url, container.spec.value = TYPE_URL, builder.to_json()
        self.call(self.containers.Create, containers_pb2.CreateContainerRequest(container=container))
        return name

    def create(self, name: str, **options: Any) -> int:
        """The task of a container; its output goes to a file."""
        options.setdefault("stdout", f"file://{self.output}/{name}")
        options.setdefault("stderr", f"file://{self.output}/{name}.err")
        return self.call(self.tasks.Create, tasks_pb2.CreateTaskRequest(container_id=name, **options)).pid

    def start(self, name: str, exec_id: str = "") -> int:
        """Start a task or an exec."""
        return self.call(self.tasks.Start, tasks_pb2.StartRequest(container_id=name, exec_id=exec_id)).pid

    def wait(self, name: str, exec_id: str = "") -> int:
        """Exit status of a process."""
        request = tasks_pb2.WaitRequest(container_id=name, exec_id=exec_id)
        return self.call(self.tasks.Wait, request).exit_status

    def kill(self, name: str, signal: int = 9, exec_id: str = "", everything: bool = False) -> None:
        """Send a signal."""
        self.call(self.tasks.Kill, tasks_pb2.KillRequest(
            container_id=name, exec_id=exec_id, signal=signal, all=everything
        ))

    def delete(self, name: str) -> int:
        """Delete the task; returns the exit status."""
        return self.call(self.tasks.Delete, tasks_pb2.DeleteTaskRequest(container_id=name)).exit_status

    def remove(self, name: str) -> None:
        """Delete the container's record."""
        self.call(self.containers.Delete, containers_pb2.DeleteContainerRequest(id=name))
        self.made.discard(name)

    def run(self, *args: str, **changes: Any) -> str:
        """A started task; returns its container's id."""
        name = self.container(args, **changes)
        self.create(name)
        self.start(name)
        return name

    def exec(self, name: str, exec_id: str, args: Sequence[str], **options: Any) -> None:
        """Add a process."""
        process = {"args": list(args), "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}}
        request = tasks_pb2.ExecProcessRequest(container_id=name, exec_id=exec_id, **options)
        request.spec.type_url, request.spec.value = PROCESS_TYPE_URL, json.dumps(process).encode()
        self.call(self.tasks.Exec, request)

    def finish(self, name: str) -> int:
        """Kill what runs, delete task and container; returns the exit status."""
        if self.status(name) != task_pb2.STOPPED:
            with contextlib.suppress(grpc.RpcError):  # it may end by itself meanwhile; if it does not, the wait tells
                self.kill(name)
        self.wait(name)
        status = self.delete(name)
        self.remove(name)
        return status

    # -- looking -----------------------------------------------------------------------------------

    def process(self, name: str, exec_id: str = "") -> Any:
        """State of a process."""
        return self.call(self.tasks.Get, tasks_pb2.GetRequest(container_id=name, exec_id=exec_id)).process

    def status(self, name: str) -> int:
        """Status number of a task."""
        return self.process(name).status

    def listed(self) -> dict[str, int]:
        """Status by id of every task."""
        return {item.id: item.status for item in self.call(self.tasks.List, tasks_pb2.ListTasksRequest()).tasks}

    def text(self, name: str) -> str:
        """What the container wrote to standard output so far."""
        path = self.output / name
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_text(self, name: str, wanted: str) -> None:
        """Wait until the container wrote something."""
        wait_until(lambda: wanted in self.text(name), f"{wanted!r} written by {name}", TIMEOUT)

    def code(self, method: Any, request: Any) -> grpc.StatusCode:
        """Status of a call that must fail."""
        try:
            self.call(method, request)
        except grpc.RpcError as error:
            return error.code()
        raise AssertionError(f"{request} did not fail")


class Watch:
    """Events of the daemon's namespace from the moment of entering."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.topics: list[str] = []
        self.seen: list[Any] = []

    def __enter__(self) -> Watch:
        request = events_pb2.SubscribeRequest(filters=[f"namespace=={self._client.daemon.namespace}"])
        self._call = self._client.events.Subscribe(request)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        # A subscriber sees only what comes after it: ask until our own event is seen.
        wait_until(self._stands, "the subscription stands", TIMEOUT)
        return self

    def _stands(self) -> bool:
        request = events_pb2.PublishRequest(topic="/test/ready")
        request.event.type_url, request.event.value = "google.protobuf.Empty", b""
        self._client.call(self._client.events.Publish, request)
        return "/test/ready" in self.topics

    def _read(self) -> None:
        try:
            for envelope in self._call:
                self.seen.append(envelope)
                self.topics.append(envelope.topic)
        except grpc.RpcError:
            return

    def wait_for(self, *topics: str) -> None:
        """Wait until all `topics` were seen."""
        wait_until(lambda: set(topics) <= set(self.topics), f"events {topics} among {self.topics}", TIMEOUT)

    def __exit__(self, *_: object) -> None:
        self._call.cancel()
        self._thread.join(TIMEOUT)


def shim_pid(client: Client, name: str) -> int:
    """Pid of the shim that serves a task: the parent of its init, or what the bundle's record says."""
    bundle = client.daemon.state / "tasks" / client.daemon.namespace / name
    record = json.loads((bundle / "runtime.json").read_text())
    if record["pid"]:
        return int(record["pid"])
    pid = client.process(name).pid
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def shim_family(client: Client, name: str) -> list[int]:
    """All processes of the shim that serves a task: its own, and its worker's while it has one."""
    pid = shim_pid(client, name)
    return [pid, *workers(pid)]


def roots() -> Iterator[Path]:
    """A busybox root that is removed in the end."""
    root = busybox_root()
    yield root
    shutil.rmtree(root, ignore_errors=True)
