"""Unpacking a layer by two processes: what comes out is what one process makes, and nobody stays behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from supervisord_ctr.diff.pool import Job, UnpackPool
from supervisord_ctr.diff.stream import Applied
from supervisord_ctr.errors import Cancelled, Error, ResourceExhausted
from supervisord_ctr.linux.mounts import mount_all, unmount_all
from supervisord_ctr.linux.processes import children
from supervisord_ctr.model import Mount
from tests.support.daemon import wait_until
from tests.support.images import Member, file, folder, hard_link, layer, opaque, symlink, whiteout

LAYERS = 40


@pytest.fixture
async def pool() -> AsyncIterator[UnpackPool]:
    made = UnpackPool(1, always_spread=True)
    yield made
    await made.close()


def _start(pool: UnpackPool, data: bytes, target: Path, *, style: str = "overlay") -> Job:
    blob = target.with_name(f"{target.name}.blob")
    blob.write_bytes(data)
    source, place = os.open(blob, os.O_RDONLY), os.open(target, os.O_PATH | os.O_DIRECTORY)
    try:
        return pool.start(source, place, style=style, complete=style == "plain")
    finally:
        os.close(source)
        os.close(place)


async def _apply(pool: UnpackPool, data: bytes, target: Path, style: str) -> Applied | str:
    target.mkdir()
    job = _start(pool, data, target, style=style)
    await job.end(len(data))
    try:
        return await job.result()
    except Error as error:
        return f"{type(error).__name__}: {error.message}"


def _picture(root: Path, implied: set[str]) -> dict[str, tuple[object, ...]]:
    """What a tree holds; of the root, whiteouts, and directories that the layer only implied not the time."""
    inodes: dict[int, str] = {}
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        status, name = path.lstat(), str(path.relative_to(root))
        content: object = ""
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        elif path.is_dir():
            content = sorted(os.listxattr(path))
        time = 0 if name in implied or stat.S_ISCHR(status.st_mode) else status.st_mtime_ns
        found[name] = (status.st_mode, status.st_uid, status.st_gid, status.st_rdev, time, content,
                       inodes.setdefault(status.st_ino, name))
    return found


def _random_layer(seed: int) -> bytes:
    """Entries over few names, so that they meet: again, replaced, through links, below what is not listed."""
    choose = random.Random(seed)
    odd = choose.random() < 0.6
    names = ["a", "b", "c", "d"]
    members: list[Member] = []
    files: list[str] = []
    for number in range(choose.randrange(20, 400)):
        depth = choose.choice([1, 2, 2, 3])
        path = "/".join(choose.choice(names) for _ in range(depth))
        leaf = f"{path}/f{number}"
        kind = choose.random()
        time = 1_600_000_000 + number
        if odd and kind < 0.03:
            members.append(symlink(f"{path}/l{number}" if choose.random() < 0.5 else path, choose.choice(["a", "../b", "x", "/c"])))
        elif odd and kind < 0.06:
            members.append(whiteout(f"{path}/gone{number}") if choose.random() < 0.7 else opaque(path))
        elif kind < 0.10 and files:
            members.append(hard_link(f"{path}/h{number}", choose.choice(files)))
        elif kind < 0.25:
            members.append(folder(path, choose.choice([0o755, 0o2750]), gid=choose.choice([0, 5]), mtime=time))
        else:
            name = choose.choice(files) if odd and files and kind < 0.28 else leaf
            body = choose.randbytes(choose.choice([0, 1, 700, 5000, 70_000]) if choose.random() < 0.2 else 30)
            members.append(file(name, body, mode=choose.choice([0o644, 0o4755, 0o600]), uid=choose.choice([0, 1000]), mtime=time))
            files.append(name)
    return layer(*members)


@pytest.mark.parametrize("style", ["overlay", "plain"])
async def test_s1_what_comes_out_is_what_one_process_makes(pool: UnpackPool, tmp_path: Path, style: str) -> None:
    alone = UnpackPool(1)
    whole = 0
    try:
        for seed in range(LAYERS):
            data = _random_layer(seed)
            one, two = tmp_path / f"{seed}-one", tmp_path / f"{seed}-two"
            expected, got = await _apply(alone, data, one, style), await _apply(pool, data, two, style)
            assert got == expected, f"layer {seed}"
            if isinstance(expected, Applied):
                whole += 1
                implied = {os.fsdecode(path) for path in expected.implied}
                assert _picture(two, implied) == _picture(one, implied), f"layer {seed}"
    finally:
        await alone.close()
    assert whole > LAYERS // 4, "too few layers were sound to compare anything"


async def test_a_file_comes_after_the_whiteout_of_its_name(pool: UnpackPool, tmp_path: Path) -> None:
    many = [file(f"a/{number}", b"") for number in range(100)]
    data = layer(folder("a"), whiteout("a/name"), *many, file("a/name", b"new"), whiteout("a/7"))
    applied = await _apply(pool, data, tmp_path / "target", "overlay")
    assert isinstance(applied, Applied)
    assert (tmp_path / "target/a/name").read_bytes() == b"new"
    assert (tmp_path / "target/a/7").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    mount_all([Mount("tmpfs", "tmpfs", ("size=1m",))], str(place))
    yield place
    unmount_all(str(place))


async def test_a_full_disk_is_told_whoever_met_it(pool: UnpackPool, small_disk: Path) -> None:
    data = layer(folder("many"), *(file(f"many/{number}", bytes(4000)) for number in range(2000)))
    job = _start(pool, data, small_disk, style="plain")
    await job.end(len(data))
    with pytest.raises(ResourceExhausted, match="layer entry 'many/"):
        await job.result()


async def _maker(pool: UnpackPool, job: Job) -> tuple[int, int]:
    """Process ids of the worker and of its maker."""
    async with asyncio.timeout(30):
        while True:
            if job._worker is not None and (made := children(job._worker.pid)):
                return job._worker.pid, made[0]
            await asyncio.sleep(0.005)


def _open_files(pid: int) -> list[str]:
    """What a process could still write with; nothing once the kernel has begun to take it apart."""
    try:
        return os.listdir(f"/proc/{pid}/fd")
    except (FileNotFoundError, ProcessLookupError):
        return []


async def test_when_a_job_was_called_off_nobody_writes_any_more(pool: UnpackPool, tmp_path: Path) -> None:
    data = layer(folder("many"), *(file(f"many/{number}", bytes(3000)) for number in range(3000)))
    target = tmp_path / "target"
    target.mkdir()
    job = _start(pool, data, target)
    job.available(len(data) // 2)
    worker, maker = await _maker(pool, job)
    await job.abort()
    assert not os.path.exists(f"/proc/{worker}")
    assert _open_files(maker) == []  # it may still be taken apart, or wait for whoever collects it
    with pytest.raises(Cancelled):
        await job.result()


async def test_a_maker_that_is_killed_fails_its_layer_and_no_other(pool: UnpackPool, tmp_path: Path) -> None:
    data = layer(folder("many"), *(file(f"many/{number}", bytes(3000)) for number in range(3000)))
    target, second = tmp_path / "target", tmp_path / "second"
    target.mkdir()
    job = _start(pool, data, target)
    job.available(0)
    _, maker = await _maker(pool, job)
    os.kill(maker, signal.SIGKILL)
    wait_until(lambda: Path(f"/proc/{maker}/stat").read_text().rpartition(")")[2].split()[0] == "Z", "the maker's end")
    await job.end(len(data))
    with pytest.raises(Error, match="the process that makes a layer's files died"):
        await job.result()
    applied = await _apply(pool, data, second, "overlay")
    assert isinstance(applied, Applied)
    assert len(list((second / "many").iterdir())) == 3000
