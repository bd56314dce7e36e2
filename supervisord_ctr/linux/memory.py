"""Memory of a process that others are forked from: what makes its pages stay shared.

A fork shares every page with its parent until one of them writes to it. A new object that lands in the gap
between two old ones costs the fork a page of its own, for a few bytes; hundreds of them, where all of its
objects together would fill a few dozen. `fill_gaps` takes the gaps away before anything is forked.

Knows CPython's allocator (objects of up to 512 bytes, in pools of one size, multiples of 16) and the C library's.
"""

from __future__ import annotations

import gc
import marshal
import opcode
import sys
from collections.abc import Callable, Sequence
from types import CodeType, FrameType, FunctionType, ModuleType

from supervisord_ctr.linux import libc

_LARGEST_SMALL = 512
#: Bytes of one size that gaps may have. Where more is needed, the allocator is not the one that is known here.
_MOST = 1 << 20
_POOL = 16384
_POOL_HEADER, _BEGINNING = 48, 512
_HEADER_OF_BYTES = 33
_NOP = bytes((opcode.opmap["NOP"], 0))
_LARGE = (65536, 32768, 16384, 8192, 4096, 3072, 2048, *range(1536, 0, -16))

_libc = libc.libc


def fill_gaps() -> list[object]:
    """Use up every free block between live objects; keep what is returned for as long as that shall hold.

    Collects garbage first: that also empties the interpreter's lists of objects kept for reuse.
    """
    gc.collect()
    kept: list[object] = []
    for size in range(16, _LARGEST_SMALL + 1, 16):
        filling = _fill(size)
        if filling is None:
            break
        kept += filling
    if hasattr(_libc, "gnu_get_libc_version"):
        _fill_large()
    return kept


def recorded(call: Callable[[], None]) -> frozenset[CodeType]:
    """Make the call; the code of every Python function that ran meanwhile on this thread."""
    found: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            found.add(frame.f_code)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return frozenset(found)


def gather(used: frozenset[CodeType]) -> None:
    """Lay what running these functions writes to side by side: their code, themselves, and the numbers they look up.

    A call counts references: to the function, its code, and whatever constant it takes. Where each of those lies
    among others that nobody calls, each costs a fork a page. Call `fill_gaps` first; what runs at the same times is
    best gathered in one call.
    """
    functions = sorted(
        (found for found in gc.get_objects() if isinstance(found, FunctionType) and found.__code__ in used),
        key=lambda found: (found.__module__ or "", found.__code__.co_firstlineno),
    )
    # One kind after the other, and all are kept until the end: nothing that is freed between makes room in the row.
    longer = {id(function.__code__): _lengthened(function.__code__) for function in functions}
    packed = {number: marshal.dumps(code) for number, code in longer.items()}
    made = {number: marshal.loads(data) for number, data in packed.items()}
    for function in functions:
        function.__code__ = made[id(function.__code__)]
    _replace({id(function): _copied(function) for function in functions}, functions)
    _renew_numbers(functions)


def _lengthened(code: CodeType) -> CodeType:
    """The same, too large for the interpreter's own allocator, which would put each size into another pool.

    What is added is never reached: code ends with a return, a raise or a jump.
    """
    missing = _LARGEST_SMALL + 16 - sys.getsizeof(code)  # sizes are rounded
    return code if missing <= 0 else code.replace(co_code=code.co_code + _NOP * ((missing + 1) // 2))


def _copied(function: FunctionType) -> FunctionType:
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    for name in ("__kwdefaults__", "__annotations__", "__qualname__", "__module__", "__doc__"):
        setattr(made, name, getattr(function, name))
    made.__dict__.update(function.__dict__)
    return made


def _replace(copies: dict[int, FunctionType], originals: Sequence[FunctionType]) -> None:
    """Have modules and classes name the copies; whoever else holds an original goes on with that."""
    for module in filter(None, list(sys.modules.values())):  # None stands for a module that shall not be found
        names = vars(module)
        for name, value in list(names.items()):
            if id(value) in copies:
                names[name] = copies[id(value)]
    for function in originals:
        owner: object = sys.modules.get(function.__module__ or "")
        *path, name = function.__qualname__.split(".")
        for part in path:
            owner = vars(owner).get(part) if isinstance(owner, type | ModuleType) else None
        if isinstance(owner, type) and vars(owner).get(name) is function:
            setattr(owner, name, copies[id(function)])


def _renew_numbers(functions: Sequence[FunctionType]) -> None:
    """Make the numbers anew that functions find in their modules."""
    found = {
        (id(function.__globals__), name): (function.__globals__, name)
        for function in functions for name in function.__code__.co_names
        if type(function.__globals__.get(name)) in (int, float)
    }
    # All of them before the first old one goes: the next would take its place.
    fresh = [(names, name, names[name] + 0) for names, name in found.values()]
    for names, name, value in fresh:
        names[name] = value


def _block(size: int, number: int) -> object:
    """A new object of `size` bytes, of a kind that the interpreter neither shares nor keeps for reuse."""
    if size == 16:
        return object()
    if size == 32:
        return 1_000_000 + number
    return bytes(size - _HEADER_OF_BYTES)


def _fill(size: int) -> list[object] | None:
    """Objects of one size until one begins a new pool, which it leaves again; None if there is no such.

    What is made next then lies on the page that has the pool's own data, too. The very first blocks may be
    taken by the numbers that this works with.
    """
    kept: list[object] = []
    row, before = 0, 0
    wanted = _POOL // size // 2
    for number in range(_MOST // size):
        made = _block(size, number)
        place = id(made)
        begins = place % _POOL < max(_POOL_HEADER + size, _BEGINNING)
        if begins and row >= wanted:
            return kept
        kept.append(made)
        row = row + 1 if place == before + size else row if begins else 0
        before = place
    return None


def _fill_large() -> None:
    """The same for the C library's heap: blocks of falling size until they come from its end. They are never freed."""
    end, place = _libc.sbrk(0), 0
    for _ in range(_MOST // _LARGE[0]):
        place = _libc.malloc(_LARGE[0]) or 0
        if not place or place > end:
            return  # it lies elsewhere
        if _libc.sbrk(0) != end:
            break
    for size in _LARGE:
        for _ in range(_MOST // size):
            if (_libc.malloc(size) or place) >= place:
                break
