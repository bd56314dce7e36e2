"""Calls to another process over gRPC, for proxy plugins: `snapshots.proxy.Remote` over a channel."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from supervisord_ctr.errors import Error, from_code
from supervisord_ctr.rpc import NAMESPACE_HEADER

M = TypeVar("M", bound=Message)

#: Messages of a proxy may be as large as ours.
_LIMIT = 16 << 20


class GrpcRemote:
    """A connection to `target` ("unix:///run/…", "dns:///host:port"); made by the first call.

    `timeout` is the seconds that one call may take.
    """

    def __init__(self, target: str, *, timeout: float = 600.0) -> None:
        self._target = f"unix:{target}" if target.startswith("/") else target
        self._timeout = timeout
        self._opened: grpc.aio.Channel | None = None

    def _channel(self) -> grpc.aio.Channel:
        if self._opened is None:
            self._opened = grpc.aio.insecure_channel(self._target, options=[
                ("grpc.max_receive_message_length", _LIMIT), ("grpc.max_send_message_length", _LIMIT),
            ])
        return self._opened

    def _error(self, method: str, error: grpc.aio.AioRpcError) -> Error:
        code: Any = error.code()
        return from_code(code.value[0], f"{self._target}: {method}: {error.details()}")

    async def call(self, method: str, request: Message, response: type[M], *, namespace: str) -> M:
        """See `Remote.call`."""
        serialize: Callable[[Any], bytes] = type(request).SerializeToString
        stub = self._channel().unary_unary(method, request_serializer=serialize,
                                           response_deserializer=response.FromString)
        try:
            answer: M = await stub(request, timeout=self._timeout, metadata=((NAMESPACE_HEADER, namespace),))
        except grpc.aio.AioRpcError as error:
            raise self._error(method, error) from error
        return answer

    async def stream(self, method: str, request: Message, response: type[M], *, namespace: str) -> AsyncIterator[M]:
        """See `Remote.stream`."""
        serialize: Callable[[Any], bytes] = type(request).SerializeToString
        stub = self._channel().unary_stream(method, request_serializer=serialize,
                                            response_deserializer=response.FromString)
        try:
            async for answer in stub(request, timeout=self._timeout, metadata=((NAMESPACE_HEADER, namespace),)):
                yield answer
        except grpc.aio.AioRpcError as error:
            raise self._error(method, error) from error

    async def close(self) -> None:
        """Give the connection up; twice is fine."""
        channel, self._opened = self._opened, None
        if channel is not None:
            await channel.close(None)
