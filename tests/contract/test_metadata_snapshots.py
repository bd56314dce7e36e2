"""Snapshots as namespaces see them: names, leases, labels, and layers that are there already."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from supervisord_ctr.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unknown
from supervisord_ctr.metadata.snapshots import NamespacedSnapshotter
from supervisord_ctr.model import Mount, SnapshotInfo, SnapshotKind
from supervisord_ctr.names import LABEL_SNAPSHOT_REF
from tests.support.stores import Stores, open_stores


@pytest.fixture
async def stores(tmp_path: Path) -> AsyncIterator[Stores]:
    async with open_stores(tmp_path) as made:
        yield made


@pytest.fixture(params=["overlayfs", "native"])
def snapshotter(request: pytest.FixtureRequest, stores: Stores) -> NamespacedSnapshotter:
    return stores.database.snapshotter(request.param)


async def layer(snapshotter: NamespacedSnapshotter, namespace: str, name: str, parent: str = "") -> None:
    await snapshotter.prepare(namespace, f"extract {name}", parent)
    await snapshotter.commit(namespace, name, f"extract {name}")


async def test_a_life_and_its_events(stores: Stores, snapshotter: NamespacedSnapshotter) -> None:
    await layer(snapshotter, "ns", "base")
    await snapshotter.prepare("ns", "run", "base", {"a": "1", "empty": ""})
    await snapshotter.view("ns", "look", "base")
    found = {info.name: info for info in await snapshotter.walk("ns")}
    assert {name: info.kind for name, info in found.items()} == {
        "base": SnapshotKind.COMMITTED, "run": SnapshotKind.ACTIVE, "look": SnapshotKind.VIEW
    }
    assert found["run"] == await snapshotter.stat("ns", "run")
    assert (found["run"].parent, dict(found["run"].labels)) == ("base", {"a": "1"})
    assert [info.name for info in await snapshotter.walk("ns", ["kind==active", "kind==view"])] == ["look", "run"]
    assert [info.name for info in await snapshotter.walk("ns", ["labels.a==1"])] == ["run"]
    assert [info.name for info in await snapshotter.walk("ns", ["parent==base,name!=look"])] == ["run"]
    with pytest.raises(InvalidArgument):
        await snapshotter.walk("ns", ["kind=="])
    with pytest.raises(FailedPrecondition, match="cannot remove snapshot base with child"):
        await snapshotter.remove("ns", "base")
    for name in ("run", "look", "base"):
        await snapshotter.remove("ns", name)
    assert await snapshotter.walk("ns") == []
    assert stores.topics() == [
        "/snapshot/prepare", "/snapshot/commit", "/snapshot/prepare", *["/snapshot/remove"] * 3
    ]


async def test_names_belong_to_their_namespace(snapshotter: NamespacedSnapshotter) -> None:
    await layer(snapshotter, "one", "base")
    for work in (snapshotter.stat("two", "base"), snapshotter.usage("two", "base"), snapshotter.mounts("two", "base"),
                 snapshotter.remove("two", "base"), snapshotter.update("two", SnapshotInfo("base")),
                 snapshotter.prepare("two", "run", "base"), snapshotter.commit("two", "x", "base")):
        with pytest.raises(NotFound, match="base does not exist"):
            await work
    await layer(snapshotter, "two", "base")
    assert [info.name for info in await snapshotter.walk("two")] == ["base"]


async def test_refusals(snapshotter: NamespacedSnapshotter) -> None:
    await layer(snapshotter, "ns", "base")
    await snapshotter.prepare("ns", "run", "base")
    for work in (snapshotter.prepare("ns", ""), snapshotter.view("ns", ""), snapshotter.commit("ns", "", "run"),
                 snapshotter.prepare("ns", "x", "", {"k": "v" * 5000}), snapshotter.prepare("ns", "x", "", {"": "v"}),
                 snapshotter.commit("ns", "x", "run", {"k": "v" * 5000}),
                 snapshotter.update("ns", SnapshotInfo("")), snapshotter.prepare("ns", "x", "run"),
                 snapshotter.update("ns", SnapshotInfo("run"), ["kind"])):
        with pytest.raises(InvalidArgument):
            await work
    for work in (snapshotter.prepare("ns", "run"), snapshotter.view("ns", "base"), snapshotter.commit("ns", "base", "run")):
        with pytest.raises(AlreadyExists):
            await work
    with pytest.raises(FailedPrecondition):
        await snapshotter.commit("ns", "again", "base")
    with pytest.raises(FailedPrecondition):
        await snapshotter.mounts("ns", "base")
    assert sorted(info.name for info in await snapshotter.walk("ns")) == ["base", "run"]


async def test_only_its_own_labels_reach_the_snapshotter(snapshotter: NamespacedSnapshotter) -> None:
    await snapshotter.prepare("ns", "run", "", {"mine": "1", "containerd.io/snapshot/its": "2"})
    info = next(iter(await snapshotter.backend.walk()))
    assert dict(info.labels) == {"containerd.io/snapshot/its": "2"}
    changed = await snapshotter.update(
        "ns", SnapshotInfo("run", labels={"mine": "3", "containerd.io/snapshot/its": "4", "new": "5"}),
        ["labels.containerd.io/snapshot/its", "labels.new"],
    )
    assert dict(changed.labels) == {"mine": "1", "containerd.io/snapshot/its": "4", "new": "5"}
    assert dict((await snapshotter.backend.stat(info.name)).labels) == {"containerd.io/snapshot/its": "4"}
    assert changed.updated_at > changed.created_at
    assert changed == await snapshotter.stat("ns", "run")


async def test_a_lease_follows_a_snapshot_through_its_commit(
    stores: Stores, snapshotter: NamespacedSnapshotter
) -> None:
    leases = stores.database.leases
    await leases.create("ns", "l")
    await leases.create("ns", "other")

    async def held(lease: str) -> list[str]:
        return [item.id for item in await leases.list_resources("ns", lease)]

    await snapshotter.prepare("ns", "extract", lease="l")
    assert await held("l") == ["extract"]
    await snapshotter.commit("ns", "base", "extract", lease="l")
    assert await held("l") == ["base"]
    with pytest.raises(AlreadyExists):
        await snapshotter.prepare("ns", "base", lease="other")
    assert await held("other") == ["base"]
    await snapshotter.remove("ns", "base", lease="other")
    assert await held("other") == []
    with pytest.raises(NotFound, match="does not exist"):
        await snapshotter.prepare("ns", "x", lease="nobody")
    assert await snapshotter.walk("ns") == []


class Remote:
    """A snapshotter that may have layers by itself, as those that fetch layers on demand do: it answers
    ALREADY_EXISTS to a `prepare` whose label names a layer it has on that parent."""

    name = "remote"
    capabilities: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.infos: dict[str, SnapshotInfo] = {}
        self.fails = False

    async def open(self, *, adopt: bool = False) -> None: ...
    async def close(self) -> None: ...

    async def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> tuple[Mount, ...]:
        target = (labels or {}).get(LABEL_SNAPSHOT_REF)
        if self.fails or target and any(
            info.labels.get(LABEL_SNAPSHOT_REF) == target and info.parent == parent
            and info.kind == SnapshotKind.COMMITTED for info in self.infos.values()
        ):
            raise AlreadyExists("target")
        self.infos[key] = SnapshotInfo(key, parent, SnapshotKind.ACTIVE, 1, 1, dict(labels or {}))
        return ()

    async def commit(
        self, name: str, key: str, labels: Mapping[str, str] | None = None, *, parent: str | None = None
    ) -> None:
        self.infos[name] = replace(
            self.infos.pop(key), name=name, kind=SnapshotKind.COMMITTED, labels=dict(labels or {})
        )

    async def walk(self, filters: Any = ()) -> list[SnapshotInfo]:
        return list(self.infos.values())

    async def stat(self, key: str) -> SnapshotInfo:
        return self.infos[key]

    async def remove(self, key: str) -> None:
        del self.infos[key]


@pytest.fixture
def remote(stores: Stores) -> NamespacedSnapshotter:
    backend: Any = Remote()
    return NamespacedSnapshotter(stores.engine, backend, stores.database.content.owner)


async def test_a_layer_that_the_snapshotter_has_joins_the_namespace(
    stores: Stores, remote: NamespacedSnapshotter
) -> None:
    leases = stores.database.leases
    for namespace in ("one", "two", "three"):
        await leases.create(namespace, "l")

    async def held(namespace: str) -> list[str]:
        return sorted(item.id for item in await leases.list_resources(namespace, "l"))

    ref1, ref2 = {LABEL_SNAPSHOT_REF: "one"}, {LABEL_SNAPSHOT_REF: "two"}
    await remote.prepare("one", "tmp1", "", ref1, lease="l")
    await remote.commit("one", "one", "tmp1", ref1, lease="l")
    # Another namespace is told that it is there, and has it from then on.
    with pytest.raises(AlreadyExists, match='target snapshot "one"'):
        await remote.prepare("two", "tmp1", "", ref1, lease="l")
    assert (await remote.stat("two", "one")).kind == SnapshotKind.COMMITTED
    assert await held("two") == ["one"]
    # In the making in both: whoever commits second has a layer of its own.
    await remote.prepare("two", "tmp2", "one", ref2)
    await remote.prepare("one", "tmp2", "one", ref2)
    await remote.commit("two", "two", "tmp2", ref2)
    await remote.commit("one", "two", "tmp2", ref2)
    # What the namespace has under the name is there, whatever parent is asked for; it joins the lease.
    with pytest.raises(AlreadyExists):
        await remote.prepare("two", "again", "", ref2, lease="l")
    assert await held("two") == ["one", "two"]
    # A third namespace: only onto the right parent, which it must have.
    await remote.prepare("three", "tmp2", "", ref2)
    await remote.remove("three", "tmp2")
    with pytest.raises(NotFound, match="parent snapshot one"):
        await remote.prepare("three", "tmp2", "one", ref2, lease="l")
    assert await held("three") == []
    for key, parent, labels in (("tmp1", "", ref1), ("tmp2", "one", ref2)):
        with pytest.raises(AlreadyExists):
            await remote.prepare("three", key, parent, labels, lease="l")
    assert await held("three") == ["one", "two"]
    assert (await remote.stat("three", "two")).parent == "one"


async def test_a_key_of_the_snapshotter_s_own_is_no_answer(remote: NamespacedSnapshotter) -> None:
    backend: Any = remote.backend
    backend.fails = True
    with pytest.raises(Unknown, match="unexpected error from snapshotter"):
        await remote.prepare("ns", "key")
    with pytest.raises(NotFound, match="in backend"):
        await remote.prepare("ns", "key", "", {LABEL_SNAPSHOT_REF: "nothing"})
    assert await remote.walk("ns") == []


async def test_an_update_reaches_the_snapshotter_although_its_caller_left(snapshotter: NamespacedSnapshotter) -> None:
    """Row and snapshotter are changed one after the other; a cancelled call must not stop between them."""
    await snapshotter.prepare("ns", "run", "", {"containerd.io/snapshot/its": "1"})
    backend = next(iter(await snapshotter.backend.walk())).name
    work = asyncio.get_running_loop().create_task(
        snapshotter.update("ns", SnapshotInfo("run", labels={"containerd.io/snapshot/its": "2"}))
    )
    await asyncio.sleep(0)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    async with asyncio.timeout(60):
        while dict((await snapshotter.backend.stat(backend)).labels) != {"containerd.io/snapshot/its": "2"}:
            await asyncio.sleep(0.001)
    assert dict((await snapshotter.stat("ns", "run")).labels) == {"containerd.io/snapshot/its": "2"}
