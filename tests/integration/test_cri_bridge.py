"""Pods on the embedded bridge, where there is no CNI configuration."""

from __future__ import annotations

import secrets
import socket
import subprocess
from collections.abc import Iterator

import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.sandbox.bridge import interface_name
from tests.support.cri import Cri, running_cri
from tests.support.daemon import wait_until

BRIDGE = f"eb{secrets.token_hex(3)}"
SUBNET = f"10.{200 + secrets.randbelow(40)}.{secrets.randbelow(250)}.0/28"


@pytest.fixture(scope="module")
def cri() -> Iterator[Cri]:
    options = f'embedded_bridge = true\nbridge_name = "{BRIDGE}"\nbridge_subnet = "{SUBNET}"'
    with running_cri(cni=options) as made:
        (made.network.folder / "10-test.conflist").unlink()
        made.pull()
        yield made
    from pyroute2 import IPRoute

    with IPRoute() as route:
        for index in route.link_lookup(ifname=BRIDGE):
            route.link("del", index=index)
    subprocess.run(["nft", "delete", "table", "ip", f"supervisord-ctr-{BRIDGE}"], check=True, capture_output=True)


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def test_d8_a_pod_gets_an_address_and_gives_it_back(cri: Cri) -> None:
    network_ready = next(
        condition for condition in cri.runtime.Status(pb.StatusRequest()).status.conditions
        if condition.type == "NetworkReady"
    )
    assert network_ready.status
    pod, config = cri.run_pod()
    address = cri.pod_status(pod).network.ip
    assert address.rpartition(".")[0] == SUBNET.rpartition(".")[0]
    assert interface_name(pod) in interfaces()
    container = cri.run(pod, config, "while :; do echo served | nc -l -p 8080; done")
    other, other_config = cri.run_pod()
    client = cri.run(other, other_config, "sleep 600")
    wait_until(
        lambda: b"served" in cri.exec(client, "sh", "-c", f"nc -w 5 {address} 8080 < /dev/null").stdout,
        "the other pod is reached", 60,
    )
    assert cri.status(container).state == pb.CONTAINER_RUNNING
    cri.remove_pod(pod)
    cri.remove_pod(other)
    assert interface_name(pod) not in interfaces()


def test_d8_addresses_do_not_run_out(cri: Cri) -> None:
    for _ in range(16):
        pod, _ = cri.run_pod()
        cri.remove_pod(pod)


def test_d8_the_address_survives_the_daemon(cri: Cri) -> None:
    pod, _ = cri.run_pod()
    address = cri.pod_status(pod).network.ip
    cri.daemon.restart(kill=True)
    cri.connect()
    assert cri.pod_status(pod).network.ip == address
    cri.remove_pod(pod)
    assert interface_name(pod) not in interfaces()


def test_d8_a_host_port_leads_to_the_pod(cri: Cri) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = cri.pod_config()
    config.port_mappings.append(pb.PortMapping(container_port=8080, host_port=port))
    pod, _ = cri.run_pod(config)
    gateway = cri.pod_status(pod).network.ip.rpartition(".")[0] + "." + str(int(SUBNET.split(".")[3].split("/")[0]) + 1)
    cri.run(pod, config, "while :; do echo served | nc -l -p 8080; done")

    def reached() -> bool:
        try:
            with socket.create_connection((gateway, port), timeout=5) as connection:
                return connection.recv(100) == b"served\n"
        except OSError:
            return False

    wait_until(reached, f"the pod is reached at {gateway}:{port}", 60)
    cri.remove_pod(pod)
    rules = subprocess.run(
        ["nft", "list", "table", "ip", f"supervisord-ctr-{BRIDGE}"], check=True, capture_output=True, text=True).stdout
    assert "masquerade" in rules
    assert f"dport {port} " not in rules
