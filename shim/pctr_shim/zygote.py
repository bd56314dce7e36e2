"""The zygote: a small program with the shim's modules loaded, which forks a shim on request.

The daemon executes it once (`python -I -m pctr_shim.zygote FD`) and talks to it over FD, one end
of a `socketpair(AF_UNIX, SOCK_SEQPACKET)`. Each packet is one JSON object in UTF-8, at most 64 KiB.
When the daemon's end closes, the zygote ends. It may be killed at any time: shims have sessions of
their own, do not depend on it, and the daemon starts another one.

While shims are asked for, one is kept ready: forked, its loop set up, waiting for its configuration and
its listening socket on a socket whose end it does not outlive. It takes the time of forking out of the
time of a start. It goes when it was not needed for a minute.

Every request has a `serial` (int), which its reply repeats. Replies to `cleanup` may come later
than replies to later requests; all others come in order. A reply is either the object stated below
or `{"serial": N, "error": {"code": C, "message": "…"}}` with a code of `errors.Code`.

`{"op": "ping", "serial": N}`
    → `{"serial": N, "pid": PID}`

`{"op": "fork-shim", "serial": N, "namespace": "default", "id": "c1", "bundle": "/run/…/c1", "socket": "/run/…/s/ab12",
"events": "/run/…/events.sock", "runtime": "runc", "runtime_root": "/run/supervisord-ctr/runc", …}`
    → `{"serial": N, "pid": PID, "start_time": TICKS, "address": "unix:///run/…/s/ab12"}`

    The shim's socket (mode 0600, below 108 bytes) is listening when the reply comes: connect at
    once. `id` is the container or, for the shim of a pod, the sandbox. `bundle` becomes the working
    directory and must exist. `start_time` is field 22 of /proc/PID/stat: with the PID it names the
    process beyond reuse. Optional keys and their defaults:

    "events": ""            path of the daemon's ttrpc socket that takes events ("": none are sent)
    "runtime": "runc"       OCI runtime when the task's options name none
    "runtime_root": "/run/containerd/runc"   state of the OCI runtime; the namespace is appended
    "log": ""               file that takes the shim's log ("": the zygote's stderr)
    "debug": false
    "cgroups": []           folders of cgroups that the shim joins before it serves
    "oom_score_adj": null   e.g. -998; clamped to what the kernel allows us
    "env": {}               added to the environment of the runtime and of loggers

`{"op": "fork-pause", "serial": N, "netns": "/path", "ipcns": "/path", "utsns": "/path", "userns": "",
"hostname": "", "cgroups": [], "label": "", "mount_label": ""}`
    → `{"serial": N, "pid": PID, "start_time": TICKS}`

    A process that is number 1 of a new PID namespace, for pods whose containers share one (design:
    pods without a pause image). Containers join `/proc/PID/ns/pid`. Paths are optional: "" keeps the
    zygote's namespace. It has an empty read-only root, no descriptors, no capabilities,
    no_new_privs, a seccomp filter, is not dumpable and reaps. SIGKILL it to end the namespace.
    `label` and `mount_label` are SELinux labels of the process and of its root.

`{"op": "cleanup", "serial": N, "namespace": "default", "id": "c1", "bundle": "/run/…/c1", "runtime": "runc",
"runtime_root": "…"}`
    → `{"serial": N, "pid": PID, "exit_status": 137, "exited_at": SECONDS, "oom_kills": 0, "oom_level": ""}`

    What is left of a container whose shim died: kills it, removes it from the OCI runtime, takes
    its root file system's mounts away. The exit is the recorded one when the shim had written it,
    else 137 at the time of the call. The bundle's folder stays: it is the daemon's.

Not here: what a shim does (`service.py`), how a foreign daemon starts one (`__main__.py`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any

from pctr_shim import cleanup, pause, sealed, serve, warm
from pctr_shim.config import FOREIGN_RUNTIME_ROOT, ShimConfig
from pctr_shim.signals import Signals
from supervisord_ctr import errors, faults
from supervisord_ctr.linux import cgroups, heap, libc, memory, namespaces, processes
from supervisord_ctr.ttrpc.server import listen

log = logging.getLogger(__name__)

FORKED = faults.declare("shim.fork.after-listen", "the shim's socket listens; the daemon does not know its pid")

_PACKET = 65536
#: Seconds without a request before a spare shim is forked, and before one is let go.
_QUIET = 0.1
_UNUSED = 60.0


@dataclass(frozen=True, slots=True)
class _Spare:
    """A shim without work; it ends when `work` is closed."""

    pid: int
    start_time: int
    work: socket.socket


@dataclass(frozen=True, slots=True)
class _Employment:
    """What a fork is to do: be the shim of `request`, or, while that is None, wait for one on `listener`."""

    request: dict[str, Any] | None
    listener: socket.socket


class Zygote:
    """Serves one connection until it ends."""

    def __init__(self, connection: socket.socket, signals: Signals) -> None:
        self._connection = connection
        self._signals = signals
        self._spare: _Spare | None = None
        self._wants_spare = False

    def run(self) -> _Employment | None:
        """Answer requests until the daemon's end closes: None then, and in each shim that was forked its employment."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        poll.register(self._signals.reader, select.POLLIN)
        while True:
            patience = _UNUSED if self._spare is not None else _QUIET if self._wants_spare else None
            ready = poll.poll(None if patience is None else 1000 * patience)
            employment = None
            if not ready:
                employment = self._turn_spare()
            for fd, _ in ready:
                if fd != self._connection.fileno():
                    if signal.SIGTERM in self._signals.take():
                        return None
                    _reap()
                    continue
                try:
                    packet = self._connection.recv(_PACKET)
                except ConnectionError:
                    return None
                if not packet:
                    return None
                employment = self._answer(packet)
            if employment is not None:
                return employment

    def _answer(self, packet: bytes) -> _Employment | None:
        serial = 0
        try:
            request = json.loads(packet)
            serial = int(request["serial"])
            operation = {
                "ping": self._ping, "fork-shim": self._fork_shim, "fork-pause": self._fork_pause,
                "cleanup": self._cleanup,
            }.get(request["op"])
            if operation is None:
                raise errors.Unimplemented(f"zygote does not know {request['op']!r}")
            reply = operation(serial, request)
            if reply is None or isinstance(reply, _Employment):
                return reply
        except (ValueError, KeyError, TypeError) as error:
            reply = _failure(errors.InvalidArgument(f"zygote request is wrong: {type(error).__name__}: {error}"))
        except OSError as error:
            reply = _failure(errors.from_os_error(error, "zygote"))
        except errors.Error as error:
            reply = _failure(error)
        self._send({"serial": serial, **reply})
        return None

    def _send(self, reply: dict[str, Any]) -> None:
        try:
            self._connection.send(json.dumps(reply).encode())
        except ConnectionError:
            log.debug("the daemon is gone")

    def _ping(self, serial: int, request: dict[str, Any]) -> dict[str, Any]:
        return {"pid": os.getpid()}

    def _fork_shim(self, serial: int, request: dict[str, Any]) -> dict[str, Any] | _Employment:
        config = _config_of(request)
        if not os.path.isdir(config.bundle):
            raise errors.NotFound(f"bundle {config.bundle} is not a folder", kind="bundle", key=config.bundle)
        sealed.prepare(config.runtime)
        listener = listen(config.socket)
        self._wants_spare = True
        try:
            faults.point(FORKED)
            pid, started = self._employ_spare(request, listener)
            if not pid:
                pid = libc.fork()
                if pid == 0:
                    self._leave()
                    return _Employment(request, listener)
                started = processes.read_start_time(pid)
        except OSError:
            os.unlink(config.socket)
            listener.close()
            raise
        listener.close()
        return {"pid": pid, "start_time": started, "address": f"unix://{config.socket}"}

    def _leave(self) -> None:
        """In a child: let go of what is the zygote's. Another's spare would outlive the zygote else."""
        self._connection.close()
        if self._spare is not None:
            self._spare.work.close()

    # Spares

    def _turn_spare(self) -> _Employment | None:
        """Nobody asked for a while: make a spare shim, or end the one that nobody needs."""
        self._wants_spare = False
        if self._spare is not None:
            self._spare.work.close()
            self._spare = None
            return None
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                pid = libc.fork()
            except OSError:
                ours.close()
                theirs.close()
                raise
        except OSError as error:
            log.warning("forking a spare shim: %s", error)
            return None
        if pid == 0:
            ours.close()
            self._leave()
            return _Employment(None, theirs)
        theirs.close()
        self._spare = _Spare(pid, processes.read_start_time(pid), ours)
        return None

    def _employ_spare(self, request: dict[str, Any], listener: socket.socket) -> tuple[int, int]:
        """Give the request to the spare: its pid and start time; 0 when there is none."""
        spare, self._spare = self._spare, None
        if spare is None:
            return 0, 0
        with spare.work:
            try:
                socket.send_fds(spare.work, [json.dumps(request).encode()], [listener.fileno()])
            except OSError as error:
                log.warning("the spare shim is gone: %s", error)
                return 0, 0
        return spare.pid, spare.start_time

    # Others

    def _fork_pause(self, serial: int, request: dict[str, Any]) -> dict[str, Any]:
        enter = [
            (str(request.get(key, "")), kind)
            for key, kind in (("userns", namespaces.CLONE_NEWUSER), ("ipcns", namespaces.CLONE_NEWIPC),
                              ("utsns", namespaces.CLONE_NEWUTS), ("netns", namespaces.CLONE_NEWNET))
        ]
        reader, writer = os.pipe2(os.O_CLOEXEC)
        pid = libc.fork()
        if pid == 0:
            try:
                self._leave()
                labels = pause.Labels(str(request.get("label", "")), str(request.get("mount_label", "")))
                groups = [str(folder) for folder in request.get("cgroups", [])]
                pause.become(enter, str(request.get("hostname", "")), groups, labels, writer)
            except BaseException as error:
                os.write(writer, f"error {type(error).__name__}: {error}".encode()[:500])
            os._exit(1)
        os.close(writer)
        try:
            said = os.read(reader, 1024)
        finally:
            os.close(reader)
        if not said.isdigit():
            text = said.removeprefix(b"error ").decode("utf-8", "replace") or "it ended early"
            raise errors.Internal(f"pause process: {text}")
        return {"pid": int(said), "start_time": processes.read_start_time(int(said))}

    def _cleanup(self, serial: int, request: dict[str, Any]) -> None:
        """In a child, which answers by itself: it may take a while."""
        arguments = (
            str(request["namespace"]), str(request["id"]), str(request["bundle"]),
            str(request.get("runtime", "") or "runc"),
            str(request.get("runtime_root", "") or FOREIGN_RUNTIME_ROOT),
        )
        if libc.fork():
            return
        try:
            if self._spare is not None:
                self._spare.work.close()
            self._signals.renew()
            record = cleanup.clean_up(*arguments)
            self._send({
                "serial": serial, "pid": record.pid, "exit_status": record.exit_status,
                "exited_at": record.exited_at, "oom_kills": record.oom_kills, "oom_level": record.oom_level,
            })
        except errors.Error as error:
            self._send({"serial": serial, **_failure(error)})
        except Exception as error:
            self._send({"serial": serial, **_failure(errors.Internal(f"{type(error).__name__}: {error}"))})
        finally:
            os._exit(0)


def _config_of(request: dict[str, Any]) -> ShimConfig:
    return ShimConfig(
        namespace=str(request["namespace"]), group=str(request["id"]), bundle=str(request["bundle"]),
        socket=str(request["socket"]), events=str(request.get("events", "")), batches=True,
        runtime=str(request.get("runtime", "") or "runc"),
        runtime_root=str(request.get("runtime_root", "") or FOREIGN_RUNTIME_ROOT),
        debug=bool(request.get("debug", False)), env=dict(request.get("env", {})),
    )


async def _live(connection: socket.socket, loop: serve.Loop) -> None:
    """Make a shim, then be the zygote of shims: this goes on in every fork where it stands in the zygote."""
    loop.signals.watch()
    shim = serve.Shim(loop.signals)
    loop.signals.install(list(loop.signals.calls))
    zygote = Zygote(connection, loop.signals)
    loop.before_fork()
    kept = memory.fill_gaps()
    gc.freeze()
    heap.forget_text()
    employment = zygote.run()
    if employment is None:
        del kept
        return
    try:
        os.setsid()
        loop.renew()
        await _be_employed(employment, shim)
    except BaseException:
        log.exception("shim failed")
        os._exit(1)
    os._exit(0)


async def _be_employed(employment: _Employment, shim: serve.Shim) -> None:
    request, listener = employment.request, employment.listener
    if request is None:
        processes.set_title("containerd-shim-pctr-v1", "(spare)")
        processes.set_name("pctr-spare")
        await warm.rehearse(shim)
        packet, descriptors, _, _ = socket.recv_fds(listener, _PACKET + 4096, 1, socket.MSG_CMSG_CLOEXEC)
        listener.close()
        if not packet or not descriptors:
            return  # the zygote ended, or needs us no more
        request, listener = json.loads(packet), socket.socket(fileno=descriptors[0])
    await _serve(request, listener, shim)


async def _serve(request: dict[str, Any], listener: socket.socket, shim: serve.Shim) -> None:
    config = _config_of(request)
    _redirect(str(request.get("log", "")))
    if config.debug:
        logging.getLogger().setLevel(logging.DEBUG)
    if (score := request.get("oom_score_adj")) is not None:
        processes.set_oom_score_adj(os.getpid(), int(score))
    try:
        cgroups.join([str(folder) for folder in request.get("cgroups", [])], os.getpid())
    except OSError as error:
        log.warning("joining a cgroup: %s", error)
    await shim.serve(config, listener)


def _greet(connection: socket.socket) -> None:
    """Answer the daemon's first ping, if it has come: it need not wait until all is warm."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        request = json.loads(connection.recv(_PACKET, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        if request["op"] == "ping":
            connection.recv(_PACKET)
            connection.send(json.dumps({"serial": request["serial"], "pid": os.getpid()}).encode())


def _reap() -> None:
    """Children that have ended: forked shims, and helpers."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _failure(error: errors.Error) -> dict[str, Any]:
    return {"error": {"code": int(error.code), "message": error.message}}


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


def main(arguments: list[str]) -> int:
    """Run on the descriptor given as the first argument; the second only makes room for a title of the forks.

    The word `merge` behind them offers the memory of the zygote and its forks to ksmd.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    number = int(arguments[0])
    os.closerange(3, number)  # what else was inherited must not reach a container (S3)
    os.closerange(number + 1, 1 << 16)
    connection = socket.socket(fileno=number)
    connection.set_inheritable(False)
    processes.set_name("pctr-zygote")
    _greet(connection)
    serve.prepare()
    kept = warm.warm_up()
    if "merge" in arguments[2:]:
        heap.offer_pages()
    loop = serve.Loop()
    loop.run_until_complete(_live(connection, loop))
    del kept
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
