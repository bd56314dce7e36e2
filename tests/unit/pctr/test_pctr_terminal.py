"""The size of a process's terminal follows ours, whatever order a daemon works in."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from pctr import terminal


class Sent:
    """A call under way."""

    def __init__(self) -> None:
        self.done = False


class Daemon:
    """Takes sizes; `away` while no call can be made."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.calls: list[Sent] = []
        self.away = False

    def send(self, width: int, height: int) -> Sent | None:
        """Begin a call."""
        if self.away:
            return None
        self.sizes.append((width, height))
        self.calls.append(Sent())
        return self.calls[-1]


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[os.terminal_size]]:
    """The size of our terminal, to be changed."""
    now = [os.terminal_size((101, 43))]
    monkeypatch.setattr(os, "get_terminal_size", lambda _: now[0])
    return now


def test_a_size_waits_for_the_answer_to_the_one_before_it(ours: list[os.terminal_size]) -> None:
    daemon = Daemon()
    relay = terminal.SizeRelay(daemon.send)
    relay.changed()
    for columns in (90, 80, 77):
        ours[0] = os.terminal_size((columns, 22))
        relay.changed()
    relay.settle()
    assert daemon.sizes == [(101, 43)]
    daemon.calls[0].done = True
    relay.settle()
    assert daemon.sizes == [(101, 43), (77, 22)]
    daemon.calls[1].done = True
    relay.settle()
    assert daemon.sizes == [(101, 43), (77, 22)]


def test_a_size_that_could_not_be_told_is_told_when_it_can_be(ours: list[os.terminal_size]) -> None:
    daemon = Daemon()
    relay = terminal.SizeRelay(daemon.send)
    daemon.away = True
    relay.changed()
    relay.settle()
    assert daemon.sizes == []
    daemon.away = False
    relay.settle()
    assert daemon.sizes == [(101, 43)]


def test_no_size_is_told_of_what_is_no_terminal(ours: list[os.terminal_size]) -> None:
    daemon = Daemon()
    ours[0] = os.terminal_size((0, 0))
    terminal.SizeRelay(daemon.send).changed()
    assert daemon.sizes == []
