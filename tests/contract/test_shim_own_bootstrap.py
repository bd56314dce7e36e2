"""How foreign daemons start, share, ask and clean up after our shim; and what survives a dead one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from supervisord_ctr import errors
from supervisord_ctr.aio import wait_until
from supervisord_ctr.api.runc.v1 import options_pb2
from supervisord_ctr.api.runtime.bootstrap.v1 import bootstrap_pb2
from supervisord_ctr.api.runtime.task.v3 import task_pb2 as api
from supervisord_ctr.api.shim.v1 import shim_pb2
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.api.types.task import task_pb2 as types
from supervisord_ctr.linux import cgroups, mounts
from supervisord_ctr.linux.processes import children, set_child_subreaper
from supervisord_ctr.ttrpc.client import connect_until
from tests.support.shim import PATIENCE, Lab, Zygote, children_named, laboratory

PRIVATE = "pctr.shim.v1.Shim"


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """One zygote for all tests."""
    made = Zygote()
    yield made
    assert made.close() == 0


@pytest.fixture
async def lab(zygote: Zygote) -> AsyncIterator[Lab]:
    """A laboratory of bootstrapped shims."""
    async with laboratory("bootstrap", zygote) as made:
        yield made


@pytest.fixture
async def forked(zygote: Zygote) -> AsyncIterator[Lab]:
    """A laboratory of forked shims."""
    async with laboratory("zygote", zygote) as made:
        yield made


def run(lab: Lab, name: str, action: str, data: bytes = b"", **environment: str) -> bytes:
    """Run the bootstrap program in a bundle, without a log fifo; its output."""
    command = [lab.command(), "-namespace", lab.namespace, "-address", "/a.sock", "-id", name, "-debug", action]
    settings = {
        "PCTR_SHIM_SOCKETS": str(lab.folder / "s"), "PCTR_SHIM_RUNTIME_ROOT": str(lab.folder / "runc"),
        "TTRPC_ADDRESS": lab.events_path, **environment,
    }
    done = subprocess.run(
        command, cwd=lab.folder / "b" / name, input=data, env={**os.environ, **settings}, capture_output=True,
        check=False, timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


async def end(address: str) -> None:
    """Shut an idle shim down."""
    client = await connect_until(address, PATIENCE)
    with contextlib.suppress(errors.Unavailable):
        await client.call("containerd.task.v3.Task", "Shutdown", api.ShutdownRequest(), api.ConnectResponse)
    await asyncio.wait_for(client.wait_closed(), PATIENCE)
    await client.close()


async def test_the_answer_has_the_form_of_the_question(lab: Lab) -> None:
    lab.bundle("c", ["true"])
    address = run(lab, "c", "start", MAX_SHIM_VERSION="2").decode()
    assert address.startswith(f"unix://{lab.folder}/s/")
    await end(address)

    answer = json.loads(run(lab, "c", "start", MAX_SHIM_VERSION="3"))
    assert answer == {"version": 3, "address": address, "protocol": "ttrpc"}
    await end(address)

    params = bootstrap_pb2.BootstrapParams(
        instance_id="c", namespace=lab.namespace, containerd_ttrpc_address=lab.events_path,
        containerd_grpc_address="/a.sock", socket_dir=str(lab.folder / "s2"),
    )
    result = bootstrap_pb2.BootstrapResult.FromString(run(lab, "c", "start", params.SerializeToString()))
    assert (result.version, result.protocol) == (3, "ttrpc")
    assert result.address.startswith(f"unix://{lab.folder}/s2/")
    await end(result.address)

    options = AnyMessage(type_url="containerd.runc.v1.Options", value=options_pb2.Options(root="/x").SerializeToString())
    assert run(lab, "c", "start", options.SerializeToString(), MAX_SHIM_VERSION="2").decode() == address
    await end(address)


async def test_the_shim_enters_the_cgroup_that_the_options_name(lab: Lab) -> None:
    lab.bundle("c", ["true"])
    group = cgroups.create(f"/{lab.namespace}/shims")
    options = AnyMessage(
        type_url="containerd.runc.v1.Options",
        value=options_pb2.Options(shim_cgroup=f"/{lab.namespace}/shims").SerializeToString(),
    )
    params = bootstrap_pb2.BootstrapParams(
        instance_id="c", namespace=lab.namespace, containerd_grpc_address="/a.sock",
        extensions=[bootstrap_pb2.Extension(value=options)],
    )
    try:
        for version, data in (("2", options.SerializeToString()), ("3", params.SerializeToString())):
            run(lab, "c", "start", data, MAX_SHIM_VERSION=version)
            address = (lab.folder / "b" / "c" / "address").read_text()
            client = await connect_until(address, PATIENCE)
            info = await client.call(PRIVATE, "Info", shim_pb2.InfoRequest(), shim_pb2.InfoResponse)
            assert group.pids() == [info.pid]
            await client.close()
            await end(address)
            await wait_until(lambda: group.pids() == [], PATIENCE, "the shim to leave its cgroup")
    finally:
        for folder in {*group.folders.values()}:
            with contextlib.suppress(OSError):
                os.rmdir(folder)


async def test_a_shim_whose_cgroup_is_missing_does_not_start(lab: Lab) -> None:
    lab.bundle("c", ["true"])
    options = AnyMessage(
        type_url="containerd.runc.v1.Options",
        value=options_pb2.Options(shim_cgroup=f"/{lab.namespace}/nowhere").SerializeToString(),
    )
    with pytest.raises(AssertionError, match="control group is gone"):
        run(lab, "c", "start", options.SerializeToString())
    assert os.listdir(lab.folder / "s") == []


async def test_containers_of_a_group_share_a_shim(lab: Lab) -> None:
    for name in ("pod", "inner"):
        lab.bundle(name, ["sleep", "1000"], annotations={"io.kubernetes.cri.sandbox-id": "pod"})
    lab.bundle("other", ["true"])
    first, second, third = (run(lab, name, "start").decode() for name in ("pod", "inner", "other"))
    assert first == second != third
    client = await connect_until(first, PATIENCE)
    info = await client.call(PRIVATE, "Info", shim_pb2.InfoRequest(), shim_pb2.InfoResponse)
    assert info.group == "pod"
    title = Path(f"/proc/{info.pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()
    assert title == f"containerd-shim-pctr-v1 -namespace {lab.namespace} -id pod -address /a.sock"
    await client.close()
    await end(first)
    await end(third)


async def test_s13_the_socket_is_a_private_path(lab: Lab) -> None:
    lab.bundle("c", ["true"])
    path = run(lab, "c", "start").decode().removeprefix("unix://")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
    table = Path("/proc/net/unix").read_text()
    assert not [line for line in table.splitlines() if "@" in line and str(lab.folder) in line]
    await end(f"unix://{path}")
    assert not os.path.exists(path)


async def test_s13_another_user_is_refused(lab: Lab) -> None:
    lab.bundle("c", ["true"])
    path = run(lab, "c", "start").decode().removeprefix("unix://")
    for folder in (lab.folder, lab.folder / "s"):
        folder.chmod(0o755)
    os.chmod(path, 0o666)
    script = f"import socket; s=socket.socket(socket.AF_UNIX); s.connect({path!r}); s.settimeout(60); print(s.recv(1))"
    done = subprocess.run(
        ["/usr/bin/python3", "-c", script], user=65534, group=65534, extra_groups=[], capture_output=True,
        check=False, cwd="/",
    )
    assert done.stdout == b"b''\n", done.stderr
    await end(f"unix://{path}")


async def test_info_tells_what_the_runtime_can(lab: Lab) -> None:
    options = AnyMessage(
        type_url="containerd.runc.v1.Options", value=options_pb2.Options(binary_name="runc").SerializeToString()
    )
    done = subprocess.run([lab.command(), "-info"], input=options.SerializeToString(), capture_output=True, check=True)
    info = types_pb2.RuntimeInfo.FromString(done.stdout)
    assert info.name == "io.containerd.pctr.v1"
    assert info.options == options


async def test_delete_takes_away_what_a_killed_shim_left(lab: Lab) -> None:
    shim = await lab.run("c", ["sleep", "1000"])
    pid = (await shim.state("c")).pid
    os.kill(shim.pid, signal.SIGKILL)
    await asyncio.wait_for(shim.client.wait_closed(), PATIENCE)
    response = api.DeleteResponse.FromString(run(lab, "c", "delete"))
    assert (response.exit_status, response.pid) == (137, pid)
    await wait_until(lambda: not _runs(pid), PATIENCE, "the container's process to end")
    assert mounts.mounts_below(lab.folder / "b" / "c") == []
    assert not cgroups.at(f"/{lab.namespace}/c").exists()
    assert not os.path.exists(shim.path)


async def test_p13_an_exit_that_was_recorded_survives_the_shim(forked: Lab) -> None:
    shim = await forked.run("c", ["sh", "-c", "exit 23"])
    assert await shim.wait("c") == 23
    os.kill(shim.pid, signal.SIGKILL)
    await asyncio.wait_for(shim.client.wait_closed(), PATIENCE)
    assert forked.zygote is not None
    for _ in range(2):  # safe to repeat
        reply = forked.zygote.ask(
            "cleanup", namespace=forked.namespace, id="c", bundle=str(forked.folder / "b" / "c"),
            runtime_root=str(forked.folder / "runc"),
        )
        assert reply["exit_status"] == 23, reply
    assert mounts.mounts_below(forked.folder / "b" / "c") == []


async def test_events_wait_for_a_daemon_that_is_away(forked: Lab) -> None:
    forked.bundle("c", ["sh", "-c", "exit 3"])
    shim = await forked.launch("c")
    await forked.stop_events()
    await forked.create(shim, "c")
    await shim.start("c")
    assert await shim.wait("c") == 3
    info = await shim.client.call(PRIVATE, "Info", shim_pb2.InfoRequest(), shim_pb2.InfoResponse)
    assert info.events_queued == 3
    await forked.serve_events()
    assert await forked.wait_topics(lambda found: "exit" in found) == ["create", "start", "exit"]
    await forked.stop_events()
    await shim.delete("c")
    await forked.serve_events()
    await shim.call("Connect", api.ConnectRequest(id="c"), api.ConnectResponse)
    assert await forked.wait_topics(lambda found: "delete" in found) == ["create", "start", "exit", "delete"]
    await shim.shutdown("c")


async def test_p13_p23_the_record_tells_why(forked: Lab) -> None:
    shim = await forked.run("c", ["sleep", "1000"])
    await shim.exec("c", "e1", ["sh", "-c", "exit 4"])
    await shim.start("c", "e1")
    assert await shim.wait("c", "e1") == 4
    await shim.kill("c", signal.SIGKILL)
    assert await shim.wait("c") == 137
    response = await shim.client.call(PRIVATE, "ExitRecords", shim_pb2.ExitRecordsRequest(id="c"), shim_pb2.ExitRecordsResponse)
    init, added = response.records
    assert (init.exec_id, init.exit_status, init.signal, init.asked_signal) == ("", 137, 9, 9)
    assert init.asked_at.seconds > 0
    assert (added.exec_id, added.exit_status, added.signal, added.asked_signal) == ("e1", 4, 0, 0)
    on_disk = json.loads((forked.folder / "b" / "c" / "exit.json").read_text())
    assert on_disk["exit_status"] == 137
    await forked.finish(shim, "c")


async def test_p13_out_of_memory_is_told_with_its_level(forked: Lab) -> None:
    limit = {"memory": {"limit": 16 << 20, "swap": 16 << 20}}
    hungry = ["dd", "if=/dev/zero", "of=/dev/null", "bs=100000000", "count=1"]
    shim = await forked.run("c", hungry, bundle={"resources": limit})
    assert await shim.wait("c") == 137
    topics = await forked.wait_topics(lambda found: "exit" in found)
    assert topics == ["create", "start", "oom", "exit"]
    response = await shim.client.call(PRIVATE, "ExitRecords", shim_pb2.ExitRecordsRequest(), shim_pb2.ExitRecordsResponse)
    assert response.records[0].oom_kills >= 1
    assert response.records[0].oom_level == "container"
    await forked.finish(shim, "c")


async def test_both_versions_of_the_task_service(forked: Lab) -> None:
    shim = await forked.run("c", ["sleep", "1000"], version=3)
    shim.service = "containerd.task.v2.Task"
    assert (await shim.state("c")).status == types.Status.RUNNING
    shim.service = "containerd.task.v3.Task"
    await forked.finish(shim, "c")


async def test_crun_works_too(forked: Lab) -> None:
    forked.bundle("c", ["sleep", "1000"])
    shim = await forked.launch("c")
    if cgroups.hierarchy().mode == "hybrid":  # crun refuses such machines; its reason must come through
        with pytest.raises(errors.Unknown, match="hybrid mode not supported"):
            await forked.create(shim, "c", options=forked.options(binary_name="crun"))
        return
    await forked.create(shim, "c", options=forked.options(binary_name="crun"))
    await shim.start("c")
    await shim.exec("c", "e1", ["sh", "-c", "exit 5"])
    await shim.start("c", "e1")
    assert await shim.wait("c", "e1") == 5
    await shim.kill("c")
    assert await shim.wait("c") == 137
    await shim.delete("c")
    await shim.shutdown("c")


async def test_a_runtime_that_is_not_installed(forked: Lab) -> None:
    forked.bundle("c", ["true"])
    shim = await forked.launch("c")
    with pytest.raises(errors.NotFound, match="no-such-runtime"):
        await forked.create(shim, "c", options=forked.options(binary_name="no-such-runtime"))
    strange = AnyMessage(type_url="some.other.Options", value=b"")
    with pytest.raises(errors.InvalidArgument):
        await forked.create(shim, "c", options=strange)


async def test_names_are_checked(forked: Lab) -> None:
    shim = await forked.run("c", ["sleep", "1000"])
    for name in ("../x", "a/b", "", "x" * 200):
        with pytest.raises(errors.InvalidArgument):
            await shim.exec("c", name, ["true"])
    with pytest.raises(errors.AlreadyExists):
        await forked.create(shim, "c")
    await forked.finish(shim, "c")


async def test_the_shim_outlives_its_zygote_and_signals() -> None:
    zygote = Zygote()
    async with laboratory("zygote", zygote) as lab:
        shim = await lab.run("c", ["sleep", "1000"])
        zygote.process.kill()
        zygote.close()
        os.kill(shim.pid, signal.SIGTERM)
        assert (await shim.state("c")).status == types.Status.RUNNING
        await lab.finish(shim, "c")


async def test_a_pause_process_is_stripped(zygote: Zygote) -> None:
    reply = zygote.ask("fork-pause", hostname="pod")
    pid = reply["pid"]
    try:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
        assert status["NSpid"].split()[-1] == "1"
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert status["Name"] == "pctr-pause"
        assert Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0") == b"pctr-pause"
        assert all(int(status[name], 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"))
        assert os.listdir(f"/proc/{pid}/fd") == []
        assert os.listdir(f"/proc/{pid}/root") == []
        subprocess.run(
            ["/usr/bin/nsenter", "-t", str(pid), "-p", "--", "/bin/sh", "-c", "sleep 0.2 & exit 0"], check=True
        )

        await wait_until(lambda: not children(pid), PATIENCE, "the orphan to be reaped")
    finally:
        os.kill(pid, signal.SIGTERM)
    await wait_until(lambda: not _runs(pid), PATIENCE, "the pause process to end")


async def test_a_zygote_answers_nonsense_with_errors(zygote: Zygote) -> None:
    assert zygote.ask("dance")["error"]["code"] == errors.Code.UNIMPLEMENTED
    assert zygote.ask("fork-shim")["error"]["code"] == errors.Code.INVALID_ARGUMENT
    reply = zygote.ask("fork-shim", namespace="n", id="c", bundle="/no/such/bundle", socket="/no/such/socket")
    assert reply["error"]["code"] == errors.Code.NOT_FOUND
    assert zygote.ask("ping")["pid"] == zygote.process.pid


@pytest.fixture
def orphans() -> Iterator[Callable[[], list[int]]]:
    """Asks for the children that we have got since; those that ended are reaped. They come to us and not to init."""
    before = set(children(os.getpid()))
    set_child_subreaper()

    def found() -> list[int]:
        new = set(children(os.getpid())) - before
        return sorted(pid for pid in new if os.waitpid(pid, os.WNOHANG) == (0, 0))

    yield found
    set_child_subreaper(False)
    for pid in found():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize("rest", [0.0, 60.0])
async def test_p5_a_shim_that_its_daemon_did_not_live_to_hear_of_ends(
    rest: float, spare: bool, tmp_path: Path, orphans: Callable[[], list[int]],
) -> None:
    """The next daemon looks once for shims that nobody knows of, and may have looked before this one was made."""
    zygote = Zygote(rest=rest)
    zygote.ask("ping")
    if spare:
        zygote.expect()
        await wait_until(lambda: bool(children_named(zygote.process.pid, "pctr-spare")), PATIENCE, "a spare shim")
    path = tmp_path / "shim.sock"
    assert zygote.ask_and_go("fork-shim", namespace="n", id="c", bundle=str(tmp_path), socket=str(path)) == 0
    await wait_until(lambda: not orphans(), PATIENCE, "the shim to end")
    assert not path.exists()


async def test_p5_a_pause_process_that_its_daemon_did_not_live_to_hear_of_ends(
    orphans: Callable[[], list[int]],
) -> None:
    zygote = Zygote()
    zygote.ask("ping")
    assert zygote.ask_and_go("fork-pause", hostname="pod") == 0
    await wait_until(lambda: not orphans(), PATIENCE, "the pause process to end")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
