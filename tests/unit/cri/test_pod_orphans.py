"""Networks, addresses and interfaces of pods that are gone are found and given back; those of others are not (P5)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from supervisord_ctr.aio import Executors
from supervisord_ctr.cri.core import Stages
from supervisord_ctr.cri.orphans import PodOrphans
from supervisord_ctr.sandbox import cni
from supervisord_ctr.sandbox.bridge import EmbeddedBridge
from supervisord_ctr.sandbox.network import Attached

NETWORK = "10.88.0.0/16"


class Addresses:
    """The table of addresses."""

    def __init__(self, *owners: str) -> None:
        self.rows = {owner: f"10.88.0.{number}" for number, owner in enumerate(owners, 2)}

    async def all(self) -> list[tuple[str, str, str]]:
        return [(NETWORK, address, owner) for owner, address in self.rows.items()]

    async def lease(self, network: str, owner: str) -> str:
        return self.rows[owner]

    async def release(self, network: str, owner: str) -> None:
        self.rows.pop(owner, None)


class Bridge(EmbeddedBridge):
    """The embedded bridge without a kernel."""

    def __init__(self, addresses: Addresses, executors: Executors, strays: list[str]) -> None:
        super().__init__(addresses, executors, "test0", NETWORK)
        self.strays = strays

    def stray_interfaces(self, owners: Any) -> list[str]:
        return list(self.strays)

    def remove_interface(self, name: str) -> None:
        self.strays.remove(name)

    async def detach(self, owner: str) -> None:
        await self._addresses.release(NETWORK, owner)


class Networks:
    """`PodNetworks`, as far as it is used."""

    def __init__(self, bridge: Bridge, *pods: str) -> None:
        self.bridge = bridge
        self.attached = {pod: Attached(cni.Request(pod, "/ns"), addresses=("10.1.1.1",)) for pod in pods}

    def known(self) -> list[str]:
        return list(self.attached)

    def get(self, pod: str) -> Attached | None:
        return self.attached.get(pod)

    async def detach(self, pod: str) -> None:
        del self.attached[pod]


class State:
    """Pods by id; no containers."""

    def __init__(self, **ready: bool) -> None:
        self._pods = [SimpleNamespace(id=name, ready=value) for name, value in ready.items()]

    def pods(self) -> list[Any]:
        return self._pods

    def containers(self) -> list[Any]:
        return []


async def nothing(*_: Any) -> list[Any]:
    return []


def core_of(tmp_path: Any, executors: Executors, networks: Networks, state: State) -> Any:
    environments = SimpleNamespace(known=list)
    database = SimpleNamespace(containers=SimpleNamespace(list=nothing), snapshotters={})
    return SimpleNamespace(executors=executors, networks=networks, state=state, stages=Stages(), root=tmp_path,
                           run=tmp_path / "run", environments=environments, database=database)


async def test_p5_networks_addresses_and_interfaces_without_a_pod(tmp_path: Any) -> None:
    executors = Executors.create(io=1, cpu=1)
    try:
        addresses = Addresses("runs", "gone")
        networks = Networks(Bridge(addresses, executors, ["pc0123456789ab"]), "runs", "stopped", "making")
        core = core_of(tmp_path, executors, networks, State(runs=True, stopped=False))
        orphans = PodOrphans(core, addresses)  # type: ignore[arg-type]
        with core.stages.track("making", "network"):
            found = await orphans.find()
            assert [(entry.kind, entry.id, entry.remedy) for entry in found] == [
                ("network", "stopped", "remove"), ("address", "10.88.0.3 gone", "remove"),
                ("interface", "pc0123456789ab", "remove")]
            assert await orphans.repair(found) == {}
            assert await orphans.find() == []
        assert networks.known() == ["runs", "making"]
        assert addresses.rows == {"runs": "10.88.0.2"}
    finally:
        executors.close()


async def test_p5_an_address_whose_owner_came_back_is_kept(tmp_path: Any) -> None:
    executors = Executors.create(io=1, cpu=1)
    try:
        addresses = Addresses("late")
        networks = Networks(Bridge(addresses, executors, []))
        orphans = PodOrphans(core_of(tmp_path, executors, networks, State()), addresses)  # type: ignore[arg-type]
        found = await orphans.find()
        networks.attached["late"] = Attached(cni.Request("late", "/ns"))
        assert await orphans.repair(found) == {}
        assert list(addresses.rows) == ["late"]
    finally:
        executors.close()


def test_p22_failures_are_remembered_by_id_and_by_what_people_say() -> None:
    stages = Stages()
    try:
        with stages.track("0123456789", "namespaces", "tests/web") as stage:
            stage.enter("network")
            assert list(stages.about("web")) == ["tests/web"]
            raise OSError(5, "no cable")
    except OSError:
        pass
    for word in ("0123456789", "01234", "tests/web", "web"):
        assert [(found.stage, found.label) for found in stages.troubles(word)] == [("network", "tests/web")]
    assert stages.troubles("other", "0", "test") == []
    assert stages.about("web") == {}
