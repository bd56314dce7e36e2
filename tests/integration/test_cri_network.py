"""Networks that fail, hang or are not there: the right words, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import grpc
import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.linux import mounts, namespaces
from tests.support.cri import Cri, running_cri
from tests.support.daemon import wait_until
from tests.unit.sandbox.fake_plugins import FakePlugins


@pytest.fixture(scope="module")
def cri() -> Iterator[Cri]:
    with running_cri(cni="plugin_timeout = 3.0") as made:
        yield made


@pytest.fixture
def plugins(cri: Cri) -> Iterator[FakePlugins]:
    """A network of one made-up plugin in place of the real ones, until the test is over."""
    file = cri.network.folder / "10-test.conflist"
    kept = file.read_text()
    made = FakePlugins(cri.daemon.base / "plugins")
    made.add("odd", {"cniVersion": "1.0.0", "ips": [{"address": "10.9.9.9/24"}]})
    file.write_text(json.dumps({"cniVersion": "1.0.0", "name": "odd", "plugins": [{"type": "odd"}]}))
    yield made
    cri.sweep()
    file.write_text(kept)
    shutil.rmtree(made.folder)


def ready(cri: Cri) -> tuple[bool, str]:
    conditions = {each.type: each for each in cri.runtime.Status(pb.StatusRequest()).status.conditions}
    return conditions["NetworkReady"].status, conditions["NetworkReady"].message


def test_without_a_network_the_status_says_what_is_missing(cri: Cri) -> None:
    file = cri.network.folder / "10-test.conflist"
    kept = file.read_text()
    file.unlink()
    try:
        state, message = ready(cri)
        assert not state
        assert f"no network configuration in {cri.network.folder}" in message
        with pytest.raises(grpc.RpcError) as caught:
            cri.run_pod()
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "failed to setup network for sandbox" in caught.value.details()
        config = cri.pod_config()
        config.linux.security_context.namespace_options.network = pb.NODE
        config.hostname = ""
        pod, _ = cri.run_pod(config)
        assert cri.pod_status(pod).network.ip == ""
        cri.remove_pod(pod)
    finally:
        file.write_text(kept)
    assert ready(cri) == (True, "")
    wait_until(lambda: not cri.leaks(), f"nothing is left: {cri.leaks()}", 60)


def test_p5_a_plugin_that_fails_leaves_nothing(cri: Cri, plugins: FakePlugins) -> None:
    plugins.answer("odd", "ADD", {"code": 11, "msg": "the pool is empty"}, fail=True)
    with pytest.raises(grpc.RpcError, match="the pool is empty"):
        cri.run_pod()
    assert plugins.calls() == ["ADD odd", "DEL odd"]
    wait_until(lambda: not cri.leaks(), f"nothing is left: {cri.leaks()}", 60)


def test_p5_a_plugin_that_hangs_is_ended_and_detached(cri: Cri, plugins: FakePlugins) -> None:
    plugins.hang("odd", "ADD")
    with pytest.raises(grpc.RpcError) as caught:
        cri.run_pod()
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "odd did not finish ADD within 3 s" in caught.value.details()
    assert plugins.calls() == ["ADD odd", "DEL odd"]
    wait_until(lambda: not cri.leaks(), f"nothing is left: {cri.leaks()}", 60)


def test_p5_a_detach_that_fails_is_told_and_repeated(cri: Cri, plugins: FakePlugins) -> None:
    pod, _ = cri.run_pod()
    plugins.answer("odd", "DEL", {"code": 7, "msg": "not now"}, fail=True)
    with pytest.raises(grpc.RpcError, match="failed to destroy network for sandbox .*not now"):
        cri.stop_pod(pod)
    with pytest.raises(grpc.RpcError, match="not now"):
        cri.remove_pod(pod)
    plugins.heal("odd", "DEL")
    cri.stop_pod(pod)
    cri.remove_pod(pod)
    assert plugins.calls()[-1] == "DEL odd"


def test_p15_one_stuck_network_does_not_hold_up_other_pods(cri: Cri, plugins: FakePlugins) -> None:
    plugins.hang("odd", "ADD")
    stuck = cri.runtime.RunPodSandbox.future(pb.RunPodSandboxRequest(config=cri.pod_config()), timeout=120)
    wait_until(lambda: plugins.calls(), "the plugin hangs", 60)
    config = cri.pod_config()
    config.linux.security_context.namespace_options.network = pb.NODE
    config.hostname = ""
    pod, _ = cri.run_pod(config)
    assert pod in {item.id for item in cri.runtime.ListPodSandbox(pb.ListPodSandboxRequest()).items}
    cri.remove_pod(pod)
    with pytest.raises(grpc.RpcError):
        stuck.result()


@pytest.mark.parametrize("left", ["a plain file", "nothing"])
def test_p5_a_pod_whose_network_namespace_is_gone_gives_its_address_back(cri: Cri, left: str) -> None:
    pod, _ = cri.run_pod()
    assert cri.network.leased()
    pin = cri.daemon.state / "cri" / "sandboxes" / pod / "ns" / "net"
    mounts.unmount_all(pin)
    assert not namespaces.is_pinned(pin)
    if left == "nothing":
        pin.unlink()
    cri.stop_pod(pod)
    cri.remove_pod(pod)
    assert cri.network.leased() == []
    assert cri.leaks() == []
