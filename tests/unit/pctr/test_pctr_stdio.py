"""Pumps: every byte arrives, nothing waits, and what cannot be written is known."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pctr.stdio import Fifos, Pump, open_input, open_output, remove_fifos_of

DATA = os.urandom(3 << 20)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for descriptor in (reading, writing):
        try:
            os.close(descriptor)
        except OSError:
            pass


def _drive(pump: Pump) -> None:
    while (wait := pump.waits_for) is not None:
        poll = select.poll()
        poll.register(*wait)
        assert poll.poll(30_000)
        pump.step()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]
    os.close(descriptor)


def _read_all(descriptor: int, into: bytearray) -> None:
    while part := os.read(descriptor, 1 << 16):
        into += part


def test_pipe_to_pipe(pipe: tuple[int, int]) -> None:
    source, target = os.pipe()
    received = bytearray()
    writer = threading.Thread(target=_write_all, args=(target, DATA))
    reader = threading.Thread(target=_read_all, args=(pipe[0], received))
    writer.start()
    reader.start()
    ended = []
    pump = Pump(source, pipe[1], on_end=lambda: ended.append(True))
    _drive(pump)
    os.close(pipe[1])
    os.close(source)
    writer.join(30)
    reader.join(30)
    assert bytes(received) == DATA
    assert ended == [True]


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_WRONLY | os.O_APPEND])
def test_pipe_to_file(tmp_path: Path, pipe: tuple[int, int], flags: int) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"before:")
    target = os.open(path, flags)
    os.lseek(target, 0, os.SEEK_END)
    writer = threading.Thread(target=_write_all, args=(pipe[1], DATA))
    writer.start()
    _drive(Pump(pipe[0], target))
    writer.join(30)
    os.close(target)
    assert path.read_bytes() == b"before:" + DATA


def test_file_to_pipe(tmp_path: Path, pipe: tuple[int, int]) -> None:
    path = tmp_path / "in"
    path.write_bytes(DATA)
    received = bytearray()
    reader = threading.Thread(target=_read_all, args=(pipe[0], received))
    reader.start()
    source = os.open(path, os.O_RDONLY)
    _drive(Pump(source, pipe[1]))
    os.close(source)
    os.close(pipe[1])
    reader.join(30)
    assert bytes(received) == DATA


def test_a_target_that_takes_nothing_stops_the_pump_and_no_one_waits(pipe: tuple[int, int]) -> None:
    source, feed = os.pipe()
    os.set_blocking(feed, False)
    pump = Pump(source, pipe[1])
    for _ in range(200):
        try:
            os.write(feed, b"z" * 4096)
        except BlockingIOError:
            break
        pump.step()
    for _ in range(50):
        pump.step()
    assert pump.blocked
    assert pump.waits_for == (pipe[1], select.POLLOUT)
    os.close(source)
    os.close(feed)


def test_a_reader_that_has_gone_is_noticed_and_the_rest_is_drained(pipe: tuple[int, int]) -> None:
    source, feed = os.pipe()
    os.close(pipe[0])
    os.write(feed, b"nobody reads this")
    pump = Pump(source, pipe[1])
    pump.step()
    assert pump.gone
    os.close(feed)
    _drive(pump)
    assert pump.ended
    os.close(source)


def test_an_output_fifo_has_no_end_before_it_had_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reading = open_output(str(path))
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    assert not poll.poll(0)
    writing = os.open(path, os.O_WRONLY)
    os.write(writing, b"x")
    os.close(writing)
    assert poll.poll(30_000)
    assert os.read(reading, 10) == b"x"
    assert os.read(reading, 10) == b""
    os.close(reading)


def test_an_input_fifo_needs_no_reader_to_open(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writing = open_input(str(path))
    os.write(writing, b"early")
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.close(writing)
    assert os.read(reading, 10) == b"early"
    os.close(reading)


def test_s12_fifos_are_private_and_go_with_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pctr.stdio.fifo_root", lambda: str(tmp_path / "fifos"))
    fifos = Fifos(stdin=True, stderr=False)
    assert os.stat(fifos.directory).st_mode & 0o777 == 0o700
    assert os.stat(fifos.stdin).st_mode & 0o777 == 0o600
    assert fifos.stderr == ""
    outside = tmp_path / "other" / "stdout"
    outside.parent.mkdir()
    os.mkfifo(outside)
    remove_fifos_of([fifos.stdin, fifos.stdout, fifos.stderr, str(outside)])
    assert not os.path.exists(fifos.directory)
    assert outside.exists()
