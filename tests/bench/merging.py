"""ksmd for the length of a measurement: the kernel's thread that merges equal pages of memory offered to it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.waiting import wait_until

KSM = Path("/sys/kernel/mm/ksm")
_PAGES = "5000"
"""Pages for each turn, 50 a second: an administrator would choose fewer, and wait longer."""
_QUIET = 6.0
"""Seconds without another merge."""


def _read(name: str) -> int:
    return int((KSM / name).read_text())


@contextlib.contextmanager
def merged(timeout: float = 120.0) -> Iterator[None]:
    """Everything that can be merged is, in the block; afterwards all is as it was. RuntimeError without ksm."""
    if not KSM.is_dir():
        raise RuntimeError("this kernel has no ksm")
    # smart_scan skips pages for a while that found no equal in vain: merging is then the same, and later.
    before = {name: (KSM / name).read_text() for name in ("smart_scan", "pages_to_scan", "run") if (KSM / name).exists()}
    try:
        (KSM / "pages_to_scan").write_text(_PAGES)
        if "smart_scan" in before:
            (KSM / "smart_scan").write_text("0")
        (KSM / "run").write_text("1")
        wait_until(_Settled(), "ksmd to find nothing more", timeout=timeout, pause=0.5)
        yield
    finally:
        if before["run"].strip() != "1":
            (KSM / "run").write_text("2")  # parts what was merged, so that other measurements do not gain from it
        for name, value in before.items():
            (KSM / name).write_text(value)


class _Settled:
    """Whether next to nothing was merged for a while, of several whole scans: in some ksmd only compares."""

    def __init__(self) -> None:
        self._merged = 0
        self._since = (time.monotonic(), _read("full_scans"))

    def __call__(self) -> bool:
        scans, now = _read("full_scans"), _read("pages_sharing")
        if not now or now > self._merged * 1.002:
            self._merged, self._since = now, (time.monotonic(), scans)
        return scans >= self._since[1] + 3 and time.monotonic() > self._since[0] + _QUIET
