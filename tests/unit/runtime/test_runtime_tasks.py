"""Tasks over fake shims: life, errors, lost shims, and other daemons on the same folders."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from supervisord_ctr import errors
from supervisord_ctr.aio import wait_until
from supervisord_ctr.linux import cgroups
from supervisord_ctr.model import Container, Exit, Runtime, TaskStatus, TypedValue
from supervisord_ctr.runtime import RuntimeConfig
from supervisord_ctr.runtime.bundle import Bundle
from supervisord_ctr.runtime.spec import SANDBOX_ANNOTATION, read_spec
from supervisord_ctr.runtime.zygote import Remains
from tests.support.places import SHORT
from tests.unit.runtime.fakes import NAMESPACE, FakeShim, Machine


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    # Directly below /tmp: socket paths may hold 107 bytes only.
    folder = Path(tempfile.mkdtemp(prefix="rt-", dir=SHORT))
    made = Machine(folder)
    await made.start()
    yield made
    await made.close()
    shutil.rmtree(folder)


async def test_a_task_lives_and_leaves_nothing(machine: Machine) -> None:
    machine.store.add("c1")
    assert await machine.tasks.create(NAMESPACE, "c1", rootfs=[]) == 100
    (state,) = await machine.tasks.list(NAMESPACE)
    assert (state.id, state.status, state.pid) == ("c1", TaskStatus.CREATED, 100)
    assert await machine.tasks.start(NAMESPACE, "c1") == 100
    (shim,) = machine.zygote.shims
    assert shim.namespaces == {NAMESPACE}
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(machine.tasks.wait(NAMESPACE, "c1"))
        await wait_until(lambda: "Wait" in shim.calls, 30, "somebody waits")
        shim.tasks["c1"].exit(7)
    assert (waiting.result().status, waiting.result().pid) == (7, 100)
    assert (await machine.tasks.delete(NAMESPACE, "c1")).status == 7
    assert await machine.tasks.list(NAMESPACE) == []
    await wait_until(lambda: machine.leftovers() == [], 30, "nothing left")


async def test_errors_are_those_of_containerd(machine: Machine) -> None:
    with pytest.raises(errors.NotFound, match="container"):
        await machine.tasks.create(NAMESPACE, "c1", rootfs=[])
    with pytest.raises(errors.NotFound, match="container"):
        await machine.tasks.start(NAMESPACE, "c1")
    machine.store.add("c1")
    with pytest.raises(errors.NotFound, match="task c1 not found"):
        await machine.tasks.start(NAMESPACE, "c1")
    await machine.run("c1")
    with pytest.raises(errors.AlreadyExists):
        await machine.tasks.create(NAMESPACE, "c1", rootfs=[])
    with pytest.raises(errors.FailedPrecondition):
        await machine.tasks.delete(NAMESPACE, "c1")
    with pytest.raises(errors.InvalidArgument):
        await machine.tasks.exec(NAMESPACE, "c1", "", spec=TypedValue("p", b"{}"))
    with pytest.raises(errors.InvalidArgument):
        await machine.tasks.exec(NAMESPACE, "c1", "../x", spec=TypedValue("p", b"{}"))
    assert len(await machine.tasks.list(NAMESPACE)) == 1


@pytest.mark.parametrize("runtime", ["runc", "io.containerd.not-there.v1", "/not/there", "a/b.v1"])
async def test_unknown_runtimes_are_refused(machine: Machine, runtime: str) -> None:
    machine.store.add("c1", runtime=Runtime(runtime))
    with pytest.raises((errors.NotFound, errors.InvalidArgument)):
        await machine.tasks.create(NAMESPACE, "c1", rootfs=[])
    await wait_until(lambda: machine.leftovers() == [], 30, "nothing left")


async def test_a_create_that_fails_leaves_nothing(machine: Machine) -> None:
    def prepare(shim: FakeShim) -> None:
        shim.fail_create = errors.Unknown("runc create failed")

    machine.zygote.prepare = prepare
    machine.store.add("c1")
    with pytest.raises(errors.Unknown, match="runc create failed"):
        await machine.tasks.create(NAMESPACE, "c1", rootfs=[])
    assert await machine.tasks.list(NAMESPACE) == []
    await wait_until(lambda: machine.leftovers() == [], 30, "nothing left")
    machine.zygote.prepare = None
    await machine.tasks.create(NAMESPACE, "c1", rootfs=[])


async def test_a_shim_that_dies_in_create_leaves_nothing(machine: Machine) -> None:
    def prepare(shim: FakeShim) -> None:
        shim.die_in = "Create"

    machine.zygote.prepare = prepare
    machine.store.add("c1")
    with pytest.raises(errors.Unavailable):
        await machine.tasks.create(NAMESPACE, "c1", rootfs=[])
    assert machine.zygote.cleaned == ["c1"]
    await wait_until(lambda: machine.leftovers() == [], 30, "nothing left")


async def test_a_zygote_that_dies_in_create_is_asked_again(machine: Machine) -> None:
    machine.zygote.fail.append(errors.Unavailable("the zygote is gone"))
    await machine.run("c1")
    machine.zygote.fail.extend([errors.Unavailable("gone"), errors.Unavailable("gone again")])
    machine.store.add("c2")
    with pytest.raises(errors.Unavailable, match="gone again"):
        await machine.tasks.create(NAMESPACE, "c2", rootfs=[])
    assert [state.id for state in await machine.tasks.list(NAMESPACE)] == ["c1"]


async def test_a_client_that_hangs_up_never_leaves_half_a_task(machine: Machine) -> None:
    machine.store.add("c1")
    creating = asyncio.get_running_loop().create_task(machine.tasks.create(NAMESPACE, "c1", rootfs=[]))
    await asyncio.sleep(0)
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating

    async def listed() -> bool:
        return [state.id for state in await machine.tasks.list(NAMESPACE)] == ["c1"]

    await wait_until(listed, 30, "the task is whole")


async def test_containers_of_a_pod_share_a_shim(machine: Machine) -> None:
    spec = TypedValue("spec", f'{{"annotations": {{"{SANDBOX_ANNOTATION}": "pod"}}}}'.encode())
    first = await machine.run("c1", spec=spec)
    assert await machine.run("c2", sandbox="pod") is first
    assert await machine.run("alone") is not first
    first.tasks["c1"].exit(0)
    await machine.tasks.delete(NAMESPACE, "c1")
    assert not first.ended
    assert {state.id for state in await machine.tasks.list(NAMESPACE)} == {"c2", "alone"}
    first.tasks["c2"].exit(0)
    await machine.tasks.delete(NAMESPACE, "c2")
    await wait_until(lambda: first.ended, 30, "the pod's shim ends with its last container")


async def test_a_shim_of_version_2_is_spoken_to_as_such(machine: Machine) -> None:
    machine.zygote.versions = (2,)
    shim = await machine.run("c1")
    shim.tasks["c1"].exit(3)
    assert (await machine.tasks.delete(NAMESPACE, "c1")).status == 3


async def test_the_containers_snapshot_is_mounted_when_no_root_is_given(machine: Machine) -> None:
    machine.store.add("c1", snapshotter="overlayfs", snapshot_key="key")
    await machine.tasks.create(NAMESPACE, "c1", rootfs=None)
    assert "c1" in machine.zygote.shims[0].tasks


def test_the_label_of_the_root_is_read_from_the_spec() -> None:
    def label(document: str) -> str:
        return read_spec(Container("c1", spec=TypedValue("spec", document.encode())), None).mount_label

    assert label('{"linux": {"mountLabel": "u:r:t:s0:c1,c2"}}') == "u:r:t:s0:c1,c2"
    assert label('{"linux": {}}') == label("{}") == label('{"linux": null}') == ""


# -- lost shims ----------------------------------------------------------------------------------------


async def test_p13_a_lost_shim_is_told_with_the_recorded_exit(machine: Machine) -> None:
    shim = await machine.run("c1")
    machine.zygote.remains = Remains(Exit(5, 1234.5, 100))
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(machine.tasks.wait(NAMESPACE, "c1"))
        await wait_until(lambda: "Wait" in shim.calls, 30, "somebody waits")
        await shim.die()
    assert waiting.result() == Exit(5, 1234.5, 100)
    await wait_until(lambda: machine.topics == ["/tasks/exit", "/tasks/delete"], 30, "the end is told")
    assert await machine.tasks.list(NAMESPACE) == []
    await wait_until(lambda: machine.leftovers() == [], 30, "nothing left")
    with pytest.raises(errors.NotFound):
        await machine.tasks.wait(NAMESPACE, "c1")


async def test_a_shim_that_dies_in_delete_is_cleaned_up_after(machine: Machine) -> None:
    shim = await machine.run("c1")
    shim.tasks["c1"].exit(9)
    shim.die_in = "Delete"
    machine.zygote.remains = Remains(Exit(9, 1.0, 100))
    assert (await machine.tasks.delete(NAMESPACE, "c1")).status == 9
    assert machine.zygote.cleaned == ["c1"]
    assert machine.topics == ["/tasks/exit", "/tasks/delete"]
    await wait_until(lambda: machine.leftovers() == [], 30, "nothing left")


async def test_p6_a_task_that_cannot_be_cleaned_up_stays_listed(machine: Machine) -> None:
    shim = await machine.run("c1")
    shim.tasks["c1"].pid = os.getpid()
    await machine.tasks.start(NAMESPACE, "c1")
    machine.zygote.remains = errors.Unknown("runc is broken")
    await shim.die()
    await wait_until(lambda: bool(machine.zygote.cleaned), 30, "a clean-up was tried")

    async def unknown() -> bool:
        (state,) = await machine.tasks.list(NAMESPACE)
        return state.status is TaskStatus.UNKNOWN

    await wait_until(unknown, 30, "the task is listed as unknown")
    with pytest.raises(errors.Unavailable, match="runc is broken"):
        await machine.tasks.kill(NAMESPACE, "c1")
    machine.zygote.remains = Remains(Exit(137, 1.0, 0))
    await wait_until(lambda: len(machine.tasks) == 0, 60, "it is tried again")
    assert machine.topics == ["/tasks/exit", "/tasks/delete"]


async def test_p13_unknown_is_never_zero(machine: Machine) -> None:
    shim = await machine.run("c1")
    machine.zygote.remains = errors.Unknown("nothing is known")
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(machine.tasks.wait(NAMESPACE, "c1"))
        await wait_until(lambda: "Wait" in shim.calls, 30, "somebody waits")
        shim.tasks.clear()
        # Its pid is not running: nothing can be killed any more, and nothing is known of the end.
        await shim.die()
    assert waiting.result().status == 255


# -- other daemons -------------------------------------------------------------------------------------


async def test_p4_the_next_daemon_adopts_what_runs_and_finds_what_ended(machine: Machine) -> None:
    running = await machine.run("running")
    ended = await machine.run("ended")
    await machine.tasks.close()
    ended.tasks["ended"].exit(5)
    await machine.restart()
    states = {state.id: state for state in await machine.tasks.list(NAMESPACE)}
    assert states["running"].status is TaskStatus.RUNNING
    assert (states["ended"].status, states["ended"].exit_status) == (TaskStatus.STOPPED, 5)
    assert (await machine.tasks.wait(NAMESPACE, "ended")).status == 5
    assert (await machine.tasks.delete(NAMESPACE, "ended")).status == 5
    await machine.tasks.kill(NAMESPACE, "running", signal=9)
    assert (await machine.tasks.wait(NAMESPACE, "running")).status == 137
    assert running.tasks["running"].exit_status == 137
    assert machine.zygote.cleaned == []


async def test_p6_tasks_without_a_container_record_are_adopted_all_the_same(machine: Machine) -> None:
    await machine.run("c1")
    machine.store.containers.clear()
    await machine.restart()
    assert [state.id for state in await machine.tasks.list(NAMESPACE)] == ["c1"]
    await machine.tasks.kill(NAMESPACE, "c1", signal=9)
    assert (await machine.tasks.delete(NAMESPACE, "c1")).status == 137


async def test_p5_shims_that_died_meanwhile_are_cleaned_up_after(machine: Machine) -> None:
    shim = await machine.run("c1")
    await machine.tasks.close()
    await shim.die()
    machine.zygote.remains = Remains(Exit(3, 1.0, 100))
    await machine.restart()
    assert await machine.tasks.list(NAMESPACE) == []
    assert machine.topics == ["/tasks/exit", "/tasks/delete"]
    await wait_until(lambda: machine.leftovers() == [], 30, "nothing left")


async def test_p6_a_shim_that_does_not_answer_keeps_its_task_listed(machine: Machine) -> None:
    shim = await machine.run("c1")
    await machine.tasks.close()
    shim.stuck.clear()
    await machine.restart(RuntimeConfig(load_timeout=0.1, state_timeout=0.1))
    (state,) = await machine.tasks.list(NAMESPACE)
    assert (state.id, state.status) == ("c1", TaskStatus.UNKNOWN)
    assert (await machine.tasks.state(NAMESPACE, "c1")).status is TaskStatus.UNKNOWN
    with pytest.raises(errors.Unavailable):
        await machine.tasks.kill(NAMESPACE, "c1")
    shim.stuck.set()

    async def answers() -> bool:
        return (await machine.tasks.state(NAMESPACE, "c1")).status is TaskStatus.RUNNING

    await wait_until(answers, 60, "it answers again")
    assert machine.zygote.cleaned == []


async def test_p5_a_task_that_was_never_made_is_removed_with_its_shim(machine: Machine) -> None:
    shim = await machine.run("c1")
    shim.tasks.clear()
    await machine.restart()
    assert await machine.tasks.list(NAMESPACE) == []
    await wait_until(lambda: shim.ended, 30, "the idle shim ends")
    await wait_until(lambda: machine.leftovers() == [], 30, "nothing left")


async def test_p5_a_create_that_outlived_its_daemon_is_adopted(machine: Machine) -> None:
    shim = await machine.run("c1")
    held = shim.tasks.pop("c1")
    await machine.tasks.close()
    async with asyncio.TaskGroup() as group:
        restarting = group.create_task(machine.restart(RuntimeConfig(create_grace=60.0)))
        await wait_until(lambda: shim.calls.count("State") > 1, 30, "the shim is asked again")
        shim.tasks["c1"] = held
        await restarting
    assert [state.id for state in await machine.tasks.list(NAMESPACE)] == ["c1"]
    assert machine.zygote.cleaned == []


async def test_p5_what_a_killed_daemon_left_between_two_steps_is_removed(machine: Machine) -> None:
    # A bundle without a shim, and a shim without a bundle.
    Bundle.create(machine.folder / "state/tasks", machine.folder / "root/tasks", NAMESPACE, "half", b"{}")
    stray = FakeShim(str(machine.folder / "state/s/stray"))
    await stray.start()
    await machine.restart()
    await wait_until(lambda: stray.ended, 30, "the stray shim ends")
    await wait_until(lambda: machine.leftovers() == [], 30, "nothing left")


async def test_pods_keep_their_shim_over_a_restart(machine: Machine) -> None:
    shim = await machine.run("c1", sandbox="pod")
    await machine.run("c2", sandbox="pod")
    await machine.restart()
    assert await machine.run("c3", sandbox="pod") is shim
    assert len(machine.zygote.shims) == 1
    assert len(machine.tasks.shims) == 1


async def test_the_kernel_is_asked_ahead_when_a_runtime_will_move_a_process(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    possible = [True]

    def pass_grace() -> bool:
        asked.append(possible[0])
        return possible[0]

    async def asked_times(number: int) -> None:
        await wait_until(lambda: len(asked) == number and not machine.tasks._haste.busy, 30, "the kernel asked")

    monkeypatch.setattr(cgroups, "pass_grace", pass_grace)
    machine.store.add("c1")
    await machine.tasks.create(NAMESPACE, "c1", rootfs=[])
    await asked_times(1)
    await machine.tasks.start(NAMESPACE, "c1")  # moves nobody: the process is where it belongs
    for number, name in enumerate(("e1", "e2"), 2):
        with contextlib.suppress(errors.Error):  # the fake shim has no execs
            await machine.tasks.start(NAMESPACE, "c1", name)
        await asked_times(number)
    possible[0] = False
    for name in ("e3", "e4"):
        with contextlib.suppress(errors.Error):  # the fake shim has no execs
            await machine.tasks.start(NAMESPACE, "c1", name)
        await wait_until(lambda: len(asked) == 4, 30, "the kernel asked")
    await asyncio.sleep(0.05)  # noqa: TID251  nothing must happen
    assert asked == [True, True, True, False]
