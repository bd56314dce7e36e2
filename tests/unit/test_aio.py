"""Asynchronous building blocks."""

from __future__ import annotations

import asyncio
import threading

import pytest

from supervisord_ctr.aio import Executors, KeyedLock, Operations, TaskOwner, shielded, wait_until


async def test_keyed_lock_serialises_one_key_and_not_others() -> None:
    lock = KeyedLock()
    order: list[str] = []
    entered = asyncio.Event()
    leave = asyncio.Event()

    async def first() -> None:
        async with lock.hold("a"):
            entered.set()
            await leave.wait()
            order.append("first")

    async def second() -> None:
        async with lock.hold("a"):
            order.append("second")

    async with asyncio.TaskGroup() as group:
        group.create_task(first())
        await entered.wait()
        group.create_task(second())
        async with lock.hold("b"):
            order.append("other key")
        assert lock.locked("a")
        leave.set()
    assert order == ["other key", "first", "second"]
    assert len(lock) == 0


async def test_keyed_lock_forgets_a_cancelled_waiter() -> None:
    lock = KeyedLock()
    async with lock.hold("a"):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                async with lock.hold("a"):
                    raise AssertionError("must not get the lock")
        assert lock.locked("a")
    assert len(lock) == 0


async def test_an_operation_outlives_its_caller_and_is_joined() -> None:
    owner = TaskOwner("test")
    operations = Operations(owner)
    go = asyncio.Event()
    runs = 0

    async def work() -> int:
        nonlocal runs
        runs += 1
        await go.wait()
        return 7

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await operations.run("key", work)
    assert operations.running("key")
    async with asyncio.TaskGroup() as group:
        joined = [group.create_task(operations.run("key", work)) for _ in range(3)]
        await asyncio.sleep(0)
        go.set()
    assert [task.result() for task in joined] == [7, 7, 7]
    assert runs == 1
    assert not operations.running("key")
    await owner.close()


async def test_a_failed_operation_may_be_tried_again() -> None:
    owner = TaskOwner("test")
    operations = Operations(owner)

    async def fail() -> None:
        raise ValueError("no")

    async def succeed() -> str:
        return "yes"

    with pytest.raises(ValueError, match="no"):
        await operations.run("key", fail)
    assert await operations.run("key", succeed) == "yes"
    await owner.close()


async def test_owner_cancels_what_still_runs_and_refuses_more() -> None:
    owner = TaskOwner("test")
    ended = asyncio.Event()
    started = asyncio.Event()

    async def forever() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    owner.start(forever())
    await started.wait()
    await owner.close()
    assert ended.is_set()
    assert len(owner) == 0
    with pytest.raises(RuntimeError):
        owner.start(forever())


async def test_shielded_work_finishes_after_its_caller_left() -> None:
    owner = TaskOwner("test")
    go, done = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await go.wait()
        done.set()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await shielded(owner, work())
    go.set()
    await done.wait()
    await owner.close()


async def test_executors_return_values_and_errors() -> None:
    executors = Executors.create(io=1, cpu=1)
    assert await executors.run_io(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await executors.run_cpu(divmod, 1, 0)
    executors.close()


async def test_a_call_that_was_handed_over_is_made_though_its_caller_is_cancelled() -> None:
    executors = Executors.create(io=1, cpu=1)
    free, made = threading.Event(), threading.Event()
    busy = asyncio.create_task(executors.run_io(free.wait, 10))
    undo = asyncio.create_task(executors.run_io(made.set))
    await asyncio.sleep(0)
    undo.cancel()
    with pytest.raises(asyncio.CancelledError):
        await undo
    free.set()
    assert await busy
    assert await asyncio.to_thread(made.wait, 10)
    executors.close()


async def test_who_waits_for_a_thread_is_told_that_the_executors_close() -> None:
    executors = Executors.create(io=1, cpu=1)
    begun, free = threading.Event(), threading.Event()

    def busy() -> bool:
        begun.set()
        return free.wait(10)

    first = asyncio.create_task(executors.run_io(busy))
    second = asyncio.create_task(executors.run_io(int))
    await asyncio.to_thread(begun.wait, 10)
    closing = asyncio.create_task(asyncio.to_thread(executors.close))
    with pytest.raises(asyncio.CancelledError):
        await second
    free.set()
    assert await first
    await closing


async def test_an_error_that_no_future_can_hold_is_told_all_the_same() -> None:
    executors = Executors.create(io=1, cpu=1)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await executors.run_io(next, iter(()))
    executors.close()


async def test_wait_until_names_what_did_not_happen() -> None:
    with pytest.raises(TimeoutError, match="the moon"):
        await wait_until(lambda: False, 0.02, "the moon")
    await wait_until(lambda: True, 1, "the sun")
