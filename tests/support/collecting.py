"""Garbage collection of a running daemon, asked for by its clients."""

from __future__ import annotations

import threading
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from supervisord_ctr.api.services.introspection.v1 import introspection_pb2, introspection_pb2_grpc


def collect(channel: grpc.Channel, timeout: float = 60.0) -> dict[str, Any]:
    """One whole pass that begins after this call; what it tells: removed, errors, seconds."""
    question = Struct()
    question.update({"collect": True})
    request = introspection_pb2.PluginInfoRequest(
        type="io.containerd.gc.v1", id="scheduler",
        options=any_pb2.Any(type_url="google.protobuf.Struct", value=question.SerializeToString()),
    )
    stub: Any = introspection_pb2_grpc.IntrospectionStub(channel)
    told: dict[str, Any] = MessageToDict(Struct.FromString(stub.PluginInfo(request, timeout=timeout).extra.value))
    return told


class Collecting:
    """Passes one after another until the end of the block. `errors` are those of the passes and of the calls."""

    def __init__(self, channel: grpc.Channel, timeout: float = 60.0) -> None:
        self._channel = channel
        self._timeout = timeout
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop)
        self.passes = 0
        self.errors: list[Any] = []

    def _loop(self) -> None:
        while not self._stop.is_set():
            try:
                self.errors.extend(collect(self._channel, self._timeout)["errors"])
            except grpc.RpcError as error:
                self.errors.append(error)
                return
            self.passes += 1

    def __enter__(self) -> Collecting:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
