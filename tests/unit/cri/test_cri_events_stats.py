"""Events with slow listeners, stats from readings, metric names, pages."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import metric_names, stats
from supervisord_ctr.cri.container_report import container_status, exit_reason, pages
from supervisord_ctr.cri.core import Core, Stages, all_of
from supervisord_ctr.cri.events import EventHub
from supervisord_ctr.cri.pipes import opened
from supervisord_ctr.cri.state import Container
from supervisord_ctr.errors import ResourceExhausted


def publish(hub: EventHub, name: str) -> None:
    hub.publish(name, pb.CONTAINER_STARTED_EVENT, None, [])


async def test_events_reach_every_listener_in_order() -> None:
    hub = EventHub()
    seen: list[list[str]] = [[], []]

    async def listen(into: list[str]) -> None:
        async for event in hub.listen():
            into.append(event.container_id)

    async with asyncio.TaskGroup() as group:
        for into in seen:
            group.create_task(listen(into))
        while len(hub) < 2:
            await asyncio.sleep(0)
        for name in ("a", "b", "c"):
            publish(hub, name)
        hub.close()
    assert seen == [["a", "b", "c"]] * 2
    assert len(hub) == 0


async def test_p9_a_listener_that_does_not_read_loses_its_stream_alone() -> None:
    hub = EventHub(limit=3)
    slow = hub.listen()
    first = asyncio.get_running_loop().create_future()

    async def begin() -> None:
        first.set_result(await anext(slow))

    async with asyncio.TaskGroup() as group:
        group.create_task(begin())
        while not len(hub):
            await asyncio.sleep(0)
        publish(hub, "0")
    for index in range(1, 6):
        publish(hub, str(index))
    seen = [first.result().container_id]
    with pytest.raises(ResourceExhausted):
        async for event in slow:
            seen.append(event.container_id)
    assert seen == ["0", "1", "2", "3"]
    assert len(hub) == 0


async def first_of(hub: EventHub, count: int) -> list[str]:
    """What a listener hears first."""
    stream = hub.listen()
    try:
        return [(await anext(stream)).container_id for _ in range(count)]
    finally:
        await stream.aclose()  # type: ignore[attr-defined]


async def test_p14_what_happens_while_nobody_listens_is_held_for_the_first_who_does() -> None:
    hub = EventHub(held=3)
    for name in "abcd":
        publish(hub, name)
    assert await first_of(hub, 3) == ["b", "c", "d"]
    publish(hub, "e")
    assert await first_of(hub, 1) == ["e"]
    hub.close()


async def test_held_events_are_forgotten_after_a_while() -> None:
    hub = EventHub(held_for=0.0)
    publish(hub, "old")
    heard: list[str] = []

    async def listen() -> None:
        async for event in hub.listen():
            heard.append(event.container_id)

    async with asyncio.TaskGroup() as group:
        group.create_task(listen())
        while not len(hub):
            await asyncio.sleep(0)
        publish(hub, "new")
        hub.close()
    assert heard == ["new"]


V1 = stats.Reading(1, False, {
    "cpu": {"usage": {"total": 5_000, "user": 1, "kernel": 2}},
    "memory": {"usage": {"usage": 100, "limit": 1000, "max": 0, "failcnt": 0}, "total_inactive_file": 30,
               "swap": {"usage": 110, "limit": 1500}, "total_rss": 40},
    "pids": {"current": 3, "limit": 1 << 63},
})
V2 = stats.Reading(1, True, {
    "cpu": {"usage_usec": 5}, "memory": {"usage": 100, "usage_limit": (1 << 64) - 1, "inactive_file": 120},
})


def test_readings_of_both_cgroup_versions() -> None:
    assert (stats.cpu_total(V1), stats.working_set(V1), stats.memory_limit(V1)) == (5_000, 70, 1000)
    assert (stats.cpu_total(V2), stats.working_set(V2), stats.memory_limit(V2)) == (5_000, 0, 0)
    assert V2.part("no", "such") == {}
    assert V1.number("memory", "no") == 0


def test_rates_need_two_samples_that_are_apart() -> None:
    collector = stats.StatsCollector()
    second = 1_000_000_000
    assert collector.rate("c", second, 100) == 0
    assert collector.rate("c", second + 1000, 200) == 0
    assert collector.rate("c", 2 * second, 1100) == 1000
    assert collector.rate("c", 2 * second + 1, 9999) == 1000
    assert collector.rate("c", 4 * second, 0) == 0
    collector.forget("c")
    assert collector.rate("c", 5 * second, 5) == 0


def test_every_metric_has_words_and_labels_once() -> None:
    described = metric_names.descriptors()
    assert len({item.name for item in described}) == len(described) == len(metric_names.LABELS)
    assert all(item.help and item.label_keys[:2] == ["pod", "namespace"] for item in described)
    assert "container_threads" in metric_names.GAUGES
    assert "container_oom_events_total" not in metric_names.GAUGES


def test_a_status_is_shared_until_something_changes() -> None:
    """A pod's events hold the statuses of all of its containers: a copy for each event would be large."""
    image = SimpleNamespace(tags=["example.test/app:1"], digests=["example.test/app@sha256:ab"])
    core = cast(Core, SimpleNamespace(images=SimpleNamespace(get={"sha256:cd": image}.get)))
    container = Container("c1", "app", "p1", pb.ContainerConfig(image=pb.ImageSpec(image="app")))
    container.image_id, container.stage = "sha256:cd", "created"
    told = container_status(core, container)
    assert (told.image.image, told.image_ref, told.state) == (
        "example.test/app:1", "example.test/app@sha256:ab", pb.CONTAINER_CREATED)
    assert container_status(core, container) is told
    image.tags = ["example.test/app:2"]
    retagged = container_status(core, container)
    assert (retagged.image.image, told.image.image) == ("example.test/app:2", "example.test/app:1")
    container.stage = "running"
    container.changed()
    assert container_status(core, container).state == pb.CONTAINER_RUNNING
    assert retagged.state == pb.CONTAINER_CREATED
    container.image_id = "sha256:gone"
    container.changed()
    assert container_status(core, container).image_ref == "sha256:gone"


def test_pages() -> None:
    assert [len(page) for page in pages(list(range(501)), 250)] == [250, 250, 1]
    assert list(pages([])) == [[]]


@pytest.mark.parametrize(("code", "oom", "reason", "expected"), [
    (0, False, "", "Completed"), (1, False, "", "Error"), (137, True, "", "OOMKilled"), (128, False, "StartError", "StartError"),
])
def test_reasons_of_an_exit(code: int, oom: bool, reason: str, expected: str) -> None:
    container = Container("c", "n", "p", pb.ContainerConfig(), stage="exited", exit_code=code, oom=oom, reason=reason)
    assert exit_reason(container) == expected


def test_p22_stages_tell_what_runs_and_since_when() -> None:
    book = Stages()
    assert book.tell("pod") == ""
    with book.track("pod", "first") as stage:
        stage.enter("second")
        assert book.tell("pod").startswith("second, for ")
        assert list(book.all()) == ["pod"]
    assert book.all() == {}


async def test_all_of_waits_for_everyone_before_it_fails() -> None:
    ended: list[str] = []

    async def work(name: str, fail: bool) -> None:
        await asyncio.sleep(0)
        if fail:
            raise ValueError(name)
        await asyncio.sleep(0)
        ended.append(name)

    with pytest.raises(ValueError, match="b"):
        await all_of(work("a", False), work("b", True), work("c", False))
    assert ended == ["a", "c"]


async def test_pipes_carry_bytes_and_vanish(tmp_path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "x"
    async with opened(folder, stdin=True, stdout=True, stderr=False) as pipes:
        assert pipes.stderr == ""
        with open(pipes.stdout, "wb", buffering=0) as writer:
            writer.write(b"hello")
            assert await pipes.read(pipes.stdout) == b"hello"
        assert await pipes.read(pipes.stdout) == b""
        with pytest.raises(BrokenPipeError):
            await pipes.write_stdin(b"nobody reads")
    assert not folder.exists()
