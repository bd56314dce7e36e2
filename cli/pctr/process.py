"""A process in the foreground: its streams, signals, terminal and exit, in one loop.

Owns the time between the start of a task or exec and its exit. The caller creates and deletes it.
"""

from __future__ import annotations

import os
import select
import sys
import time

from pctr import light
from pctr.command import Failed
from pctr.contexts import ExitStack, suppress
from pctr.rpc import TASKS, Call, Client
from pctr.stdio import Fifos, Pump, open_input, open_output
from supervisord_ctr import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

    from pctr.terminal import SizeRelay
else:
    import _signal as signal  # see pctr.running

#: After an exit, how long an output may stay silent without its end before it is given up (P7).
QUIET = 1.0
#: How long a lost daemon is waited for: a restart must not end what runs (P4).
DAEMON_ABSENCE = 120.0
#: So many SIGINT or SIGTERM mean that whoever sends them will not wait: the process is killed, or left.
_PATIENCE = 3
_FORWARDED = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM,
)


class CaughtSignals:
    """Inside the block, these signals only write their number to the descriptor that it is entered with."""

    def __init__(self, *numbers: int) -> None:
        self._numbers = numbers

    def __enter__(self) -> int:
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._former_wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, lambda *_: None) for number in self._numbers}
        return self._reading

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_wakeup)
        os.close(self._reading)
        os.close(self._writing)


class Foreground:
    """Joins one process to our own streams until it exits.

    Open the streams before the process is created, call `start` when it may be started, then
    `relay`. Clear `proxy_signals` to forward no signals (a terminal's size is still followed), and
    `owns_process` when somebody else's process is only joined: it is then never killed, whatever
    happens to us.
    """

    def __init__(self, client: Client, container: str, exec_id: str = "", *, has_terminal: bool) -> None:
        self._client = client
        self._container = container
        self._exec = exec_id
        self._terminal = has_terminal
        self._pumps: list[Pump] = []
        self._input: Pump | None = None
        self._input_fd = -1
        self._output_fds: list[int] = []
        self._calls: list[Call[light.Empty]] = []
        self._wait: Call[light.WaitResponse] | None = None
        self._sizes: SizeRelay | None = None
        self._lost_at = 0.0
        self._retry_at = 0.0
        self._broken_pipe = False
        self._impatience = 0
        self.proxy_signals = True
        self.owns_process = True

    def open(self, stdin: str, stdout: str, stderr: str) -> None:
        """Open our ends of the fifos; "" leaves a stream out."""
        for path, target in ((stdout, 1), (stderr, 2)):
            if path:
                descriptor = open_output(path)
                self._output_fds.append(descriptor)
                self._pumps.append(Pump(descriptor, target))
        if stdin:
            self._input_fd = open_input(stdin)
            self._input = Pump(0, self._input_fd, on_end=self._input_ended)

    def open_fifos(self, fifos: Fifos) -> None:
        """`open` for fifos of our own."""
        self.open(fifos.stdin, fifos.stdout, fifos.stderr)

    def close(self) -> None:
        """Close our ends."""
        for descriptor in self._output_fds:
            os.close(descriptor)
        self._output_fds.clear()
        self._pumps.clear()
        self._close_input()

    def _close_input(self) -> None:
        if self._input_fd >= 0:
            os.close(self._input_fd)
            self._input_fd = -1

    # -- requests ----------------------------------------------------------------------------------

    def _ask(self, method: str, request: light.Message) -> Call[light.Empty] | None:
        try:
            call = self._client.start(TASKS + method, request, light.Empty)
        except errors.Unavailable:
            return None
        self._calls.append(call)
        return call

    def _input_ended(self) -> None:
        self._close_input()
        self._ask("CloseIO", light.CloseIORequest(container_id=self._container, exec_id=self._exec, stdin=True))

    def _kill(self, number: int) -> None:
        self._ask("Kill", light.KillRequest(container_id=self._container, exec_id=self._exec, signal=number))

    def _resize(self, width: int, height: int) -> Call[light.Empty] | None:
        return self._ask("ResizePty", light.ResizePtyRequest(
            container_id=self._container, exec_id=self._exec, width=width, height=height))

    def wait_for_exit(self) -> None:
        """Ask for the exit; the answer comes while `relay` runs."""
        self._wait = self._client.start(
            TASKS + "Wait", light.ProcessId(container_id=self._container, exec_id=self._exec), light.WaitResponse)

    # -- the loop ----------------------------------------------------------------------------------

    def relay(self, start: Callable[[], None]) -> int:
        """Call `start`, then copy until the process has exited and its output has come; the exit status."""
        forwarded = _FORWARDED if self.proxy_signals else ()
        numbers = (*forwarded, signal.SIGWINCH) if self._terminal else forwarded
        with ExitStack() as stack:
            if self._terminal:
                from pctr import terminal

                stack.enter_context(terminal.raw(0))
                self._sizes = terminal.SizeRelay(self._resize)
            start()
            signals = stack.enter_context(CaughtSignals(*numbers)) if numbers else -1
            if self._sizes is not None:
                self._sizes.changed()
            return self._loop(signals)

    def _loop(self, signals: int) -> int:
        status: int | None = None
        moved_at = time.monotonic()
        while True:
            if status is None:
                status = self._exit()
                moved_at = time.monotonic()
            self._settle_calls()
            open_outputs = [pump for pump in self._pumps if not pump.ended]
            if status is not None:
                blocked = any(pump.blocked for pump in open_outputs)
                if not open_outputs or (not blocked and time.monotonic() - moved_at > QUIET):
                    return 141 if self._broken_pipe else status
            ready = self._poll(signals, with_input=status is None)
            for pump in open_outputs:
                if pump.waits_for is not None and pump.waits_for[0] in ready and pump.step():
                    moved_at = time.monotonic()
                if pump.gone:
                    self._reader_gone()
            source = self._input
            if source is not None and status is None and source.waits_for is not None and source.waits_for[0] in ready:
                source.step()
            if signals in ready:
                self._forward(os.read(signals, 256))

    def _poll(self, signals: int, *, with_input: bool) -> set[int]:
        poll = select.poll()
        connection = self._client.established
        if connection is not None:
            connection.flush()
            poll.register(connection.fileno(), select.POLLIN | (select.POLLOUT if connection.wants_write else 0))
        if signals >= 0:
            poll.register(signals, select.POLLIN)
        events: dict[int, int] = {}
        for pump in (*self._pumps, *((self._input,) if self._input is not None and with_input else ())):
            if pump.waits_for is not None:
                descriptor, event = pump.waits_for
                events[descriptor] = events.get(descriptor, 0) | event
        for descriptor, event in events.items():
            poll.register(descriptor, event)
        timeout = 200 if self._wait is None or not with_input else None
        ready = {descriptor for descriptor, _ in poll.poll(timeout)}
        if connection is not None and connection.failure is None and connection.fileno() in ready:
            connection.pump(0.0)
        return ready

    def _forward(self, numbers: bytes) -> None:
        for number in numbers:
            if number == signal.SIGWINCH:
                if self._sizes is not None:
                    self._sizes.changed()
                continue
            self._kill(number)
            self._impatience += number in (signal.SIGINT, signal.SIGTERM)
            if self._impatience == _PATIENCE:
                if not self.owns_process:
                    raise Failed(f"left {self._container} running", 128 + number)
                self._kill(signal.SIGKILL)

    def _reader_gone(self) -> None:
        """Nobody reads our output any more: what writes into a closed pipe ends, so the process does."""
        if not self._broken_pipe:
            self._broken_pipe = True
            if not self.owns_process:
                raise BrokenPipeError
            self._kill(signal.SIGKILL)

    def _settle_calls(self) -> None:
        for call in [call for call in self._calls if call.done]:
            self._calls.remove(call)
            try:
                call.result()
            except (errors.NotFound, errors.FailedPrecondition, errors.Unavailable):
                pass  # it has ended, or the daemon is away: the exit will tell
            except errors.Error as error:
                print(f"pctr: {error}\r", file=sys.stderr)
        if self._sizes is not None:
            self._sizes.settle()

    def _exit(self) -> int | None:
        """The exit status when it is known; joins the daemon again when it was away."""
        if self._wait is None:
            return self._rejoin()
        if not self._wait.done:
            return None
        try:
            return int(self._wait.result().exit_status) & 0xFF
        except errors.Unavailable:
            self._wait = None
            self._calls.clear()
            self._lost_at = self._retry_at = time.monotonic()
            return None

    def _rejoin(self) -> int | None:
        now = time.monotonic()
        if now < self._retry_at:
            return None
        if now - self._lost_at > DAEMON_ABSENCE:
            raise Failed(f"the daemon has been away for {DAEMON_ABSENCE:.0f} seconds; {self._container} may still run")
        self._retry_at = now + 0.2
        with suppress(errors.Unavailable):
            self.wait_for_exit()
            if self._sizes is not None:
                self._sizes.changed()  # it may have changed while nobody could be told
        return None
