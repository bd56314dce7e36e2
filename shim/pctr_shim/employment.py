"""What a fork of the zygote does: read its request, answer it, and be what was asked for.

The requests are told in `zygote`. A shim's request is read by its first worker, so that the keeper shares what reading
changes with the zygote.
"""

from __future__ import annotations

import _socket
import contextlib
import json
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pctr_shim import cleanup, pause, rest, serve, warm
from pctr_shim.config import FOREIGN_RUNTIME_ROOT, ShimConfig
from pctr_shim.keeper import Post, show_spare
from supervisord_ctr import errors, faults
from supervisord_ctr.linux import cgroups, libc, namespaces, processes
from supervisord_ctr.ttrpc.server import listen

log = logging.getLogger(__name__)

FORKED = faults.declare("shim.fork.after-listen", "the shim's socket listens; the daemon does not know its pid")

_PACKET = 65536
#: Where a request for a shim has its name, within so many bytes.
_FORK_SHIM, _FORK_PAUSE, _EXPECT, _HEAD = b'"fork-shim"', b'"fork-pause"', b'"expect"', 32

Reply = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Employment:
    """What a fork finds: a shim made on its loop, the daemon's connection, and its request.

    Without a packet, the request comes on `work` (a spare shim). `post` is that of a worker, if the shim has a keeper;
    `patience`: seconds without anything to do after which it rests.
    """

    shim: serve.Shim
    loop: serve.Loop
    daemon: socket.socket
    packet: bytes
    work: _socket.socket | None
    post: Post | None
    patience: float

    async def carry_out(self) -> None:
        """Returns when all is done; then the process shall end."""
        self.loop.renew()
        if self.post is None and not wants_shim(self.packet):
            serial, reply = answered(self.packet, _operate)
            if not send_reply(self.daemon, serial, reply) and self.packet.find(_FORK_PAUSE, 0, _HEAD) >= 0:
                with contextlib.suppress(KeyError, ProcessLookupError):
                    os.kill(reply["pid"], signal.SIGKILL)
            return
        if self.post is None:
            os.setsid()
            if self.work is not None:
                show_spare()
            await self._first(None)
            return
        self.shim.reaper.listen(self.post.keeper)
        if self.post.description < 0:
            await self._first(self.post)
        else:
            await self._next(self.post)

    async def _first(self, post: Post | None) -> None:
        """Be the whole shim that is asked for, or its first worker."""
        packet = self.packet
        if self.work is not None:
            if not select.select([self.work], [], [], 0)[0]:
                await warm.rehearse(self.shim)
            packet = self.work.recv(_PACKET)
            self.work.close()
            if not packet:
                return  # the zygote ended, or needs a spare no more
        pid = post.pid if post is not None else os.getpid()
        made: list[tuple[Reply, socket.socket]] = []

        def begin(request: Reply) -> Reply:
            if post is not None:
                post.begin(int(request["serial"]))
            reply = {"pid": pid, "start_time": processes.read_start_time(pid), "address": f"unix://{request['socket']}"}
            made.append((request, _listen(request)))
            return reply

        known = send_reply(self.daemon, *answered(packet, begin))
        self.daemon.close()
        if not made:
            return
        request, listener = made[0]
        if not known:
            # The next daemon may have looked for shims that nobody knows of already.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(request["socket"])
            return
        config = _configure(request, pid)
        _redirect(str(request.get("log", "")))
        if post is not None:
            serve.enter(config)
            post.introduce(*serve.title(config))
            _settle(request, post.pid)
        _settle(request, os.getpid())
        if post is None:
            await self.shim.serve(config, listener)
            return
        self.shim.become(config)
        await self.shim.server.serve(listener)
        rest.Rest(self.loop, self.shim, post, request, self.patience).begin()
        await self.shim.until_stopped()

    async def _next(self, post: Post) -> None:
        """Be a worker that goes on with what another one left.

        Nothing is opened by its path: what the shim was started with may be gone, and its container runs all the same.
        """
        faults.point(rest.WOKEN)
        self.daemon.detach()  # the keeper has closed it
        left = rest.read(post)
        request = left["request"]
        self.shim.become(_configure(request, post.pid))
        await rest.resume(self.shim, post, left)
        patience = rest.next_patience(left["patience"], self.patience, time.monotonic() - left["since"])
        rest.Rest(self.loop, self.shim, post, request, patience).begin()
        await self.shim.until_stopped()


def wants_shim(packet: bytes) -> bool:
    """Whether the request, or that which a spare waits for, is for a shim: found without decoding."""
    return not packet or packet.find(_FORK_SHIM, 0, _HEAD) >= 0


def expects_shim(packet: bytes) -> bool:
    """Whether the packet only tells that a shim will be asked for."""
    return packet.find(_EXPECT, 0, _HEAD) >= 0


def _listen(request: Mapping[str, Any]) -> socket.socket:
    config = _config_of(request)
    if not os.path.isdir(config.bundle):
        raise errors.NotFound(f"bundle {config.bundle} is not a folder", kind="bundle", key=config.bundle)
    listener = listen(config.socket)
    try:
        faults.point(FORKED)
    except OSError:
        os.unlink(config.socket)
        raise
    return listener


def _config_of(request: Mapping[str, Any]) -> ShimConfig:
    return ShimConfig(
        namespace=str(request["namespace"]), group=str(request["id"]), bundle=str(request["bundle"]),
        socket=str(request["socket"]), events=str(request.get("events", "")), batches=True,
        runtime=str(request.get("runtime", "") or "runc"),
        runtime_root=str(request.get("runtime_root", "") or FOREIGN_RUNTIME_ROOT),
        debug=bool(request.get("debug", False)), env=dict(request.get("env", {})),
    )


def _configure(request: Mapping[str, Any], pid: int) -> ShimConfig:
    """What the shim shall be; its log tells as much as was asked for. `pid` is the shim's."""
    config = _config_of(request)
    config.pid = pid
    if config.debug:
        logging.getLogger().setLevel(logging.DEBUG)
    return config


def _settle(request: Mapping[str, Any], pid: int) -> None:
    """Give a process of the shim its place among the others."""
    if (score := request.get("oom_score_adj")) is not None:
        processes.set_oom_score_adj(pid, int(score))
    try:
        cgroups.join([str(folder) for folder in request.get("cgroups", [])], pid)
    except OSError as error:
        log.warning("joining a cgroup: %s", error)


def _redirect(log_path: str) -> None:
    """Standard streams to the null device, the log to its file."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    if log_path:
        file = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.dup2(file, 2)
        os.close(file)


# Other requests


def _operate(request: Reply) -> Reply:
    operation = {"ping": _ping, "fork-pause": _fork_pause, "cleanup": _cleanup}.get(request["op"])
    if operation is None:
        raise errors.Unimplemented(f"zygote does not know {request['op']!r}")
    return operation(request)


def _ping(request: Mapping[str, Any]) -> Reply:
    return {"pid": os.getppid()}


def _fork_pause(request: Mapping[str, Any]) -> Reply:
    enter = [
        (str(request.get(key, "")), kind)
        for key, kind in (("userns", namespaces.CLONE_NEWUSER), ("ipcns", namespaces.CLONE_NEWIPC),
                          ("utsns", namespaces.CLONE_NEWUTS), ("netns", namespaces.CLONE_NEWNET))
    ]
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = libc.fork()
    if pid == 0:
        try:
            labels = pause.Labels(str(request.get("label", "")), str(request.get("mount_label", "")))
            groups = [str(folder) for folder in request.get("cgroups", [])]
            pause.become(enter, str(request.get("hostname", "")), groups, labels, writer)
        except BaseException as error:
            os.write(writer, f"error {type(error).__name__}: {error}".encode()[:500])
        os._exit(1)
    os.close(writer)
    said = os.read(reader, 1024)
    if not said.isdigit():
        text = said.removeprefix(b"error ").decode("utf-8", "replace") or "it ended early"
        raise errors.Internal(f"pause process: {text}")
    return {"pid": int(said), "start_time": processes.read_start_time(int(said))}


def _cleanup(request: Mapping[str, Any]) -> Reply:
    record = cleanup.clean_up(
        str(request["namespace"]), str(request["id"]), str(request["bundle"]),
        str(request.get("runtime", "") or "runc"), str(request.get("runtime_root", "") or FOREIGN_RUNTIME_ROOT),
    )
    return {
        "pid": record.pid, "exit_status": record.exit_status, "exited_at": record.exited_at,
        "oom_kills": record.oom_kills, "oom_level": record.oom_level,
    }


# Replies


def answered(packet: bytes, operation: Callable[[Reply], Reply]) -> tuple[int, Reply]:
    """The request's serial, and what the operation gives or the error that it ended with."""
    serial = 0
    try:
        request = json.loads(packet)
        serial = int(request["serial"])
        return serial, operation(request)
    except (ValueError, KeyError, TypeError) as error:
        text = f"zygote request is wrong: {type(error).__name__}: {error}"
        return serial, failure(errors.InvalidArgument(text))
    except OSError as error:
        return serial, failure(errors.from_os_error(error, "zygote"))
    except errors.Error as error:
        return serial, failure(error)
    except Exception as error:
        return serial, failure(errors.Internal(f"{type(error).__name__}: {error}"))


def send_reply(daemon: socket.socket, serial: int, reply: Reply) -> bool:
    """Send a reply; False when the daemon is gone, so that nobody knows of what was made for it."""
    try:
        daemon.send(json.dumps({"serial": serial, **reply}).encode())
    except ConnectionError:
        log.warning("the daemon is gone, which asked for %s", reply.get("address", "something"))
        return False
    return True


def failure(error: errors.Error) -> Reply:
    """The part of a reply that tells an error."""
    return {"error": {"code": error.code, "message": error.message}}
