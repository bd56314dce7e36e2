"""Calls of CNI plugins: order, environment, capabilities, errors. The plugins are small shell programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from supervisord_ctr import errors
from supervisord_ctr.sandbox import cni
from supervisord_ctr.sandbox.cni_config import ConfigFolder
from supervisord_ctr.sandbox.cni_exec import PluginError, find_plugin, run_plugin
from tests.unit.sandbox.fake_plugins import FakePlugins

RESULT = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "br0"}, {"name": "eth0", "sandbox": "/ns"}],
    "ips": [{"address": "fd00::5/64", "interface": 1}, {"address": "10.1.2.3/24", "interface": 1}],
}


def make(tmp_path: Path, *types: str, version: str = "1.0.0", skip_idle: bool = True, **extra: object) -> tuple[cni.Cni, FakePlugins]:
    plugins = FakePlugins(tmp_path / "bin")
    for name in types:
        plugins.add(name, RESULT)
    folder = tmp_path / "net.d"
    folder.mkdir()
    listed = [{"type": name, "capabilities": {"portMappings": True}} for name in types]
    (folder / "10.conflist").write_text(
        json.dumps({"cniVersion": version, "name": "net", "plugins": listed, **extra})
    )
    return cni.Cni(ConfigFolder(folder), [str(plugins.folder)], timeout=30, skip_idle=skip_idle), plugins


def request(**capabilities: object) -> cni.Request:
    return cni.Request("pod1", "/ns", {"K8S_POD_NAME": "p", "IgnoreUnknown": "1"}, capabilities)


async def test_add_runs_forward_and_del_backward(tmp_path: Path) -> None:
    room, plugins = make(tmp_path, "one", "two")
    done = await room.add(request(), room.plan())
    await room.delete(request(), done)
    assert plugins.calls() == ["ADD one", "ADD two", "DEL two", "DEL one"]
    assert "ADD one pod1 eth0 K8S_POD_NAME=p;IgnoreUnknown=1" in plugins.raw_calls()


async def test_each_plugin_sees_the_result_before_it(tmp_path: Path) -> None:
    room, plugins = make(tmp_path, "one", "two")
    done = await room.add(request(), room.plan())
    assert "prevResult" not in plugins.configs("one", "ADD")[0]
    assert plugins.configs("two", "ADD")[0]["prevResult"]["ips"] == RESULT["ips"]
    await room.delete(request(), done)
    assert plugins.configs("one", "DEL")[0]["prevResult"]["ips"] == RESULT["ips"]


async def test_capabilities_reach_those_that_ask(tmp_path: Path) -> None:
    room, plugins = make(tmp_path, "one")
    await room.add(request(portMappings=[{"hostPort": 80}], bandwidth={"ingressRate": 1}), room.plan())
    config = plugins.configs("one", "ADD")[0]
    assert config["runtimeConfig"] == {"portMappings": [{"hostPort": 80}]}
    assert "capabilities" not in config


async def test_port_mapping_is_not_started_for_nothing(tmp_path: Path) -> None:
    room, plugins = make(tmp_path, "one", "portmap")
    done = await room.add(request(), room.plan())
    await room.delete(request(), done)
    assert plugins.calls() == ["ADD one", "DEL one"]
    done = await room.add(request(portMappings=[{"hostPort": 80}]), room.plan())
    await room.delete(request(portMappings=[{"hostPort": 80}]), done)
    assert plugins.calls()[2:] == ["ADD one", "ADD portmap", "DEL portmap", "DEL one"]


async def test_every_plugin_is_run_where_none_shall_be_skipped(tmp_path: Path) -> None:
    room, plugins = make(tmp_path, "one", "portmap", "bandwidth", skip_idle=False)
    done = await room.add(request(), room.plan())
    await room.check(request(), done)
    await room.delete(request(), done)
    names = ["one", "portmap", "bandwidth"]
    assert plugins.calls() == [
        *(f"ADD {name}" for name in names), *(f"CHECK {name}" for name in names),
        *(f"DEL {name}" for name in reversed(names)),
    ]


async def test_a_failure_speaks_the_plugins_words(tmp_path: Path) -> None:
    room, plugins = make(tmp_path, "one")
    plugins.answer("one", "ADD", {"code": 11, "msg": "no address left", "details": "pool is full"}, fail=True)
    with pytest.raises(PluginError, match=r'plugin type="one" failed \(add\): no address left: pool is full') as caught:
        await room.add(request(), room.plan())
    assert caught.value.number == 11


async def test_a_plugin_that_is_not_there_names_the_folders(tmp_path: Path) -> None:
    room, plugins = make(tmp_path, "one")
    (plugins.folder / "one").unlink()
    with pytest.raises(errors.NotFound, match=f"failed to find plugin 'one' in path .*{plugins.folder}"):
        await room.add(request(), room.plan())


async def test_a_plugin_that_hangs_is_killed(tmp_path: Path) -> None:
    plugins = FakePlugins(tmp_path / "bin")
    plugins.add("slow")
    plugins.hang("slow", "ADD")
    with pytest.raises(errors.DeadlineExceeded, match=r"slow did not finish ADD within 0\.2 s"):
        await run_plugin(str(plugins.folder / "slow"), "ADD", {}, timeout=0.2)


async def test_delete_tries_every_network_and_tells_the_failure(tmp_path: Path) -> None:
    room, plugins = make(tmp_path, "one", "two")
    done = await room.add(request(), room.plan())
    plugins.answer("two", "DEL", {"code": 7, "msg": "busy"}, fail=True)
    with pytest.raises(PluginError, match="busy"):
        await room.delete(request(), done)
    plugins.heal("two", "DEL")
    await room.delete(request(), done)
    assert plugins.calls()[-2:] == ["DEL two", "DEL one"]


async def test_status_and_gc_are_for_plugins_that_know_them(tmp_path: Path) -> None:
    room, plugins = make(tmp_path, "one", version="1.1.0")
    assert await room.status() == ""
    plugins.answer("one", "STATUS", {"code": 50, "msg": "no carrier"}, fail=True)
    assert "no carrier" in await room.status()
    await room.collect([("pod1", "eth0")])
    assert plugins.configs("one", "GC")[0]["cni.dev/valid-attachments"] == [{"containerID": "pod1", "ifname": "eth0"}]


async def test_status_of_older_networks_only_looks_for_the_programs(tmp_path: Path) -> None:
    room, plugins = make(tmp_path, "one")
    assert await room.status() == ""
    assert plugins.calls() == []
    (plugins.folder / "one").unlink()
    assert "failed to find plugin" in await room.status()


async def test_check_needs_a_version_that_has_it(tmp_path: Path) -> None:
    room, plugins = make(tmp_path, "one", version="0.3.1")
    await room.check(request(), await room.add(request(), room.plan()))
    assert plugins.calls() == ["ADD one"]


def test_addresses_are_those_of_the_pods_interface() -> None:
    assert cni.addresses(RESULT, "eth0") == ["fd00::5", "10.1.2.3"]
    assert cni.addresses({"ip4": {"ip": "10.0.0.2/24"}}, "eth0") == ["10.0.0.2"]
    assert cni.addresses({"ips": [{"address": "10.0.0.9/8"}]}, "eth0") == ["10.0.0.9"]
    assert cni.addresses(RESULT, "eth1") == []


@pytest.mark.parametrize(("preference", "first"), [("ipv4", "10.1.2.3"), ("ipv6", "fd00::5"), ("cni", "fd00::5")])
def test_the_preferred_family_leads(preference: str, first: str) -> None:
    assert cni.prefer(["fd00::5", "10.1.2.3"], preference)[0] == first


@pytest.mark.parametrize("name", ["../bridge", "/usr/bin/id", "..", ""])
def test_s16_a_plugin_is_a_plain_name(name: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        find_plugin(name, ["/usr/lib/cni"])


def test_attachments_read_back() -> None:
    network = cni.NetworkList("n", "1.0.0", ({"type": "x"},))
    attachment = cni.Attachment(network, "eth0", RESULT)
    assert cni.Attachment.from_json(json.loads(json.dumps(attachment.to_json()))) == attachment
