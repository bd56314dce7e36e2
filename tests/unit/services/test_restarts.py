"""The restart monitor against tasks that only pretend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from supervisord_ctr.errors import InvalidArgument, NotFound, Unavailable
from supervisord_ctr.model import Container, Exit, Runtime, TaskStatus, TypedValue
from supervisord_ctr.runtime import TaskState
from supervisord_ctr.services.restarts import COUNT, LOG, POLICY, STATUS, STOPPED, RestartMonitor, parse_policy
from tests.support.stores import Stores, open_stores


class FakeTasks:
    """Tasks by name, and what was asked of them."""

    def __init__(self) -> None:
        self.states: dict[str, TaskState] = {}
        self.calls: list[str] = []
        self.held: dict[str, asyncio.Event] = {}

    def put(self, name: str, status: TaskStatus, exit_status: int = 0) -> None:
        self.states[name] = TaskState(name, status=status, exit_status=exit_status)

    async def state(self, namespace: str, container_id: str) -> TaskState:
        if container_id in self.held:
            await self.held[container_id].wait()
        if container_id not in self.states:
            raise NotFound("no task")
        return self.states[container_id]

    async def create(self, namespace: str, container_id: str, **options: Any) -> int:
        self.calls.append(f"create {container_id} {options['stdout']} {options['stderr']} {options['terminal']}")
        self.put(container_id, TaskStatus.CREATED)
        return 1

    async def start(self, namespace: str, container_id: str) -> int:
        self.calls.append(f"start {container_id}")
        self.put(container_id, TaskStatus.RUNNING)
        return 1

    async def kill(self, namespace: str, container_id: str, **options: Any) -> None:
        self.calls.append(f"kill {container_id}")
        if self.states[container_id].status == TaskStatus.STOPPED:
            raise NotFound("no process")

    async def wait(self, namespace: str, container_id: str) -> Exit:
        return Exit(137, 0.0)

    async def delete(self, namespace: str, container_id: str) -> Exit:
        self.calls.append(f"delete {container_id}")
        del self.states[container_id]
        return Exit(137, 0.0)


class Subject:
    def __init__(self, stores: Stores) -> None:
        self.containers = stores.database.containers
        self.tasks = FakeTasks()
        self.monitor = RestartMonitor(stores.database, self.tasks, 3600)

    async def container(self, name: str, labels: dict[str, str], spec: bytes = b"{}") -> None:
        await self.containers.create("ns", Container(name, labels, "", Runtime("r"), TypedValue("s", spec)))

    async def look(self) -> list[str]:
        await self.monitor.look()
        await self.monitor.settled()
        calls, self.tasks.calls = self.tasks.calls, []
        return calls


@pytest.fixture
async def subject(tmp_path: Path) -> AsyncIterator[Subject]:
    async with open_stores(tmp_path) as stores:
        made = Subject(stores)
        yield made
        await made.monitor.close()


@pytest.mark.parametrize(("text", "expected"), [
    ("", ("always", 0)), ("no", ("no", 0)), ("on-failure", ("on-failure", 0)), ("on-failure:3", ("on-failure", 3)),
    ("unless-stopped", ("unless-stopped", 0)),
])
def test_policies(text: str, expected: tuple[str, int]) -> None:
    assert parse_policy(text) == expected


@pytest.mark.parametrize("text", ["sometimes", "always:3", "on-failure:x", "on-failure:", ":"])
def test_bad_policies(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_policy(text)


async def test_a_task_that_ended_is_started_again_and_counted(subject: Subject) -> None:
    await subject.container("c", {STATUS: "running", LOG: "file:///log", "other": "kept"})
    await subject.container("unlabelled", {"note": STATUS})
    subject.tasks.put("c", TaskStatus.STOPPED, 1)
    assert await subject.look() == ["kill c", "delete c", "create c file:///log file:///log False", "start c"]
    assert dict((await subject.containers.get("ns", "c")).labels) == {
        STATUS: "running", LOG: "file:///log", "other": "kept", COUNT: "1"
    }
    assert await subject.look() == []
    del subject.tasks.states["c"]
    assert await subject.look() == ["create c file:///log file:///log False", "start c"]
    assert (await subject.containers.get("ns", "c")).labels[COUNT] == "2"


async def test_a_terminal_has_one_output(subject: Subject) -> None:
    await subject.container("c", {STATUS: "running", LOG: "file:///log"}, b'{"process":{"terminal":true}}')
    assert await subject.look() == ["create c file:///log  True", "start c"]


async def test_what_is_to_be_stopped_is(subject: Subject) -> None:
    await subject.container("c", {STATUS: "stopped"})
    assert await subject.look() == []
    subject.tasks.put("c", TaskStatus.RUNNING)
    assert await subject.look() == ["kill c", "delete c"]
    subject.tasks.put("c", TaskStatus.STOPPED)
    assert await subject.look() == []


@pytest.mark.parametrize(("labels", "exit_status", "restarted"), [
    ({POLICY: "always"}, 0, True), ({POLICY: "no"}, 1, False), ({POLICY: "on-failure"}, 0, False),
    ({POLICY: "on-failure"}, 1, True), ({POLICY: "on-failure:2", COUNT: "1"}, 1, True),
    ({POLICY: "on-failure:2", COUNT: "2"}, 1, False), ({POLICY: "unless-stopped"}, 0, True),
    ({POLICY: "unless-stopped", STOPPED: "true"}, 0, False), ({POLICY: "nonsense"}, 1, False),
])
async def test_the_policy_decides(
    subject: Subject, labels: dict[str, str], exit_status: int, restarted: bool
) -> None:
    await subject.container("c", {STATUS: "running", **labels})
    subject.tasks.put("c", TaskStatus.STOPPED, exit_status)
    assert ("start c" in await subject.look()) is restarted


@pytest.mark.parametrize("status", [TaskStatus.PAUSED, TaskStatus.PAUSING, TaskStatus.UNKNOWN, TaskStatus.RUNNING])
async def test_p6_what_may_run_is_left_alone(subject: Subject, status: TaskStatus) -> None:
    await subject.container("c", {STATUS: "running"})
    subject.tasks.put("c", status)
    assert await subject.look() == []


async def test_a_client_has_time_to_start_what_it_made(subject: Subject) -> None:
    await subject.container("c", {STATUS: "running"})
    subject.tasks.put("c", TaskStatus.CREATED)
    assert await subject.look() == []
    assert await subject.look() == ["kill c", "delete c", "create c   False", "start c"]


async def test_p15_one_that_hangs_delays_no_other_and_is_not_asked_twice(subject: Subject) -> None:
    await subject.container("slow", {STATUS: "running"})
    subject.tasks.held["slow"] = asyncio.Event()
    await subject.monitor.look()
    await subject.container("quick", {STATUS: "running"})
    await subject.monitor.look()
    while "start quick" not in subject.tasks.calls:
        await asyncio.sleep(0.001)
    assert not any("slow" in call for call in subject.tasks.calls)
    subject.tasks.held["slow"].set()
    await subject.monitor.settled()
    assert subject.tasks.calls.count("start slow") == 1


async def test_a_failure_is_tried_again_at_the_next_look(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    await subject.container("c", {STATUS: "running"})

    async def fail(*_: Any, **__: Any) -> int:
        raise Unavailable("not now")

    with monkeypatch.context() as patch:
        patch.setattr(subject.tasks, "create", fail)
        assert await subject.look() == []
    assert "start c" in await subject.look()


async def test_p5_a_container_that_is_removed_while_its_task_is_made_leaves_no_task(
    subject: Subject, monkeypatch: pytest.MonkeyPatch,
) -> None:
    await subject.container("c", {STATUS: "running"})
    create = subject.tasks.create

    async def remove_meanwhile(namespace: str, container_id: str, **options: Any) -> int:
        made = await create(namespace, container_id, **options)
        await subject.containers.delete("ns", "c")
        return made

    monkeypatch.setattr(subject.tasks, "create", remove_meanwhile)
    assert (await subject.look())[1:] == ["kill c", "delete c"], "and it never ran"
    assert subject.tasks.states == {}
