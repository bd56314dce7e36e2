"""Asynchronous building blocks: owned tasks, keyed locks, named executors, shielded operations.

The one place that starts asyncio tasks outside a TaskGroup. Nothing here knows containers.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

log = logging.getLogger(__name__)


class KeyedLock:
    """A lock for each key; keys without holders or waiters take no memory."""

    def __init__(self) -> None:
        self._locks: dict[Hashable, tuple[asyncio.Lock, int]] = {}

    @contextlib.asynccontextmanager
    async def hold(self, key: Hashable) -> AsyncIterator[None]:
        """Hold the lock of `key`; waiters are served in order."""
        lock, users = self._locks.get(key, (None, 0))
        if lock is None:
            lock = asyncio.Lock()
        self._locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[key]
            if users == 1:
                del self._locks[key]
            else:
                self._locks[key] = (lock, users - 1)

    def locked(self, key: Hashable) -> bool:
        """Whether somebody holds or waits for `key`."""
        return key in self._locks

    def __len__(self) -> int:
        return len(self._locks)


class TaskOwner:
    """Starts tasks and answers for their end.

    A task that fails is logged with its name and does not take the others along (unlike a
    TaskGroup); `close` cancels what still runs and waits for it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def start(self, work: Coroutine[Any, Any, T], name: str = "") -> asyncio.Task[T]:
        """Run `work` as a task of this owner."""
        if self._closed:
            work.close()
            raise RuntimeError(f"{self._name} is closed")
        task = asyncio.get_running_loop().create_task(work, name=f"{self._name}:{name}")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("task %s ended with %r", task.get_name(), error)

    def __len__(self) -> int:
        return len(self._tasks)

    async def close(self) -> None:
        """Cancel and await every task; starting another is refused from now on."""
        self._closed = True
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._tasks.difference_update(tasks)


class Operations:
    """Mutations that the daemon owns: the caller may go away, the operation goes on.

    `run(key, factory)` starts the operation, or joins the one that already runs under the same
    key (D9), and awaits it shielded.
    """

    def __init__(self, owner: TaskOwner) -> None:
        self._owner = owner
        self._running: dict[Hashable, asyncio.Task[Any]] = {}

    async def run(self, key: Hashable, factory: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of the operation under `key`; every joined caller gets the same one."""
        task = self._running.get(key)
        if task is None:
            task = self._owner.start(factory(), str(key))
            self._running[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(task)

    def _forget(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        if self._running.get(key) is task:
            del self._running[key]

    def running(self, key: Hashable) -> bool:
        """Whether an operation runs under `key`."""
        return key in self._running


async def shielded(owner: TaskOwner, work: Coroutine[Any, Any, T], name: str = "") -> T:
    """Await `work` as a task of `owner`: cancelling the caller does not cancel it."""
    return await asyncio.shield(owner.start(work, name))


@dataclass(frozen=True)
class Executors:
    """The daemon's threads (D1): `io` waits for disks, `cpu` hashes and inflates."""

    io: ThreadPoolExecutor
    cpu: ThreadPoolExecutor

    @classmethod
    def create(cls, io: int = 16, cpu: int = 4) -> Executors:
        """Executors with so many threads at most."""
        return cls(ThreadPoolExecutor(io, "io"), ThreadPoolExecutor(cpu, "cpu"))

    async def run_io(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call on the `io` threads."""
        return await run_in(self.io, call, *args, **kwargs)

    async def run_cpu(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a computing call on the `cpu` threads."""
        return await run_in(self.cpu, call, *args, **kwargs)

    def close(self) -> None:
        """Refuse new work and wait for what runs."""
        self.io.shutdown(wait=True, cancel_futures=True)
        self.cpu.shutdown(wait=True, cancel_futures=True)


async def run_in(
    executor: ThreadPoolExecutor, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run a blocking call on a thread of `executor`.

    A call that was handed over is made, also when the caller is cancelled before a thread is free: it
    may be the undo of something.
    """
    # Not the loop's run_in_executor under a shield: three futures chained by callbacks cost more than most calls.
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(how: Callable[..., object], *values: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop ended: nobody waits any more
            loop.call_soon_threadsafe(how, *values)

    def make() -> None:
        try:
            result = call(*args, **kwargs)
        except BaseException as error:
            tell(_fail, future, error)
        else:
            tell(_settle, future, result)

    def check(handed: concurrent.futures.Future[None]) -> None:
        if handed.cancelled():  # the executor closed before a thread was free
            tell(future.cancel)

    executor.submit(make).add_done_callback(check)
    return await future


def _settle(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(RuntimeError("StopIteration") if isinstance(error, StopIteration) else error)


async def wait_until(condition: Callable[[], bool | Awaitable[bool]], timeout: float, what: str) -> None:
    """Poll `condition` (10 ms apart) until it holds; `TimeoutError` names `what` after `timeout` seconds.

    For conditions that nothing announces (a path that appears, a process that ends elsewhere).
    """
    deadline = asyncio.get_running_loop().time() + timeout
    while True:
        held = condition()
        if not isinstance(held, bool):
            held = await held
        if held:
            return
        if asyncio.get_running_loop().time() > deadline:
            raise TimeoutError(f"{what}: not within {timeout:g} s")
        await asyncio.sleep(0.01)
