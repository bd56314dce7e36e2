"""Shims: starting them, finding them again, and clearing up after those that died.

A shim of ours is forked by the zygote; a foreign one is a program (`containerd-shim-NAME-VERSION
start`) that leaves a process behind and prints its address. One `Shim` value stands for one shim
process and may serve several tasks: the containers of a pod share it. When the connection of a shim
ends while it serves tasks, `on_lost` is called once.

Source: containerd, core/runtime/v2/README.md, for the programs' arguments, environment and output.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import secrets
import signal
import stat
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError

from supervisord_ctr import errors, faults
from supervisord_ctr.aio import Executors, KeyedLock, TaskOwner, wait_until
from supervisord_ctr.api.runc.v1 import options_pb2
from supervisord_ctr.api.runtime.bootstrap.v1 import bootstrap_pb2
from supervisord_ctr.api.runtime.task.v3 import task_pb2 as api
from supervisord_ctr.api.shim.v1 import shim_pb2
from supervisord_ctr.linux import cgroups, processes
from supervisord_ctr.model import Exit, TypedValue
from supervisord_ctr.runtime import resolve
from supervisord_ctr.runtime.bundle import Bundle, Record
from supervisord_ctr.runtime.connection import TaskService, seconds
from supervisord_ctr.runtime.shimlog import ShimLogs
from supervisord_ctr.runtime.values import RuntimeConfig
from supervisord_ctr.runtime.zygote import Forked, Zygote
from supervisord_ctr.ttrpc.client import Client

log = logging.getLogger(__name__)

_FORKED = faults.declare("runtime.shim.forked", "a shim process runs and nothing on disk tells of it yet")

#: Newest task API that we speak.
NEWEST = 3
#: What our own shims serve beside the task API.
SHIM_SERVICE = "pctr.shim.v1.Shim"
_RUNC_OPTIONS = "containerd.runc.v1.Options"
#: Bytes.
_LONG_LOG = 8 << 20
#: Exit status when nothing is known: never 0 (P13).
UNKNOWN_EXIT = 255


@dataclass(eq=False)
class Shim:
    """One shim process and the connection to it; `tasks` are the ids it serves for us."""

    namespace: str
    record: Record
    service: TaskService
    tasks: set[str] = field(default_factory=set)
    lost: bool = False
    #: We hung up on purpose; the shim goes on.
    left: bool = False

    @property
    def address(self) -> str:
        """`ttrpc+unix:///path`, as the sandbox API tells it."""
        return f"{self.record.protocol}+{self.record.address}"


@dataclass(frozen=True, slots=True)
class Launch:
    """What a shim is needed for."""

    bundle: Bundle
    runtime: str
    options: TypedValue | None
    group: str
    debug: bool = False


def runc_options(value: TypedValue | None) -> options_pb2.Options | None:
    """The runc options in an `Any`, None when it holds something else or nothing."""
    if value is None or value.type_url.rpartition("/")[2] != _RUNC_OPTIONS:
        return None
    found = options_pb2.Options()
    try:
        found.ParseFromString(value.value)
    except DecodeError as error:
        raise errors.InvalidArgument("runtime options are no containerd.runc.v1.Options", kind="options") from error
    return found


def _is_pipe(fd: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(fd).st_mode)
    except OSError:
        return False


def cgroup_folders(options: options_pb2.Options | None) -> list[str]:
    """Folders of the cgroup that a client asks a shim to join; `NotFound` when there is no such cgroup."""
    if options is None or not options.shim_cgroup:
        return []
    try:
        return cgroups.folders_to_join(options.shim_cgroup)
    except FileNotFoundError:
        raise errors.NotFound(f"failed to load cgroup {options.shim_cgroup}: cgroup deleted", kind="cgroup") from None


def socket_path(address: str) -> str:
    """The path in `unix:///path`; abstract and remote addresses are refused (S13)."""
    path = address.removeprefix("unix://")
    if not path.startswith("/"):
        raise errors.Unimplemented(f"shim address {address!r} is not a socket path", kind="shim", key=address)
    return path


def parse_start(output: bytes) -> tuple[str, str, int]:
    """Address, protocol and version from what a shim printed: protobuf, JSON or the bare address."""
    text = output.strip()
    if text.startswith(b"{"):
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise errors.Unknown(f"the shim's answer is not JSON: {text[:200]!r}") from error
        protocol, version = str(found.get("protocol", "ttrpc")), int(found.get("version", 2))
        return _checked(str(found.get("address", "")), protocol, version)
    if not text.startswith(b"unix:") and text:
        result = bootstrap_pb2.BootstrapResult()
        with contextlib.suppress(DecodeError):
            result.ParseFromString(output)
            if result.address:
                return _checked(result.address, result.protocol or "ttrpc", result.version or 2)
    # A shim may log to the same stream; the address is the last line.
    return _checked(text.splitlines()[-1].decode("utf-8", "replace") if text else "", "ttrpc", 2)


def _checked(address: str, protocol: str, version: int) -> tuple[str, str, int]:
    if version > NEWEST:
        raise errors.Unimplemented(f"unsupported shim version {version}", kind="shim", key=address)
    if protocol != "ttrpc":
        raise errors.Unimplemented(f"unsupported shim protocol {protocol!r}", kind="shim", key=address)
    socket_path(address)
    return address, protocol, version


class Shims:
    """Every shim that this daemon is connected to, by address."""

    def __init__(
        self, state: Path, zygote: Zygote, config: RuntimeConfig, owner: TaskOwner, executors: Executors, *,
        grpc_address: str, events: str,
    ) -> None:
        #: Folder of our shims' sockets.
        self.sockets = state / "s"
        self._zygote = zygote
        self._config = config
        self._owner = owner
        self._executors = executors
        self._grpc_address = grpc_address
        self._events = events
        # Whoever reads our stderr from a pipe waits for its end, which shims would put off: they outlive us.
        self._shim_log = str(state / "shims.log") if _is_pipe(2) else ""
        self._oci_root = config.oci_root or str(state / "runc")
        self._by_address: dict[tuple[str, str], Shim] = {}
        self._groups = KeyedLock()
        self._dialing = KeyedLock()
        self._logs = ShimLogs(owner)
        self._found: dict[str, str] = {}
        #: Sockets of shims that are being started: no bundle tells of them yet.
        self.starting: set[str] = set()
        #: Told of a shim whose connection ended while it had tasks.
        self.on_lost: Callable[[Shim], Awaitable[None]] | None = None

    def prepare(self) -> None:
        """Make the folder of sockets; a log of shims that grew long begins anew (blocking)."""
        self.sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._shim_log:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._shim_log).st_size > _LONG_LOG:
                    os.unlink(self._shim_log)

    def __len__(self) -> int:
        return len(self._by_address)

    def all(self) -> list[Shim]:
        """Those connected now."""
        return list(self._by_address.values())

    def resolve(self, runtime: str) -> str:
        """Path of the program of a foreign runtime, "" for ours; `NotFound` or `InvalidArgument` otherwise."""
        name = runtime or self._config.default
        if name in self._config.own:
            return ""
        if name not in self._found:
            self._found[name] = resolve.find(name)
        return self._found[name]

    # -- starting ----------------------------------------------------------------------------------

    def expect(self, namespace: str, runtime: str, group: str = "") -> None:
        """A task of this runtime will be made soon: have a shim ready unless the group has one. Only a hint."""
        with contextlib.suppress(errors.Error):
            if not self.resolve(runtime) and self._of_group(namespace, group) is None:
                self._zygote.expect()

    async def launch(self, launch: Launch, ready: Awaitable[Any] | None = None) -> Shim:
        """The shim for a task: the group's if there is one, else a new one. Its id joins `tasks`.

        `ready` is awaited before anything is written into the bundle: making it overlaps forking.
        When this returns the bundle tells of the shim, so that the next daemon finds it.
        """
        binary = self.resolve(launch.runtime)
        bundle = launch.bundle
        async with self._groups.hold((bundle.namespace, launch.group or bundle.id)):
            shim = None if binary else self._of_group(bundle.namespace, launch.group)
            if shim is not None:
                if ready is not None:
                    await ready
                await self._executors.run_io(bundle.write_record, self._record_for(launch, shim.record))
            else:
                if binary and ready is not None:
                    await ready
                record = await (self._start_program(launch, binary) if binary else self._fork(launch))
                try:
                    if ready is not None:
                        await ready
                    written = self._executors.run_io(bundle.write_record, self._record_for(launch, record))
                    shim = (await asyncio.gather(self.connect(bundle, record), written))[0]
                except BaseException:
                    await self.dismiss(bundle.namespace, socket_path(record.address))
                    raise
                finally:
                    self.starting.discard(socket_path(record.address).removesuffix("-2"))
            shim.tasks.add(bundle.id)
        return shim

    def _record_for(self, launch: Launch, record: Record) -> Record:
        """What a bundle says of a shim that other bundles may tell of, too."""
        return replace(record, runtime=launch.runtime or self._config.default, sandbox=False)

    def _of_group(self, namespace: str, group: str) -> Shim | None:
        if not group:
            return None
        for shim in self._by_address.values():
            if shim.namespace == namespace and shim.record.group == group and not shim.record.binary and not shim.lost:
                return shim
        return None

    def oci(self, options: TypedValue | None) -> tuple[str, str]:
        """OCI runtime and its root (before the namespace) that options ask of our own shim."""
        chosen = runc_options(options)
        binary = chosen.binary_name if chosen is not None and chosen.binary_name else self._config.oci_runtime
        root = chosen.root if chosen is not None and chosen.root else self._oci_root
        return binary, root

    async def _fork(self, launch: Launch) -> Record:
        path = str(self.sockets / secrets.token_hex(8))
        if len(path.encode()) > 107:
            raise errors.InvalidArgument(f"socket path {path} is longer than 107 bytes: choose a shorter state folder")
        runtime, root = self.oci(launch.options)
        group = launch.group or launch.bundle.id
        joined = (*self._config.shim_cgroups, *cgroup_folders(runc_options(launch.options)))
        self.starting.add(path)
        try:
            forked = await self._fork_once(launch.bundle.namespace, group, path, runtime, root, joined)
        except BaseException:
            self.starting.discard(path)
            raise
        faults.point(_FORKED)
        return Record(
            launch.runtime or self._config.default, "", forked.address, "ttrpc", NEWEST, forked.pid,
            forked.start_time, launch.group, runtime, root,
        )

    def _oom_score(self) -> int:
        """containerd's rule: under pressure a shim goes before its daemon, and both before what runs at 1000."""
        wanted = self._config.shim_oom_score
        return wanted if wanted is not None else min(1000, processes.read_oom_score_adj(os.getpid()) + 1)

    async def _fork_once(
        self, namespace: str, group: str, path: str, runtime: str, root: str, joined: Sequence[str]
    ) -> Forked:
        """Ask the zygote; when it dies meanwhile, ask the next one under another path."""
        for attempt in (path, f"{path}-2"):
            try:
                return await self._zygote.fork_shim(
                    namespace=namespace, group=group, bundle=str(self.sockets), socket_path=attempt,
                    events=self._events, runtime=runtime, runtime_root=root, cgroups=joined,
                    oom_score_adj=self._oom_score(), env=self._config.shim_env, debug=self._config.debug,
                    log=self._shim_log,
                )
            except errors.Unavailable as error:
                last = error
                await self.dismiss(namespace, attempt)
        raise last

    async def containers_at(self, path: str) -> list[str]:
        """Ids of the containers that a shim of ours at `path` serves; `NotFound` when nothing listens there."""
        try:
            client = await Client.connect(path)
        except errors.Unavailable as error:
            if isinstance(error.__cause__, ConnectionRefusedError | FileNotFoundError):
                raise errors.NotFound(f"no shim listens at {path}", kind="shim", key=path) from error
            raise
        try:
            answer = await TaskService(client, "default", NEWEST).call_service(
                SHIM_SERVICE, "Info", shim_pb2.InfoRequest(), shim_pb2.InfoResponse, self._config.state_timeout)
        finally:
            await client.close()
        return [container.id for container in answer.containers]

    async def remove_state(self, namespace: str, container: str, bundle: Path) -> None:
        """Take away what the OCI runtime still keeps of a container that is dead."""
        runtime, root = self.oci(None)
        await asyncio.wait_for(
            self._zygote.cleanup(namespace=namespace, container=container, bundle=str(bundle), runtime=runtime,
                                 runtime_root=root), self._config.cleanup_timeout * 3)

    async def dismiss(self, namespace: str, path: str) -> None:
        """End a shim that serves nothing, and remove its socket: one that nobody could be told of."""
        with contextlib.suppress(OSError, errors.Error):
            client = await Client.connect(path)
            try:
                await TaskService(client, namespace, NEWEST).shutdown("", timeout=self._config.cleanup_timeout)
            finally:
                await client.close()
        with contextlib.suppress(OSError):
            os.unlink(path)

    async def _start_program(self, launch: Launch, binary: str) -> Record:
        bundle = launch.bundle
        self._logs.open(bundle)
        options = AnyMessage()
        if launch.options is not None:
            options.type_url, options.value = launch.options.type_url, launch.options.value
        output = await self._run(
            binary, bundle, "start", stdin=options.SerializeToString(), timeout=self._config.start_timeout,
            debug=launch.debug or self._config.debug,
        )
        address, protocol, version = parse_start(output)
        faults.point(_FORKED)
        runtime, root = self.oci(launch.options)
        return Record(launch.runtime, binary, address, protocol, version, group=launch.group, oci_runtime=runtime,
                      oci_root=root)

    async def _run(
        self, binary: str, bundle: Bundle, action: str, *, stdin: bytes, timeout: float, debug: bool = False,
        extra: tuple[str, ...] = (),
    ) -> bytes:
        """Run a shim program in the bundle and return what it printed; its errors are `Unknown` with their text."""
        arguments = [
            "-namespace", bundle.namespace, "-address", self._grpc_address, "-publish-binary", sys.argv[0],
            "-id", bundle.id, *extra, *(("-debug",) if debug else ()), action,
        ]
        environment = {
            **os.environ, **self._config.shim_env, "GOMAXPROCS": "2", "MAX_SHIM_VERSION": "2",
            "TTRPC_ADDRESS": self._events, "GRPC_ADDRESS": self._grpc_address, "NAMESPACE": bundle.namespace,
        }
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                binary, *arguments, cwd=bundle.path, env=environment, stdin=pipe, stdout=pipe, stderr=pipe,
                start_new_session=True,
            )
        except OSError as error:
            raise errors.from_os_error(error, f"run shim {binary}") from error
        try:
            out, err = await asyncio.wait_for(process.communicate(stdin), timeout)
        except TimeoutError:
            raise errors.DeadlineExceeded(f"shim {binary} {action} took longer than {timeout:g} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            text = (err or out).decode("utf-8", "replace").strip()[-2000:]
            raise errors.Unknown(f"shim {binary} {action}: {text}: exit status {process.returncode}", kind="shim")
        return out

    # -- connections -------------------------------------------------------------------------------

    async def connect(self, bundle: Bundle, record: Record, *, timeout: float | None = None) -> Shim:
        """The shim that `record` tells of, connected; `NotFound` when nothing listens there."""
        key = (bundle.namespace, record.address)
        async with self._dialing.hold(key):
            known = self._by_address.get(key)
            if known is not None and not known.lost:
                return known
            return await self._dial(key, record, timeout or self._config.start_timeout)

    async def _dial(self, key: tuple[str, str], record: Record, timeout: float) -> Shim:
        path = socket_path(record.address)
        try:
            async with asyncio.timeout(timeout):
                client = await Client.connect(path)
        except TimeoutError:
            raise errors.DeadlineExceeded(f"shim at {path} does not accept a connection") from None
        except errors.Unavailable as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in (errno.ENOENT, errno.ECONNREFUSED):
                raise errors.NotFound(f"no shim listens at {path}", kind="shim", key=record.address) from error
            raise
        shim = Shim(key[0], record, TaskService(client, key[0], record.version, remembers=not record.binary))
        self._by_address[key] = shim
        self._owner.start(self._watch(key, shim), f"watch {record.address}")
        return shim

    async def _watch(self, key: tuple[str, str], shim: Shim) -> None:
        await shim.service.client.wait_closed()
        shim.lost = True
        if self._by_address.get(key) is shim:
            del self._by_address[key]
        if shim.left:
            return
        if shim.tasks and self.on_lost is not None:
            await self.on_lost(shim)

    async def release(self, shim: Shim, task: str) -> None:
        """A task is gone from `shim`: ask it to end when that was the last one, and hang up."""
        shim.tasks.discard(task)
        async with self._groups.hold((shim.namespace, shim.record.group or task)):
            if shim.lost or shim.tasks:
                return
            try:
                await shim.service.shutdown(task, timeout=self._config.cleanup_timeout)
            except errors.Error as error:
                log.warning("shim of task %s in %s does not shut down: %s", task, shim.namespace, error)
            self._by_address.pop((shim.namespace, shim.record.address), None)
            shim.left = True
            await shim.service.client.close()
        self._remove_socket(shim.record)

    @staticmethod
    def _remove_socket(record: Record) -> None:
        """Remove the socket of one of our shims that is gone."""
        if not record.binary:
            with contextlib.suppress(OSError):
                os.unlink(socket_path(record.address))

    def watch_log(self, bundle: Bundle, record: Record) -> None:
        """Read the log of a foreign shim again after a restart."""
        if record.binary:
            self._logs.open(bundle)

    def forget_log(self, bundle: Bundle) -> None:
        """Stop reading the log of a bundle that goes away."""
        self._logs.close(bundle)

    # -- clearing up -------------------------------------------------------------------------------

    async def clean_up(self, bundle: Bundle, record: Record | None) -> Exit:
        """Kill and take away what is left of a task whose shim is dead, and say how it ended.

        Raises when that did not work; may be repeated.
        """
        binary = record.binary if record is not None else ""
        if not binary:
            if record is not None and record.oci_runtime:
                runtime, root = record.oci_runtime, record.oci_root
            else:
                runtime, root = self.oci(None)
            if record is not None and not self._in_use(record):
                await self._end_process(record)
            remains = await asyncio.wait_for(
                self._zygote.cleanup(
                    namespace=bundle.namespace, container=bundle.id, bundle=str(bundle.path), runtime=runtime,
                    runtime_root=root,
                ), self._config.cleanup_timeout * 3,
            )
            return remains.exit
        output = await self._run(
            binary, bundle, "delete", stdin=b"", timeout=self._config.cleanup_timeout * 3,
            extra=("-bundle", str(bundle.path)),
        )
        found = api.DeleteResponse()
        try:
            found.ParseFromString(output)
        except DecodeError as error:
            raise errors.Unknown(f"shim {binary} delete printed no DeleteResponse") from error
        return Exit(found.exit_status, seconds(found.exited_at), found.pid)

    def _in_use(self, record: Record) -> bool:
        """Whether we are connected to the shim of `record`."""
        return any(shim.record.address == record.address and not shim.lost for shim in self._by_address.values())

    async def _end_process(self, record: Record) -> None:
        """Make sure that the process of a shim that answers nobody is gone, and its socket."""
        if record.pid and processes.send_signal(record.pid, record.start_time, signal.SIGKILL):
            with contextlib.suppress(TimeoutError):
                await wait_until(
                    lambda: not processes.is_alive(record.pid, record.start_time), self._config.cleanup_timeout, "shim"
                )
        if record.address:
            self._remove_socket(record)

    async def close(self) -> None:
        """Hang up on every shim; they go on."""
        self.on_lost = None
        shims, self._by_address = list(self._by_address.values()), {}
        for shim in shims:
            shim.left = True
            await shim.service.client.close()
        self._logs.close_all()
