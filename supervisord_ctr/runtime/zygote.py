"""The zygote's client and keeper: starts `pctr_shim.zygote`, talks to it, starts another when it ends.

Owns the process and the packets; what the operations do is told in `pctr_shim/zygote.py`. Shims
are not the zygote's dependants, so its death costs nothing but the requests under way: those fail
with `Unavailable` and may be repeated by who knows whether that is safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from supervisord_ctr import errors
from supervisord_ctr.aio import TaskOwner
from supervisord_ctr.model import Exit

log = logging.getLogger(__name__)

_PACKET = 1 << 16
#: Seconds before another zygote is started when one did not live long, doubled each time.
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 5.0
#: Seconds that a fork may take to answer; only a clean-up may take longer, whose caller has a limit of its own.
_PATIENCE = 60.0
#: An argument that means nothing: where it lies, the zygote's forks write what ps shall show of them.
_ROOM = " " * 320


@dataclass(frozen=True, slots=True)
class Forked:
    """A new process: `start_time` is field 22 of /proc/PID/stat, `address` how a shim is reached."""

    pid: int
    start_time: int
    address: str = ""


@dataclass(frozen=True, slots=True)
class Remains:
    """What a clean-up after a dead shim found: the exit, and out-of-memory kills with the cgroup's level."""

    exit: Exit
    oom_kills: int = 0
    oom_level: str = ""


class Zygote:
    """One zygote at a time. `start` returns when it runs; `close` ends it, shims live on.

    With `page_merging` its memory and that of its forks is offered to ksmd; `rest` are the seconds after which shims
    without anything to do rest, 0: never; `programs` are OCI runtimes that shims run from a sealed copy.
    """

    def __init__(self, *, command: Sequence[str] = (sys.executable, "-I", "-m", "pctr_shim.zygote"),
                 env: Mapping[str, str] | None = None, page_merging: bool = False, rest: float = 0.0,
                 programs: Iterable[str] = ("runc",)) -> None:
        self._command = tuple(command)
        self._options = [f"rest={rest}", *(f"seal={program}" for program in sorted(programs))]
        if page_merging:
            self._options.append("merge")
        self._env = env
        self._owner = TaskOwner("zygote")
        self._ready = asyncio.Event()
        self._sending = asyncio.Lock()
        self._closing = False
        self._serial = 0
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._socket: socket.socket | None = None
        self._process: Process | None = None
        self.restarts = 0

    @property
    def pid(self) -> int:
        """The running zygote's pid, 0 while there is none."""
        return self._process.pid if self._process is not None and self._ready.is_set() else 0

    async def start(self) -> None:
        """Start it. It warms up by itself; requests wait for that, and a daemon that starts need not."""
        await self._spawn()
        self._owner.start(self._keep(), "keeper")

    async def close(self) -> None:
        """End it. Requests under way fail with `Unavailable`."""
        self._closing = True
        await self._owner.close()
        self._hang_up("the daemon stops")
        process, self._process = self._process, None
        if process is not None:
            try:
                await asyncio.wait_for(process.wait(), 5)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    # -- operations --------------------------------------------------------------------------------

    def expect(self) -> None:
        """A shim will be asked for soon: the zygote has one ready then. Only a hint, which may be lost."""
        sock = self._socket
        if sock is not None and not self._sending.locked():
            with contextlib.suppress(OSError):
                sock.send(b'{"op":"expect","serial":0}')

    async def fork_shim(self, *, namespace: str, group: str, bundle: str, socket_path: str, events: str, runtime: str,
                        runtime_root: str, cgroups: Sequence[str] = (), oom_score_adj: int | None = None,
                        env: Mapping[str, str] | None = None, debug: bool = False, log: str = "") -> Forked:
        """A shim whose socket listens at `socket_path` when this returns. Without `log` it shares our stderr."""
        reply = await self.request(
            "fork-shim", namespace=namespace, id=group, bundle=bundle, socket=socket_path, events=events,
            runtime=runtime, runtime_root=runtime_root, cgroups=list(cgroups), oom_score_adj=oom_score_adj,
            env=dict(env or {}), debug=debug, log=log,
        )
        return Forked(reply["pid"], reply.get("start_time", 0), reply["address"])

    async def fork_pause(self, *, netns: str = "", ipcns: str = "", utsns: str = "", userns: str = "",
                         hostname: str = "", cgroups: Sequence[str] = (), label: str = "",
                         mount_label: str = "") -> Forked:
        """Number 1 of a new PID namespace for a pod (D7); SELinux labels are of the process and of its root."""
        reply = await self.request(
            "fork-pause", netns=netns, ipcns=ipcns, utsns=utsns, userns=userns, hostname=hostname,
            cgroups=list(cgroups), label=label, mount_label=mount_label,
        )
        return Forked(reply["pid"], reply.get("start_time", 0))

    async def cleanup(self, *, namespace: str, container: str, bundle: str, runtime: str, runtime_root: str) -> Remains:
        """Kill and take away what is left of a container whose shim died; its exit, from the record if there is one."""
        reply = await self.request(
            "cleanup", namespace=namespace, id=container, bundle=bundle, runtime=runtime, runtime_root=runtime_root
        )
        found = Exit(reply["exit_status"], reply["exited_at"], reply.get("pid", 0))
        return Remains(found, reply.get("oom_kills", 0), reply.get("oom_level", ""))

    async def request(self, operation: str, **fields: Any) -> dict[str, Any]:
        """Send one request and return its reply; errors of the reply are raised."""
        if self._closing:
            raise errors.Unavailable("the zygote is gone: the daemon stops", kind="zygote")
        await self._ready.wait()
        sock = self._socket
        if sock is None:
            raise errors.Unavailable("the zygote is gone", kind="zygote")
        self._serial += 1
        serial = self._serial
        packet = json.dumps({"op": operation, "serial": serial, **fields}, separators=(",", ":")).encode()
        if len(packet) > _PACKET:
            raise errors.InvalidArgument(f"request {operation} for the zygote is {len(packet)} bytes long")
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[dict[str, Any]] = loop.create_future()
        self._pending[serial] = waiting
        try:
            try:
                async with self._sending:
                    await loop.sock_sendall(sock, packet)
            except OSError as error:
                if isinstance(error, ConnectionError) and self._socket is sock:
                    self._ready.clear()  # the keeper will see it, too; who asks again before must wait for the next
                raise errors.Unavailable(f"the zygote ended during {operation}", kind="zygote") from error
            async with asyncio.timeout(_PATIENCE if operation != "cleanup" else None):
                reply = await waiting
        except TimeoutError:  # whoever was to answer has ended before that
            raise errors.Unavailable(f"{operation} was not answered within {_PATIENCE:g} s", kind="zygote") from None
        finally:
            self._pending.pop(serial, None)
        failed = reply.get("error")
        if failed:
            raise errors.from_code(int(failed.get("code", 2)), str(failed.get("message", f"{operation} failed")))
        return reply

    # -- keeping -----------------------------------------------------------------------------------

    async def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            ours.setblocking(False)
            env = {**os.environ, **(self._env or {})}
            self._process = await asyncio.create_subprocess_exec(
                *self._command, str(theirs.fileno()), _ROOM, *self._options, stdin=DEVNULL,
                pass_fds=(theirs.fileno(),), env=env, start_new_session=True, umask=0o022,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._socket = ours
        self._ready.set()

    async def _keep(self) -> None:
        """Read replies; when the zygote ends, start the next one."""
        loop = asyncio.get_running_loop()
        pause = _FIRST_PAUSE
        while True:
            started = loop.time()
            await self._read()
            self._hang_up("it ended")
            process = self._process
            if process is not None:
                status = await process.wait()
                log.warning("the zygote (pid %d) ended with %s, starting another", process.pid, status)
            pause = _FIRST_PAUSE if loop.time() - started > 10 else min(pause * 2, _LONGEST_PAUSE)
            await asyncio.sleep(pause if pause > 2 * _FIRST_PAUSE else 0)
            self.restarts += 1
            while True:
                try:
                    await self._spawn()
                    break
                except OSError as error:
                    log.error("cannot start the zygote: %s", error)
                    await asyncio.sleep(_LONGEST_PAUSE)

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        sock = self._socket
        while sock is not None:
            try:
                packet = await loop.sock_recv(sock, _PACKET)
            except OSError:
                return
            if not packet:
                return
            try:
                reply = json.loads(packet)
                waiting = self._pending.get(reply["serial"])
            except (ValueError, KeyError, TypeError):
                log.error("the zygote sent something that is no reply: %r", packet[:200])
                continue
            if waiting is not None and not waiting.done():
                waiting.set_result(reply)

    def _hang_up(self, why: str) -> None:
        self._ready.clear()
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()
        for waiting in self._pending.values():
            if not waiting.done():
                waiting.set_exception(errors.Unavailable(f"the zygote is gone: {why}", kind="zygote"))
        if self._closing:
            self._ready.set()
