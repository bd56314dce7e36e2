"""Prometheus metrics."""

from __future__ import annotations

import asyncio
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import empty_pb2

from supervisord_ctr import errors, rpc
from supervisord_ctr.api.services.version.v1 import version_pb2, version_pb2_grpc
from supervisord_ctr.metrics import Metrics


class Once(version_pb2_grpc.VersionServicer):
    """Answers the first call and fails the rest."""

    def __init__(self) -> None:
        self.calls = 0

    async def Version(self, request: Any, context: Any) -> version_pb2.VersionResponse:
        self.calls += 1
        if self.calls > 1:
            raise errors.NotFound("gone")
        return version_pb2.VersionResponse(version="1")


async def test_calls_are_counted_by_method_and_status(tmp_path: Path) -> None:
    metrics = Metrics("127.0.0.1:0", {"tasks": lambda: 3.0})
    await metrics.start()
    server = rpc.RpcServer(tmp_path / "s.sock", observe=metrics.observe)
    server.add("containerd.services.version.v1.Version", version_pb2_grpc.add_VersionServicer_to_server, Once())
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s.sock") as channel:
        stub = version_pb2_grpc.VersionStub(channel)
        await stub.Version(empty_pb2.Empty())
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Version(empty_pb2.Empty())
    await server.stop(0)

    def scrape() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics") as answer:
            return str(answer.read().decode())

    text = await asyncio.to_thread(scrape)
    await metrics.close()
    method = "/containerd.services.version.v1.Version/Version"
    assert f'supervisord_ctr_grpc_calls_total{{code="OK",method="{method}"}} 1.0' in text
    assert f'supervisord_ctr_grpc_calls_total{{code="NOT_FOUND",method="{method}"}} 1.0' in text
    assert "supervisord_ctr_tasks 3.0" in text


async def test_bad_and_taken_addresses_are_refused() -> None:
    with pytest.raises(errors.InvalidArgument):
        await Metrics("nonsense").start()
    first = Metrics("127.0.0.1:0")
    await first.start()
    with pytest.raises(errors.Unavailable):
        await Metrics(f"127.0.0.1:{first.port}").start()
    await first.close()
