"""What containerd's own clients rely on beyond the shapes of messages; each case was seen on containerd 2.3 first."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from supervisord_ctr.api.runc.v1 import options_pb2
from supervisord_ctr.api.services.introspection.v1 import introspection_pb2, introspection_pb2_grpc
from supervisord_ctr.api.services.ttrpc.events.v1 import events_pb2 as forwarding
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.linux import cgroups
from supervisord_ctr.ttrpc.client import Client as TtrpcClient
from tests.integration.tasks_support import FOREIGN, OWN, TIMEOUT, Client, Watch, shim_pid
from tests.support.daemon import DaemonProcess, wait_until


def packed(message: Message) -> AnyMessage:
    """As typeurl packs it: the bare name."""
    return AnyMessage(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


EVENTS = "containerd.services.events.ttrpc.v1.Events"


async def forward(address: str, namespace: str, topic: str) -> None:
    request = forwarding.ForwardRequest()
    request.envelope.namespace, request.envelope.topic = namespace, topic
    request.envelope.timestamp.FromSeconds(int(time.time()))
    request.envelope.event.type_url = "google.protobuf.Empty"
    connection = await TtrpcClient.connect(address)
    try:
        await connection.call(EVENTS, "Forward", request, Empty, timeout=TIMEOUT)
    finally:
        await connection.close()


def test_events_are_taken_on_the_socket_beside_the_address(daemon: DaemonProcess) -> None:
    client = Client(daemon, Path("/"))
    with Watch(client) as watch:
        asyncio.run(forward(f"{daemon.address}.ttrpc", daemon.namespace, "/test/beside"))
        watch.wait_for("/test/beside")
    client.close()


@pytest.mark.parametrize("runtime", ["", OWN, FOREIGN])
def test_a_runtime_tells_what_it_can(client: Client, runtime: str) -> None:
    stub: Any = introspection_pb2_grpc.IntrospectionStub(client.channel)
    question = packed(types_pb2.RuntimeRequest(runtime_path=runtime))
    request = introspection_pb2.PluginInfoRequest(type="io.containerd.runtime.v2", id="task", options=question)
    if runtime == FOREIGN:
        # Debian's shim does not know the question.
        assert client.code(stub.PluginInfo, request) == grpc.StatusCode.UNKNOWN
        return
    answer = client.call(stub.PluginInfo, request)
    assert answer.plugin.id == "task"
    assert answer.extra.type_url == "containerd.types.RuntimeInfo"
    told = types_pb2.RuntimeInfo.FromString(answer.extra.value)
    assert told.name
    assert told.features.type_url.endswith("/features/Features")
    assert "rro" in json.loads(told.features.value)["mountOptions"]


def test_parts_refuse_questions_that_are_not_theirs(client: Client) -> None:
    stub: Any = introspection_pb2_grpc.IntrospectionStub(client.channel)

    def code(kind: str, name: str, question: Message) -> grpc.StatusCode:
        return client.code(stub.PluginInfo, introspection_pb2.PluginInfoRequest(
            type=kind, id=name, options=packed(question)))

    task = ("io.containerd.runtime.v2", "task")
    assert code(*task, Empty()) == grpc.StatusCode.UNIMPLEMENTED
    assert code("io.containerd.content.v1", "content", Empty()) == grpc.StatusCode.UNIMPLEMENTED
    assert code("io.containerd.content.v1", "none", Empty()) == grpc.StatusCode.NOT_FOUND
    assert code(*task, types_pb2.RuntimeRequest(runtime_path="io.containerd.none.v9")) == grpc.StatusCode.NOT_FOUND


def test_a_shim_joins_the_cgroup_that_the_client_names(client: Client) -> None:
    path = f"/pctr-test-{secrets.token_hex(4)}/shim"
    name = client.container(["sleep", "1000"])
    missing = packed(options_pb2.Options(shim_cgroup=path))
    assert code_of_create(client, name, missing) == grpc.StatusCode.NOT_FOUND
    group = cgroups.create(path)
    try:
        client.create(name, options=missing)
        assert shim_pid(client, name) in group.pids()
        client.start(name)
        assert client.process(name).pid not in group.pids()
        client.finish(name)
        wait_until(lambda: not group.populated(), "the shim is gone", TIMEOUT)
    finally:
        group.delete()
        cgroups.at(path.rpartition("/")[0]).delete()


def code_of_create(client: Client, name: str, options: AnyMessage) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        client.create(name, options=options)
    found: grpc.StatusCode = caught.value.code()
    return found


def test_a_missing_oci_runtime_is_named_in_quotes(client: Client) -> None:
    name = client.container(["true"])
    with pytest.raises(grpc.RpcError) as caught:
        client.create(name, options=packed(options_pb2.Options(binary_name="no-runc")))
    assert '"no-runc"' in (caught.value.details() or "")
    client.remove(name)
