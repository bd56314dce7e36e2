"""The zygote's client, against a stand-in that answers, lies and dies as told."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from supervisord_ctr.aio import wait_until
from supervisord_ctr.errors import FailedPrecondition, InvalidArgument, Unavailable
from supervisord_ctr.linux import processes
from supervisord_ctr.runtime.zygote import Zygote

STAND_IN = """
import json, os, socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
held = []
while packet := sock.recv(1 << 16):
    request = json.loads(packet)
    serial, op = request["serial"], request["op"]
    def answer(**fields):
        sock.send(json.dumps({"serial": serial, **fields}).encode())
    if op == "ping":
        answer(pid=os.getpid())
    elif op == "fork-shim":
        answer(pid=7, start_time=8, address="unix://" + request["socket"])
    elif op == "fail":
        answer(error={"code": 9, "message": "not now"})
    elif op == "die":
        os._exit(3)
    elif op == "noise":
        sock.send(b"no json")
        sock.send(b"[]")
        answer(fine=True)
    elif op == "hold":
        held.append(serial)
    elif op == "let-go":
        for earlier in held:
            sock.send(json.dumps({"serial": earlier, "late": True}).encode())
        answer()
"""


@pytest.fixture
async def zygote(tmp_path: Path) -> AsyncIterator[Zygote]:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    made = Zygote(command=(sys.executable, "-I", str(script)))
    await made.start()
    yield made
    await made.close()


async def test_it_answers(zygote: Zygote) -> None:
    assert (await zygote.request("ping"))["pid"] == zygote.pid
    forked = await zygote.fork_shim(
        namespace="n", group="g", bundle="/", socket_path="/run/x", events="", runtime="runc", runtime_root="/r"
    )
    assert (forked.pid, forked.start_time, forked.address) == (7, 8, "unix:///run/x")


async def test_errors_of_a_reply_are_raised(zygote: Zygote) -> None:
    with pytest.raises(FailedPrecondition, match="not now"):
        await zygote.request("fail")
    with pytest.raises(InvalidArgument):
        await zygote.request("ping", padding="x" * (1 << 16))
    assert (await zygote.request("ping"))["pid"]


async def test_noise_is_passed_over(zygote: Zygote) -> None:
    assert (await zygote.request("noise"))["fine"] is True


async def test_replies_may_come_in_any_order(zygote: Zygote) -> None:
    async with asyncio.TaskGroup() as group:
        held = [group.create_task(zygote.request("hold")) for _ in range(3)]
        await zygote.request("ping")
        await zygote.request("let-go")
    assert [task.result()["late"] for task in held] == [True] * 3


async def test_many_at_once(zygote: Zygote) -> None:
    replies = await asyncio.gather(*(zygote.request("ping", padding="x" * 20000) for _ in range(200)))
    assert {reply["pid"] for reply in replies} == {zygote.pid}


async def test_when_it_dies_another_one_takes_over(zygote: Zygote) -> None:
    before = zygote.pid
    with pytest.raises(Unavailable):
        await zygote.request("die")
    assert (await zygote.request("ping"))["pid"] not in (0, before)
    assert zygote.restarts == 1


async def test_a_killed_one_fails_what_waits_and_nothing_else(zygote: Zygote) -> None:
    async with asyncio.TaskGroup() as group:
        held = group.create_task(_outcome(zygote))
        await zygote.request("ping")
        os.kill(zygote.pid, signal.SIGKILL)
    assert isinstance(held.result(), Unavailable)
    await wait_until(lambda: zygote.restarts == 1, 30, "another zygote")
    assert (await zygote.request("ping"))["pid"]


async def _outcome(zygote: Zygote) -> object:
    try:
        return await zygote.request("hold")
    except Unavailable as error:
        return error


async def test_closing_ends_it(tmp_path: Path) -> None:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    zygote = Zygote(command=(sys.executable, "-I", str(script)))
    await zygote.start()
    pid = zygote.pid
    await zygote.close()
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(Unavailable):
        await zygote.request("ping")


async def test_who_asks_a_dead_zygote_fails_and_who_asks_again_waits_for_the_next(zygote: Zygote) -> None:
    """Even when its keeper has not seen the end yet: another try at once would meet the same dead one."""
    await zygote.request("ping")
    victim = zygote.pid
    os.kill(victim, signal.SIGKILL)
    while processes.is_alive(victim):
        time.sleep(0.001)  # the loop, and so the keeper, stands still meanwhile
    with pytest.raises(Unavailable):
        await zygote.request("ping")
    assert (await zygote.request("ping"))["pid"] != victim
