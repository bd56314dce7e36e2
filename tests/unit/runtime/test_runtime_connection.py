"""What a connection to a shim remembers of its tasks, and when it asks again."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from supervisord_ctr import errors
from supervisord_ctr.api.runtime.task.v3 import task_pb2 as api
from supervisord_ctr.model import TaskStatus
from supervisord_ctr.runtime import connection
from supervisord_ctr.ttrpc.client import Client


class FakeClient:
    """Answers State with `status`, and counts how often it was asked."""

    def __init__(self) -> None:
        self.closed = False
        self.status = TaskStatus.RUNNING
        self.asked = 0

    async def call(self, service: str, method: str, request: Message, response: type[Message], **_: Any) -> Message:
        if self.closed:
            raise errors.Unavailable("closed")
        if method != "State":
            return response()
        self.asked += 1
        return api.StateResponse(id="c", pid=7, status=int(self.status))  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of the monotonic clock, to be moved on."""
    now = [1000.0]
    monkeypatch.setattr(connection.time, "monotonic", lambda: now[0])
    assert time.monotonic() == 1000.0
    return now


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


def service(client: FakeClient, *, remembers: bool = True) -> connection.TaskService:
    return connection.TaskService(cast("Client", client), "default", 3, remembers=remembers)


async def test_a_task_in_which_nothing_happened_is_asked_for_once(client: FakeClient, clock: list[float]) -> None:
    tasks = service(client)
    for _ in range(2):  # something happened just now: it was connected to
        assert (await tasks.state("c", "")).status == TaskStatus.RUNNING
    assert client.asked == 2
    clock[0] += 1.5
    client.status = TaskStatus.PAUSED
    for _ in range(3):
        assert (await tasks.state("c", "")).status == TaskStatus.PAUSED
    assert client.asked == 3
    await tasks.state("c", "e")
    assert client.asked == 4  # an exec is asked for each time


async def test_calls_exits_and_events_make_it_ask_again(client: FakeClient, clock: list[float]) -> None:
    tasks = service(client)
    for happen in (lambda: tasks.kill("c", "", 15, False), lambda: tasks.wait("c", ""), lambda: tasks.pause("c")):
        clock[0] += 1.5
        await tasks.state("c", "")
        before = client.asked
        await tasks.state("c", "")
        assert client.asked == before
        await happen()
        await tasks.state("c", "")
        await tasks.state("c", "")
        assert client.asked == before + 2
    clock[0] += 1.5
    await tasks.state("c", "")
    before = client.asked
    tasks.note()
    await tasks.state("c", "")
    assert client.asked == before + 1


async def test_p6_a_shim_that_is_gone_is_not_remembered_as_running(client: FakeClient, clock: list[float]) -> None:
    tasks = service(client)
    clock[0] += 1.5
    await tasks.state("c", "")
    client.closed = True
    with pytest.raises(errors.Unavailable):
        await tasks.state("c", "")


async def test_a_shim_whose_events_go_elsewhere_is_asked_each_time(client: FakeClient, clock: list[float]) -> None:
    tasks = service(client, remembers=False)
    clock[0] += 1.5
    for _ in range(3):
        await tasks.state("c", "")
    assert client.asked == 3
    assert isinstance(await tasks.call("Kill", api.KillRequest(id="c"), Empty), Empty)
