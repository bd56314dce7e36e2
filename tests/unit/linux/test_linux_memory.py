"""Memory that forks shall go on sharing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from supervisord_ctr.linux import memory

_GAPS = """
import gc
from supervisord_ctr.linux import memory

holes = [bytes(size) for size in range(30, 450, 16) for _ in range(2000)]
del holes[::2]
kept = memory.fill_gaps()
fresh = [bytes(68) for _ in range(60)]
steps = [after - before for before, after in zip(map(id, fresh), map(id, fresh[1:]))]
assert steps.count(112) >= len(steps) - 12, steps  # filling itself frees some, and a pool may end
print(len(kept))
"""


_FOREIGN = """
import resource
from supervisord_ctr.linux import memory

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kept = memory.fill_gaps()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def _work(number: int) -> int:
    return _inner(number) + 1


def _inner(number: int) -> int:
    return number * 2


def test_new_objects_lie_side_by_side_once_gaps_are_filled() -> None:
    done = subprocess.run([sys.executable, "-c", _GAPS], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 2000


@pytest.mark.parametrize("settings", [
    {"PYTHONMALLOC": "malloc"}, {"PYTHONMALLOC": "malloc_debug"}, {"MALLOC_MMAP_THRESHOLD_": "4096"}, {"MALLOC_ARENA_MAX": "1"},
])
def test_another_allocator_costs_a_bounded_try(settings: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FOREIGN], env={**os.environ, **settings}, capture_output=True, text=True, check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 << 10


def test_gathered_functions_do_what_they_did() -> None:
    used = memory.recorded(lambda: None if _work(1) else None)
    assert {_work.__code__, _inner.__code__} <= used
    before, _, line = _work.__code__, _inner.__code__, _work.__code__.co_firstlineno
    memory.gather(used)
    assert _work.__code__ is not before
    assert _work.__code__ == before
    assert _work.__code__.co_firstlineno == line
    assert _work(20) == 41
