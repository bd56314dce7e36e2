"""Folders, the lock and signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from supervisord_ctr import lifecycle
from supervisord_ctr.aio import wait_until
from supervisord_ctr.errors import FailedPrecondition
from supervisord_ctr.linux import heap


def test_s12_an_open_folder_is_tightened(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    lifecycle.make_private_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(FailedPrecondition, match="not a directory"):
        lifecycle.make_private_folder(tmp_path / "state")


def test_the_second_daemon_on_a_root_is_told_who_holds_it(tmp_path: Path) -> None:
    with lifecycle.exclusive(tmp_path):
        with pytest.raises(FailedPrecondition, match=f"pid {os.getpid()}"):
            with lifecycle.exclusive(tmp_path):
                raise AssertionError("two holders")
    with lifecycle.exclusive(tmp_path):
        pass


def test_a_lock_left_by_a_killed_daemon_stops_nobody(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom supervisord_ctr.lifecycle import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "lock").exists()
    with lifecycle.exclusive(tmp_path):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_begin_the_graceful_stop(number: signal.Signals) -> None:
    stop = asyncio.Event()
    with lifecycle.stop_signals(stop):
        os.kill(os.getpid(), number)
        async with asyncio.timeout(10):
            await stop.wait()


def test_p5_what_a_killed_daemon_left_in_its_scratch_folder_goes(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    lifecycle.make_empty_folder(folder)
    (folder / "mount" / "inner").mkdir(parents=True)
    (folder / "file").touch()
    (folder / "link").symlink_to(tmp_path)
    lifecycle.make_empty_folder(folder)
    assert list(folder.iterdir()) == []
    assert tmp_path.is_dir()


class Burst:
    """Memory as `slim` sees it: bytes of the process's own, of files, free on its heap; what it gave back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.own = self.files = 50 << 20
        self.free = self.looks = self.given = self.forgotten = 0
        monkeypatch.setattr(lifecycle, "_memory", self._look)
        monkeypatch.setattr(heap, "free_bytes", lambda: self.free)
        monkeypatch.setattr(heap, "give_back", self._give_back)
        monkeypatch.setattr(heap, "forget_text", self._forget_text)

    def _look(self) -> tuple[int, int]:
        self.looks += 1
        return self.own, self.files

    def _give_back(self) -> bool:
        self.own = 50 << 20
        self.given += 1
        return True

    def _forget_text(self) -> int:
        self.files = 50 << 20
        self.forgotten += 1
        return 1 << 20

    async def several_looks(self) -> None:
        before = self.looks
        await wait_until(lambda: self.looks > before + 10, 30, "several looks")


async def test_memory_that_a_burst_left_free_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    burst = Burst(monkeypatch)
    async with lifecycle.slim(period=0.001):
        burst.own = 90 << 20  # in use: nothing to give back
        await burst.several_looks()
        assert burst.given == 0
        burst.free = 40 << 20
        await burst.several_looks()
        assert burst.given == 1  # free blocks stay free blocks; only new pages are worth another time
        assert burst.forgotten == 1  # of what starting needed


async def test_programs_that_only_a_burst_needed_are_forgotten_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    burst, used = Burst(monkeypatch), 0.0
    monkeypatch.setattr("supervisord_ctr.lifecycle.time.process_time", lambda: used)
    async with lifecycle.slim(period=0.001, busy=0.5):
        burst.files = 60 << 20
        before = burst.looks
        while burst.looks < before + 10:  # at work all the time
            used += 0.01
            await asyncio.sleep(0)
        assert burst.forgotten == 1
        await burst.several_looks()
        assert burst.forgotten == 2
        burst.files = 53 << 20  # what idling needs again is not worth it
        await burst.several_looks()
        assert (burst.forgotten, burst.given) == (2, 0)
