"""The mounts of the local snapshotters, word for word as containerd writes them; options and numbers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from supervisord_ctr.aio import Executors
from supervisord_ctr.errors import FailedPrecondition, Unavailable
from supervisord_ctr.model import Mount, SnapshotKind, Usage
from supervisord_ctr.names import CAPABILITY_REMAP_IDS
from supervisord_ctr.snapshots import SnapshotRecord, Snapshotter
from supervisord_ctr.snapshots.interface import CAPABILITY_REBASE
from supervisord_ctr.snapshots.native import NativeSnapshotter
from supervisord_ctr.snapshots.overlay import OverlaySnapshotter
from supervisord_ctr.snapshots.tree import disk_usage


class MemoryRecords:
    """`snapshots.Records` without a database."""

    def __init__(self) -> None:
        self.rows: dict[int, SnapshotRecord] = {}

    async def load(self) -> list[SnapshotRecord]:
        return list(self.rows.values())

    async def put(self, record: SnapshotRecord, *, durable: bool = True) -> None:
        self.rows[record.id] = record

    async def delete(self, ids: list[int], *, durable: bool = True) -> None:
        for number in ids:
            self.rows.pop(number, None)


@pytest.fixture
def executors():  # type: ignore[no-untyped-def]
    made = Executors.create(io=2, cpu=1)
    yield made
    made.close()


async def overlay(tmp_path: Path, executors: Executors, **options: object) -> OverlaySnapshotter:
    made = OverlaySnapshotter(tmp_path, MemoryRecords(), executors, **options)  # type: ignore[arg-type]
    await made.open()
    return made


async def test_overlay(tmp_path: Path, executors: Executors) -> None:
    made = await overlay(tmp_path, executors, options=["volatile"])
    assert isinstance(made, Snapshotter)
    base = f"{tmp_path}/snapshots"
    assert await made.prepare("k1") == (Mount("bind", f"{base}/1/fs", ("rw", "rbind")),)
    assert await made.view("v0") == (Mount("bind", f"{base}/2/fs", ("ro", "rbind")),)
    await made.commit("one", "k1")
    assert await made.view("v1", "one") == (Mount("bind", f"{base}/1/fs", ("ro", "rbind")),)
    tail = ("volatile", "index=off") if os.path.exists("/sys/module/overlay/parameters/index") else ("volatile",)
    assert await made.prepare("k2", "one") == (Mount("overlay", "overlay", (
        f"workdir={base}/4/work", f"upperdir={base}/4/fs", f"lowerdir={base}/1/fs", *tail,
    )),)
    await made.commit("two", "k2")
    assert await made.view("v2", "two") == (
        Mount("overlay", "overlay", (f"lowerdir={base}/4/fs:{base}/1/fs", *tail)),
    )
    assert made.capabilities == {CAPABILITY_REBASE}


async def test_overlay_with_mapped_ids(tmp_path: Path, executors: Executors) -> None:
    made = await overlay(tmp_path, executors, remap_ids=True)
    labels = {
        "containerd.io/snapshot/uidmapping": "0:1000:65536", "containerd.io/snapshot/gidmapping": "0:2000:65536",
    }
    await made.prepare("k")
    await made.commit("one", "k")
    (mount,) = await made.prepare("run", "one", labels)
    assert mount.options[:2] == ("uidmap=0:1000:65536", "gidmap=0:2000:65536")
    assert os.stat(f"{tmp_path}/snapshots/2/fs").st_uid == 1000
    assert CAPABILITY_REMAP_IDS in made.capabilities


async def test_a_named_index_option_is_kept(tmp_path: Path, executors: Executors) -> None:
    made = await overlay(tmp_path, executors, options=["index=on"])
    await made.prepare("k")
    await made.commit("one", "k")
    (mount,) = await made.prepare("run", "one")
    assert [option for option in mount.options if option.startswith("index")] == ["index=on"]


async def test_where_overlay_cannot_mount_it_says_so(tmp_path: Path, executors: Executors) -> None:
    made = OverlaySnapshotter(tmp_path, MemoryRecords(), executors, options=["nonsense=1"])  # type: ignore[arg-type]
    with pytest.raises(Unavailable, match="cannot be mounted"):
        await made.open()
    assert os.listdir(tmp_path / "trash") == []


async def test_native(tmp_path: Path, executors: Executors) -> None:
    made = NativeSnapshotter(tmp_path, MemoryRecords(), executors)  # type: ignore[arg-type]
    await made.open()
    base = f"{tmp_path}/snapshots"
    assert await made.prepare("k1") == (Mount("bind", f"{base}/1", ("rbind", "rw")),)
    await made.commit("one", "k1")
    assert await made.view("v1", "one") == (Mount("bind", f"{base}/1", ("rbind", "ro")),)
    assert await made.prepare("k2", "one") == (Mount("bind", f"{base}/3", ("rbind", "rw")),)
    assert (made.upper_dir("k2"), made.capabilities) == (None, frozenset())


async def test_s12_nobody_else_reads_the_folders(tmp_path: Path, executors: Executors) -> None:
    made = await overlay(tmp_path / "root", executors)
    await made.prepare("k")
    for folder in (tmp_path / "root", tmp_path / "root" / "snapshots", made.directory(1)):
        assert folder.stat().st_mode & 0o077 == 0
    assert made.changes_dir(1).stat().st_mode & 0o777 == 0o755


async def test_numbers_are_never_used_twice(tmp_path: Path, executors: Executors) -> None:
    records = MemoryRecords()
    first = OverlaySnapshotter(tmp_path, records, executors)  # type: ignore[arg-type]
    await first.open()
    await first.prepare("a")
    await first.prepare("b")
    (tmp_path / "snapshots" / "7").mkdir()
    second = OverlaySnapshotter(tmp_path, records, executors)  # type: ignore[arg-type]
    await second.open()
    (mount,) = await second.prepare("c")
    assert mount.source.endswith("/snapshots/8/fs")
    assert sorted(os.listdir(tmp_path / "snapshots")) == ["1", "2", "8"]


async def test_p6_records_are_made_again_from_notes(tmp_path: Path, executors: Executors) -> None:
    first = await overlay(tmp_path, executors)
    await first.prepare("ns/1/w")
    await first.commit("ns/2/base", "ns/1/w", {"containerd.io/snapshot/a": "b"})
    await first.prepare("ns/3/run", "ns/2/base")
    (tmp_path / "snapshots" / "77").mkdir()
    (tmp_path / "notes" / "78.json").write_text("{}")
    second = OverlaySnapshotter(tmp_path, MemoryRecords(), executors)  # type: ignore[arg-type]
    await second.open(adopt=True)
    assert [(info.name, info.parent, info.kind) for info in await second.walk()] == [
        ("ns/2/base", "", SnapshotKind.COMMITTED), ("ns/3/run", "ns/2/base", SnapshotKind.ACTIVE),
    ]
    assert dict((await second.stat("ns/2/base")).labels) == {"containerd.io/snapshot/a": "b"}
    assert sorted(os.listdir(tmp_path / "snapshots")) == ["1", "2"]
    assert sorted(os.listdir(tmp_path / "notes")) == ["1.json", "2.json"]
    with pytest.raises(FailedPrecondition):
        await second.remove("ns/2/base")


async def test_a_told_usage_is_not_measured(tmp_path: Path, executors: Executors) -> None:
    made = await overlay(tmp_path, executors)
    await made.prepare("k")
    made.account("k", Usage(123, 4))
    await made.commit("one", "k")
    assert await made.usage("one") == Usage(123, 4)


def test_disk_usage_counts_links_once_and_follows_none(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "file").write_bytes(b"x" * 10_000)
    os.link(tmp_path / "dir" / "file", tmp_path / "same")
    os.symlink("/", tmp_path / "link")
    usage = disk_usage(tmp_path)
    assert usage.inodes == 4
    assert 10_000 <= usage.size < 100_000
    assert disk_usage(tmp_path / "nothing") == Usage()
