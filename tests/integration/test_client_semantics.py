"""What containerd's own clients rely on beyond the shapes of messages; each case was seen on containerd 2.3 first."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from google.protobuf.empty_pb2 import Empty

from supervisord_ctr.api.services.ttrpc.events.v1 import events_pb2 as forwarding
from supervisord_ctr.ttrpc.client import Client as TtrpcClient
from tests.integration.tasks_support import TIMEOUT, Client, Watch
from tests.support.daemon import DaemonProcess

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
