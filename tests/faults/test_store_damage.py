"""A damaged or lost database, and a full disk: what is on disk is taken up again, and the daemon goes on (P6)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from supervisord_ctr.errors import NotFound, ResourceExhausted
from supervisord_ctr.linux.mounts import mount, temp_mount, umount
from supervisord_ctr.model import Container, Descriptor, Image, Runtime, SnapshotKind, TypedValue
from tests.support.stores import Stores, open_stores


async def fill(stores: Stores) -> str:
    """A running container's worth: two layers, a writable snapshot with a file, an image."""
    database = stores.database
    overlay = database.snapshotter("overlayfs")
    for name, parent in (("one", ""), ("two", "one")):
        with temp_mount(await overlay.prepare("ns", f"{name}-work", parent)) as target:
            (Path(target) / name).write_text(name)
        await overlay.commit("ns", name, f"{name}-work", {"containerd.io/snapshot/note": name})
    with temp_mount(await overlay.prepare("ns", "run", "two")) as target:
        (Path(target) / "data").write_text("precious")
    digest = await stores.blob("ns", b"manifest")
    await database.images.create("ns", Image("img", Descriptor("m", digest, 8)))
    await database.containers.create(
        "ns", Container("c1", {}, "img", Runtime("r"), TypedValue("s", b"{}"), "overlayfs", "run")
    )
    return digest


@pytest.mark.parametrize("keep_copy", [False, True])
async def test_p6_a_lost_database_costs_no_layer_and_no_blob(tmp_path: Path, keep_copy: bool) -> None:
    async with open_stores(tmp_path) as stores:
        digest = await fill(stores)
    (tmp_path / "metadata.db").write_bytes(b"\0" * 20_000)
    if not keep_copy:
        (tmp_path / "metadata.db.copy").unlink()
    async with open_stores(tmp_path) as stores:
        assert stores.engine.repair is not None
        database = stores.database
        overlay = database.snapshotter("overlayfs")
        infos = {info.name: info for info in await overlay.walk("ns")}
        assert {name: (info.parent, info.kind) for name, info in infos.items()} == {
            "one": ("", SnapshotKind.COMMITTED), "two": ("one", SnapshotKind.COMMITTED), "run": ("two", SnapshotKind.ACTIVE),
        }
        with temp_mount(await overlay.mounts("ns", "run")) as target:
            assert (Path(target) / "data").read_text() == "precious"
            assert (Path(target) / "one").read_text() == "one"
        report = await database.gc.collect()
        assert report.removed == ()
        assert "held until" in report.errors[0]
        if keep_copy:
            assert (await database.containers.get("ns", "c1")).snapshot_key == "run"
            assert (await database.images.get("ns", "img")).target.digest == digest
        else:
            with pytest.raises(NotFound):
                await database.containers.get("ns", "c1")
        # Whoever pulls the image again need not fetch what is on disk.
        if not keep_copy:
            writer = await database.content.writer("ns", "again", expected=digest)
            assert writer.shared
            assert await writer.commit() == digest
        assert await database.content.read("ns", digest) == b"manifest"
        # Numbers go on after those on disk.
        await overlay.prepare("ns", "more", "two")
    async with open_stores(tmp_path) as stores:
        assert stores.engine.repair is None
        assert len(await stores.database.snapshotter("overlayfs").walk("ns")) == 4
        assert "held until" in (await stores.database.gc.collect()).errors[0]
        await stores.database.gc.release()
        await stores.database.gc.collect()
        kept = {info.name for info in await stores.database.snapshotter("overlayfs").walk("ns")}
        assert kept == ({"one", "two", "run"} if keep_copy else set())


async def test_p6_a_full_disk_stops_neither_start_nor_removal(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("tmpfs", disk, "tmpfs", 0, "size=24m,mode=0700")
    try:
        async with open_stores(disk) as stores:
            digest = await stores.blob("ns", os.urandom(6 << 20))
            await stores.database.images.create("ns", Image("img", Descriptor("m", digest, 6 << 20)))
            writer = await stores.database.content.writer("ns", "huge")
            with pytest.raises(ResourceExhausted):
                for _ in range(64):
                    await writer.write(os.urandom(1 << 20))
            held = writer.offset
            await writer.close()
        assert os.statvfs(disk).f_bavail == 0
        async with open_stores(disk) as stores:
            assert (await stores.database.images.get("ns", "img")).target.digest == digest
            status = await stores.database.content.status("ns", "huge")
            assert status.offset == held
            await stores.database.images.delete("ns", "img", sync=True)
            assert os.statvfs(disk).f_bavail > 0
            again = await stores.database.content.writer("ns", "huge")
            assert again.offset == held
            await again.write(os.urandom(1 << 20))
            await again.close()
            await stores.database.content.abort("ns", "huge")
    finally:
        umount(disk, 2)
