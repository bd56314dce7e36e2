"""Publish and subscribe: filters, bounds, ends."""

from __future__ import annotations

import asyncio

import pytest

from supervisord_ctr.api.events import events_pb2
from supervisord_ctr.errors import InvalidArgument, ResourceExhausted, Unavailable
from supervisord_ctr.events import Exchange, pack, unpack
from supervisord_ctr.model import Event, TypedValue

EXIT = events_pb2.TaskExit(container_id="c1", id="e1", pid=7, exit_status=3)


async def test_a_subscriber_gets_what_comes_after_it() -> None:
    exchange = Exchange(clock=lambda: 5.0)
    exchange.publish("ns", "/tasks/start", events_pb2.TaskStart(container_id="before"))
    async with exchange.subscribe() as events:
        exchange.publish("ns", "/tasks/exit", EXIT)
        event = await anext(events)
    assert event == Event(5.0, "ns", "/tasks/exit", pack(EXIT))
    assert event.event.type_url == "containerd.events.TaskExit"
    assert unpack(event.event) == EXIT
    assert len(exchange) == 0


@pytest.mark.parametrize(("filters", "matches"), [
    ([], True),
    (['topic=="/tasks/exit"'], True),
    (["topic~=/tasks/"], True),
    (['topic~="^/images"'], False),
    (["namespace==ns"], True),
    (["namespace==other"], False),
    (['namespace==other', 'topic=="/tasks/exit"'], True),
    (["event.container_id==c1"], True),
    (["event.container_id==c2"], False),
    (["event.pid==7"], True),
    (["event.nonsense"], False),
    (["event.exited_at"], False),
    (["nonsense"], False),
])
async def test_filters(filters: list[str], matches: bool) -> None:
    exchange = Exchange()
    async with exchange.subscribe(filters) as events:
        exchange.publish("ns", "/tasks/exit", EXIT)
        exchange.close()
        assert len([event async for event in events]) == matches


async def test_filters_look_into_maps_and_messages() -> None:
    exchange = Exchange()
    create = events_pb2.ContainerCreate(id="c", runtime=events_pb2.ContainerCreate.Runtime(name="runc"))
    update = events_pb2.ContainerUpdate(id="c", labels={"a.b": "x"})
    async with exchange.subscribe(["event.runtime.name==runc", "event.labels.a.b==x"]) as events:
        exchange.publish("ns", "/containers/create", create)
        exchange.publish("ns", "/containers/update", update)
        exchange.forward(Event(1.0, "ns", "/other", TypedValue("no.such.Type", b"\xff")))
        exchange.close()
        assert [event.topic async for event in events] == ["/containers/create", "/containers/update"]


async def test_p9_a_slow_subscriber_harms_only_itself() -> None:
    exchange = Exchange(limit=10)
    async with exchange.subscribe() as slow, exchange.subscribe() as quick:
        for number in range(25):
            exchange.publish("ns", "/tasks/start", events_pb2.TaskStart(pid=number))
            assert unpack((await anext(quick)).event) == events_pb2.TaskStart(pid=number)
        with pytest.raises(ResourceExhausted, match="too slow"):
            await anext(slow)


async def test_waiting_subscribers_end_with_the_exchange() -> None:
    exchange = Exchange()
    async with exchange.subscribe() as events:
        waiting = asyncio.get_running_loop().create_task(anext(events, None))
        await asyncio.sleep(0)
        exchange.close()
        assert await waiting is None
    with pytest.raises(Unavailable):
        async with exchange.subscribe():
            pass


@pytest.mark.parametrize("topic", ["", "tasks", "/", "//", "/a//b", "/a b", "/" + "x" * 80])
def test_bad_topics(topic: str) -> None:
    with pytest.raises(InvalidArgument):
        Exchange().publish("ns", topic, EXIT)


def test_bad_events() -> None:
    with pytest.raises(InvalidArgument):
        Exchange().publish("a/b", "/tasks/exit", EXIT)
    with pytest.raises(InvalidArgument, match="timestamp"):
        Exchange().forward(Event(0.0, "ns", "/tasks/exit", pack(EXIT)))


async def test_bad_filters() -> None:
    with pytest.raises(InvalidArgument):
        async with Exchange().subscribe(["topic="]):
            pass
