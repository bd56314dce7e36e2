"""The zygote: a small program with the shim's modules loaded, which forks a shim on request.

The daemon executes it once (`python -I -m pctr_shim.zygote FD`) and talks to it over FD, one end
of a `socketpair(AF_UNIX, SOCK_SEQPACKET)`. Each packet is one JSON object in UTF-8, at most 64 KiB.
When the daemon's end closes, the zygote ends. It may be killed at any time: shims have sessions of
their own, do not depend on it, and the daemon starts another one.

A shim of the zygote is a keeper and a worker (`keeper`); its pid is the keeper's. While shims are asked for, one is
kept ready: forked, its loop set up, waiting for its request on a socket whose end it does not outlive. It takes
the time of forking out of the time of a start. It goes when it was not needed for a minute. One is made, too, when
the daemon says that a shim will be asked for: it has a container whose task is likely to follow.

Every request begins with its `op` and has a `serial` (int), which its reply repeats. Forks answer, so replies come
in any order. A reply is either the object stated below or
`{"serial": N, "error": {"code": C, "message": "…"}}` with a code of `errors.Code`.

`{"op": "expect", "serial": N}`
    A shim will be asked for soon. There is no reply.

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

What the zygote itself writes to between two forks, the forks do not share. So it looks at nothing: it forks, or
passes the request on to the spare, and forks read and answer it (`employment.py`).

Not here: what a shim does (`service.py`), how a foreign daemon starts one (`__main__.py`).
"""

from __future__ import annotations

from pctr_shim import lean as lean  # isort: split

import _socket
import contextlib
import gc
import json
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence

from pctr_shim import keeper, sealed, serve, warm
from pctr_shim.employment import Employment, expects_shim, failure, wants_shim
from pctr_shim.signals import Signals
from supervisord_ctr import errors
from supervisord_ctr.linux import heap, libc, memory, processes

log = logging.getLogger(__name__)

_PACKET = 65536
#: Seconds without a request before a spare shim is forked, and before one is let go.
_QUIET = 0.1
_UNUSED = 60.0


_POLLIN, _SIGTERM = int(select.POLLIN), int(signal.SIGTERM)

#: In a fork: the request, or for a spare shim the socket on which that will come.
_Work = tuple[bytes, _socket.socket | None]


class Zygote:
    """Serves one connection until it ends."""

    def __init__(self, connection: socket.socket, signals: Signals) -> None:
        self._connection = connection
        self._signals = signals
        #: Our end of the spare's socket.
        self._spare: _socket.socket | None = None
        self._wants_spare = False

    def run(self) -> _Work | None:
        """Have requests answered until the daemon's end closes: None then, and in each fork what it is to do."""
        poll = select.poll()
        connection = self._connection.fileno()
        poll.register(connection, _POLLIN)
        poll.register(self._signals.reader, _POLLIN)
        while True:
            patience = _UNUSED if self._spare is not None else _QUIET if self._wants_spare else None
            ready = poll.poll(None if patience is None else 1000 * patience)
            work = None
            if not ready:
                work = self._turn_spare()
            for fd, _ in ready:
                if fd != connection:
                    if _SIGTERM in self._signals.take():
                        return None
                    _reap()
                    continue
                try:
                    packet = self._connection.recv(_PACKET)
                except ConnectionError:
                    return None
                if not packet:
                    return None
                work = self._pass_on(packet)
            if work is not None:
                return work

    def _pass_on(self, packet: bytes) -> _Work | None:
        """Have somebody answer: the spare, or a fork."""
        if wants_shim(packet):
            self._wants_spare = True
            if self._employ_spare(packet):
                return None
        elif expects_shim(packet):
            return self._make_spare() if self._spare is None else None
        try:
            pid = libc.fork()
        except OSError as error:
            with contextlib.suppress(ValueError, KeyError, TypeError, ConnectionError):
                serial = json.loads(packet)["serial"]
                reply = {"serial": serial, **failure(errors.from_os_error(error, "zygote"))}
                self._connection.send(json.dumps(reply).encode())
            return None
        if pid:
            return None
        if self._spare is not None:
            self._spare.close()  # it would outlive the zygote else
        return packet, None

    # Spares

    def _turn_spare(self) -> _Work | None:
        """Nobody asked for a while: make a spare shim, or end the one that nobody needs."""
        if self._spare is not None:
            self._spare.close()
            self._spare = None
            sealed.refresh()
            return None
        return self._make_spare()

    def _make_spare(self) -> _Work | None:
        self._wants_spare = False
        try:
            ours, theirs = keeper.socketpair()
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
            return b"", theirs
        theirs.close()
        self._spare = ours
        return None

    def _employ_spare(self, packet: bytes) -> bool:
        """Give the request to the spare; whether there is one."""
        spare, self._spare = self._spare, None
        if spare is None:
            return False
        try:
            spare.send(packet)
        except OSError as error:
            log.warning("the spare shim is gone: %s", error)
            return False
        finally:
            spare.close()
        return True


#: What runs between two forks, and is under way in each.
_FORKING = frozenset(function.__code__ for function in (
    Zygote.run, Zygote._pass_on, Zygote._employ_spare, Zygote._turn_spare, Zygote._make_spare, wants_shim, expects_shim,
    keeper.socketpair,
))


async def _live(connection: socket.socket, loop: serve.Loop, programs: Sequence[str], patience: float) -> None:
    """Make a shim, then be the zygote of shims: this goes on in every fork where it stands in the zygote.

    `patience`: seconds after which a shim rests that has nothing to do; 0: it never does, and has no keeper.
    """
    loop.signals.watch()
    shim = serve.Shim(loop.signals)
    loop.signals.install(list(loop.signals.calls))
    sealed.prepare(programs)
    zygote = Zygote(connection, loop.signals)
    loop.before_fork()
    kept = memory.fill_gaps()
    gc.freeze()
    heap.forget_text()
    given = zygote.run()
    if given is None:
        del kept
        return
    packet, work = given
    try:
        post = None
        if patience and wants_shim(packet):
            post = keeper.Keeper(loop.signals).become(connection.fileno(), -1 if work is None else work.fileno())
        await Employment(shim, loop, connection, packet, work, post, patience).carry_out()
    except BaseException:
        log.exception("shim failed")
        os._exit(1)
    os._exit(0)


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


def main(arguments: list[str]) -> int:
    """Run on the descriptor given as the first argument; the second only makes room for a title of the forks.

    Words behind them: `merge` offers the memory of the zygote and its forks to ksmd; `rest=SECONDS` lets shims rest
    when they had nothing to do for so long (`keeper`); `seal=PROGRAM` names an OCI runtime to be run from a
    sealed copy (`sealed`).
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
    kept = warm.warm_up(_FORKING)
    words = arguments[2:]
    if "merge" in words:
        heap.offer_pages()
    patience = next((float(word[5:]) for word in words if word.startswith("rest=")), 0.0)
    programs = [word[5:] for word in words if word.startswith("seal=")]
    loop = serve.Loop()
    loop.run_until_complete(_live(connection, loop, programs, patience))
    del kept
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
