"""Checkpoint and restore: what is asked of the OCI runtime, what becomes of the task, what a failure tells.

Where criu cannot work on the machine's kernel, a runtime that plays its part (state in a file, restore by
creating anew) proves the shim's side; the real one must work or say why and where its log is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty

from supervisord_ctr import errors
from supervisord_ctr.api.runc.v1 import options_pb2
from supervisord_ctr.api.runtime.task.v3 import task_pb2 as api
from supervisord_ctr.api.types.task import task_pb2 as types
from supervisord_ctr.linux import mounts
from tests.support import player
from tests.support.shim import Lab, Shim, Zygote, laboratory, read_all


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """One zygote for all tests."""
    made = Zygote()
    yield made
    assert made.close() == 0


@pytest.fixture
async def lab(zygote: Zygote) -> AsyncIterator[Lab]:
    """A laboratory of forked shims with the playing runtime in it."""
    async with laboratory("zygote", zygote) as made:
        player.write(made.folder / "player")
        yield made


async def start(lab: Lab, name: str, binary: str, **fields: str) -> Shim:
    """A shim with a running task."""
    lab.bundle(name, ["sh", "-c", "echo alive; while :; do sleep 1000; done"])
    shim = await lab.launch(name)
    await lab.create(shim, name, options=lab.options(binary_name=binary), **fields)
    if not fields.get("checkpoint"):
        await shim.start(name)
    return shim


async def checkpoint(shim: Shim, path: Path, **fields: object) -> None:
    """Take a checkpoint of the container "c"."""
    options = options_pb2.CheckpointOptions(**fields)  # type: ignore[arg-type]
    value = AnyMessage(type_url="containerd.runc.v1.CheckpointOptions", value=options.SerializeToString())
    await shim.call("Checkpoint", api.CheckpointTaskRequest(id="c", path=str(path), options=value), Empty)


async def test_a_checkpoint_ends_the_task_or_leaves_it_running(lab: Lab) -> None:
    shim = await start(lab, "c", str(lab.folder / "player"))
    await checkpoint(
        shim, lab.folder / "one", open_tcp=True, terminal=True, file_locks=True, external_unix_sockets=True,
        empty_namespaces=["network"], work_path=str(lab.folder / "work"),
    )
    asked = (lab.folder / "one" / "asked").read_text()
    for word in ("--leave-running", "--tcp-established", "--shell-job", "--file-locks", "--ext-unix-sk", "--empty-ns network"):
        assert word in asked
    assert (await shim.state("c")).status == types.Status.RUNNING
    await checkpoint(shim, lab.folder / "two", exit=True)
    assert "--leave-running" not in (lab.folder / "two" / "asked").read_text()
    assert await shim.wait("c") == 137
    topics = await lab.wait_topics(lambda found: found.count("checkpointed") == 2 and "exit" in found)
    assert topics[:3] == ["create", "start", "checkpointed"]
    await lab.finish(shim, "c")


async def test_a_task_is_restored_by_start(lab: Lab) -> None:
    player = str(lab.folder / "player")
    first = await start(lab, "c", player)
    await checkpoint(first, lab.folder / "images", exit=True)
    assert await first.wait("c") == 137
    await first.delete("c")
    await first.shutdown("c")

    out, out_fd = lab.fifo("out")
    reading = asyncio.get_running_loop().create_task(read_all(out_fd, lambda data: b"alive" in data))
    shim = await start(lab, "r", player, checkpoint=str(lab.folder / "images"), stdout=out)
    state = await shim.state("r")
    assert (state.status, state.pid) == (types.Status.CREATED, 0)
    with pytest.raises(errors.FailedPrecondition):
        await shim.kill("r")
    pid = await shim.start("r")
    assert pid > 0
    assert (await shim.state("r")).status == types.Status.RUNNING
    assert b"alive" in await reading
    assert len((await shim.call("Pids", api.PidsRequest(id="r"), api.PidsResponse)).processes) >= 1
    await shim.kill("r", everyone=True)
    assert await shim.wait("r") == 137
    assert await lab.wait_topics(lambda found: "exit" in found, "r") == ["create", "start", "exit"]
    await lab.finish(shim, "r")
    assert mounts.mounts_below(lab.folder / "b") == []


async def test_a_restore_that_fails_leaves_a_task_that_can_be_deleted(lab: Lab) -> None:
    shim = await start(lab, "c", str(lab.folder / "player"), checkpoint=str(lab.folder / "no-images"))
    with pytest.raises(errors.Unknown, match="OCI runtime restore failed"):
        await shim.start("c")
    await shim.delete("c")
    await shim.shutdown("c")
    assert mounts.mounts_below(lab.folder / "b") == []


async def test_a_refused_checkpoint_keeps_the_log_of_criu(lab: Lab) -> None:
    shim = await start(lab, "c", str(lab.folder / "player"))
    with pytest.raises(errors.Unknown, match=r"criu failed: type DUMP.*criu's log: .*criu-dump\.log"):
        await checkpoint(shim, lab.folder / "refuse")
    assert (lab.folder / "b" / "c" / "criu-dump.log").read_text() == "criu said no\n"
    assert (await shim.state("c")).status == types.Status.RUNNING
    await lab.finish(shim, "c")


async def test_criu_works_or_says_why(lab: Lab) -> None:
    shim = await start(lab, "c", "runc")
    try:
        await checkpoint(shim, lab.folder / "images")
    except errors.Unknown as error:
        assert "criu" in error.message
        assert (lab.folder / "b" / "c" / "criu-dump.log").exists()
    else:
        assert any((lab.folder / "images").iterdir())
    assert (await shim.state("c")).status == types.Status.RUNNING
    await lab.finish(shim, "c")
