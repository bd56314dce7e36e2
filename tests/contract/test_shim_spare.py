"""The shim that a zygote keeps ready, and deletes that need no run of the OCI runtime."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from supervisord_ctr import errors
from supervisord_ctr.aio import wait_until
from supervisord_ctr.linux import processes
from tests.support.shim import PATIENCE, Lab, Zygote, children_named, laboratory


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    """A zygote of each test's own."""
    made = Zygote()
    try:
        yield made
    finally:
        made.process.kill()
        made.close()


@pytest.fixture
async def lab(zygote: Zygote) -> AsyncIterator[Lab]:
    async with laboratory("zygote", zygote) as made:
        yield made


def spares(zygote: Zygote) -> list[int]:
    """The shims without work that the zygote has."""
    return children_named(zygote.process.pid, "pctr-spare")


async def next_spare(zygote: Zygote) -> tuple[int, int]:
    """Pid and start time of the spare, as soon as there is one."""
    await wait_until(lambda: bool(spares(zygote)), PATIENCE, "a spare shim")
    (pid,) = spares(zygote)
    return pid, processes.read_start_time(pid)


async def gone(pid: int, started: int) -> None:
    await wait_until(lambda: not processes.is_alive(pid, started), PATIENCE, f"the end of {pid}")


async def test_the_spare_becomes_the_next_shim_and_another_takes_its_place(lab: Lab, zygote: Zygote) -> None:
    first = await lab.run("c1", ["sleep", "1000"])
    pid, _ = await next_spare(zygote)
    assert pid != first.pid
    assert Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0") == b"containerd-shim-pctr-v1\0(spare)"
    second = await lab.run("c2", ["sleep", "1000"])
    assert second.pid == pid
    assert os.getsid(pid) == pid
    assert Path(f"/proc/{pid}/comm").read_text().strip() == "pctr-shim"
    title = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()
    assert title == f"containerd-shim-pctr-v1 -namespace {lab.namespace} -id c2 -address {second.path}"
    another, _ = await next_spare(zygote)
    assert another not in (first.pid, second.pid)
    await lab.finish(second, "c2")
    await lab.finish(first, "c1")


async def test_p5_shims_live_on_and_the_spare_ends_when_the_zygote_is_killed(lab: Lab, zygote: Zygote) -> None:
    first = await lab.run("c1", ["sleep", "1000"])
    await next_spare(zygote)
    second = await lab.run("c2", ["sleep", "1000"])
    spare = await next_spare(zygote)
    zygote.process.send_signal(signal.SIGKILL)
    await gone(*spare)
    for shim, name in ((first, "c1"), (second, "c2")):
        await lab.finish(shim, name)


async def test_the_spare_ends_when_the_daemon_closes_the_connection(lab: Lab, zygote: Zygote) -> None:
    shim = await lab.run("c1", ["true"])
    spare = await next_spare(zygote)
    assert zygote.close() == 0
    await gone(*spare)
    await lab.finish(shim, "c1")


async def test_a_spare_that_was_killed_costs_nobody_a_shim(lab: Lab, zygote: Zygote) -> None:
    await lab.finish(await lab.run("c1", ["true"]), "c1")
    pid, started = await next_spare(zygote)
    os.kill(pid, signal.SIGKILL)
    await gone(pid, started)
    shim = await lab.run("c2", ["sh", "-c", "exit 3"])
    assert shim.pid != pid
    assert await shim.wait("c2") == 3
    await lab.finish(shim, "c2")


async def test_an_expected_shim_is_ready_before_the_first_was_ever_asked_for(lab: Lab, zygote: Zygote) -> None:
    assert spares(zygote) == []
    for _ in range(3):
        zygote.expect()
    pid, _ = await next_spare(zygote)
    zygote.expect()
    assert zygote.ask("ping")["pid"] == zygote.process.pid
    assert spares(zygote) == [pid]
    shim = await lab.run("c1", ["sh", "-c", "exit 4"])
    assert shim.pid == pid
    assert await shim.wait("c1") == 4
    await lab.finish(shim, "c1")


async def test_a_shim_asked_for_right_after_it_was_expected_is_that_one(lab: Lab, zygote: Zygote) -> None:
    for number in range(3):
        zygote.expect()
        shim = await lab.run(f"c{number}", ["sh", "-c", f"exit {number}"])
        assert await shim.wait(f"c{number}") == number
        await lab.finish(shim, f"c{number}")
    pid, _ = await next_spare(zygote)
    assert pid != shim.pid


def left(lab: Lab, name: str) -> list[str]:
    """What the OCI runtime and the kernel still have of a container."""
    found = [str(path) for path in (lab.folder / "runc" / lab.namespace).glob(name)]
    return found + [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{lab.namespace}/{name}")]


async def test_a_delete_takes_cgroups_and_state_away(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    assert left(lab, "c")
    await lab.finish(shim, "c")
    assert left(lab, "c") == []


async def test_a_container_that_never_ran_is_deleted(lab: Lab) -> None:
    lab.bundle("c", ["sleep", "1000"])
    shim = await lab.launch("c")
    await lab.create(shim, "c")
    assert (await shim.delete("c")).exit_status == 137
    assert left(lab, "c") == []
    await shim.shutdown("c")


async def test_groups_below_the_container_s_are_the_runtime_s_business(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    groups = [path for path in left(lab, "c") if path.startswith("/sys/fs/cgroup/")]
    for group in groups:
        os.mkdir(f"{group}/inner")
    await lab.finish(shim, "c")
    assert left(lab, "c") == []


async def test_poststop_hooks_run(lab: Lab) -> None:
    bundle = Path(lab.bundle("c", ["true"]))
    proof = lab.folder / "proof"
    spec = lab.spec("c", ["true"])
    spec["hooks"] = {"poststop": [{"path": "/bin/touch", "args": ["touch", str(proof)]}]}
    (bundle / "config.json").write_text(json.dumps(spec))
    shim = await lab.launch("c")
    await lab.create(shim, "c")
    await shim.start("c")
    assert await shim.wait("c") == 0
    assert not proof.exists()
    await shim.delete("c")
    assert proof.exists()
    assert left(lab, "c") == []
    with pytest.raises(errors.NotFound):
        await shim.state("c")
    await shim.shutdown("c")
