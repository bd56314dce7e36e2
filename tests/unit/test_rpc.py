"""The gRPC boundary: every error class reaches a client as its status."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import empty_pb2, timestamp_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from supervisord_ctr import errors, rpc
from supervisord_ctr.api.services.content.v1 import content_pb2, content_pb2_grpc
from supervisord_ctr.api.services.version.v1 import version_pb2_grpc


class Failing(version_pb2_grpc.VersionServicer):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def Version(self, request: Any, context: Any) -> Any:
        raise self.error


class FailingStream(content_pb2_grpc.ContentServicer):
    async def List(self, request: Any, context: Any) -> AsyncIterator[content_pb2.ListContentResponse]:
        yield content_pb2.ListContentResponse()
        raise errors.OutOfRange("beyond the end")

    async def Info(self, request: Any, context: Any) -> content_pb2.InfoResponse:
        return content_pb2.InfoResponse(info=content_pb2.Info(digest=rpc.namespace_of(context)))


class Endless(content_pb2_grpc.ContentServicer):
    """Answers more than a client takes; `ended` is set when its generator is."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def Read(self, request: Any, context: Any) -> AsyncIterator[content_pb2.ReadContentResponse]:
        try:
            while True:
                yield content_pb2.ReadContentResponse(data=bytes(1 << 20))
        finally:
            self.ended.set()


async def test_a_cancelled_stream_lets_go_at_once_of_what_its_handler_holds(tmp_path: Path) -> None:
    address, endless = tmp_path / "s.sock", Endless()
    server = rpc.RpcServer(address)
    server.add("containerd.services.content.v1.Content", content_pb2_grpc.add_ContentServicer_to_server, endless)
    await server.start()
    gc.disable()  # the garbage collector would hide a handler that nobody ends
    try:
        async with grpc.aio.insecure_channel(f"unix:{address}") as channel:
            stream = content_pb2_grpc.ContentStub(channel).Read(content_pb2.ReadContentRequest())
            await stream.read()
            await asyncio.sleep(0.2)  # the next answers wait for a client that takes them
            stream.cancel()
            async with asyncio.timeout(10):
                await endless.ended.wait()
    finally:
        gc.enable()
    await server.stop(0)


async def test_health_is_watched(tmp_path: Path) -> None:
    address = tmp_path / "s.sock"
    server = rpc.RpcServer(address)
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{address}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await server.set_serving(False)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
    await server.stop(0)


async def call(tmp_path: Path, error: BaseException) -> grpc.aio.AioRpcError:
    server = rpc.RpcServer(tmp_path / "s.sock")
    server.add("containerd.services.version.v1.Version", version_pb2_grpc.add_VersionServicer_to_server, Failing(error))
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s.sock") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await version_pb2_grpc.VersionStub(channel).Version(empty_pb2.Empty())
    await server.stop(0)
    return caught.value


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
async def test_each_class_has_its_status(tmp_path: Path, code: grpc.StatusCode) -> None:
    assert getattr(errors.Code, code.name) == code.value[0]
    status = await call(tmp_path, errors.from_code(code.value[0], f"image {code.name} is not there"))
    assert status.code() is code
    assert status.details() == f"image {code.name} is not there"


async def test_a_cancelled_error_of_our_own_is_a_status_and_not_silence(tmp_path: Path) -> None:
    assert (await call(tmp_path, asyncio.CancelledError())).code() is grpc.StatusCode.CANCELLED


async def test_system_errors_and_defects_are_statuses(tmp_path: Path) -> None:
    assert (await call(tmp_path, OSError(28, "No space left on device"))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    (tmp_path / "b").mkdir()
    assert (await call(tmp_path / "b", ZeroDivisionError("x"))).code() is grpc.StatusCode.UNKNOWN


async def test_a_long_message_fits_into_a_header(tmp_path: Path) -> None:
    status = await call(tmp_path, errors.NotFound("x" * 100_000))
    assert status.code() is grpc.StatusCode.NOT_FOUND
    assert len(status.details() or "") == 4096


async def test_streams_namespaces_health_and_permissions(tmp_path: Path) -> None:
    address = tmp_path / "s.sock"
    server = rpc.RpcServer(address)
    server.add("containerd.services.content.v1.Content", content_pb2_grpc.add_ContentServicer_to_server, FailingStream())
    await server.start()
    assert address.stat().st_mode & 0o777 == 0o600
    async with grpc.aio.insecure_channel(f"unix:{address}") as channel:
        stub = content_pb2_grpc.ContentStub(channel)
        got = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for item in stub.List(content_pb2.ListContentRequest()):
                got.append(item)
        assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
        assert len(got) == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Info(content_pb2.InfoRequest())
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert caught.value.details() == "namespace is required"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Info(content_pb2.InfoRequest(), metadata=(("containerd-namespace", "a/b"),))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        answer = await stub.Info(content_pb2.InfoRequest(), metadata=(("containerd-namespace", "k8s.io"),))
        assert answer.info.digest == "k8s.io"
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    await server.stop(0)
    assert not address.exists()


async def test_a_stale_socket_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    import socket

    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "s.sock"))
    stale.close()
    server = rpc.RpcServer(tmp_path / "s.sock")
    await server.start()
    await server.stop(0)
    (tmp_path / "f").write_text("mine")
    with pytest.raises(errors.FailedPrecondition):
        await rpc.RpcServer(tmp_path / "f").start()
    assert (tmp_path / "f").read_text() == "mine"


@pytest.mark.parametrize("value", [0.0, 1.5, 1_700_000_000.25, -1.5])
def test_timestamps(value: float) -> None:
    made = rpc.timestamp(value)
    assert isinstance(made, timestamp_pb2.Timestamp)
    assert 0 <= made.nanos < 1_000_000_000
    assert rpc.seconds(made) == pytest.approx(value)
