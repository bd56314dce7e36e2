"""The C library's heap: what was used and freed goes back to the kernel."""

from __future__ import annotations

import subprocess
import sys

_BURST = """
import ctypes
from supervisord_ctr.linux import heap
assert heap.limit_arenas(2)
libc = heap.libc.libc
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = (ctypes.c_void_p,)

def resident():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Private_Dirty:"))

places = [libc.malloc(65536) for _ in range(800)]
for place in places:
    ctypes.memset(place, 1, 65536)
full = resident()
for place in places[:-1]:  # the last one stays, so that the end of the heap cannot simply move down
    libc.free(place)
free = heap.free_bytes()
assert free > 40 << 20, free
assert full - resident() < 10 << 10, "nothing to show: the C library gave it back by itself"
assert heap.give_back()
assert full - resident() > 40 << 10, (full, resident())
print("done")
"""


def test_the_memory_of_a_burst_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _BURST], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
