"""SIGKILL to a shim at every trace point of create, start, rest, exec, kill, exit and delete.

Whatever the moment: the clean-up leaves no process, mount, cgroup or runtime state, and gives no wrong
exit status.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pctr_shim.container
import pctr_shim.employment
import pctr_shim.process
import pctr_shim.records
import pctr_shim.rest
import pytest

from supervisord_ctr import errors, faults
from supervisord_ctr.aio import wait_until
from supervisord_ctr.linux import cgroups, mounts
from tests.support.shim import PATIENCE, Lab, Zygote, laboratory, rested

MODULES = (pctr_shim.container, pctr_shim.process, pctr_shim.records, pctr_shim.rest)
POINTS = sorted(name for name in faults.POINTS if name.startswith("shim.") and name != pctr_shim.employment.FORKED)
#: Seconds after which shims rest.
PATIENCE_OF_SHIMS = 0.05


@pytest.fixture(scope="module")
def healthy() -> Iterator[Zygote]:
    """A zygote without faults, which cleans up."""
    made = Zygote()
    yield made
    assert made.close() == 0


def test_every_step_has_trace_points() -> None:
    steps = {name.split(".")[1] for name in POINTS}
    assert MODULES
    assert {"create", "start", "rest", "exec", "kill", "exit", "delete"} <= steps


async def _live(lab: Lab) -> None:
    """A container's whole life; ends early when the shim does."""
    shim = await lab.launch("c")
    await lab.create(shim, "c")
    await shim.start("c")
    await rested(shim)
    await shim.exec("c", "e1", ["sh", "-c", "exit 3"])
    await shim.start("c", "e1")
    assert await shim.wait("c", "e1") == 3
    await shim.delete("c", "e1")
    await shim.kill("c", signal.SIGTERM)
    await shim.kill("c", signal.SIGKILL)
    assert await shim.wait("c") == 137
    await shim.delete("c")


@pytest.mark.parametrize("point", POINTS)
async def test_a_shim_killed_there_leaves_nothing(point: str, healthy: Zygote) -> None:
    faulty = Zygote({"PCTR_FAULTS": f"{point}=kill"}, rest=PATIENCE_OF_SHIMS)
    try:
        async with laboratory("zygote", faulty) as lab:
            lab.bundle("c", ["sleep", "1000"])
            with pytest.raises(errors.Unavailable):
                await asyncio.wait_for(_live(lab), PATIENCE)
            reply = healthy.ask(
                "cleanup", namespace=lab.namespace, id="c", bundle=str(lab.folder / "b" / "c"),
                runtime_root=str(lab.folder / "runc"),
            )
            assert reply.get("exit_status") == 137, reply
            given_up = "no worker could take up" in (lab.folder / "c.log").read_text()
            assert given_up == (point in (pctr_shim.rest.WOKEN, pctr_shim.rest.TAKEN_UP))
            await _nothing_left(lab)
    finally:
        faulty.close()


async def _nothing_left(lab: Lab) -> None:
    group = cgroups.at(f"/{lab.namespace}/c")
    await wait_until(lambda: not group.exists(), PATIENCE, "the cgroup to go")
    assert mounts.mounts_below(lab.folder / "b") == []
    state = lab.folder / "runc" / lab.namespace
    assert not state.exists() or list(state.iterdir()) == []
    await wait_until(lambda: not _processes_of(lab), PATIENCE, "every process to go")


def _processes_of(lab: Lab) -> list[str]:
    """Processes that name the laboratory or whose root lies in it."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{entry}/cmdline").read_bytes()
                if str(lab.folder).encode() in line or os.readlink(f"/proc/{entry}/root").startswith(str(lab.folder)):
                    found.append(entry)
    return found


async def test_a_shim_killed_before_it_is_told_of_leaves_a_dead_socket_that_is_replaced(healthy: Zygote) -> None:
    faulty = Zygote({"PCTR_FAULTS": f"{pctr_shim.employment.FORKED}=kill"}, rest=PATIENCE_OF_SHIMS)
    async with laboratory("zygote", faulty) as lab:
        lab.bundle("c", ["sleep", "1000"])
        with pytest.raises(AssertionError, match="the shim ended while it was being started"):
            await lab.launch("c")
        assert faulty.close() == 0
        lab.zygote = healthy
        shim = await lab.launch("c")
        await lab.create(shim, "c")
        await shim.start("c")
        await lab.finish(shim, "c")


async def test_an_oci_runtime_that_is_killed_fails_the_create_and_leaves_nothing(healthy: Zygote) -> None:
    async with laboratory("zygote", healthy) as lab:
        fake = lab.folder / "runc-that-dies"
        fake.write_text('#!/bin/sh\ncase "$*" in *" create "*) kill -9 $$;; esac\nexec /usr/sbin/runc "$@"\n')
        fake.chmod(0o755)
        lab.bundle("c", ["sleep", "1000"])
        shim = await lab.launch("c")
        with pytest.raises(errors.Unknown, match="OCI runtime create failed.*137"):
            await lab.create(shim, "c", options=lab.options(binary_name=str(fake)))
        assert mounts.mounts_below(lab.folder / "b") == []
        await lab.create(shim, "c")  # the same name works as soon as the runtime does
        await shim.start("c")
        await lab.finish(shim, "c")
