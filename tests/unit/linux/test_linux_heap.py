"""The C library's heap: what was used and freed goes back to the kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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


_MERGE = """
import os
from supervisord_ctr.linux import heap

def flagged():
    with open("/proc/self/smaps") as file:
        return sum(" mg" in line for line in file if line.startswith("VmFlags:"))

assert flagged() == 0
offered = heap.offer_pages()
print(offered, flagged())
child = os.fork()
if not child:
    os._exit(0 if flagged() else 7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not os.path.exists("/sys/kernel/mm/ksm/run"), reason="the kernel has no ksm")
def test_pages_are_offered_for_merging_and_those_of_forks_too() -> None:
    done = subprocess.run([sys.executable, "-c", _MERGE], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    offered, flagged, child = (int(word) for word in done.stdout.split())
    assert offered > 1 << 20
    assert flagged > 3
    assert child == 0


_TEXT = """
import asyncio, hashlib, re, sqlite3, ssl
import grpc.aio
from supervisord_ctr.linux import heap

def shared():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Rss:"))

before = shared()
assert heap.forget_text() > 1 << 20
assert shared() < before - 1024, (before, shared())
# Everything still works, relocated tables included.
assert hashlib.sha256(b"x").hexdigest().startswith("2d71")
assert sqlite3.connect(":memory:").execute("select 1 + 1").fetchone() == (2,)
ssl.create_default_context()

async def main():
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()
    await server.stop(0)

asyncio.run(main())
print("done")
"""


def test_text_that_only_starting_needed_is_given_back_and_comes_again_when_used() -> None:
    done = subprocess.run([sys.executable, "-c", _TEXT], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
