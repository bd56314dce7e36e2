"""`pctr pod exec|attach|port-forward` against the real daemon."""

from __future__ import annotations

import os
import pty
import select
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.daemon import wait_until
from tests.support.streaming_pod import Pod, running_pod

pytestmark = pytest.mark.slow
LIMIT = 60.0


@pytest.fixture(scope="module")
def pod() -> Iterator[Pod]:
    with running_pod() as made:
        yield made


@pytest.fixture(scope="module")
def container(pod: Pod) -> str:
    return pod.run("sleep", "100000", name="main")


def command(pod: Pod, *words: str) -> list[str]:
    return [sys.executable, "-m", "pctr", "--address", str(pod.daemon.address), "pod", *words]


def pctr(pod: Pod, *words: str, data: bytes | None = None) -> tuple[int, bytes, bytes]:
    feed = {"stdin": subprocess.DEVNULL} if data is None else {"input": data}
    done = subprocess.run(command(pod, *words), capture_output=True, timeout=LIMIT, **feed)  # type: ignore[call-overload]
    return done.returncode, done.stdout, done.stderr


def test_exec_passes_everything_through(pod: Pod, container: str) -> None:
    script = "cat; echo err >&2; exit 7"
    assert pctr(pod, "exec", "-i", container, "--", "sh", "-c", script, data=b"in") == (7, b"in", b"err\n")
    assert pctr(pod, "exec", container[:10], "echo", "by beginning") == (0, b"by beginning\n", b"")
    assert pctr(pod, "exec", "main", "echo", "by name") == (0, b"by name\n", b"")


def test_exec_says_what_is_wrong(pod: Pod, container: str) -> None:
    code, _, err = pctr(pod, "exec", container, "no-such-command")
    assert code == 1
    assert b"executable file not found in $PATH" in err
    assert pctr(pod, "exec", "nobody", "true")[0] == 1
    assert pctr(pod, "exec", container)[0] == 2
    assert pctr(pod, "exec", "-t", container, "sh")[0] == 2


def test_exec_on_a_terminal(pod: Pod, container: str) -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (33, 101))
    before = termios.tcgetattr(slave)
    process = subprocess.Popen(
        command(pod, "exec", "-it", container, "sh", "-c",
                # The protocol does not order the size before the input, nor does any peer.
                "read x; until stty size 2>&1 | grep '33 101'; do usleep 50000; done; echo got $x; exit 9"),
        stdin=slave, stdout=slave, stderr=slave,
    )
    try:
        wait_until(lambda: not termios.tcgetattr(slave)[3] & termios.ICANON, "raw terminal", LIMIT)
        os.write(master, b"typed\r")
        seen = b""
        deadline = time.monotonic() + LIMIT
        while b"got typed" not in seen and time.monotonic() < deadline:
            if select.select([master], [], [], 1.0)[0]:
                seen += os.read(master, 4096)
        assert b"33 101" in seen
        assert process.wait(LIMIT) == 9
        assert termios.tcgetattr(slave) == before
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)


def test_attach(pod: Pod) -> None:
    shell = pod.run("sh", "-c", "while read line; do echo got $line; done; exit 0", stdin=True, stdin_once=True)
    assert pctr(pod, "attach", "-i", shell, data=b"one\ntwo\n") == (0, b"got one\ngot two\n", b"")


def test_port_forward(pod: Pod, container: str) -> None:
    listener = pod.listen(container)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"hello " + connection.recv(100))

    thread = threading.Thread(target=serve)
    thread.start()
    process = subprocess.Popen(
        command(pod, "port-forward", pod.id, f"0:{listener.getsockname()[1]}"), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    port = int(process.stdout.readline().split(b":")[1].split()[0])
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as client:
        client.sendall(b"pod")
        assert client.recv(100) == b"hello pod"
    process.send_signal(2)
    assert process.wait(LIMIT) == 0
    process.stdout.close()
    thread.join(LIMIT)
    listener.close()
