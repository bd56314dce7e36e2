"""`pctr run -t` and `exec -t` on a real terminal: size, resizes, input, and the terminal put back."""

from __future__ import annotations

import fcntl
import os
import pty
import secrets
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator

import pytest

from tests.support.fake_registry import fake_registry
from tests.support.pctr_target import TIMEOUT, Target, busybox_image, running_target


@pytest.fixture(scope="module", params=["supervisord-ctr", "containerd"])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    with fake_registry() as registry, running_target(request.param) as made:
        made.image = registry.add("suite/busybox", "1", busybox_image())
        made.pctr("image", "pull", made.image)
        yield made
        for row in made.rows("container", "ls"):
            made.pctr("container", "rm", "--force", row["container"])


class Terminal:
    """A terminal with pctr on it, as its session's leader."""

    def __init__(self, target: Target, *words: str) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(101, 43)
        self.before = termios.tcgetattr(self.slave)
        self.output = b""
        slave = self.slave

        self.process = subprocess.Popen(
            [*_SETCTTY, *target.command(*words)], stdin=slave, stdout=slave, stderr=slave, env=target.environment,
            start_new_session=True,
        )

    def resize(self, columns: int, rows: int) -> None:
        """Give the terminal another size."""
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: bytes) -> None:
        """Press keys."""
        os.write(self.master, text)

    def wait_for(self, text: bytes) -> None:
        """Wait until the screen has shown `text`."""
        deadline = time.monotonic() + TIMEOUT
        while text not in self.output:
            left = deadline - time.monotonic()
            if left <= 0 or (not self._read(min(left, 1.0)) and self.process.poll() is not None):
                self._read(0)
                assert text in self.output, self.output[-2000:]

    def _read(self, timeout: float) -> bool:
        if not select.select([self.master], [], [], timeout)[0]:
            return False
        self.output += os.read(self.master, 65536)
        return True

    def wait(self) -> int:
        """Wait for pctr's end, reading on."""
        deadline = time.monotonic() + TIMEOUT
        while self.process.poll() is None and time.monotonic() < deadline:
            self._read(0.1)
        while self._read(0):
            pass
        return self.process.wait(1)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


# setsid made a session; this gives it the terminal, so that the kernel sends SIGWINCH.
_SETCTTY = [
    "python3", "-c",
    "import fcntl,os,sys,termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])",
]


@pytest.fixture
def name() -> str:
    return f"c{secrets.token_hex(4)}"


@pytest.mark.parametrize("options", [(), ("--no-sig-proxy",)])
def test_the_terminal_has_our_size_and_follows_it(target: Target, name: str, options: tuple[str, ...]) -> None:
    script = "stty size; echo begin; read line; stty size; echo line=$line; exit 5"
    terminal = Terminal(target, "run", "--rm", "-t", *options, target.image, name, "sh", "-c", script)
    try:
        terminal.wait_for(b"begin")
        assert b"43 101" in terminal.output
        terminal.resize(77, 22)
        # What is typed after the resize arrives after it only once pctr has passed the resize on.
        exec_size = ("task", "exec", name, "sh", "-c", "stty size < /dev/pts/0 2>/dev/null || stty size < /dev/console")
        deadline = time.monotonic() + TIMEOUT
        while (asked := target.pctr(*exec_size, status=None)).stdout.strip() != b"22 77":
            assert time.monotonic() < deadline, (asked, terminal.output)
        terminal.type(b"typed\r")
        assert terminal.wait() == 5
        assert b"22 77" in terminal.output
        assert b"line=typed" in terminal.output
        assert termios.tcgetattr(terminal.slave) == terminal.before
    finally:
        terminal.close()
    assert name not in target.ids()


def test_keys_go_to_the_process_and_not_to_us(target: Target, name: str) -> None:
    script = "trap 'echo interrupted; exit 3' INT; echo ready; while true; do sleep 0.1; done"
    terminal = Terminal(target, "run", "--rm", "-t", target.image, name, "sh", "-c", script)
    try:
        terminal.wait_for(b"ready")
        terminal.type(b"\x03")
        assert terminal.wait() == 3
        assert b"interrupted" in terminal.output
        assert termios.tcgetattr(terminal.slave) == terminal.before
    finally:
        terminal.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_put_back_when_we_are_told_to_end(target: Target, name: str, number: int) -> None:
    script = "trap 'exit 4' TERM HUP; echo ready; while true; do sleep 0.1; done"
    terminal = Terminal(target, "run", "--rm", "-t", target.image, name, "sh", "-c", script)
    try:
        terminal.wait_for(b"ready")
        os.kill(terminal.process.pid, number)
        assert terminal.wait() == 4
        assert termios.tcgetattr(terminal.slave) == terminal.before
    finally:
        terminal.close()


def test_the_terminal_is_put_back_when_it_cannot_start(target: Target, name: str) -> None:
    terminal = Terminal(target, "run", "--rm", "-t", target.image, name, "/no/such/program")
    try:
        assert terminal.wait() == 1
        assert b"/no/such/program" in terminal.output
        assert termios.tcgetattr(terminal.slave) == terminal.before
    finally:
        terminal.close()
    assert name not in target.ids()


def test_exec_with_a_terminal(target: Target, name: str) -> None:
    target.pctr("run", "-d", target.image, name, "sleep", "1000")
    terminal = Terminal(target, "task", "exec", "-t", name, "sh", "-c", "echo begin; read line; stty size; exit 8")
    try:
        terminal.wait_for(b"begin")
        terminal.type(b"\r")
        assert terminal.wait() == 8
        assert b"43 101" in terminal.output
        assert termios.tcgetattr(terminal.slave) == terminal.before
    finally:
        terminal.close()
        target.pctr("container", "rm", "--force", name)
