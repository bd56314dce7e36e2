"""Events on their way: in order, several in one call where the daemon takes them so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import pytest
from google.protobuf.empty_pb2 import Empty
from pctr_shim import publisher
from pctr_shim.config import ShimConfig
from pctr_shim.reaper import Reaper
from pctr_shim.service import TaskService

from supervisord_ctr import errors
from supervisord_ctr.aio import wait_until
from supervisord_ctr.api.events import events_pb2
from supervisord_ctr.api.services.ttrpc.events.v1 import events_pb2 as forward_pb2
from supervisord_ctr.api.shim.v1 import shim_pb2
from supervisord_ctr.ttrpc.server import Context, Method, Server, listen


class Daemon:
    """Takes events one by one and, unless it is an old one, several at once."""

    def __init__(self, path: Path, *, old: bool) -> None:
        self.calls: list[list[str]] = []
        services = {publisher.SERVICE: {"Forward": Method(forward_pb2.ForwardRequest, self._one)}}
        if not old:
            services[publisher.OWN_SERVICE] = {"ForwardAll": Method(shim_pb2.ForwardAllRequest, self._several)}
        self.server = Server(services)
        self.listener = listen(str(path))

    async def _one(self, request: forward_pb2.ForwardRequest, context: Context) -> Empty:
        self.calls.append([events_pb2.TaskOOM.FromString(request.envelope.event.value).container_id])
        return Empty()

    async def _several(self, request: shim_pb2.ForwardAllRequest, context: Context) -> Empty:
        found = [events_pb2.TaskOOM.FromString(each.event.value).container_id for each in request.envelopes]
        self.calls.append(found)
        return Empty()


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Callable[..., Daemon]]:
    made: list[Daemon] = []

    def start(*, old: bool) -> Daemon:
        made.append(Daemon(tmp_path / "e", old=old))
        return made[0]

    yield start
    for daemon in made:
        await daemon.server.close()
        daemon.listener.close()


@pytest.mark.parametrize(("old", "batches"), [(False, True), (False, False), (True, True)])
async def test_events_arrive_in_order(
    serve: Callable[..., Daemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool, batches: bool
) -> None:
    monkeypatch.setattr(publisher, "_BATCH", 7)
    config = ShimConfig("n", "g", str(tmp_path), "", events=str(tmp_path / "e"), batches=batches)
    sender = publisher.Publisher(config, Reaper())
    sender.start()
    names = [f"c{number}" for number in range(30)]
    for name in names:
        sender.publish("/tasks/oom", events_pb2.TaskOOM(container_id=name))
    assert len(sender) == 30
    daemon = serve(old=old)
    await daemon.server.serve(daemon.listener)
    sender.nudge()
    await wait_until(lambda: len(sender) == 0, 60, "all events to be taken")
    assert [name for call in daemon.calls for name in call] == names
    assert max(map(len, daemon.calls)) == (7 if batches and not old else 1)
    await sender.close()


async def test_p13_the_last_events_leave_before_the_sender_closes(serve: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = serve(old=False)
    await daemon.server.serve(daemon.listener)
    sender = publisher.Publisher(ShimConfig(events=str(tmp_path / "e")), Reaper())
    sender.start()
    sender.publish("/tasks/oom", events_pb2.TaskOOM(container_id="c"))
    await sender.close()
    assert daemon.calls == [["c"]]


async def test_a_daemon_of_ours_that_is_gone_is_awaited_and_not_tried(
    serve: Callable[..., Daemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "_FIRST_RETRY", 0.01)
    monkeypatch.setattr(publisher, "_LONGEST_RETRY", 0.02)
    sender = publisher.Publisher(ShimConfig(events=str(tmp_path / "e"), batches=True), Reaper())
    sender.start()
    sender.publish("/tasks/oom", events_pb2.TaskOOM(container_id="a"))
    assert sender.busy
    await wait_until(lambda: not sender.busy, 60, "it to wait")
    next_worker = publisher.Publisher(ShimConfig(events=str(tmp_path / "e"), batches=True), Reaper())
    next_worker.take_up(sender.leave())
    await sender.close(0)
    next_worker.publish("/tasks/oom", events_pb2.TaskOOM(container_id="b"))
    next_worker.start()
    await wait_until(lambda: not next_worker.busy, 60, "the next one to wait")
    daemon = serve(old=False)
    await daemon.server.serve(daemon.listener)
    await asyncio.sleep(0.1)  # noqa: TID251  nothing must happen
    assert daemon.calls == []
    next_worker.nudge()
    await wait_until(lambda: len(next_worker) == 0, 60, "all events to be taken")
    assert daemon.calls == [["a", "b"]]
    await next_worker.close()


async def test_a_daemon_that_shows_up_while_a_try_fails_is_not_overlooked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "_FIRST_RETRY", 0.01)
    monkeypatch.setattr(publisher, "_LONGEST_RETRY", 0.01)
    sender = publisher.Publisher(ShimConfig(events=str(tmp_path / "e"), batches=True), Reaper())
    tries = 0

    async def connect(target: str) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            sender.nudge()
        raise errors.Unavailable("nobody") from FileNotFoundError()

    monkeypatch.setattr(publisher.Client, "connect", connect)
    sender.start()
    sender.publish("/tasks/oom", events_pb2.TaskOOM(container_id="a"))
    await wait_until(lambda: not sender.busy, 60, "it to wait")
    await wait_until(lambda: tries == 2, 60, "a second try")
    await sender.close(0)


@pytest.mark.parametrize("method", ["State", "Connect"])
async def test_who_asks_a_shim_how_it_is_takes_its_events(tmp_path: Path, method: str) -> None:
    config = ShimConfig(events=str(tmp_path / "e"), batches=True)
    sender = publisher.Publisher(config, Reaper())
    asked: list[str] = []
    sender.nudge = lambda: asked.append(method)  # type: ignore[method-assign]
    found = TaskService(config, Reaper(), sender, lambda: None).methods()[method]
    with contextlib.suppress(errors.NotFound):
        await found.handler(found.request(id="c"), cast("Context", None))
    assert asked == [method]


async def test_a_foreign_daemon_that_is_gone_is_tried_on(
    serve: Callable[..., Daemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "_FIRST_RETRY", 0.01)
    monkeypatch.setattr(publisher, "_LONGEST_RETRY", 0.02)
    sender = publisher.Publisher(ShimConfig(events=str(tmp_path / "e")), Reaper())
    sender.start()
    sender.publish("/tasks/oom", events_pb2.TaskOOM(container_id="a"))
    await asyncio.sleep(0.2)  # noqa: TID251  several tries fail
    assert sender.busy
    daemon = serve(old=False)
    await daemon.server.serve(daemon.listener)
    await wait_until(lambda: len(sender) == 0, 60, "the event to be taken")
    assert daemon.calls == [["a"]]
    await sender.close()


async def test_events_that_nobody_wants_are_not_kept() -> None:
    sender = publisher.Publisher(ShimConfig(), Reaper())
    sender.start()
    sender.publish("/tasks/oom", events_pb2.TaskOOM(container_id="c"))
    assert len(sender) == 0
    await sender.close()
