"""A real gRPC server on a Unix socket, in a thread, for the tests of the light client."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc

from supervisord_ctr.api.services.content.v1 import content_pb2
from supervisord_ctr.api.services.tasks.v1 import tasks_pb2


class Behaviour:
    """What the server answers; `released` ends the calls that wait."""

    def __init__(self) -> None:
        self.metadata: dict[str, str] = {}
        self.released = threading.Event()
        self.cancelled = threading.Event()

    async def wait(self, request: tasks_pb2.WaitRequest, context: Any) -> tasks_pb2.WaitResponse:
        """Answers when it is released."""
        try:
            while not self.released.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return tasks_pb2.WaitResponse(exit_status=7)

    async def state(self, request: tasks_pb2.GetRequest, context: Any) -> tasks_pb2.GetResponse:
        """Echoes the id; remembers the metadata; fails for ids that name a status."""
        self.metadata = dict(context.invocation_metadata())
        if request.container_id.startswith("fail:"):
            _, code, message = request.container_id.split(":", 2)
            await context.abort(getattr(grpc.StatusCode, code), message)
        response = tasks_pb2.GetResponse()
        response.process.container_id = request.container_id
        return response

    async def read(self, request: content_pb2.ReadContentRequest, context: Any) -> AsyncIterator[Any]:
        """`size` bytes in parts of `offset` bytes; then DATA_LOSS when the digest says so."""
        left = request.size
        while left:
            part = min(left, request.offset)
            left -= part
            yield content_pb2.ReadContentResponse(data=b"x" * part)
        if request.digest == "broken":
            await context.abort(grpc.StatusCode.DATA_LOSS, "the rest is gone")

    async def write(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        """Answers each message with the bytes so far."""
        total = 0
        async for request in requests:
            total += len(request.data)
            yield content_pb2.WriteContentResponse(action=request.action, offset=total)


@contextlib.contextmanager
def grpc_server(folder: Path) -> Iterator[tuple[str, Behaviour]]:
    """The socket's path and the behaviour of a server that serves until the block ends."""
    path, behaviour = str(folder / "grpc.sock"), Behaviour()
    ready, stop = threading.Event(), threading.Event()

    async def main() -> None:
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        server = grpc.aio.server(options=options)
        handlers = {
            "Wait": grpc.unary_unary_rpc_method_handler(
                behaviour.wait, tasks_pb2.WaitRequest.FromString, tasks_pb2.WaitResponse.SerializeToString),
            "Get": grpc.unary_unary_rpc_method_handler(
                behaviour.state, tasks_pb2.GetRequest.FromString, tasks_pb2.GetResponse.SerializeToString),
        }
        content = {
            "Read": grpc.unary_stream_rpc_method_handler(
                behaviour.read, content_pb2.ReadContentRequest.FromString,
                content_pb2.ReadContentResponse.SerializeToString),
            "Write": grpc.stream_stream_rpc_method_handler(
                behaviour.write, content_pb2.WriteContentRequest.FromString,
                content_pb2.WriteContentResponse.SerializeToString),
        }
        server.add_generic_rpc_handlers((
            grpc.method_handlers_generic_handler("containerd.services.tasks.v1.Tasks", handlers),
            grpc.method_handlers_generic_handler("containerd.services.content.v1.Content", content),
        ))
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        ready.set()
        while not stop.is_set():
            await asyncio.sleep(0.01)
        await server.stop(None)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert ready.wait(30)
        yield path, behaviour
    finally:
        behaviour.released.set()
        stop.set()
        thread.join(30)
        assert not thread.is_alive()
