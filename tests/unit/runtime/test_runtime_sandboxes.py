"""Sandboxes kept by our own shims: their life, the containers in them, and the next daemon."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from supervisord_ctr import errors
from supervisord_ctr.aio import wait_until
from supervisord_ctr.model import Runtime, Sandbox, TypedValue
from supervisord_ctr.runtime.sandboxes import NOT_READY, READY
from tests.support.places import SHORT
from tests.unit.runtime.fakes import NAMESPACE, Machine

POD = Sandbox("pod", Runtime("io.containerd.runc.v2"), TypedValue("spec", b"{}"))


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    folder = Path(tempfile.mkdtemp(prefix="rt-", dir=SHORT))
    made = Machine(folder)
    await made.start()
    yield made
    await made.close()
    shutil.rmtree(folder)


async def test_a_sandbox_lives_without_containers(machine: Machine) -> None:
    boxes = machine.tasks.sandboxes
    await boxes.create(NAMESPACE, POD)
    assert (await boxes.status(NAMESPACE, "pod")).state == NOT_READY
    started = await boxes.start(NAMESPACE, "pod")
    assert (started.state, started.version) == (READY, 3)
    assert started.address.startswith("ttrpc+unix:///")
    assert (await boxes.platform(NAMESPACE, "pod")).os == "linux"
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(boxes.wait(NAMESPACE, "pod"))
        await asyncio.sleep(0)
        await boxes.stop(NAMESPACE, "pod")
    assert waiting.result().status == 0
    assert (await boxes.status(NAMESPACE, "pod")).state == NOT_READY
    await boxes.shutdown(NAMESPACE, "pod")
    (shim,) = machine.zygote.shims
    await wait_until(lambda: shim.ended, 30, "its shim ends")
    assert not list(machine.folder.glob("state/sandboxes/*/*"))


async def test_errors(machine: Machine) -> None:
    boxes = machine.tasks.sandboxes
    for call in (boxes.start, boxes.wait, boxes.platform, boxes.shutdown, boxes.metrics):
        with pytest.raises(errors.NotFound):
            await call(NAMESPACE, "nobody")
    await boxes.stop(NAMESPACE, "nobody")
    assert (await boxes.status(NAMESPACE, "nobody")).state == NOT_READY
    await boxes.create(NAMESPACE, POD)
    with pytest.raises(errors.AlreadyExists):
        await boxes.create(NAMESPACE, POD)
    with pytest.raises(errors.InvalidArgument):
        await boxes.create(NAMESPACE, Sandbox("../x"))


async def test_its_containers_use_its_shim_and_hold_it(machine: Machine) -> None:
    boxes = machine.tasks.sandboxes
    await boxes.create(NAMESPACE, POD)
    shim = await machine.run("c1", sandbox="pod")
    assert machine.zygote.shims == [shim]
    with pytest.raises(errors.FailedPrecondition, match="c1"):
        await boxes.shutdown(NAMESPACE, "pod")
    shim.tasks["c1"].exit(0)
    await machine.tasks.delete(NAMESPACE, "c1")
    assert not shim.ended
    await boxes.shutdown(NAMESPACE, "pod")
    await wait_until(lambda: shim.ended, 30, "its shim ends")


async def test_the_next_daemon_finds_it(machine: Machine) -> None:
    await machine.tasks.sandboxes.create(NAMESPACE, POD)
    await machine.restart()
    boxes = machine.tasks.sandboxes
    assert (await boxes.status(NAMESPACE, "pod")).state == READY
    shim = await machine.run("c1", sandbox="pod")
    assert machine.zygote.shims == [shim]


async def test_a_dead_shim_ends_its_sandbox(machine: Machine) -> None:
    boxes = machine.tasks.sandboxes
    await boxes.create(NAMESPACE, POD)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(boxes.wait(NAMESPACE, "pod"))
        await asyncio.sleep(0)
        await machine.zygote.shims[0].die()
    assert waiting.result().status == 137
    await machine.restart()
    with pytest.raises(errors.NotFound):
        await machine.tasks.sandboxes.start(NAMESPACE, "pod")
    assert not list(machine.folder.glob("state/sandboxes/*/*"))
