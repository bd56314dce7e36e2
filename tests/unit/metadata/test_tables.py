"""The small tables: CRI records, addresses, activations; and what a snapshotter that fails to open does to the rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from supervisord_ctr.errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from tests.support.stores import Stores, open_stores


@pytest.fixture
async def stores(tmp_path: Path) -> AsyncIterator[Stores]:
    async with open_stores(tmp_path) as made:
        yield made


async def test_cri_records(stores: Stores) -> None:
    cri = stores.database.cri
    await cri.put("sandbox", "b", b"\x00two")
    await cri.put("sandbox", "a", b"one")
    await cri.put("container", "a", b"other")
    await cri.put("sandbox", "a", b"again", durable=False)
    assert await cri.list("sandbox") == [("a", b"again"), ("b", b"\x00two")]
    assert await cri.get("container", "a") == b"other"
    await cri.delete("sandbox", "a")
    await cri.delete("sandbox", "a")
    with pytest.raises(NotFound):
        await cri.get("sandbox", "a")


async def test_p5_addresses_are_leased_once_and_come_back(stores: Stores) -> None:
    addresses = stores.database.addresses
    first = await addresses.lease("10.88.0.0/29", "pod-1")
    assert first == "10.88.0.2"
    assert await addresses.lease("10.88.0.0/29", "pod-1") == first
    leased = await asyncio.gather(*(addresses.lease("10.88.0.0/29", f"pod-{number}") for number in range(2, 6)))
    assert sorted([first, *leased]) == [f"10.88.0.{number}" for number in range(2, 7)]
    with pytest.raises(ResourceExhausted):
        await addresses.lease("10.88.0.0/29", "one too many")
    await addresses.release("10.88.0.0/29", "pod-1")
    await addresses.release("10.88.0.0/29", "nobody")
    assert await addresses.lease("10.88.0.0/29", "next") == first
    assert len(await addresses.list("10.88.0.0/29")) == 5
    assert await addresses.lease("10.89.0.0/29", "pod-1") == "10.89.0.2"


async def test_a_released_address_rests(stores: Stores) -> None:
    addresses = stores.database.addresses
    seen = []
    for number in range(6):
        seen.append(await addresses.lease("10.88.0.0/28", f"pod-{number}"))
        await addresses.release("10.88.0.0/28", f"pod-{number}")
    assert len(set(seen)) == 6


async def test_addresses_of_ipv6(stores: Stores) -> None:
    assert await stores.database.addresses.lease("fd00::/64", "pod") == "fd00::2"


async def test_activations(stores: Stores) -> None:
    activations = stores.database.activations
    await activations.create("ns", "m", "{}")
    with pytest.raises(AlreadyExists):
        await activations.create("ns", "m", "{}")
    await activations.put("ns", "m", "[1]")
    assert await activations.get("ns", "m") == "[1]"
    assert await activations.list() == await activations.list("ns") == [("ns", "m", "[1]")]
    assert await activations.list("other") == []
    await activations.delete("ns", "m")
    for work in (activations.get("ns", "m"), activations.delete("ns", "m"), activations.put("ns", "m", "x")):
        with pytest.raises(NotFound):
            await work


async def test_snapshotters_by_name(stores: Stores) -> None:
    database = stores.database
    assert set(database.snapshotters) == {"overlayfs", "native"}
    for name in ("", "zfs"):
        with pytest.raises(InvalidArgument):
            database.snapshotter(name)


async def test_a_snapshotter_that_cannot_be_opened_is_left_out(tmp_path: Path) -> None:
    stores = Stores(tmp_path)

    async def fails(*, adopt: bool = False) -> None:
        raise Unavailable("overlayfs cannot be mounted")

    stores.overlay.open = fails  # type: ignore[method-assign]
    await stores.database.open()
    try:
        assert set(stores.database.snapshotters) == {"native"}
        assert stores.database.unavailable == {"overlayfs": "overlayfs cannot be mounted"}
        with pytest.raises(InvalidArgument, match="cannot be mounted"):
            stores.database.snapshotter("overlayfs")
        await stores.database.snapshotter("native").prepare("ns", "k")
    finally:
        await stores.database.close()
        stores.executors.close()


async def test_layers_of_another_namespace_are_adopted(stores: Stores) -> None:
    overlay = stores.database.snapshotter("overlayfs")
    for name, parent in (("one", ""), ("two", "one")):
        await overlay.prepare("a", "w", parent)
        await overlay.commit("a", name, "w", {"l": name})
    assert not await overlay.adopt("b", "two", "one")
    assert await overlay.adopt("b", "one")
    assert await overlay.adopt("b", "two", "one")
    assert await overlay.adopt("b", "two", "one")
    assert not await overlay.adopt("b", "three", "two")
    info = await overlay.stat("b", "two")
    assert (info.parent, dict(info.labels)) == ("one", {"l": "two"})
    await overlay.prepare("b", "run", "two", {"containerd.io/gc.root": "1"})
    for name in ("two", "one"):
        await overlay.remove("a", name)
    await stores.database.gc.collect()
    assert {info.name for info in await overlay.walk("b")} == {"one", "two", "run"}
    assert stores.overlay.missing() == []
    await overlay.remove("b", "run")
    await stores.database.gc.collect()
    assert await stores.overlay.walk() == []


async def test_a_layer_that_the_snapshotter_lost_is_not_adopted(stores: Stores) -> None:
    overlay = stores.database.snapshotter("overlayfs")
    await overlay.prepare("a", "w")
    await overlay.commit("a", "one", "w")
    (info,) = await stores.overlay.walk()
    await stores.overlay.remove(info.name)
    assert not await overlay.adopt("b", "one")
    with pytest.raises(NotFound):
        await overlay.stat("b", "one")
