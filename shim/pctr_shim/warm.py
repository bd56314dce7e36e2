"""Warming the zygote up: run the shim's paths once, so that forks inherit what running leaves in memory.

The interpreter writes into code and types the first times they are used, protobuf builds its classes when they
are first asked for, and the allocator grows. Done once before forking, those pages stay shared;
done in each shim, they are each shim's own. Nothing is left running and no folder stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from types import CodeType

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from pctr_shim import keeper, publisher, serve
from pctr_shim.config import ShimConfig
from pctr_shim.private import SERVICE as PRIVATE
from pctr_shim.service import SERVICES
from pctr_shim.signals import Signals
from supervisord_ctr import errors, faults
from supervisord_ctr.api.runtime.task.v3 import task_pb2 as api
from supervisord_ctr.api.services.ttrpc.events.v1 import events_pb2 as forward_pb2
from supervisord_ctr.api.shim.v1 import shim_pb2
from supervisord_ctr.linux import cgroup_messages, cgroups, memory, processes
from supervisord_ctr.ttrpc.client import Client
from supervisord_ctr.ttrpc.server import Context, Method, Server, listen

log = logging.getLogger(__name__)

#: The interpreter adapts code that has run eight times; a fork that is the eighth would write to all of it.
_ROUNDS = 9
_NOWHERE = "/proc/nowhere"
#: What the fake runtime is: it writes its own pid where the real one writes the container's.
_FAKE = """#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = --pid-file ] && echo $$ > "$2"; shift; done
"""


def warm_up(forking: frozenset[CodeType]) -> list[object]:
    """Blocks for less than half a second. A failure only costs memory, so it is never raised.

    `forking` is the code that is under way when a fork is made. What is returned shall be kept for as long as forks
    are made.
    """
    used = memory.recorded(lambda: _rounds(1))
    resting = forking | keeper.BEFORE_REHEARSAL | _of_keepers()
    kept = memory.fill_gaps()
    with _careful():
        memory.gather(resting)
        memory.gather(used - resting)
    _rounds(_ROUNDS)
    sys._clear_type_cache()  # it holds what imports looked up, and the names in it lie everywhere
    _rounds(1)
    return kept


@contextlib.contextmanager
def _careful() -> Iterator[None]:
    """Failures are only told of, and what tests arm is left for shims."""
    faults.arm("")
    try:
        yield
    except Exception as error:
        log.warning("shims will take more memory than they must: %s: %s", type(error).__name__, error)
    finally:
        faults.arm(os.environ.get("PCTR_FAULTS", ""))


def _of_keepers() -> frozenset[CodeType]:
    """The code of what runs in a keeper."""
    ran: set[CodeType] = set()
    signals = Signals()
    try:
        with _careful():
            _keep(signals, ran)
    finally:
        signals.close()
    return frozenset(ran)


def _rounds(number: int) -> None:
    try:
        folder = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"pctr-warm-{os.urandom(8).hex()}")
        os.mkdir(folder, 0o700)
    except OSError as error:
        log.warning("shims will take more memory than they must: %s", error)
        return
    loop = serve.Loop()
    try:
        with _careful():
            loop.run_until_complete(asyncio.wait_for(_run(folder, number, loop.signals), 10))
            for _ in range(number):
                _keep(loop.signals)
    finally:
        loop.close()
        loop.signals.close()
        shutil.rmtree(folder, ignore_errors=True)


def _keep(signals: Signals, ran: set[CodeType] | None = None) -> None:
    """What a keeper does, with a worker that hands over at once. Name, title and streams stay what they are.

    `ran` takes the code of the functions that ran in the keeper.
    """
    streams = [os.dup(fd) for fd in range(3)]
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.write(writer, b"!")

    def work(post: keeper.Post) -> None:
        if post.description < 0:
            post.begin(1)
            post.introduce("warm", "-id", "warm")
        else:
            post.taken_up()
        with open(os.path.join("/proc/self/stat"), "rb") as description:
            keeper.hand_over(post, [(reader, keeper.WATCH), (2, keeper.KEEP)], description.fileno())
        os._exit(0)

    try:
        with processes.kept_title():
            if ran is None:
                keeper.Keeper(signals).rehearse(work)
            else:
                ran |= memory.recorded(lambda: keeper.Keeper(signals).rehearse(work))
    finally:
        for fd, copy in enumerate(streams):
            os.dup2(copy, fd)
            os.close(copy)
        os.close(reader)
        os.close(writer)
        processes.set_name("pctr-zygote")


async def rehearse(shim: serve.Shim) -> None:
    """In a shim that waits for work: two calls that find nothing, so that pages which any call writes to are its own.

    Raises nothing but what means that this process cannot serve.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    async with asyncio.TaskGroup() as group:
        group.create_task(shim.server.attend(theirs))
        async with await Client.connect(ours) as client:
            with contextlib.suppress(errors.NotFound):
                create = api.CreateTaskRequest(id="warm", bundle=_NOWHERE)
                await client.call(SERVICES[1], "Create", create, api.CreateTaskResponse, timeout=10)
            with contextlib.suppress(errors.NotFound):
                await client.call(SERVICES[1], "State", api.StateRequest(id="warm"), api.StateResponse, timeout=10)


async def _run(folder: str, rounds: int, signals: Signals) -> None:
    fake = os.path.join(folder, "runtime")
    with open(fake, "w", encoding="ascii") as file:
        file.write(_FAKE)
    os.chmod(fake, 0o700)
    events = os.path.join(folder, "e")
    daemon = Server({
        publisher.SERVICE: {"Forward": Method(forward_pb2.ForwardRequest, _take)},
        publisher.OWN_SERVICE: {"ForwardAll": Method(shim_pb2.ForwardAllRequest, _take)},
    })
    await daemon.serve(listen(events))
    signals.watch()
    shim = serve.Shim(signals)
    signals.install([signal.SIGCHLD])
    shim.config.become(ShimConfig(
        "warm", "warm", folder, os.path.join(folder, "s"), events=events, batches=True, runtime=fake
    ))
    shim.publisher.start()
    await shim.server.serve(listen(shim.config.socket))
    try:
        for number in range(rounds):
            async with await Client.connect(shim.config.socket) as client:
                await _calls(client, folder, f"c{number}")
    finally:
        for container in shim.tasks.containers.values():
            container.close()
            await container.init.io.close()
        await shim.publisher.close(1)
        await shim.server.close()
        await daemon.close()
        await shim.tasks.tasks.close()


async def _take(request: Message, context: Context) -> Empty:
    return Empty()


async def _calls(client: Client, folder: str, name: str) -> None:
    """One container's life with the fake runtime: what fails is answered with an error, which is a path, too."""
    bundle = os.path.join(folder, name)
    os.mkdir(bundle)
    output = os.path.join(bundle, "out")
    os.mkfifo(output)
    with open(os.path.join(bundle, "config.json"), "w", encoding="ascii") as file:
        json.dump({"linux": {"namespaces": [{"type": "pid"}]}}, file)
    task = SERVICES[1]
    requests: tuple[tuple[str, Message, type[Message]], ...] = (
        ("Connect", api.ConnectRequest(id=name), api.ConnectResponse),
        ("Create", api.CreateTaskRequest(
            id=name, bundle=bundle, stdout=output, stderr=f"cri-log://{bundle}/log"
        ), api.CreateTaskResponse),
        ("State", api.StateRequest(id=name), api.StateResponse),
        ("Start", api.StartRequest(id=name), api.StartResponse),
        ("Exec", api.ExecProcessRequest(id=name, exec_id="e", stdout=output), Empty),
        ("Pids", api.PidsRequest(id=name), api.PidsResponse),
        ("Kill", api.KillRequest(id=name, signal=200), Empty),
        ("CloseIO", api.CloseIORequest(id=name, stdin=True), Empty),
        ("Delete", api.DeleteRequest(id=name), api.DeleteResponse),
    )
    for method, request, response in requests:
        with contextlib.suppress(errors.Error):
            await client.call(task, method, request, response, timeout=5)
    await client.call(PRIVATE, "Info", shim_pb2.InfoRequest(), shim_pb2.InfoResponse, timeout=5)
    cgroup_messages.metrics(cgroups.of_pid(os.getpid())).SerializeToString()
