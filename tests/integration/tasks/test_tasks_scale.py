"""Many tasks, many execs, much output: nothing is lost, nothing grows, nobody waits.

The sizes are small; `PCTR_TEST_TASKS=200 PCTR_TEST_EXECS=1000 PCTR_TEST_OUTPUT_MIB=1024` are those that were promised.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from supervisord_ctr.api.services.tasks.v1 import tasks_pb2
from supervisord_ctr.api.types.task import task_pb2
from tests.integration.tasks_support import TIMEOUT, Client, shim_family, shim_pid
from tests.support.daemon import DaemonProcess, running_daemon, wait_until
from tests.support.shim import zygote_of

TASKS = int(os.environ.get("PCTR_TEST_TASKS", "10"))
EXECS = int(os.environ.get("PCTR_TEST_EXECS", "60"))
OUTPUT = int(os.environ.get("PCTR_TEST_OUTPUT_MIB", "24")) << 20

#: Of one shim, once its container runs. Pages that several shims share are left out.
SHIM_MEMORY = 5.0
#: Threads that work for the first time open a reader of the database, which stays: three descriptors each.
READERS = 48


def memory(pids: Iterable[int], field: str = "Private_Dirty") -> float:
    """MiB of one kind, of all of these processes that there are."""
    total = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
            assert found is not None
            total += int(found[1])
    return total / 1024


def descriptors(*pids: int) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def at_once(count: int, many: int, call: Callable[[int], object]) -> None:
    """The calls 0 to `many` - 1, `count` at a time; the first failure is raised."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(call, range(many)))


def test_p13_p17_tasks_at_once_end_as_they_should_and_shims_stay_small(daemon: DaemonProcess, client: Client) -> None:
    client.finish(client.run("true"))
    assert daemon.process is not None
    watched = (daemon.process.pid, zygote_of(daemon.process.pid))
    before = [descriptors(pid) for pid in watched]
    names = [
        client.container(["sh", "-c", f"trap 'exit {number % 250 + 1}' TERM; echo up; while :; do sleep 1; done"])
        for number in range(TASKS)
    ]

    def start(number: int) -> None:
        client.create(names[number])
        client.start(names[number])

    at_once(8, TASKS, start)
    for name in names:
        client.wait_text(name, "up\n")
    assert len({shim_pid(client, name) for name in names}) == TASKS
    shims = [shim_family(client, name) for name in names]
    dirty, proportional = sorted(map(memory, shims)), sorted(memory(family, "Pss") for family in shims)
    print(f"{TASKS} shims: proportional memory {proportional[0]:.2f} to {proportional[-1]:.2f} MiB, "
          f"mean {sum(proportional) / TASKS:.2f}; their own {sum(dirty) / TASKS:.2f} MiB")
    assert dirty[TASKS // 2] < SHIM_MEMORY
    assert proportional[TASKS // 2] < SHIM_MEMORY or TASKS < 100

    def end(number: int) -> None:
        client.kill(names[number], signal.SIGTERM)
        assert client.wait(names[number]) == number % 250 + 1
        assert client.finish(names[number]) == number % 250 + 1

    at_once(8, TASKS, end)

    def now() -> list[int]:
        return [descriptors(pid) for pid in watched]

    # A spare shim costs the zygote one; a task that leaks costs at least one for each.
    wait_until(lambda: now()[0] <= before[0] + READERS and now()[1] <= before[1] + 1,
               f"descriptors of daemon and zygote are back to {before}", TIMEOUT)
    print(f"descriptors of daemon and zygote: {before} before, {now()} after")


@pytest.mark.skipif(not os.path.exists("/sys/kernel/mm/ksm/run"), reason="the kernel has no ksm")
@pytest.mark.parametrize(("config", "offered"), [("", True), ("[runtime]\nshim_page_merging = false\n", False)])
def test_the_memory_of_shims_is_offered_for_merging_unless_told_not_to(root: Path, config: str, offered: bool) -> None:
    with running_daemon(config) as second:
        client = Client(second, root)
        name = client.run("sleep", "1000000")
        smaps = Path(f"/proc/{shim_pid(client, name)}/smaps").read_text()
        task = client.process(name).pid
        assert any(line.startswith("VmFlags:") and " mg" in line for line in smaps.splitlines()) is offered
        # What runs in the container is no business of ours.
        assert " mg" not in Path(f"/proc/{task}/smaps").read_text()
        client.finish(name)
        client.close()


def test_s9_execs_at_once_all_succeed_and_nothing_grows(daemon: DaemonProcess, client: Client) -> None:
    name = client.run("sleep", "1000000")
    assert daemon.process is not None
    daemon_pid = daemon.process.pid

    def one(number: int) -> None:
        exec_id = f"e{number}"
        client.exec(name, exec_id, ["true"])
        client.start(name, exec_id)
        assert client.wait(name, exec_id) == 0
        client.call(client.tasks.DeleteProcess, tasks_pb2.DeleteProcessRequest(container_id=name, exec_id=exec_id))

    def sizes() -> list[tuple[int, float]]:
        family = shim_family(client, name)
        return [(descriptors(daemon_pid), memory([daemon_pid])), (descriptors(*family), memory(family))]

    # Buffers and threads exist once as many calls have been made at a time as there will be.
    at_once(20, 40, one)
    before = sizes()
    at_once(20, EXECS, lambda number: one(40 + number))
    wait_until(lambda: sizes()[0][0] <= before[0][0] + READERS and sizes()[1][0] <= before[1][0],
               f"descriptors of daemon and shim are back to {before}", TIMEOUT)
    after = sizes()
    print(f"descriptors and MiB of daemon and shim: {before} before, {after} after {EXECS} execs")
    assert after[0][1] - before[0][1] < 16
    assert after[1][1] - before[1][1] < 1
    assert os.listdir(client.daemon.state / "tasks" / client.daemon.namespace / name).count("exit.json") == 0
    client.finish(name)


def test_p9_a_client_that_never_reads_costs_the_container_nothing(daemon: DaemonProcess, client: Client) -> None:
    line = "0123456789" * 25
    log = client.output / "0.log"
    name = client.container(["sh", "-c", f"read x; yes {line} | head -c {OUTPUT}; echo; echo finished; read y; exit 4"])
    client.create(name, stdin="attach://", stdout=f"cri-log://{log}", stderr="")
    client.start(name)
    bundle = os.open(daemon.state / "tasks" / daemon.namespace / name, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as idle, socket.socket(socket.AF_UNIX) as typist:
            for client_socket in (idle, typist):
                client_socket.connect(f"/proc/self/fd/{bundle}/attach.sock")
            idle.sendall(json.dumps({"id": name, "stdout": True}).encode() + b"\n")
            typist.sendall(json.dumps({"id": name, "stdin": True}).encode() + b"\n\0\0\0\0\3go\n")
            wait_until(lambda: b"finished" in tail_of(log), "the container has written all", 600)
            assert client.status(name) == task_pb2.RUNNING
            assert memory(shim_family(client, name)) < 2 * SHIM_MEMORY
            payload = lines = 0
            with log.open("rb") as records:
                for record in records:
                    _, stream, tag, text = record.rstrip(b"\n").split(b" ", 3)
                    assert stream == b"stdout"
                    assert tag == b"F"
                    assert text in (line.encode(), b"finished") or payload + len(text) == OUTPUT
                    payload += len(text) + 1
                    lines += 1
            # The last line of `yes` was cut short, and ended by `echo`.
            assert payload == OUTPUT + 1 + len("finished\n")
            typist.sendall(b"\0\0\0\0\3go\n")
            assert client.wait(name) == 4
    finally:
        os.close(bundle)
    print(f"{OUTPUT >> 20} MiB in {lines} records")
    client.finish(name)


def tail_of(path: Path) -> bytes:
    """The last bytes of a file."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 200))
        return file.read()
