"""Memory that forks shall go on sharing."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

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


_LARGE = 123_456_789


def _work(number: int, *, more: int = 1) -> int:
    """Documented."""
    return _inner(number) + more + _LARGE - _LARGE


def _inner(number: int) -> int:
    return number * 2


def _failing(number: int) -> int:
    return number // 0


class _Worker:
    def __init__(self, step: int) -> None:
        self.step = step

    def work(self, number: int) -> int:
        return number + self.step

    @staticmethod
    def still(number: int) -> int:
        return -number


def _adder(step: int) -> Callable[[int], int]:
    def add(number: int) -> int:
        return number + step

    return add


async def _waiting(number: int) -> int:
    await asyncio.sleep(0)
    return number


def _counting(number: int) -> Iterator[int]:
    yield from range(number)


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


def _everything() -> list[object]:
    add = _adder(3)
    found: list[object] = [_work(20), _work(20, more=2), _Worker(2).work(5), _Worker.still(4), add(4), list(_counting(3))]
    found.append(asyncio.run(_waiting(7)))
    with pytest.raises(ZeroDivisionError) as caught:
        _failing(1)
    found.append(caught.traceback[-1].lineno)
    return found


def test_gathered_functions_do_what_they_did() -> None:
    before = _everything()
    former = [_work, _inner, _Worker.work, _failing]
    used = frozenset(code for code in memory.recorded(_everything) if code.co_filename == __file__)
    assert {function.__code__ for function in former} <= used
    large = _LARGE
    memory.gather(used)
    assert _everything() == before
    assert _work.__doc__ == "Documented."
    assert _work.__kwdefaults__ == {"more": 1}
    assert all(new is not old for new, old in zip([_work, _inner, _Worker.work, _failing], former, strict=True))
    assert _LARGE == large
    assert _LARGE is not large
    assert former[1](4) == 8  # type: ignore[operator]


def test_gathered_functions_lie_side_by_side() -> None:
    names = ["_work", "_inner", "_failing", "_adder"]
    program = f"""
from supervisord_ctr.linux import memory
from tests.unit.linux import test_linux_memory as module

used = memory.recorded(module._everything)
kept = memory.fill_gaps()
memory.gather(used)
for size, places in ((4096, [id(getattr(module, name)) for name in {names}]),
                     (16384, [id(getattr(module, name).__code__) for name in {names}])):
    assert max(places) - min(places) < size, places
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
