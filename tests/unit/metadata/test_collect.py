"""Collection over real stores: what goes, what stays, and what must never go."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from supervisord_ctr.errors import Unknown
from supervisord_ctr.metadata import Collector, GcReport
from supervisord_ctr.model import Container, Descriptor, Image, LeaseResource, Runtime, Sandbox, TypedValue
from tests.support.stores import Stores, open_stores

REF = "containerd.io/gc.ref.content"
SPEC = TypedValue("spec", b"{}")


@pytest.fixture
async def stores(tmp_path: Path) -> AsyncIterator[Stores]:
    async with open_stores(tmp_path) as made:
        yield made


def later(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


async def make_image(stores: Stores, name: str, namespace: str = "ns", labels: dict[str, str] | None = None) -> list[str]:
    """Blobs and an image record: manifest → config and two layers; returns the digests."""
    config = await stores.blob(namespace, f"{name}-config".encode())
    layers = [await stores.blob(namespace, f"{name}-layer-{number}".encode()) for number in range(2)]
    references = {f"{REF}.config": config, **{f"{REF}.l.{number}": layer for number, layer in enumerate(layers)}}
    manifest = await stores.blob(namespace, f"{name}-manifest".encode(), references)
    await stores.database.images.create(namespace, Image(name, Descriptor("m", manifest, 10), labels or {}))
    return [manifest, config, *layers]


async def make_layer(stores: Stores, name: str, parent: str = "", labels: dict[str, str] | None = None) -> None:
    overlay = stores.database.snapshotter("overlayfs")
    await overlay.prepare("ns", f"{name}-work", parent)
    await overlay.commit("ns", name, f"{name}-work", labels)


async def blobs(stores: Stores, namespace: str = "ns") -> set[str]:
    return {info.digest for info in await stores.database.content.walk(namespace)}


async def keys(stores: Stores) -> set[str]:
    return {info.name for info in await stores.database.snapshotter("overlayfs").walk("ns")}


def on_disk(stores: Stores) -> set[str]:
    return {info.digest for info in stores.local.walk()}


async def test_an_image_holds_its_content_until_it_is_deleted(stores: Stores) -> None:
    kept = await make_image(stores, "a")
    stray = await stores.blob("ns", b"stray")
    report = await stores.database.gc.collect()
    assert ("ns", "content", stray) in report.removed
    assert ("", "blob", stray) in report.removed
    assert await blobs(stores) == on_disk(stores) == set(kept)
    await stores.database.images.delete("ns", "a")
    assert len(on_disk(stores)) == 4
    await stores.database.gc.collect()
    assert await blobs(stores) == on_disk(stores) == set()
    assert report.errors == ()


async def test_p16_a_synchronous_delete_gives_the_space_back_before_it_returns(stores: Stores) -> None:
    await make_image(stores, "a")
    await stores.database.images.delete("ns", "a", sync=True)
    assert on_disk(stores) == set()
    assert os.listdir(stores.root / "content" / "trash") == []


async def test_p16_a_dry_run_tells_and_removes_nothing(stores: Stores) -> None:
    stray = await stores.blob("ns", b"stray")
    await make_layer(stores, "layer")
    await stores.overlay.prepare("ns/99/lost")
    with stores.local.writer("nobody's") as writer:
        writer.write(b"x")
    told = await stores.database.gc.collect(dry_run=True)
    assert told.dry_run
    assert {("ns", "content", stray), ("", "blob", stray), ("", "ingest-data", "nobody's"),
            ("", "snapshot-data", "overlayfs/ns/99/lost")} <= set(told.removed)
    assert on_disk(stores) == {stray}
    done = await stores.database.gc.collect()
    assert sorted(done.removed) == sorted(told.removed)


async def test_p6_a_held_collector_removes_nothing_and_says_so(stores: Stores) -> None:
    stray = await stores.blob("ns", b"stray")
    await stores.database.gc.hold(3600.0)
    report = await stores.database.gc.collect()
    assert (report.removed, "held until" in report.errors[0], on_disk(stores)) == ((), True, {stray})
    await stores.database.gc.release()
    await stores.database.gc.collect()
    assert on_disk(stores) == set()


async def test_content_of_another_namespace_stays_on_disk(stores: Stores) -> None:
    digests = await make_image(stores, "a", "one")
    writer = await stores.database.content.writer("two", "r", expected=digests[1])
    await writer.commit(labels={"containerd.io/gc.root": "now"})
    await stores.database.images.delete("one", "a", sync=True)
    assert on_disk(stores) == await blobs(stores, "two") == {digests[1]}


async def test_root_labels(stores: Stores) -> None:
    root = await stores.blob("ns", b"root", {"containerd.io/gc.root": "2026", REF: "sha256:" + "0" * 64})
    await make_layer(stores, "layer", labels={"containerd.io/gc.root": "2026", REF: root})
    await stores.database.gc.collect()
    assert (await blobs(stores), await keys(stores)) == ({root}, {"layer"})


async def test_containers_hold_their_snapshot_and_its_parents(stores: Stores) -> None:
    for name, parent in (("one", ""), ("two", "one"), ("other", "one")):
        await make_layer(stores, name, parent)
    overlay = stores.database.snapshotter("overlayfs")
    await overlay.prepare("ns", "c1", "two")
    await overlay.prepare("ns", "stray", "two")
    extra = await stores.blob("ns", b"extra")
    await stores.database.containers.create("ns", Container(
        "c1", {REF: extra}, "img", Runtime("r"), SPEC, "overlayfs", "c1",
    ))
    stores.topics()
    report = await stores.database.gc.collect()
    assert await keys(stores) == {"one", "two", "c1"}
    assert await blobs(stores) == {extra}
    assert stores.topics().count("/snapshot/remove") == 2
    assert {key for _, kind, key in report.removed if kind == "snapshot"} == {"overlayfs/stray", "overlayfs/other"}
    assert len(os.listdir(stores.root / "overlayfs" / "snapshots")) == 3
    await stores.database.containers.delete("ns", "c1")
    await stores.database.gc.collect()
    assert await keys(stores) == set()
    assert os.listdir(stores.root / "overlayfs" / "snapshots") == []


async def test_sandboxes_hold_what_their_labels_name(stores: Stores) -> None:
    await make_layer(stores, "layer")
    await stores.database.sandboxes.create("ns", Sandbox(
        "box", Runtime("r"), labels={"containerd.io/gc.ref.snapshot.overlayfs": "layer"}
    ))
    await stores.database.gc.collect()
    assert await keys(stores) == {"layer"}


async def test_a_lease_holds_resources_with_what_they_refer_to(stores: Stores) -> None:
    layer = await stores.blob("ns", b"layer")
    manifest = await stores.blob("ns", b"manifest", {REF: layer})
    await make_layer(stores, "one")
    await make_layer(stores, "two", "one", {REF: layer})
    leases = stores.database.leases
    await leases.create("ns", "l")
    await leases.add_resource("ns", "l", LeaseResource("content", manifest))
    await leases.add_resource("ns", "l", LeaseResource("snapshots/overlayfs", "two"))
    await stores.database.gc.collect()
    assert (await blobs(stores), await keys(stores)) == ({layer, manifest}, {"one", "two"})
    await leases.delete("ns", "l", sync=True)
    assert (await blobs(stores), await keys(stores)) == (set(), set())


async def test_a_flat_lease_holds_resources_and_parents_only(stores: Stores) -> None:
    layer = await stores.blob("ns", b"layer")
    manifest = await stores.blob("ns", b"manifest", {REF: layer})
    await make_layer(stores, "one")
    await make_layer(stores, "two", "one", {REF: layer})
    leases = stores.database.leases
    await leases.create("ns", "l", {"containerd.io/gc.flat": "1"})
    await leases.add_resource("ns", "l", LeaseResource("content", manifest))
    await leases.add_resource("ns", "l", LeaseResource("snapshots/overlayfs", "two"))
    await stores.database.gc.collect()
    assert (await blobs(stores), await keys(stores)) == ({manifest}, {"one", "two"})


async def test_expired_leases_and_images_go(stores: Stores) -> None:
    await make_image(stores, "old", labels={"containerd.io/gc.expire": later(-10)})
    kept = await make_image(stores, "new", labels={"containerd.io/gc.expire": later(1000)})
    odd = await make_image(stores, "odd", labels={"containerd.io/gc.expire": "tomorrow"})
    leases = stores.database.leases
    held = await stores.blob("ns", b"held")
    for name, when in (("gone", -10.0), ("stays", 1000.0)):
        await leases.create("ns", name, {"containerd.io/gc.expire": later(when)})
    await leases.add_resource("ns", "gone", LeaseResource("content", held))
    stores.topics()
    await stores.database.gc.collect()
    assert [lease.id for lease in await leases.list("ns")] == ["stays"]
    assert {image.name for image in await stores.database.images.list("ns")} == {"new", "odd"}
    assert await blobs(stores) == {*kept, *odd}
    assert "/images/delete" in stores.topics()


async def test_ingests_live_by_lease_or_for_a_day(stores: Stores) -> None:
    content = stores.database.content
    await stores.database.leases.create("ns", "l")
    for ref, lease in (("leased", "l"), ("free", None)):
        writer = await content.writer("ns", ref, lease=lease)
        await writer.write(b"x")
        await writer.close()
    await stores.database.gc.collect()
    assert {status.ref for status in await content.statuses("ns")} == {"leased", "free"}
    await stores.database.leases.delete("ns", "l")
    await stores.engine.write(lambda tx: tx.execute("UPDATE ingests SET expires = 1 WHERE ref = 'free'"))
    await stores.database.gc.collect()
    assert await content.statuses("ns") == []
    assert stores.local.statuses() == []


async def test_a_shared_ingest_holds_the_blob(stores: Stores) -> None:
    digest = await stores.blob("one", b"shared")
    writer = await stores.database.content.writer("two", "r", expected=digest)
    await stores.database.content.delete("one", digest)
    await stores.database.gc.collect()
    assert on_disk(stores) == {digest}
    assert await writer.commit() == digest
    assert await stores.database.content.read("two", digest) == b"shared"


async def test_p16_one_failure_does_not_end_the_pass(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = await stores.blob("ns", b"first"), await stores.blob("ns", b"second")
    await make_layer(stores, "layer")
    discard = stores.local.discard

    def fails(digest: str) -> None:
        if digest == first:
            raise Unknown("the disk is on fire")
        discard(digest)

    monkeypatch.setattr(stores.local, "discard", fails)
    report = await stores.database.gc.collect()
    assert report.errors == ("the disk is on fire",)
    assert on_disk(stores) == {first}
    assert (second in str(report.removed), await keys(stores)) == (True, set())
    monkeypatch.undo()
    assert ("", "blob", first) in (await stores.database.gc.collect()).removed
    assert on_disk(stores) == set()


async def test_p5_what_has_no_row_goes(stores: Stores) -> None:
    with stores.local.writer("nobody's") as writer:
        writer.write(b"x")
    with stores.local.writer("blob") as writer:
        writer.write(b"orphan")
        writer.commit()
    await stores.overlay.prepare("ns/1/lost")
    (stores.root / "overlayfs" / "snapshots" / "999").mkdir()
    (stores.root / "overlayfs" / "snapshots" / "new-1234").mkdir()
    report = await stores.database.gc.collect()
    assert {kind for _, kind, _ in report.removed} == {"blob", "ingest-data", "snapshot-data"}
    assert (on_disk(stores), stores.local.statuses()) == (set(), [])
    assert os.listdir(stores.root / "overlayfs" / "snapshots") == []
    assert (await stores.database.gc.collect()).removed == ()


async def test_what_comes_to_be_needed_during_a_pass_stays(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = await stores.blob("ns", b"needed")
    await stores.database.leases.create("ns", "l")
    collector = stores.database.gc
    read = collector._read
    loop = asyncio.get_running_loop()

    def read_then_need():  # type: ignore[no-untyped-def]
        graph = read()
        asyncio.run_coroutine_threadsafe(
            stores.database.leases.add_resource("ns", "l", LeaseResource("content", digest)), loop
        ).result(30)
        return graph

    monkeypatch.setattr(collector, "_read", read_then_need)
    assert (await collector.collect()).removed == ()
    assert on_disk(stores) == {digest}


async def test_writers_and_passes_side_by_side(stores: Stores) -> None:
    """Namespaces share blobs on disk, write and delete them, while passes run: each row keeps its bytes."""
    content, leases = stores.database.content, stores.database.leases
    done = asyncio.Event()

    async def collect() -> None:
        while not done.is_set():
            await stores.database.gc.collect()

    async def use(number: int) -> None:
        namespace = f"ns{number}"
        await leases.create(namespace, "l")
        for turn in range(20):
            data = f"blob {turn % 4}".encode()
            digest = "sha256:" + hashlib.sha256(data).hexdigest()
            expected = digest if (turn + number) % 2 else ""
            writer = await content.writer(namespace, f"ref {turn}", expected=expected, lease="l")
            if not writer.shared:
                await writer.write(data)
            await writer.commit(len(data), digest)
            assert await content.read(namespace, digest) == data
            if turn < 16:
                await content.delete(namespace, digest, lease="l")

    async with asyncio.TaskGroup() as group:
        collecting = group.create_task(collect())
        await asyncio.gather(*(use(number) for number in range(6)))
        done.set()
        await collecting
    await stores.database.gc.collect()
    for number in range(6):
        found = await blobs(stores, f"ns{number}")
        assert found == on_disk(stores)
        assert len(found) == 4


async def test_prepares_and_passes_side_by_side(stores: Stores) -> None:
    overlay = stores.database.snapshotter("overlayfs")
    await stores.database.leases.create("ns", "l")
    await overlay.prepare("ns", "w", lease="l")
    await overlay.commit("ns", "base", "w", lease="l")
    done = asyncio.Event()

    async def collect() -> None:
        while not done.is_set():
            await stores.database.gc.collect()

    async def use(number: int) -> None:
        for turn in range(10):
            key = f"{number}-{turn}"
            await overlay.prepare("ns", key, "base", lease="l")
            await overlay.mounts("ns", key)
            if turn % 2:
                await overlay.commit("ns", f"layer-{key}", key, lease="l")
            else:
                await overlay.remove("ns", key, lease="l")

    async with asyncio.TaskGroup() as group:
        collecting = group.create_task(collect())
        await asyncio.gather(*(use(number) for number in range(6)))
        done.set()
        await collecting
    await stores.database.gc.collect()
    assert len(await keys(stores)) == 1 + 6 * 5
    assert len(os.listdir(stores.root / "overlayfs" / "snapshots")) == 31
    assert stores.overlay.missing() == []


# The schedule.


async def until(condition: object, collector: Collector) -> GcReport:
    async with asyncio.timeout(60):
        while collector.last is None or not condition(collector.last):  # type: ignore[operator]
            await asyncio.sleep(0.01)
    return collector.last


async def test_p16_deletions_are_collected_soon(tmp_path: Path) -> None:
    async with open_stores(tmp_path, collect=True) as stores:
        await make_image(stores, "a")
        await stores.database.images.delete("ns", "a")
        async with asyncio.timeout(60):
            while on_disk(stores):
                await asyncio.sleep(0.01)


async def test_p16_expired_leases_go_without_a_mutation(stores: Stores) -> None:
    await stores.database.leases.create("ns", "l", {"containerd.io/gc.expire": later(0.5)})
    stores.database.gc.start(first=1000.0)
    await stores.database.gc.collect()
    async with asyncio.timeout(60):
        while await stores.database.leases.list("ns"):
            await asyncio.sleep(0.01)


async def test_callers_that_wait_share_a_pass(stores: Stores) -> None:
    reports = await asyncio.gather(*(stores.database.gc.collect() for _ in range(10)))
    assert len({id(report) for report in reports}) <= 2


@pytest.mark.parametrize("collected", [False, True])
async def test_a_blob_that_is_on_disk_without_a_row_is_used_or_written_again(stores: Stores, collected: bool) -> None:
    data = b"known to the disk alone"
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if collected:
        await stores.database.gc.collect()
    path = stores.local.path(digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    writer = await stores.database.content.writer("ns", "r", size=len(data), expected=digest)
    assert writer.shared is not collected
    if not writer.shared:
        await writer.write(data)
    assert await writer.commit() == digest
    assert await stores.database.content.read("ns", digest) == data
    await stores.database.gc.collect()
    assert not path.exists()


async def test_p16_a_blob_that_is_collected_while_a_lease_takes_it_is_written_again(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"about to go"
    digest = await stores.blob("ns", data)
    lease = await stores.database.leases.create("ns", "l")
    loop, look = asyncio.get_running_loop(), stores.local.info

    def collected(wanted: str) -> object:
        gone = stores.engine.write(lambda tx: tx.execute("DELETE FROM blobs"))
        asyncio.run_coroutine_threadsafe(gone, loop).result(10)
        return look(wanted)

    monkeypatch.setattr(stores.local, "info", collected)
    writer = await stores.database.content.writer("ns", "again", size=len(data), expected=digest, lease=lease.id)
    monkeypatch.undo()
    if not writer.shared:
        await writer.write(data)
    assert await writer.commit() == digest
    assert await stores.database.content.read("ns", digest) == data
