"""Events on their way from a shim: what is waited for goes at once, and takes along what may wait, in order."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from pctr_shim import publisher
from pctr_shim.config import ShimConfig
from pctr_shim.reaper import Reaper

from supervisord_ctr.api.events import events_pb2
from supervisord_ctr.api.shim.v1 import shim_pb2
from supervisord_ctr.ttrpc.server import Context, Method, Server, listen
from tests.support.shim import PATIENCE


async def test_an_exit_takes_along_the_events_that_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "_LINGER", 3600.0)
    calls: list[list[str]] = []
    arrived = asyncio.Event()

    async def take(request: Message, context: Context) -> Empty:
        assert isinstance(request, shim_pb2.ForwardAllRequest)
        calls.append([envelope.topic for envelope in request.envelopes])
        arrived.set()
        return Empty()

    server = Server({publisher.OWN_SERVICE: {"ForwardAll": Method(shim_pb2.ForwardAllRequest, take)}})
    await server.serve(listen(str(tmp_path / "e")))
    config = ShimConfig("test", "c", str(tmp_path), "", events=str(tmp_path / "e"), batches=True)
    events = publisher.Publisher(config, Reaper())
    events.start()
    await asyncio.sleep(0)  # it has begun, and waits for something to send
    try:
        events.publish("/tasks/create", events_pb2.TaskCreate(container_id="c"))
        events.publish("/tasks/start", events_pb2.TaskStart(container_id="c"))
        await asyncio.sleep(0)
        assert events.busy
        assert calls == []
        events.publish("/tasks/exit", events_pb2.TaskExit(container_id="c"))
        await asyncio.wait_for(arrived.wait(), PATIENCE / 4)
        assert calls == [["/tasks/create", "/tasks/start", "/tasks/exit"]]
    finally:
        await events.close(1)
        await server.close()
