"""ExecSync: exit codes, output, time limits, background children, size limits; nothing is left of any."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator

import grpc
import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from tests.support.cri import Cri, running_cri
from tests.support.daemon import wait_until


@pytest.fixture(scope="module")
def cri() -> Iterator[Cri]:
    with running_cri("exec_sync_limit = 100000\ndrain_exec_io_timeout = 0.5") as made:
        made.pull()
        yield made


@pytest.fixture(scope="module")
def container(cri: Cri) -> Iterator[str]:
    pod, config = cri.run_pod()
    yield cri.run(pod, config, "sleep 3600")
    cri.remove_pod(pod)


def test_output_and_exit_code(cri: Cri, container: str) -> None:
    done = cri.exec(container, "sh", "-c", "echo out; echo err >&2; exit 42")
    assert (done.stdout, done.stderr, done.exit_code) == (b"out\n", b"err\n", 42)
    assert cri.exec(container, "sh", "-c", "kill -9 $$").exit_code == 137


def test_a_program_that_is_not_there(cri: Cri, container: str) -> None:
    with pytest.raises(grpc.RpcError, match="no-such-program") as caught:
        cri.exec(container, "no-such-program")
    assert "failed to exec in container: failed to start exec" in caught.value.details()


def test_p7_a_timeout_kills_the_whole_tree(cri: Cri, container: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        cri.exec(container, "sh", "-c", "(sh -c 'sleep 8888 & sleep 8887 & wait') & sleep 8886", timeout=1)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: b"888" not in cri.exec(container, "ps").stdout, "the tree is gone", 60)


def test_p7_background_children_do_not_hold_the_call(cri: Cri, container: str) -> None:
    done = cri.exec(container, "sh", "-c", "echo before; sleep 7777 & exit 3")
    assert (done.stdout, done.exit_code) == (b"before\n", 3)
    assert b"sleep 7777" in cri.exec(container, "ps").stdout


def test_s8_output_beyond_the_limit_is_dropped_and_the_command_ends(cri: Cri, container: str) -> None:
    done = cri.exec(container, "sh", "-c", "head -c 5000000 /dev/zero; echo done >&2")
    assert (len(done.stdout), done.stderr, done.exit_code) == (100_000, b"done\n", 0)


def test_s9_many_execs_side_by_side_leave_nothing(cri: Cri, container: str) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda index: cri.exec(container, "echo", str(index)).stdout, range(40)))
    assert answers == [f"{index}\n".encode() for index in range(40)]
    folder = cri.daemon.state / "cri" / "exec"
    wait_until(lambda: not folder.is_dir() or not list(folder.iterdir()), "no pipes are left", 60)


def test_a_caller_who_hangs_up_takes_the_command_along(cri: Cri, container: str) -> None:
    call = cri.runtime.ExecSync.future(
        pb.ExecSyncRequest(container_id=container, cmd=["sleep", "6666"]), timeout=120)
    wait_until(lambda: b"sleep 6666" in cri.exec(container, "ps").stdout, "the command runs", 60)
    call.cancel()
    wait_until(lambda: b"sleep 6666" not in cri.exec(container, "ps").stdout, "the command is gone", 60)


def test_a_container_that_does_not_run_takes_no_exec(cri: Cri) -> None:
    pod, config = cri.run_pod()
    stopped = cri.run(pod, config, "true")
    cri.wait_exited(stopped)
    with pytest.raises(grpc.RpcError) as caught:
        cri.exec(stopped, "true")
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "container is in CONTAINER_EXITED state" in caught.value.details()
    for call, request in (
        (cri.runtime.Exec, pb.ExecRequest(container_id=stopped, cmd=["true"], stdout=True)),
        (cri.runtime.Attach, pb.AttachRequest(container_id=stopped, stdout=True)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(request)
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    cri.remove_pod(pod)
