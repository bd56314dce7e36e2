"""The stores killed at every trace point, and at random: nothing acknowledged is lost, nothing leaks (P5, P6)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from supervisord_ctr import faults
from supervisord_ctr.errors import NotFound
from tests.support.stores import Stores, open_stores

ROOT = Path(__file__).parents[2]

POINTS = sorted(
    name for name in faults.POINTS if name.partition(".")[0] in ("content", "snapshot", "metadata", "gc")
)


def work(root: Path, start: int, fault: str = "", turns: int = 6) -> subprocess.Popen[str]:
    environment = {**os.environ, "PCTR_FAULTS": fault, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.faults.store_worker", str(root), str(start), str(turns)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
    )


async def check(stores: Stores, lines: list[str]) -> None:
    """What the lines say is there; after one collection nothing is there that no row explains."""
    database = stores.database
    overlay = database.snapshotter("overlayfs")
    assert stores.engine.repair is None
    removed = {line.split()[1] for line in lines if line.startswith("remove ")}
    said = [line.split() for line in lines if not line.startswith(("open", "end", "remove"))]
    for verb, argument in said:
        if verb == "container" and argument.removeprefix("c") not in removed:
            container = await database.containers.get("ns", argument)
            assert await overlay.mounts("ns", container.snapshot_key)
        elif verb == "image" and argument.removeprefix("image-") not in removed:
            image = await database.images.get("ns", argument)
            assert await database.content.read("ns", image.target.digest)
    await explain(stores)
    # Whatever was in flight is protected by its lease; the leases of a killed client are deleted by it or expire.
    for lease in await database.leases.list("ns"):
        await database.leases.delete("ns", lease.id)
    report = await database.gc.collect()
    assert report.errors == ()
    await explain(stores)
    again = await database.gc.collect()
    assert again.removed == ()


async def explain(stores: Stores) -> None:
    """Rows, records and files agree in the direction that matters: every row has its bytes."""
    database = stores.database
    for info in await database.content.walk("ns"):
        stores.local.verify(info.digest)
        assert info.size == stores.local.info(info.digest).size
    overlay = database.snapshotter("overlayfs")
    rows = stores.engine.rows("SELECT key, backend FROM snapshots WHERE snapshotter = 'overlayfs'")
    known = {info.name for info in await overlay.backend.walk()}
    assert {backend for _, backend in rows} <= known
    assert stores.overlay.missing() == []
    assert stores.engine.rows("SELECT count(*) FROM snapshots WHERE intent IS NOT NULL") == [(0,)]


async def nothing_left_over(stores: Stores) -> None:
    """After a collection: files without rows are gone."""
    database = stores.database
    assert {info.digest for info in stores.local.walk()} == {
        info.digest for info in await database.content.walk("ns")
    }
    assert stores.local.damaged() == []
    assert os.listdir(stores.root / "content" / "trash") == []
    refs = {row[0] for row in stores.engine.rows("SELECT backend FROM ingests")}
    assert {status.ref for status in stores.local.statuses()} <= refs
    assert len(os.listdir(stores.root / "content" / "ingest")) == len(stores.local.statuses())
    records = stores.engine.rows("SELECT id FROM snapshot_records WHERE snapshotter = 'overlayfs'")
    assert {str(row[0]) for row in records} == set(os.listdir(stores.root / "overlayfs" / "snapshots"))
    assert len(records) == stores.engine.rows("SELECT count(*) FROM snapshots WHERE snapshotter = 'overlayfs'")[0][0]
    assert os.listdir(stores.root / "overlayfs" / "trash") == []


async def recover(root: Path, lines: list[str]) -> None:
    async with open_stores(root, sync=True) as stores:
        await check(stores, lines)
        await nothing_left_over(stores)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
async def test_p6_killed_at(point: str, tmp_path: Path) -> None:
    lines: list[str] = []
    start = 0
    for passage in (1, 3):
        process = work(tmp_path, start, f"{point}=kill@{passage}")
        output, _ = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, f"{point} was not passed {passage} times: {output}"
        lines.extend(output.splitlines())
        start += 10
        await recover(tmp_path, lines)
        lines = [line for line in lines if line.startswith("remove ")]
        async with open_stores(tmp_path) as stores:
            await empty(stores)


async def empty(stores: Stores) -> None:
    """Everything removed by name: afterwards disk and tables hold nothing."""
    database = stores.database
    for container in await database.containers.list("ns"):
        await database.containers.delete("ns", container.id)
    for image in await database.images.list("ns"):
        await database.images.delete("ns", image.name)
    await stores.engine.write(lambda tx: tx.execute("UPDATE ingests SET expires = 1"))
    await database.gc.collect()
    await nothing_left_over(stores)
    for table in ("containers", "images", "blobs", "ingests", "snapshots", "leases", "lease_resources",
                  "snapshot_records"):
        assert stores.engine.rows(f"SELECT count(*) FROM {table}") == [(0,)], table


@pytest.mark.slow
async def test_p6_killed_at_random(tmp_path: Path) -> None:
    """Rounds of work with a SIGKILL after a random number of acknowledged calls."""
    rounds = int(os.environ.get("PCTR_CRASH_ROUNDS", "12"))
    chance = random.Random(20240229)
    start = 0
    for _ in range(rounds):
        process = work(tmp_path, start, turns=1000)
        assert process.stdout is not None
        lines = []
        for _ in range(chance.randrange(2, 40)):
            line = process.stdout.readline()
            assert line, "the worker ended by itself"
            lines.append(line.strip())
        process.kill()
        lines.extend(line.strip() for line in process.stdout.read().splitlines())
        process.wait(60)
        process.stdout.close()
        await recover(tmp_path, lines)
        start += 1000


async def test_an_interrupted_worker_goes_on(tmp_path: Path) -> None:
    process = work(tmp_path, 0, "metadata.commit.after=kill@20")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    process = work(tmp_path, 100, turns=4)
    output, _ = process.communicate(timeout=120)
    assert (process.returncode, output.splitlines()[-1].strip()) == (0, "end")
    async with open_stores(tmp_path) as stores:
        with pytest.raises(NotFound):
            await stores.database.containers.get("ns", "c100")
        assert (await stores.database.containers.get("ns", "c103")).image == "image-103"
