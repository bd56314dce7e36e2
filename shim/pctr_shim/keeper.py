"""The keeper: what a shim is while nothing happens, and the parent of all that it runs.

A shim that works is a Python process of some 4 MiB of its own. Nearly all shims wait, nearly all the time. So a
shim of the zygote consists of two processes:

- the **keeper**, whose pid is the shim's. It is the subreaper, so containers are its children, and it runs so little
  that almost all of its memory stays the zygote's;
- the **worker**, its child, which does what a shim does (`serve`). When nothing has happened for a while it hands
  what it has to the keeper, descriptors and a description, and ends. As soon as one of those descriptors is
  ready or a container has ended, the keeper forks the next worker, which goes on from there (`rest`).

They talk over a `socketpair(AF_UNIX, SOCK_SEQPACKET)`; the first byte of a packet says what it is.

    from the worker   U            it has taken up what the worker before it left: the keeper lets go of that
                      S serial     the number of the request that it is about to answer
                      T words      it has answered; what ps shall show of the keeper, separated by zero bytes, and with
                                   it the log and the folder to be in
                      A            the exit is heard of: its process may be reaped; the worker waits for G
                      D marks      descriptors, one mark for each: `w` watch it, `c` it is a connection: so, too,
                                   `k` only keep it
                      R            the description, in a file that comes along: it is the last; the worker waits for K.
                                   Without a file: what came shall not be kept after all
    from the keeper   E pid status a container's process has ended (wait status as of wait(2)); it stays until A
                      G            it is gone
                      K            all is kept
                      N            it could not be: the worker works on

A process that has ended stays until the worker has heard of it: nobody else can get its pid while the worker may
signal it, and what a worker did not get to hear is told to the next one. It is gone before anybody else is told.

The worker ends with the keeper. When a worker ends without having handed over, so does the keeper: a shim dies as one;
and when that was before it had answered its request, the keeper does so. A worker that ends before it has taken up what
was left has done nothing yet, so others follow it, later and later: there may be no memory, or too many open files,
and containers must not die of that.
"""

from __future__ import annotations

import _socket
import os
import select
import signal
import socket
import struct
import time
from _socket import socketpair as _socketpair
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pctr_shim.signals import Signals
from supervisord_ctr import faults
from supervisord_ctr.linux.libc import fork
from supervisord_ctr.linux.processes import set_child_subreaper, set_name, set_parent_death_signal, write_title

HANDING = faults.declare("shim.rest.handing-over", "descriptors are with the keeper; the description is not")

SHIM_NAME = "pctr-shim"
WORKER_NAME = "pctr-worker"
SPARE_NAME = "pctr-spare"
WATCH, CONNECTION, KEEP = b"wck"
EXIT = struct.Struct("<cii")
_DESCRIPTOR = struct.Struct("i")
_PACKET = 1024
#: Descriptors that one packet carries: the kernel takes 253 (unix(7), SCM_MAX_FD).
MOST_DESCRIPTORS = 200
_RETRY = 0.1
#: So many workers in a row may fail to take up what was left; each waits twice as long as the one before it.
_TRIES = 7
# What the keeper looks at, it writes a reference count into, and that page is then its own. So: plain integers and a
# socket as the C library has it, where enumerations and their like are objects all over the memory; functions by their
# own names, without the modules'; and few kinds of objects, no zip, enumerate or memoryview.
_POLLIN, _SIGTERM, _PEEK = int(select.POLLIN), int(signal.SIGTERM), os.WEXITED | os.WNOHANG | os.WNOWAIT
_AF_UNIX, _SOCK_SEQPACKET = int(socket.AF_UNIX), int(socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
_POLLHUP, _LOOKING = int(select.POLLHUP), int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
_RECEIVING = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
_NULL = os.O_RDWR | os.O_CLOEXEC
_ANCILLARY = socket.CMSG_SPACE(4 * MOST_DESCRIPTORS)
#: The reply to a request whose worker ended while it answered (14: unavailable).
_FAILED = b'{"serial": %s, "error": {"code": 14, "message": "the shim ended while it was being started"}}'
#: The shim's log, when no worker takes up what was left.
_GIVEN_UP = b"pctr-shim: no worker could take up what the last one left, so the shim ends with its containers\n"


@dataclass(frozen=True, slots=True)
class Post:
    """What a worker is given: the shim's pid, the way to its keeper, and what the worker before it left."""

    pid: int
    keeper: socket.socket
    #: A file with the description, -1 for the first worker.
    description: int = -1
    descriptors: Sequence[int] = ()

    def begin(self, serial: int) -> None:
        """Tell the keeper which request is being answered."""
        self.keeper.send(b"S%d" % serial)

    def taken_up(self) -> None:
        """Tell the keeper that it may let go of what the worker before this one left."""
        self.keeper.send(b"U")

    def introduce(self, *words: str) -> None:
        """Tell the keeper that the request is answered, and what it is the keeper of; log and folder are ours."""
        opened = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            socket.send_fds(self.keeper, [b"T" + "\0".join(words).encode()[:_PACKET - 1]], [2, opened])
        finally:
            os.close(opened)


class Keeper:
    """Use: `become()` in a fresh fork; it returns in every worker, and never in the keeper."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._pid = os.getpid()
        self._control: _socket.socket
        self._worker = 0
        self._told = 0
        self._kept: list[int] = []
        self._marks = b""
        self._description = -1
        self._failed = 0
        self._daemon = -1
        self._serial = b""
        self._orderly = False

    def become(self, daemon: int, work: int) -> Post:
        """Be the keeper. `daemon` is where replies go; on `work`, unless it is -1, a spare waits for its request."""
        os.setsid()
        set_child_subreaper()
        self._signals.renew()
        self._daemon = daemon
        if work >= 0:
            self._kept = [work]
            show_spare()
        while True:
            post = self._fork()
            if post is not None:
                return post
            if not self._attend() or self._failed == _TRIES:
                if self._failed:
                    os.write(2, _GIVEN_UP)
                os._exit(int(not self._orderly))
            if self._failed:
                time.sleep(_RETRY * (1 << (self._failed - 1)))  # noqa: TID251  nothing tells when there is room again
            else:
                self._rest()

    def rehearse(self, worker: Callable[[Post], None]) -> None:
        """Go through all of it with two workers, in the zygote: what running leaves in memory, forks share.

        `worker` is called in a child and has to take up, to introduce, and to hand over something that can be read.
        """
        self._signals.renew()
        self._daemon, self._pid = os.dup(2), os.getpid()
        for _ in range(2):
            post = self._fork()
            if post is not None:
                try:
                    worker(post)
                finally:
                    os._exit(1)
            if self._attend():
                self._rest()
        self._let_go()
        if self._daemon >= 0:
            os.close(self._daemon)
            self._daemon = -1

    def _fork(self) -> Post | None:
        """A worker; in it, its post. What the worker before it left is kept here until it says that it has that."""
        while True:
            try:
                ours, theirs = socketpair()
                pid = fork()
                break
            except OSError:  # as many processes or as much memory as there may be: containers must not die of that
                time.sleep(_RETRY)  # noqa: TID251  nothing tells when there is room again
        if pid == 0:
            ours.close()
            set_parent_death_signal(signal.SIGKILL)
            if os.getppid() != self._pid:
                os._exit(1)
            set_name(WORKER_NAME)
            kept = self._kept if self._description >= 0 else ()
            return Post(self._pid, socket.socket(fileno=theirs.detach()), self._description, kept)
        theirs.close()
        self._worker, self._control, self._told = pid, ours, 0
        if self._description < 0:
            self._let_go()
        else:
            self._failed += 1  # until it says otherwise
        return None

    def _let_go(self) -> None:
        """The worker has all this."""
        for fd in (*self._kept, self._description):
            if fd >= 0:
                os.close(fd)
        self._kept, self._marks, self._description, self._failed = [], b"", -1, 0

    # While a worker works

    def _attend(self) -> bool:
        """Serve the worker until it has ended; whether the keeper has what the next one needs."""
        poll = select.poll()
        control = self._control.fileno()
        poll.register(control, _POLLIN)
        poll.register(self._signals.reader, _POLLIN)
        self._look()
        while self._worker:
            for fd, _ in poll.poll():
                if fd == control:
                    self._hear()
                elif _SIGTERM in self._signals.take():
                    os.kill(self._worker, _SIGTERM)
            self._look()
        self._control.close()
        return self._description >= 0

    def _hear(self) -> bool:
        """Take one packet; whether there was one."""
        try:
            packet, ancillary, _, _ = self._control.recvmsg(_PACKET, _ANCILLARY, _RECEIVING)
        except BlockingIOError:
            return False
        except ConnectionError:
            packet, ancillary = b"", []
        kind = packet[:1]
        descriptors: list[int] = []
        if ancillary:
            for found in _DESCRIPTOR.iter_unpack(ancillary[0][2]):
                descriptors += found
        if kind == b"A" and self._told:
            os.waitpid(self._told, 0)
            self._told = 0
            self._say(b"G")
        elif kind == b"D":
            self._kept += descriptors
            self._marks += packet[1:]
        elif kind == b"R":
            self._keep(descriptors)
        elif kind == b"U":
            self._let_go()
        elif kind == b"S":
            self._serial = packet[1:]
        elif kind == b"T":
            self._introduce(packet[1:], *descriptors)
        elif not packet:
            self._ended()
            return False
        return True

    def _keep(self, description: list[int]) -> None:
        """Everything has come; or not, where there may be no more open files."""
        self._told = 0  # an exit that crossed is told again
        if description and len(self._kept) == len(self._marks):
            self._description = description[0]
            self._say(b"K")
            return
        for fd in (*self._kept, *description):
            os.close(fd)
        self._kept, self._marks = [], b""
        self._say(b"N")

    def _introduce(self, words: bytes, log: int, folder: int) -> None:
        os.close(self._daemon)
        self._daemon = -1
        set_name(SHIM_NAME)
        write_title(words)
        null = os.open("/dev/null", _NULL)
        for fd, number in ((null, 0), (null, 1), (log, 2)):
            os.dup2(fd, number)
        os.fchdir(folder)
        for fd in (null, log, folder):
            os.close(fd)

    def _look(self) -> None:
        """Tell the worker of the first process that has ended, unless it has one to note already."""
        while self._worker and not self._told:
            found = _first_ended()
            if found is None:
                return
            pid, status = found
            if pid == self._worker:
                while self._hear():
                    pass  # what it said before its end
                if self._worker:
                    self._ended()
                return
            self._told = pid
            self._say(EXIT.pack(b"E", pid, status))

    def _say(self, packet: bytes) -> None:
        try:
            self._control.send(packet)
        except ConnectionError:
            return  # the worker's end is seen in a moment

    def _ended(self) -> None:
        """The worker has ended."""
        _, status = os.waitpid(self._worker, 0)
        self._worker, self._orderly = 0, status == 0
        if status and self._description < 0 and self._daemon >= 0 and self._serial:
            try:
                os.write(self._daemon, _FAILED % self._serial)
            except ConnectionError:
                return  # nobody waits for it

    # While there is none

    def _rest(self) -> None:
        """Return when there is something to do."""
        poll = select.poll()
        poll.register(self._signals.reader, _POLLIN)
        place = 0
        for fd in self._kept:
            if self._marks[place] != KEEP:
                poll.register(fd, _POLLIN)
            place += 1  # noqa: SIM113  see above
        while _first_ended() is None:
            fd, events = poll.poll()[0]
            if fd == self._signals.reader:
                self._signals.take()  # SIGTERM, too: a shim that has containers outlives it
            elif events & _POLLHUP and self._forget(fd):
                poll.unregister(fd)
            else:
                break

    def _forget(self, fd: int) -> bool:
        """Let go of a connection whose client has gone and left nothing to read: nobody needs a worker for that."""
        number = self._kept.index(fd)
        if self._marks[number] != CONNECTION:
            return False
        connection = _socket.socket(fileno=fd)
        try:
            left = connection.recv(1, _LOOKING)
        except OSError:
            left = b""
        if left:
            connection.detach()
            return False
        connection.close()
        self._kept[number] = -1
        return True


def socketpair() -> tuple[_socket.socket, _socket.socket]:
    """Two ends that carry packets."""
    return _socketpair(_AF_UNIX, _SOCK_SEQPACKET)


def show_spare() -> None:
    """Have ps show that this is a shim without work."""
    set_name(SPARE_NAME)
    write_title(b"containerd-shim-pctr-v1\0(spare)")


def _first_ended() -> tuple[int, int] | None:
    """Pid and wait status of a child that has ended, which stays as it is."""
    try:
        found = os.waitid(os.P_ALL, 0, _PEEK)
    except ChildProcessError:
        return None
    if found is None:
        return None
    if found.si_code == os.CLD_EXITED:
        return found.si_pid, found.si_status << 8
    return found.si_pid, found.si_status | (0x80 if found.si_code == os.CLD_DUMPED else 0)


#: What of a keeper `rehearse` does not run.
BEFORE_REHEARSAL = frozenset(
    function.__code__ for function in (Keeper.become, set_child_subreaper, show_spare)
)


def hand_over(post: Post, descriptors: Sequence[tuple[int, int]], description: int) -> bool:
    """Give the keeper descriptors, each with its mark, and the file of the description.

    True: the worker has to end now. False: it has to work on. `ConnectionError` when the keeper is gone.
    """
    try:
        for start in range(0, len(descriptors), MOST_DESCRIPTORS):
            part = descriptors[start:start + MOST_DESCRIPTORS]
            socket.send_fds(post.keeper, [b"D" + bytes(mark for _, mark in part)], [fd for fd, _ in part])
        faults.point(HANDING)
        socket.send_fds(post.keeper, [b"R"], [description])
    except ConnectionError:
        raise
    except OSError:  # too many descriptors are on their way (unix(7), ETOOMANYREFS), or there is no memory
        post.keeper.send(b"R")
    while True:
        packet = post.keeper.recv(_PACKET)
        if packet == b"K":
            return True
        if packet == b"N":
            return False
        if not packet:
            raise ConnectionResetError("the keeper is gone")
        # What else comes is an exit that crossed. The keeper tells it again.
