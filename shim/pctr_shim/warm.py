"""Warming the zygote up: run the shim's paths once, so that forks inherit what running leaves in memory.

The interpreter writes into code and types the first times they are used, protobuf builds its classes when they
are first asked for, and the allocator grows. Done once before forking, those pages stay shared;
done in each shim, they are each shim's own. Nothing is left running and no folder stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import tempfile
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from pctr_shim import publisher
from pctr_shim.config import ShimConfig
from pctr_shim.private import SERVICE as PRIVATE
from pctr_shim.private import PrivateService
from pctr_shim.reaper import Reaper
from pctr_shim.service import SERVICES, TaskService
from supervisord_ctr import errors, faults
from supervisord_ctr.api.cgroups.v1 import metrics_pb2 as metrics_v1
from supervisord_ctr.api.cgroups.v2 import metrics_pb2 as metrics_v2
from supervisord_ctr.api.runtime.task.v3 import task_pb2 as api
from supervisord_ctr.api.services.ttrpc.events.v1 import events_pb2 as forward_pb2
from supervisord_ctr.api.shim.v1 import shim_pb2
from supervisord_ctr.linux import cgroups
from supervisord_ctr.ttrpc.client import Client
from supervisord_ctr.ttrpc.server import Context, Method, Server, listen

_ROUNDS = 3
_NOWHERE = "/proc/nowhere"
#: What the fake runtime is: it writes its own pid where the real one writes the container's.
_FAKE = """#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = --pid-file ] && echo $$ > "$2"; shift; done
"""


def warm_up() -> None:
    """Blocks for a fraction of a second. A failure only costs memory, so it is never raised."""
    folder = tempfile.mkdtemp(prefix="pctr-warm-")
    before = signal.getsignal(signal.SIGCHLD)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    loop = asyncio.new_event_loop()
    faults.arm("")  # what tests arm is meant for shims
    try:
        with contextlib.suppress(OSError, errors.Error, TimeoutError, AssertionError):
            loop.run_until_complete(asyncio.wait_for(_run(folder), 10))
    finally:
        loop.close()
        signal.signal(signal.SIGCHLD, before)
        faults.arm(os.environ.get("PCTR_FAULTS", ""))
        shutil.rmtree(folder, ignore_errors=True)


async def rehearse() -> None:
    """In a shim that waits for work: two calls that find nothing, so that pages which any call writes to are its own.

    Raises nothing but what means that this process cannot serve.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    config = ShimConfig("warm", "warm", "/", "")
    reaper = Reaper()
    reaper.start()
    tasks = TaskService(config, reaper, publisher.Publisher(config, reaper), lambda: None)
    server = Server({SERVICES[1]: tasks.methods()})
    async with asyncio.TaskGroup() as group:
        group.create_task(server.attend(theirs))
        async with await Client.connect(ours) as client:
            with contextlib.suppress(errors.NotFound):
                create = api.CreateTaskRequest(id="warm", bundle=_NOWHERE)
                await client.call(SERVICES[1], "Create", create, api.CreateTaskResponse, timeout=10)
            with contextlib.suppress(errors.NotFound):
                await client.call(SERVICES[1], "State", api.StateRequest(id="warm"), api.StateResponse, timeout=10)
    await server.close()
    await tasks.tasks.close()


async def _run(folder: str) -> None:
    fake = os.path.join(folder, "runtime")
    with open(fake, "w", encoding="ascii") as file:
        file.write(_FAKE)
    os.chmod(fake, 0o700)
    events = os.path.join(folder, "e")
    config = ShimConfig("warm", "warm", folder, os.path.join(folder, "s"), events=events, runtime=fake)
    daemon = Server({publisher.SERVICE: {"Forward": Method(forward_pb2.ForwardRequest, _take)}})
    await daemon.serve(listen(events))
    reaper = Reaper()
    reaper.start()
    sender = publisher.Publisher(config, reaper)
    sender.start()
    tasks = TaskService(config, reaper, sender, lambda: None)
    methods = tasks.methods()
    server = Server({
        **dict.fromkeys(SERVICES, methods), PRIVATE: PrivateService(config, tasks, sender).methods(),
    })
    await server.serve(listen(config.socket))
    try:
        for number in range(_ROUNDS):
            async with await Client.connect(config.socket) as client:
                await _calls(client, folder, f"c{number}")
    finally:
        for container in tasks.containers.values():
            container.close()
            await container.init.io.close()
        await sender.close(1)
        await server.close()
        await daemon.close()
        await tasks.tasks.close()


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
    fields: dict[str, Any] = cgroups.of_pid(os.getpid()).metrics()
    if cgroups.hierarchy().mode == "v2":
        metrics_v2.Metrics(**fields).SerializeToString()
    else:
        metrics_v1.Metrics(**fields).SerializeToString()
