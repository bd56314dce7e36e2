"""The memory of a process: few arenas, what is free or was read once given back, equal pages merged.

What passes through a daemon in large pieces (content written by a client, a large list) leaves its heap
full of free blocks that the C library keeps for the next time. The number of arenas bounds how far
threads spread such blocks; `give_back` returns their pages. Where the C library is not glibc, none of
this exists and nothing is done.

Source: mallopt(3), malloc_trim(3), mallinfo(3), madvise(2).
"""

from __future__ import annotations

import ctypes

from supervisord_ctr.linux import libc

_M_ARENA_MAX = -8
_MADV_DONTNEED = 4
_MADV_MERGEABLE = 12
_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in _FIELDS)


_mallinfo2 = getattr(libc.libc, "mallinfo2", None)  # glibc 2.33
if _mallinfo2 is not None:
    _mallinfo2.restype = _Mallinfo2
_mallopt = getattr(libc.libc, "mallopt", None)
_trim = getattr(libc.libc, "malloc_trim", None)
if _trim is not None:
    _trim.argtypes = (ctypes.c_size_t,)


def limit_arenas(count: int) -> bool:
    """Let threads share `count` arenas; before the first thread starts. Whether the C library knows this."""
    return _mallopt is not None and _mallopt(_M_ARENA_MAX, count) == 1


def free_bytes() -> int:
    """Bytes of free blocks between and above those in use; 0 where the C library does not tell."""
    return int(_mallinfo2().fordblks) if _mallinfo2 is not None else 0


def give_back() -> bool:
    """Return the pages of free blocks to the kernel; whether there were any. Blocks for milliseconds."""
    return _trim is not None and _trim(0) == 1


def forget_text() -> int:
    """Unmap the pages of programs and libraries that were read so far; how many bytes of mappings that concerned.

    What is used again comes back from the page cache at the first touch, which costs a microsecond. What only
    starting needed, half of a large library, does not. Pages that this process has changed stay: mappings that
    have any (relocated addresses, which look read-only afterwards) are left alone. 0 where the kernel does not tell.
    """
    dropped = 0
    start = end = 0
    mapped = False
    try:
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
    except OSError:  # a kernel without CONFIG_PROC_PAGE_MONITOR
        return 0
    for line in lines:
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            start, end = (int(word, 16) for word in words[0].split("-"))
            mapped = words[1] in ("r-xp", "r--p") and words[4] != "0"
        elif mapped and words[:2] == ["Anonymous:", "0"]:
            dropped += _forget(start, end)
    return dropped


def offer_pages() -> int:
    """Let the kernel merge pages that this process and its forks change with equal ones of theirs; bytes offered.

    Only where an administrator runs ksmd (/sys/kernel/mm/ksm/run); a page that is written to becomes the
    writer's own again. What is mapped later is not offered. 0 where the kernel has no such thing.
    """
    offered = 0
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        lines = file.readlines()
    for line in lines:
        words = line.split(maxsplit=2)
        if words[1] == "rw-p":
            start, end = (int(word, 16) for word in words[0].split("-"))
            if not libc.libc.madvise(start, end - start, _MADV_MERGEABLE):
                offered += end - start
    return offered


def _forget(start: int, end: int) -> int:
    """Bytes that were unmapped; 0 where the kernel refuses, as it does for locked memory."""
    return 0 if libc.libc.madvise(start, end - start, _MADV_DONTNEED) else end - start
