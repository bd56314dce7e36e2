"""The gRPC boundary: server, the one error adapter, request headers, conversions of common messages.

Owns everything that every service needs of gRPC, so that handlers only translate messages. Handlers
raise `errors.Error`; the interceptor here turns that into a status. No handler calls
`context.abort`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar, cast

import grpc
from google.protobuf import any_pb2, timestamp_pb2
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from supervisord_ctr import errors
from supervisord_ctr.model import TypedValue
from supervisord_ctr.names import check_identifier

if TYPE_CHECKING:
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]
    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
else:
    _Interceptor = grpc.aio.ServerInterceptor
    Context: TypeAlias = grpc.aio.ServicerContext

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)

NAMESPACE_HEADER = "containerd-namespace"
LEASE_HEADER = "containerd-lease"

_STATUS: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


#: Told of each call that ended: method, name of the status, seconds (None for streams).
Observe: TypeAlias = Callable[[str, str, float | None], None]


def header(context: Any, name: str) -> str:
    """The first value of a request header, "" when the client sent none."""
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return value if isinstance(value, str) else value.decode("utf-8", "replace")
    return ""


def namespace_of(context: Any) -> str:
    """The namespace that the client works in.

    Raises `FailedPrecondition` when the header is missing, as containerd does, and
    `InvalidArgument` when it is not an identifier.
    """
    namespace = header(context, NAMESPACE_HEADER)
    if not namespace:
        raise errors.FailedPrecondition("namespace is required", kind="namespace")
    return check_identifier(namespace, "namespace")


def lease_of(context: Any) -> str | None:
    """The lease that the client's new objects belong to."""
    return header(context, LEASE_HEADER) or None


def timestamp(seconds_: float) -> timestamp_pb2.Timestamp:
    """A `Timestamp` for seconds since the epoch (nanoseconds rounded to what a float holds)."""
    whole = int(seconds_ // 1)
    return timestamp_pb2.Timestamp(seconds=whole, nanos=min(999_999_999, int((seconds_ - whole) * 1e9)))


def seconds(value: timestamp_pb2.Timestamp) -> float:
    """Seconds since the epoch."""
    return float(value.seconds) + float(value.nanos) / 1e9


def any_to_value(value: any_pb2.Any) -> TypedValue | None:
    """None for an Any that is not set."""
    return TypedValue(value.type_url, value.value) if value.type_url or value.value else None


def any_from_value(value: TypedValue | None) -> any_pb2.Any | None:
    """The reverse; None stays None, which protobuf constructors take as "not set"."""
    return None if value is None else any_pb2.Any(type_url=value.type_url, value=value.value)


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """The status that a client sees for an error of a handler."""
    if isinstance(error, errors.Error):
        return _STATUS[error.code], error.message
    if isinstance(error, asyncio.CancelledError):
        return grpc.StatusCode.CANCELLED, "the operation was cancelled"
    if isinstance(error, TimeoutError):
        return grpc.StatusCode.DEADLINE_EXCEEDED, str(error) or "deadline exceeded"
    if isinstance(error, OSError):
        translated = errors.from_os_error(error, "system call failed:")
        return _STATUS[translated.code], translated.message
    return grpc.StatusCode.UNKNOWN, f"{type(error).__name__}: {error}"


async def _fail(context: Any, method: str, error: BaseException) -> NoReturn:
    """End the call with the status of `error`; re-raises what must pass through."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise error
    code, message = status_of(error)
    if not isinstance(error, errors.Error | asyncio.CancelledError):
        log.error("%s failed", method, exc_info=error)
    elif log.isEnabledFor(logging.DEBUG):
        log.debug("%s: %s: %s", method, code.name, message)
    # A status message travels in a header: bound it, since peers refuse headers over 8 KiB.
    await context.abort(code, message[:4096])
    raise AssertionError("abort returned")


class ErrorInterceptor(_Interceptor):
    """Wraps each handler once, so that what it raises becomes a status, and its end is counted."""

    def __init__(self, observe: Observe | None = None) -> None:
        self._wrapped: dict[str, Any] = {}
        self._observe = observe

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        method = handler_call_details.method
        found = self._wrapped.get(method)
        if found is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            found = self._wrapped[method] = _wrap(handler, method, self._observe)
        return found


def _code_name(context: Any, error: BaseException | None) -> str:
    if error is None:
        return "OK"
    code = context.code()
    return code.name if isinstance(code, grpc.StatusCode) else status_of(error)[0].name


def _wrap(handler: Any, method: str, observe: Observe | None) -> Any:
    if handler.response_streaming:
        kind = "stream_stream" if handler.request_streaming else "unary_stream"
        inner = getattr(handler, kind)

        @functools.wraps(inner)
        async def streaming(request: Any, context: Any) -> None:
            # A coroutine that writes, and no generator: gRPC leaves a generator whose call was cancelled
            # between two answers to the garbage collector, and what it holds with it.
            failure: BaseException | None = None
            try:
                answers = inner(request, context)
                if inspect.isawaitable(answers):
                    await answers  # it writes itself
                else:
                    async with contextlib.aclosing(answers):
                        async for item in answers:
                            await context.write(item)
            except BaseException as error:
                failure = error
                await _fail(context, method, error)
            finally:
                if observe is not None:
                    observe(method, _code_name(context, failure), None)

        wrapped: Any = streaming
    else:
        kind = "stream_unary" if handler.request_streaming else "unary_unary"
        inner = getattr(handler, kind)

        @functools.wraps(inner)
        async def unary(request: Any, context: Any) -> Any:
            started = time.monotonic()
            failure: BaseException | None = None
            try:
                return await inner(request, context)
            except BaseException as error:
                failure = error
                await _fail(context, method, error)
            finally:
                if observe is not None:
                    observe(method, _code_name(context, failure), time.monotonic() - started)

        wrapped = unary
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(wrapped, request_deserializer=handler.request_deserializer,
                response_serializer=_serializer(handler.response_serializer))


def serialized(kind: type[M], data: bytes) -> M:
    """An answer that its handler has serialized already; the types see the message that it stands for."""
    return cast("M", data)


def _serializer(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Lets an answer pass that is bytes already."""

    def passing(answer: Any) -> bytes:
        return answer if type(answer) is bytes else serialize(answer)

    return passing


class _GenericOnly:
    """A server to which handlers are added without registering each method.

    grpc.aio waits for the next call on one future for each registered method, over all of them for
    every call: with a hundred methods that costs a call about half a millisecond. Unregistered ones
    share one future and are found by name.
    """

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service_name: str, handlers: Any) -> None:
        """Left out on purpose."""


class RpcServer:
    """The gRPC server on its Unix socket.

    `services` maps full service names to their `add_…_to_server` function and servicer. The socket
    is 0600 (0660 with a group), and its folder must already be private.
    """

    def __init__(self, address: Path, *, uid: int = 0, gid: int = 0, max_receive: int = 16 << 20,
                 max_send: int = 16 << 20, observe: Observe | None = None) -> None:
        self._address = address
        self._owner = (uid, gid)
        self._health = HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor(observe)],
            options=[
                ("grpc.max_receive_message_length", max_receive),
                ("grpc.max_send_message_length", max_send),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 5000),
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.max_concurrent_streams", 10_000),
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, _GenericOnly(self._server))
        self._names = ["", "grpc.health.v1.Health"]

    def add(self, name: str, register: Callable[[Any, Any], None], servicer: object) -> None:
        """Serve `servicer` under the full service name `name`."""
        register(servicer, _GenericOnly(self._server))
        self._names.append(name)

    @property
    def services(self) -> list[str]:
        """Full names of what is served."""
        return sorted(filter(None, self._names))

    async def start(self) -> None:
        """Listen; returns when clients can connect.

        Raises `FailedPrecondition` when the path is taken by something that is not a socket.
        """
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(self._address).st_mode):
                raise errors.FailedPrecondition(f"{self._address} exists and is not a socket", kind="address")
            os.unlink(self._address)
        if not self._server.add_insecure_port(f"unix:{self._address}"):
            raise errors.Unavailable(f"cannot listen on {self._address}", kind="address")
        os.chown(self._address, *self._owner)
        os.chmod(self._address, 0o660 if self._owner[1] else 0o600)
        await self._server.start()
        await self.set_serving(True)

    async def set_serving(self, serving: bool) -> None:
        """What the health service answers from now on."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, status)

    async def stop(self, grace: float) -> None:
        """Refuse new calls, give running ones `grace` seconds, remove the socket."""
        await self.set_serving(False)
        await self._server.stop(grace)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._address)


def metadata(namespace: str, lease: str | None = None) -> Mapping[str, str]:
    """Headers that a client of this interface sends."""
    return {NAMESPACE_HEADER: namespace, **({LEASE_HEADER: lease} if lease else {})}
