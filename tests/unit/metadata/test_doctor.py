"""The examination of the stores: every kind of damage is named, a sound store has none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from supervisord_ctr.metadata.doctor import examine
from tests.support.stores import open_stores


async def test_p5_a_sound_store_has_no_findings(tmp_path: Path) -> None:
    async with open_stores(tmp_path) as stores:
        await stores.blob("ns", b"x", {"containerd.io/gc.root": "1"})
        await stores.database.snapshotter("overlayfs").prepare("ns", "k", "", {"containerd.io/gc.root": "1"})
        assert await examine(stores.database, verify=True) == []


async def test_p5_every_damage_is_named(tmp_path: Path) -> None:
    async with open_stores(tmp_path) as stores:
        root = {"containerd.io/gc.root": "1"}
        overlay = stores.database.snapshotter("overlayfs")
        gone, short, flipped = [await stores.blob("ns", data, root) for data in (b"gone", b"short", b"flipped")]
        for digest, data in ((short, b"x"), (flipped, b"fLipped")):
            path = stores.local.path(digest)
            os.chmod(path, 0o600)
            path.write_bytes(data)
        stores.local.delete(gone)
        with stores.local.writer("nobody's") as writer:
            writer.write(b"orphan")
            orphan = writer.commit()
        (stores.root / "content" / "blobs" / "sha256" / "stray").touch()
        await overlay.prepare("ns", "lost", "", root)
        shutil.rmtree(stores.overlay.directory(1))
        await overlay.prepare("ns", "forgotten", "", root)
        await overlay.backend.remove((await overlay.backend.walk())[0].name)
        await overlay.backend.prepare("ns/99/extra")
        stores.database.unavailable["zfs"] = "no such module"
        await stores.database.gc.hold(60)
        found = {(finding.kind, finding.id.removeprefix("ns/").removeprefix("overlayfs/"), finding.remedy)
                 for finding in await examine(stores.database, verify=True)}
        assert ("content", gone, "pull") in found
        assert ("content", short, "pull") in found
        assert ("content", flipped, "pull") in found
        assert ("blob", orphan, "gc") in found
        assert ("blob", str(stores.root / "content" / "blobs" / "sha256" / "stray"), "hand") in found
        assert ("snapshot", "forgotten", "hand") in found or ("snapshot", "lost", "hand") in found
        assert ("snapshot-data", "ns/99/extra", "gc") in found
        assert ("snapshotter", "zfs", "hand") in found
        assert ("gc", "hold", "release") in found
