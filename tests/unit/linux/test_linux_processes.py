"""Processes, namespaces and control groups."""

from __future__ import annotations

import os
import secrets
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisord_ctr.api.cgroups.v1 import metrics_pb2 as metrics_v1
from supervisord_ctr.api.cgroups.v2 import metrics_pb2 as metrics_v2
from supervisord_ctr.linux import cgroup_metrics, cgroups, mounts, namespaces, processes


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    with subprocess.Popen(["/bin/sleep", "1000"], start_new_session=True) as process:
        yield process
        process.kill()


def test_a_process_is_named_beyond_reuse(sleeper: subprocess.Popen[bytes]) -> None:
    started = processes.read_start_time(sleeper.pid)
    assert started > 0
    assert processes.is_alive(sleeper.pid, started)
    assert not processes.is_alive(sleeper.pid, started + 1)
    assert not processes.send_signal(sleeper.pid, started + 1, signal.SIGKILL)
    assert processes.send_signal(sleeper.pid, started, signal.SIGKILL)
    assert sleeper.wait(30) == -signal.SIGKILL
    assert processes.read_start_time(sleeper.pid) == 0
    assert not processes.send_signal(sleeper.pid, started, signal.SIGKILL)


def test_how_processes_end() -> None:
    assert processes.exit_of(7 << 8) == (7, 0)
    assert processes.exit_of(9) == (137, 9)
    assert processes.exit_of(0) == (0, 0)


def test_peers_are_known() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert processes.peer_credentials(ours) == (os.getpid(), os.geteuid(), os.getegid())
        assert processes.is_trusted_peer(theirs)


def test_d10_oom_scores_are_clamped_to_what_is_allowed(sleeper: subprocess.Popen[bytes]) -> None:
    before = int(Path(f"/proc/{sleeper.pid}/oom_score_adj").read_text())
    assert processes.set_oom_score_adj(sleeper.pid, before + 5) == before + 5
    lowered = processes.set_oom_score_adj(sleeper.pid, -999)
    assert lowered == int(Path(f"/proc/{sleeper.pid}/oom_score_adj").read_text())
    assert processes.set_oom_score_adj(sleeper.pid, 5000) == 1000


def test_descendants_are_found_by_parent_and_session(sleeper: subprocess.Popen[bytes]) -> None:
    assert processes.children_of([sleeper.pid, os.getpid()], sleeper.pid) == [sleeper.pid]
    assert set(processes.children_of([sleeper.pid, os.getpid()], os.getpid())) == {os.getpid(), sleeper.pid}


def test_pinned_namespaces_are_entered_and_let_go(tmp_path: Path) -> None:
    path = tmp_path / "net"
    namespaces.pin("net", path)
    assert namespaces.is_pinned(path)
    assert not namespaces.same_namespace(path, "/proc/self/ns/net")
    assert namespaces.in_netns(path, lambda: "lo" in Path("/proc/thread-self/net/dev").read_text())
    with pytest.raises(FileExistsError):
        namespaces.pin("net", path)
    namespaces.unpin(path)
    namespaces.unpin(path)
    assert not path.exists()
    assert not namespaces.is_pinned(path)


def test_a_pinned_uts_namespace_has_its_hostname(tmp_path: Path) -> None:
    path, here = tmp_path / "uts", os.uname().nodename
    namespaces.pin("uts", path, hostname="lab")
    assert namespaces.call_in(path, namespaces.CLONE_NEWUTS, lambda: os.uname().nodename) == "lab"
    assert os.uname().nodename == here
    namespaces.unpin(path)


def test_namespaces_can_belong_to_a_user_namespace(tmp_path: Path) -> None:
    owner = namespaces.new_user_namespace([(0, 100000, 65536)], [(0, 100000, 65536)])
    try:
        for kind in ("net", "ipc", "uts"):
            namespaces.pin(kind, tmp_path / kind, userns=owner, hostname="inner")
            assert namespaces.is_pinned(tmp_path / kind)
            namespaces.unpin(tmp_path / kind)
    finally:
        os.close(owner)
    assert mounts.mounts_below(tmp_path) == []


def test_nothing_stays_when_pinning_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pid"):
        namespaces.pin("pid", tmp_path / "pid")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def group() -> Iterator[cgroups.Cgroup]:
    """A control group of this test."""
    name = f"/unit-{secrets.token_hex(4)}"
    made = cgroups.create(f"{name}/inner")
    yield made
    pause = select.poll()
    for attempt in range(3000):  # what was killed leaves the group when its parent has reaped it
        try:
            made.signal_all(signal.SIGKILL)
            cgroups.at(name).delete()
            break
        except OSError:
            assert attempt < 2999
            pause.poll(10)
    assert not made.exists()


def _wait(process: subprocess.Popen[bytes]) -> int:
    return process.wait(30)


def test_a_group_has_processes_freezes_and_kills(group: cgroups.Cgroup, sleeper: subprocess.Popen[bytes]) -> None:
    group.add(sleeper.pid)
    assert cgroups.of_pid(sleeper.pid).folders == group.folders
    assert group.pids() == [sleeper.pid]
    group.set_frozen(True)
    watch = select.poll()
    for _ in range(1000):
        if group.is_frozen():
            break
        watch.poll(1)
    assert group.is_frozen()
    group.set_frozen(False)
    assert group.signal_all(signal.SIGKILL) == 1
    assert _wait(sleeper) == -signal.SIGKILL


def test_metrics_fit_the_published_messages(group: cgroups.Cgroup, sleeper: subprocess.Popen[bytes]) -> None:
    group.add(sleeper.pid)
    fields = group.metrics()
    if group.is_v2:
        assert metrics_v2.Metrics(**fields).pids.current == 1  # type: ignore[arg-type]
    else:
        message = metrics_v1.Metrics(**fields)  # type: ignore[arg-type]
        assert message.pids.current == 1
        assert message.memory.usage.limit > 0
        assert len(message.cpu.usage.per_cpu) > 0


def test_memory_kills_are_counted_with_their_level(group: cgroups.Cgroup) -> None:
    if group.is_v2:
        cgroups.write(f"{group.folder('memory')}/memory.max", str(8 << 20))
    else:
        cgroups.write(f"{group.folder('memory')}/memory.limit_in_bytes", str(8 << 20))
    watch = group.watch_oom()
    try:
        assert group.oom_kills() == 0
        script = "read go; x=$(head -c 50000000 /dev/zero | tr '\\0' x)"
        with subprocess.Popen(["/bin/sh", "-c", script], stdin=subprocess.PIPE) as hungry:
            group.add(hungry.pid)
            hungry.communicate(b"go\n", timeout=60)
        assert select.select([watch], [], [], 60)[0]
        assert group.oom_kills() >= 1
        assert group.oom_level() == "container"
    finally:
        os.close(watch)


def test_a_group_that_is_gone_says_so(group: cgroups.Cgroup) -> None:
    absent = cgroups.at("/no/such/group")
    assert not absent.exists()
    assert absent.pids() == []
    assert absent.oom_kills() == 0
    absent.delete()
    with pytest.raises(FileNotFoundError):
        absent.metrics()
    with pytest.raises(ProcessLookupError):
        cgroups.of_pid(2**22 + 1)


def test_membership_is_parsed() -> None:
    text = "12:pids:/a\n11:cpu,cpuacct:/b:c\n1:name=systemd:/d\n0::/e\n"
    assert cgroups.parse_membership(text) == {"pids": "/a", "cpu": "/b:c", "cpuacct": "/b:c", "systemd": "/d", "": "/e"}


def test_systemd_paths() -> None:
    assert cgroups.systemd_path("a-b.slice", "cri", "x") == "/a.slice/a-b.slice/cri-x.scope"
    assert cgroups.systemd_path("", "cri", "x") == "/system.slice/cri-x.scope"


V2 = {
    "pids.current": "3", "pids.max": "max", "cpu.stat": "usage_usec 10\nuser_usec 4\nsystem_usec 6\nnr_periods 1",
    "cpu.pressure": "some avg10=1.50 avg60=0.00 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5",
    "memory.stat": "anon 5\nfile 6\nworkingset_refault_anon 1\nworkingset_refault_file 2\nanon_thp 9", "memory.current": "100",
    "memory.max": "max", "memory.swap.max": "0", "memory.events": "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 5",
    "io.stat": "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n7:1 rbytes=5",
    "rdma.current": "mlx5_0 hca_handle=1 hca_object=2", "rdma.max": "mlx5_0 hca_handle=max hca_object=20",
}


def test_v2_files_become_v2_metrics() -> None:
    fields = cgroup_metrics.unified("/g", lambda path: V2.get(os.path.basename(path), ""))
    message = metrics_v2.Metrics(**fields)  # type: ignore[arg-type]
    assert (message.pids.current, message.pids.limit) == (3, 2**64 - 1)
    assert (message.cpu.usage_usec, message.cpu.psi.some.total, message.cpu.psi.some.avg10) == (10, 77, 1.5)
    assert (message.memory.anon, message.memory.workingset_refault, message.memory.usage_limit) == (5, 3, 2**64 - 1)
    assert (message.memory_events.oom_kill, message.memory_events.oom_group_kill) == (4, 5)
    assert [(entry.major, entry.rbytes, entry.wios) for entry in message.io.usage] == [(8, 1, 4), (7, 5, 0)]
    assert message.rdma.limit[0].hca_handles == 2**32 - 1


V1 = {
    "pids.current": "3", "pids.max": "max", "cpuacct.usage": "99", "cpuacct.stat": "user 2\nsystem 3",
    "cpuacct.usage_percpu": "40 59 ", "cpu.stat": "nr_periods 5\nnr_throttled 1\nthrottled_time 7",
    "memory.stat": "cache 1\nrss 2\npgpgin 3\ntotal_cache 4\nhierarchical_memory_limit 5\ntotal_pgmajfault 6",
    "memory.usage_in_bytes": "10", "memory.limit_in_bytes": "20", "memory.memsw.usage_in_bytes": "11",
    "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2",
    "blkio.throttle.io_service_bytes_recursive": "8:0 Read 4096\n8:0 Write 1\nTotal 4097",
}


def test_v1_files_become_v1_metrics() -> None:
    folders = {name: f"/{name}" for name in ("pids", "cpu", "cpuacct", "memory", "blkio")}
    fields = cgroup_metrics.legacy(folders, lambda path: V1.get(os.path.basename(path), ""))
    message = metrics_v1.Metrics(**fields)  # type: ignore[arg-type]
    assert (message.pids.current, message.pids.limit) == (3, 0)
    assert (message.cpu.usage.total, list(message.cpu.usage.per_cpu)) == (99, [40, 59])
    assert message.cpu.usage.user == 2 * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    assert (message.cpu.throttling.periods, message.cpu.throttling.throttled_time) == (5, 7)
    assert (message.memory.pg_pg_in, message.memory.total_cache, message.memory.total_pg_maj_fault) == (3, 4, 6)
    assert (message.memory.usage.usage, message.memory.usage.limit, message.memory.swap.usage) == (10, 20, 11)
    assert message.memory_oom_control.oom_kill == 2
    entries = message.blkio.io_service_bytes_recursive
    assert [(entry.major, entry.op, entry.value) for entry in entries] == [(8, "Read", 4096), (8, "Write", 1)]


@settings(deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from([*V1, *V2]), st.text(alphabet="0123456789 abc:=\nmax-", max_size=60)))
def test_strange_control_files_never_raise(files: dict[str, str]) -> None:
    def read(path: str) -> str:
        return files.get(os.path.basename(path), "")

    folders = {name: f"/{name}" for name in ("pids", "cpu", "cpuacct", "memory", "blkio")}
    cgroup_metrics.legacy(folders, read)
    cgroup_metrics.unified("/g", read)


def test_a_process_can_change_what_ps_shows_of_it() -> None:
    script = (
        "import sys; from supervisord_ctr.linux import processes as p; p.set_name('a-name-that-is-too-long');"
        "p.set_title('a title', '-with', 'flags' + 'x' * int(sys.argv[1])); print('ready', flush=True); sys.stdin.read()"
    )
    for added, shown in ((0, b"a title\0-with\0flags\0\0"), (4000, b"a title\0-with\0flagsxxx")):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(added)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == b"ready\n"
            whole = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            assert whole.startswith(shown)
            assert whole.endswith(b"\0")
            assert whole.rstrip(b"x\0") == b"a title\0-with\0flags"
            assert Path(f"/proc/{process.pid}/comm").read_text() == "a-name-that-is-\n"
            process.stdin.close()


def test_children_are_found_while_others_come_and_go() -> None:
    code = (
        "import os, sys\n"
        "stay = [os.fork() or (sys.stdin.read(), os._exit(0)) for _ in range(20)]\n"
        "print(*stay, flush=True)\n"
        "while True:\n"
        "    pid = os.fork()\n"
        "    if pid == 0: os._exit(0)\n"
        "    os.waitpid(pid, 0)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdout is not None
            stay = {int(word) for word in parent.stdout.readline().split()}
            for _ in range(20):
                assert stay <= set(processes.children(parent.pid))
        finally:
            parent.kill()
    assert processes.children(parent.pid) == []
