"""Trace points."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from supervisord_ctr import faults


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    faults.arm("")


def test_an_unarmed_point_does_nothing() -> None:
    faults.point("nowhere")


def test_error_at_the_second_pass_only() -> None:
    faults.arm("a.b=error:ENOSPC@2")
    faults.point("a.b")
    with pytest.raises(OSError, match=r"trace point a\.b") as caught:
        faults.point("a.b")
    assert caught.value.errno == errno.ENOSPC
    faults.point("a.b")


def test_unknown_actions_are_refused() -> None:
    with pytest.raises(ValueError, match="explode"):
        faults.arm("a=explode")


def test_kill_from_the_environment() -> None:
    code = "from supervisord_ctr import faults; faults.point('x'); print('alive')"
    result = subprocess.run([sys.executable, "-c", code], env={"PCTR_FAULTS": "x=kill"}, capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL
    assert result.stdout == b""
