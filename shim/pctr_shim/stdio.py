"""The standard streams of one process, as its client addressed them.

Owns the pipes or the terminal between the shim and the process, and the pumps that move bytes. What an
address may be:

    ""                       the null device
    /path                    a fifo that the client made (or a plain file: appended to)
    fifo:///path             the same, said explicitly
    file:///path             appended to
    binary:///program?a=b    a logger that reads the streams itself (containerd's logging binaries)
    cri-log:///path?…        records in the format of CRI, see `crilog`
    attach://                no place of its own: only attached clients (stdin: fed by them;
                             `attach://?once=1`: ends when the first client that feeds it leaves)

An attached client sees output whatever the address is, except with "" and `binary://`, where the
bytes do not pass through the shim.

The end: `drain` waits until the output of a process that has exited is delivered. Its own bytes were
in the pipe when it exited, so silence of a tenth of a second after that is enough even when a child
in the background keeps the pipe open; a reader that does not read is given two seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import struct
import termios
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pctr_shim import sinks
from pctr_shim.attach import Client
from pctr_shim.belongings import Belongings, Busy
from pctr_shim.crilog import CriLogSink, LogAddress, LogFile
from pctr_shim.fdio import Pump, Sink
from pctr_shim.logger import BinaryLogger
from pctr_shim.reaper import Reaper
from pctr_shim.sinks import FileSink, NullSink, PipeSink, TerminalSink, is_fifo, open_fifo_for_output
from supervisord_ctr import errors
from supervisord_ctr.model import Exit

log = logging.getLogger(__name__)

QUIET = 0.1
STALLED = 2.0
DRAIN_LIMIT = 10.0
_PIPE_SIZE = 1 << 18
_STREAMS = {1: "stdout", 2: "stderr"}


@dataclass(frozen=True, slots=True)
class StreamAddresses:
    """What the request said, word for word; State repeats it."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose streams these are (loggers are told) and to whom the pipes shall belong."""

    namespace: str
    container_id: str
    exec_id: str = ""
    uid: int = 0
    gid: int = 0


class ProcessIO:
    """Use: `await prepare()`, start the process with `descriptors`, `begin()` (or `begin_terminal`)."""

    def __init__(self, addresses: StreamAddresses, owner: Owner, reaper: Reaper) -> None:
        self.addresses = addresses
        self._owner = owner
        self._reaper = reaper
        self.descriptors: dict[int, int] = {}
        self._outputs: list[tuple[int, Pump]] = []
        self._ready: list[Callable[[], None]] = []
        self._input: PipeSink | None = None
        self._input_pump: Pump | None = None
        self._keepalive = -1
        self._once = False
        self._master = -1
        self._logger: BinaryLogger | None = None
        self._logs: dict[LogAddress, LogFile] = {}
        self._files: list[FileSink] = []
        self._clients: set[Client] = set()
        self._all_ended = asyncio.Event()
        self._ended: Exit | None = None
        self._closed = False

    def leave(self, belongings: Belongings) -> dict[str, Any]:
        """Describe the streams for the next worker; `Busy` with a terminal, a logger, clients or bytes under way."""
        if self._master >= 0 or self._logger is not None or self._clients or self._closed:
            raise Busy("a terminal, a logging program or an attached client")
        live = [(number, pump) for number, pump in self._outputs if not pump.ended]
        target = self._input if self._input is not None and not self._input.closed else None
        return {
            "logs": [file.leave(belongings) for file in self._logs.values()],
            "outputs": [
                {"number": number, "fd": pump.leave(belongings), "sink": pump.sink.leave(belongings)}
                for number, pump in live
            ],
            "input": target.leave(belongings) if target is not None else None,
            "source": self._input_pump.leave(belongings) if self._input_pump is not None and target is not None else -1,
            "keepalive": belongings.leave(self._keepalive),
            "ended": self._ended is not None and [self._ended.status, self._ended.at, self._ended.pid],
        }

    def resume(self, left: Mapping[str, Any], belongings: Belongings) -> None:
        """Go on with what `leave` described."""
        for address, file in zip(self._log_addresses(), left["logs"], strict=True):
            self._logs[address] = LogFile.resume(address, file, belongings)
        for output in left["outputs"]:
            number, sink = output["number"], output["sink"]
            if sink["kind"] == "cri-log":
                address = LogAddress.parse(self.addresses.stdout if number == 1 else self.addresses.stderr)
                made: Sink = CriLogSink(self._logs[address], _STREAMS[number], bytes.fromhex(sink["rest"]))
            else:
                made = sinks.resume(sink, belongings)
                if isinstance(made, FileSink):
                    self._files.append(made)
            self._pump_output(belongings.take(output["fd"]), number, made, pipe=True)
        self._keepalive = belongings.take(left["keepalive"])
        if left["input"] is not None:
            self._input = PipeSink(belongings.take(left["input"]["fd"]))
            self._input.on_room = self._input_has_room
            self._once = _feeds_once(self.addresses.stdin)
            if left["source"] >= 0:
                self._pump_input(belongings.take(left["source"]), self._input)
        if left["ended"]:
            self._ended = Exit(*left["ended"])
        self._start_pumps()

    def _log_addresses(self) -> list[LogAddress]:
        """Of the CRI logs, each once, in the order of the streams."""
        texts = (self.addresses.stdout, self.addresses.stderr)
        return list(dict.fromkeys(LogAddress.parse(text) for text in texts if _scheme(text) == "cri-log"))

    async def prepare(self) -> None:
        """Open what the addresses name; on failure nothing stays open."""
        try:
            if _scheme(self.addresses.stdout) in ("binary", "binary-v2"):
                self._logger = await BinaryLogger.start(
                    self.addresses.stdout, self._owner.namespace, self._owner.container_id, self._reaper
                )
            if not self.addresses.terminal:
                self._prepare_pipes()
        except BaseException:
            await self.close()
            raise

    def _prepare_pipes(self) -> None:
        if self.addresses.stdin:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            self.descriptors[0] = reader
            os.set_blocking(writer, False)
            self._input = PipeSink(writer)
            self._chown(reader)
        for number, address in ((1, self.addresses.stdout), (2, self.addresses.stderr)):
            if self._logger is not None:
                self.descriptors[number] = os.dup(self._logger.writers[number - 1])
                self._chown(self.descriptors[number])
            elif address:
                reader, writer = os.pipe2(os.O_CLOEXEC)
                os.set_blocking(reader, False)
                _widen(reader)
                self.descriptors[number] = writer
                self._chown(writer)
                self._pump_output(reader, number, self._sink(address, number), pipe=True)

    def _chown(self, fd: int) -> None:
        if self._owner.uid or self._owner.gid:
            os.fchown(fd, self._owner.uid, self._owner.gid)

    def _sink(self, address: str, number: int) -> Sink:
        scheme, path = _scheme(address), _path(address)
        if scheme == "cri-log":
            target = LogAddress.parse(address)
            file = self._logs.get(target)
            if file is None:
                file = self._logs[target] = LogFile(target)
            return CriLogSink(file, _STREAMS[number])
        if scheme == "attach":
            return NullSink()
        if scheme == "file" or (scheme == "fifo" and not is_fifo(path)):
            if scheme == "file":
                os.makedirs(os.path.dirname(path) or "/", mode=0o755, exist_ok=True)
            self._files.append(FileSink(path))
            return self._files[-1]
        if scheme == "fifo":
            return PipeSink(open_fifo_for_output(path))
        raise errors.InvalidArgument(f"unknown STDIO scheme {scheme}", key=address)

    def _pump_output(self, fd: int, number: int, sink: Sink, *, pipe: bool) -> None:
        pump = Pump(
            fd, sink, tap=lambda data: self._offer(number, data), tapped=lambda: bool(self._clients), pipe=pipe,
            on_end=self._output_ended,
        )
        self._outputs.append((number, pump))
        self._ready.append(pump.start)

    def _offer(self, number: int, data: bytes) -> None:
        for client in list(self._clients):
            client.output(number, data)

    def _output_ended(self) -> None:
        if all(pump.ended for _, pump in self._outputs):
            self._all_ended.set()

    def begin(self) -> None:
        """The process has its descriptors: let go of ours and start to move bytes."""
        self._close_descriptors()
        self._open_input()
        self._start_pumps()

    def _start_pumps(self) -> None:
        for start in self._ready:
            start()
        self._ready.clear()
        if not self._outputs:
            self._all_ended.set()

    def begin_terminal(self, master: int) -> None:
        """The process has a terminal, whose other side is `master` (owned from now on)."""
        os.set_blocking(master, False)
        self._master = master
        if self.addresses.stdin:
            self._input = TerminalSink(os.dup(master))
        if self._logger is not None:
            target = os.dup(self._logger.writers[0])
            os.set_blocking(target, False)
            sink: Sink = PipeSink(target)
        else:
            sink = self._sink(self.addresses.stdout, 1) if self.addresses.stdout else NullSink()
        self._pump_output(os.dup(master), 1, sink, pipe=False)
        self.begin()

    def _open_input(self) -> None:
        address = self.addresses.stdin
        if self._input is None:
            return
        if _scheme(address) == "attach":
            self._once = _feeds_once(address)
            self._input.on_room = self._input_has_room
            return
        path = _path(address)
        try:
            source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self._keepalive = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC) if is_fifo(path) else -1
        except OSError as error:
            raise errors.from_os_error(error, "open stdin") from error
        self._pump_input(source, self._input)

    def _pump_input(self, source: int, target: PipeSink) -> None:
        pump = Pump(
            source, target, tap=lambda data: None, tapped=lambda: False,
            pipe=not self.addresses.terminal and is_fifo(_path(self.addresses.stdin)), on_end=lambda: None,
        )
        self._input_pump = pump
        target.on_room = self._input_has_room
        pump.start()

    def _input_has_room(self) -> None:
        if self._input_pump is not None:
            self._input_pump.start()
        for client in list(self._clients):
            client.resume()

    # Attached clients (attach.Attachable)

    def attach(self, client: Client) -> None:
        """Show the client what comes from now on; a process that has ended says so at once."""
        if self._ended is not None and self._all_ended.is_set():
            client.finish(self._ended)
            return
        self._clients.add(client)

    def detach(self, client: Client) -> None:
        """Forget a client; its leaving may end the input (`attach://?once=1`)."""
        if client in self._clients:
            self._clients.discard(client)
            if self._once and self._input is not None and client.feeds:
                self._input.flush()

    def feed(self, client: Client, data: bytes) -> bool:
        """Write a client's input to the process."""
        return self._input is None or self._input.write(data)

    @property
    def attached(self) -> int:
        """Clients that are attached now."""
        return len(self._clients)

    def close_stdin(self) -> None:
        """No more input will be offered: the process sees the end once what was written is read."""
        if self._keepalive >= 0:
            os.close(self._keepalive)
            self._keepalive = -1
        if self._input is not None and self._input_pump is None:
            self._input.flush()

    def resize(self, width: int, height: int) -> None:
        """Set the terminal's size; a process without a terminal does not care."""
        if self._master >= 0:
            size = struct.pack("HHHH", height & 0xFFFF, width & 0xFFFF, 0, 0)
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    # Logs

    @property
    def dropped_bytes(self) -> int:
        """Output that a full disk or a rate cap swallowed."""
        return sum(file.dropped for file in self._logs.values()) + sum(file.dropped for file in self._files)

    def reopen_logs(self) -> None:
        """Open the CRI log's path anew; `FailedPrecondition` when there is no such log."""
        if not self._logs:
            raise errors.FailedPrecondition(f"container {self._owner.container_id} has no log of the cri-log kind")
        for file in self._logs.values():
            try:
                file.reopen()
            except OSError as error:
                raise errors.from_os_error(error, "reopen log") from error

    # The end

    async def drain(self) -> None:
        """Wait until the output of the ended process is delivered; see the module's text for when."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DRAIN_LIMIT
        still_since = loop.time()
        moved = -1
        while not self._all_ended.is_set() and loop.time() < deadline:
            now = sum(pump.moved for _, pump in self._outputs)
            if now != moved or any(pump.behind for _, pump in self._outputs):
                moved, still_since = now, loop.time()
            patience = STALLED if any(pump.stalled for _, pump in self._outputs) else QUIET
            if loop.time() - still_since >= patience:
                if patience == STALLED:
                    log.warning("%s: nobody takes the rest of its output", self._owner.container_id)
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_ended.wait(), QUIET / 2)

    def finish(self, ended: Exit) -> None:
        """The process ended and its output is delivered: tell the attached clients."""
        self._ended = ended
        for client in list(self._clients):
            client.finish(ended)

    def _close_descriptors(self) -> None:
        for fd in self.descriptors.values():
            os.close(fd)
        self.descriptors.clear()

    async def close(self) -> None:
        """Close everything and wait for the logger program, if there is one, to end."""
        if self._closed:
            return
        self._closed = True
        self._close_descriptors()
        for client in list(self._clients):
            client.close()
        for _, pump in self._outputs:
            pump.close()
        if self._input_pump is not None:
            self._input_pump.close()
        for file in self._logs.values():
            file.close()
        if self._input is not None:
            self._input.close()
        for fd in (self._keepalive, self._master):
            if fd >= 0:
                os.close(fd)
        self._keepalive = self._master = -1
        if self._logger is not None:
            await self._logger.close()


def _widen(pipe: int) -> None:
    """Let more output wait in the pipe: fewer wake-ups. The kernel may refuse when a user has many."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)


def _scheme(address: str) -> str:
    scheme, separator, _ = address.partition("://")
    return scheme if separator else "fifo"


def _feeds_once(address: str) -> bool:
    return _scheme(address) == "attach" and "once=1" in address


def _path(address: str) -> str:
    if "://" not in address:
        return address
    return urllib.parse.unquote(urllib.parse.urlsplit(address).path)
