"""Addresses of `--net bridge`: one for each living process, and free when it has gone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from pctr.bridge import FileAddresses

from supervisord_ctr.errors import ResourceExhausted


async def test_an_owner_keeps_its_address_and_others_get_others(tmp_path: Path) -> None:
    table = FileAddresses(os.getpid(), str(tmp_path / "run" / "table"))
    first = await table.lease("10.1.0.0/24", "a")
    assert first == "10.1.0.2"
    assert await table.lease("10.1.0.0/24", "a") == first
    assert await table.lease("10.1.0.0/24", "b") == "10.1.0.3"
    await table.release("10.1.0.0/24", "a")
    await table.release("10.1.0.0/24", "a")
    assert await table.lease("10.1.0.0/24", "c") == first


async def test_p5_the_address_of_a_process_that_has_gone_is_given_out_again(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "1000"])
    path = str(tmp_path / "table")
    assert await FileAddresses(process.pid, path).lease("10.1.0.0/24", "killed") == "10.1.0.2"
    process.kill()
    process.wait()
    assert await FileAddresses(os.getpid(), path).lease("10.1.0.0/24", "next") == "10.1.0.2"


async def test_a_network_that_is_full_says_so(tmp_path: Path) -> None:
    table = FileAddresses(os.getpid(), str(tmp_path / "table"))
    assert await table.lease("10.1.0.0/30", "a") == "10.1.0.2"
    with pytest.raises(ResourceExhausted):
        await table.lease("10.1.0.0/30", "b")
