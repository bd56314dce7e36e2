"""The record of attachments: written before the first plugin, gone after the last."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from supervisord_ctr import errors
from supervisord_ctr.sandbox import cni
from supervisord_ctr.sandbox.cni_config import ConfigFolder
from supervisord_ctr.sandbox.network import KIND, Attached, PodNetworks
from tests.unit.sandbox.fake_plugins import FakePlugins

RESULT = {"cniVersion": "1.0.0", "ips": [{"address": "10.1.2.3/24"}]}


class MemoryRecords:
    """Records in a dictionary."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], bytes] = {}

    async def put(self, kind: str, id: str, value: bytes) -> None:  # noqa: A002
        self.kept[kind, id] = value

    async def list(self, kind: str) -> list[tuple[str, bytes]]:
        return [(key[1], value) for key, value in self.kept.items() if key[0] == kind]

    async def delete(self, kind: str, id: str) -> None:  # noqa: A002
        self.kept.pop((kind, id), None)


def make(tmp_path: Path, records: MemoryRecords | None = None) -> tuple[PodNetworks, FakePlugins, MemoryRecords]:
    plugins = FakePlugins(tmp_path / "bin")
    plugins.add("one", RESULT)
    folder = tmp_path / "net.d"
    folder.mkdir(exist_ok=True)
    (folder / "10.conflist").write_text(
        json.dumps({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "one"}]})
    )
    records = records or MemoryRecords()
    return PodNetworks(cni.Cni(ConfigFolder(folder), [str(plugins.folder)]), records), plugins, records


def request(pod: str = "pod1") -> cni.Request:
    return cni.Request(pod, "/nonexistent/netns")


async def test_attaching_twice_is_attaching_once(tmp_path: Path) -> None:
    networks, plugins, _ = make(tmp_path)
    assert await networks.attach(request()) == ["10.1.2.3"]
    assert await networks.attach(request()) == ["10.1.2.3"]
    assert plugins.calls() == ["ADD one"]


async def test_p5_the_intent_is_recorded_before_a_plugin_runs(tmp_path: Path) -> None:
    networks, plugins, records = make(tmp_path)
    seen: list[bool] = []

    async def namespace() -> None:
        seen.append(bool(plugins.calls()))

    await networks.attach(request(), namespace())
    assert seen == [False]
    assert not Attached.decode(records.kept[KIND, "pod1"]).addresses
    await networks.confirm("pod1")
    assert Attached.decode(records.kept[KIND, "pod1"]).addresses == ("10.1.2.3",)


async def test_p5_a_failed_attach_is_detached_at_once(tmp_path: Path) -> None:
    networks, plugins, records = make(tmp_path)
    plugins.answer("one", "ADD", {"code": 7, "msg": "no"}, fail=True)
    with pytest.raises(errors.Error, match="no"):
        await networks.attach(request())
    assert plugins.calls() == ["ADD one", "DEL one"]
    assert records.kept == {}


class SlowRecords(MemoryRecords):
    """Records whose writes take as long as the test wants, and happen whoever waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.writing, self.go_on = asyncio.Event(), asyncio.Event()

    async def put(self, kind: str, id: str, value: bytes) -> None:  # noqa: A002
        self.writing.set()
        try:
            await self.go_on.wait()
        finally:
            await super().put(kind, id, value)


async def test_p5_no_record_stays_of_a_pod_whose_namespace_could_not_be_made(tmp_path: Path) -> None:
    records = SlowRecords()
    networks, plugins, _ = make(tmp_path, records)

    async def namespace() -> None:
        await records.writing.wait()
        asyncio.get_running_loop().call_soon(records.go_on.set)
        raise errors.ResourceExhausted("no more namespaces")

    with pytest.raises(errors.ResourceExhausted):
        await networks.attach(request(), namespace())
    assert records.kept == {}
    assert networks.known() == []
    assert "ADD one" not in plugins.calls()


async def test_p5_no_record_stays_of_an_attach_that_is_called_off_while_it_is_written_down(tmp_path: Path) -> None:
    records = SlowRecords()
    networks, plugins, _ = make(tmp_path, records)

    async def attach() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(networks.attach(request()))
            await records.writing.wait()
            raise errors.Unknown("the other half failed")

    with pytest.raises(BaseExceptionGroup):
        await attach()
    assert records.kept == {}
    assert networks.known() == []
    assert "ADD one" not in plugins.calls()


async def test_p5_a_detach_that_fails_is_repeated_until_it_works(tmp_path: Path) -> None:
    networks, plugins, records = make(tmp_path)
    await networks.attach(request())
    plugins.answer("one", "DEL", {"code": 7, "msg": "busy"}, fail=True)
    for _ in range(2):
        with pytest.raises(errors.Error, match="busy"):
            await networks.detach("pod1")
    assert records.kept
    plugins.heal("one", "DEL")
    await networks.detach("pod1")
    assert records.kept == {}
    await networks.detach("pod1")
    assert plugins.calls().count("DEL one") == 3


async def test_p5_the_next_daemon_detaches_what_the_last_one_left(tmp_path: Path) -> None:
    networks, plugins, records = make(tmp_path)
    await networks.attach(request("wanted"))
    await networks.attach(request("orphan"))
    again, _, _ = make(tmp_path, records)
    await again.load()
    assert await again.release_orphans({"wanted"}) == []
    assert plugins.raw_calls()[-1].startswith("DEL one orphan")
    assert again.known() == ["wanted"]


async def test_detaching_uses_the_configuration_of_attaching(tmp_path: Path) -> None:
    networks, plugins, _ = make(tmp_path)
    await networks.attach(request())
    plugins.add("other", RESULT)
    (tmp_path / "net.d" / "10.conflist").write_text(
        json.dumps({"cniVersion": "1.0.0", "name": "changed", "plugins": [{"type": "other"}]})
    )
    await networks.detach("pod1")
    assert plugins.calls()[-1] == "DEL one"


async def test_a_damaged_record_is_left_alone(tmp_path: Path) -> None:
    records = MemoryRecords()
    records.kept[KIND, "broken"] = b"{"
    networks, _, _ = make(tmp_path, records)
    await networks.load()
    assert networks.known() == []
    assert records.kept[KIND, "broken"] == b"{"


async def test_a_network_without_an_address_is_no_network(tmp_path: Path) -> None:
    networks, plugins, _ = make(tmp_path)
    plugins.answer("one", "ADD", {"cniVersion": "1.0.0", "ips": []})
    with pytest.raises(errors.Unknown, match="failed to find network info"):
        await networks.attach(request())
    assert plugins.calls() == ["ADD one", "DEL one"]


class FakeBridge:
    """The embedded bridge, remembering who is attached."""

    def __init__(self) -> None:
        self.attached: set[str] = set()

    async def attach(self, owner: str, netns: str, port_mappings: object) -> list[str]:
        self.attached.add(owner)
        return ["10.88.0.2"]

    async def detach(self, owner: str) -> None:
        self.attached.discard(owner)


async def test_the_embedded_bridge_serves_where_there_is_no_configuration(tmp_path: Path) -> None:
    networks, plugins, _ = make(tmp_path)
    bridge = FakeBridge()
    networks.bridge = bridge
    (tmp_path / "net.d" / "10.conflist").unlink()
    assert await networks.status() == ""
    assert await networks.attach(request()) == ["10.88.0.2"]
    assert bridge.attached == {"pod1"}
    await networks.detach("pod1")
    assert bridge.attached == set()
    assert plugins.calls() == []
