"""`pctr` as its users meet it, the same on our daemon and on Debian's containerd.

The second one shows that the client speaks the published API and not a dialect; it has no transfer
service, so pulls, pushes and archives take the client's own way there.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import wait_until
from tests.support.fake_registry import FakeRegistry
from tests.support.pctr_target import TIMEOUT, Target


@pytest.fixture
def detached(target: Target, name: str) -> Iterator[str]:
    """A running container that ends with 9 on SIGTERM."""
    script = "trap 'exit 9' TERM; echo ready; while true; do sleep 0.1; done"
    assert target.text("run", "-d", target.image, name, "sh", "-c", script).strip() == name
    yield name
    target.pctr("container", "rm", "--force", name, status=None)


# -- running -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 7, 255])
def test_the_exit_status_is_passed_through_and_rm_leaves_nothing(target: Target, name: str, status: int) -> None:
    target.pctr("run", "--rm", target.image, name, "sh", "-c", f"exit {status}", status=status)
    assert name not in target.ids()


def test_standard_streams_stay_apart_and_the_images_config_is_used(target: Target, name: str) -> None:
    done = target.pctr("run", "--rm", target.image, name, "sh", "-c", "echo out; echo err >&2; pwd; echo $FROM")
    assert done.stdout == b"out\n/home\nimage\n"
    assert done.stderr == b"err\n"


def test_a_user_namespace_of_its_own(target: Target, name: str, tmp_path: Path) -> None:
    """Files belong to whom they belonged to, and the streams can be opened, as servers do that log to /dev/stdout."""
    maps = ("--uidmap", "0:1000000:65536", "--gidmap", "0:1000000:65536")
    script = "stat -c %u /bin /home; id -u; touch /made; echo out >/dev/stdout; echo err >/dev/stderr"
    for _ in range(2):
        done = target.pctr("run", "--rm", *maps, target.image, name, "sh", "-c", script)
        assert (done.stdout, done.stderr) == (b"0\n0\n0\nout\n", b"err\n")
    assert name not in target.ids()
    spec = tmp_path / "spec.json"
    spec.write_text("{}")
    for wrong, told in (
        (maps[:2], b"--uidmap and --gidmap go together"), (maps[2:], b"--uidmap and --gidmap go together"),
        (("--uidmap", "0:1", *maps[2:]), b"mapping '0:1' is not INSIDE:OUTSIDE:LENGTH"),
        (("--remap-labels",), b"--remap-labels needs --uidmap and --gidmap"),
        ((*maps, "--config", str(spec)), f"{spec} states its own mappings".encode()),
    ):
        done = target.pctr("run", "--rm", *wrong, target.image, name, "true", status=2)
        assert told in done.stderr
    assert name not in target.ids()


def test_fifty_mebibytes_come_whole(target: Target, name: str) -> None:
    script = "i=0; while [ $i -lt 50 ]; do dd if=/dev/zero bs=1M count=1 2>/dev/null | tr '\\0' x; i=$((i+1)); done"
    done = target.pctr("run", "--rm", target.image, name, "sh", "-c", script)
    assert len(done.stdout) == 50 << 20
    assert done.stdout.count(b"x") == 50 << 20


def test_output_to_a_file(target: Target, name: str, tmp_path: Path) -> None:
    with open(tmp_path / "out", "ab") as file:
        file.write(b"before\n")
        file.flush()
        subprocess.run(target.command("run", "--rm", target.image, name, "seq", "100000"), stdout=file, check=True,
                       env=target.environment, stdin=subprocess.DEVNULL, timeout=TIMEOUT)
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines == ["before", *map(str, range(1, 100_001))]


@pytest.mark.parametrize("way", ["pipe", "file"])
def test_ten_mebibytes_of_input_come_back_identical(target: Target, name: str, tmp_path: Path, way: str) -> None:
    data = os.urandom(10 << 20)
    words = ("run", "--rm", "-i", target.image, name, "cat")
    if way == "pipe":
        done = target.pctr(*words, stdin=data)
    else:
        path = tmp_path / "in"
        path.write_bytes(data)
        with open(path, "rb") as file:
            done = subprocess.run(target.command(*words), stdin=file, capture_output=True, env=target.environment,
                                  timeout=TIMEOUT, check=True)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


def test_without_interactive_our_input_is_left_alone(target: Target, name: str) -> None:
    assert target.pctr("run", "--rm", target.image, name, "cat", stdin=b"not for it").stdout == b""


def test_a_signal_reaches_the_process(target: Target, name: str) -> None:
    script = "trap 'exit 9' TERM; echo ready; while true; do sleep 0.1; done"
    process = target.start("run", "--rm", target.image, name, "sh", "-c", script, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 9
    assert name not in target.ids()


def test_whoever_does_not_wait_after_three_signals_ends_it(target: Target, name: str) -> None:
    script = "trap '' INT TERM; echo ready; while true; do sleep 0.1; done"
    process = target.start("run", "--rm", target.image, name, "sh", "-c", script, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"

        def insist() -> bool:
            process.send_signal(signal.SIGINT)
            return process.poll() is not None

        wait_until(insist, "the third signal kills", TIMEOUT)
    assert process.returncode == 137
    assert name not in target.ids()


def test_a_reader_that_has_enough_ends_the_process(target: Target, name: str) -> None:
    process = target.start("run", "--rm", target.image, name, "yes", stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    assert process.wait(TIMEOUT) == 141
    assert name not in target.ids()


def test_what_cannot_start_leaves_nothing(target: Target, name: str) -> None:
    done = target.pctr("run", target.image, name, "/no/such/program", status=1)
    assert done.stderr.startswith(b"pctr: ")
    assert b"/no/such/program" in done.stderr
    assert name not in target.ids()


def test_identity_limits_and_root(target: Target, name: str) -> None:
    script = "id -u; id -G; hostname; echo $EXTRA; touch /x 2>/dev/null || echo read-only; ulimit -n"
    out = target.text(
        "run", "--rm", "-u", "alice", "--hostname", "inside", "-e", "EXTRA=here", "--read-only", "--memory", "64m",
        "--cpus", "0.5", "--pids-limit", "50", "--rlimit", "nofile=99", target.image, name, "sh", "-c", script)
    uid, groups, host, extra, root, files = out.splitlines()
    assert (uid, host, extra, root, files) == ("1000", "inside", "here", "read-only", "99")
    assert set(groups.split()) == {"1000", "2000"}


def test_mounts(target: Target, name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("from the host\n")
    out = target.text(
        "run", "--rm", "--mount", f"type=bind,src={tmp_path},dst=/mnt,options=rbind:ro", "--mount",
        "type=tmpfs,dst=/scratch", target.image, name, "sh", "-c",
        "cat /mnt/file; touch /mnt/x 2>/dev/null || echo refused; touch /scratch/x && echo scratch")
    assert out == "from the host\nrefused\nscratch\n"
    assert not (tmp_path / "x").exists()


def test_networks(target: Target, name: str) -> None:
    look = ("sh", "-c", "ip route; ls /sys/class/net")
    assert target.text("run", "--rm", target.image, name, *look).split() == ["lo"]
    bridged = target.text("run", "--rm", "--net", "bridge", target.image, name, *look)
    assert "default via" in bridged
    assert "eth0" in bridged.split()
    assert set(os.listdir("/sys/class/net")) & set(
        target.text("run", "--rm", "--net", "host", target.image, name, *look).split())


# -- errors --------------------------------------------------------------------------------------------


def test_unknown_images_and_ids_are_errors_of_one_line(target: Target) -> None:
    for words in (
        ("run", "--pull", "never", "none.example/none:1", "x"), ("image", "inspect", "none.example/none:1"),
        ("task", "kill", "nobody"), ("task", "exec", "nobody", "true"), ("container", "info", "nobody"),
        ("content", "get", f"sha256:{'0' * 64}"), ("snapshot", "info", "nobody"), ("task", "attach", "nobody"),
    ):
        done = target.pctr(*words, status=1)
        assert done.stderr.startswith(b"pctr: ")
        assert done.stderr.count(b"\n") == 1
        assert b"not found" in done.stderr


@pytest.mark.parametrize("wrong", ["a/b", "x" * 200, "..", "a b"])
def test_ids_that_are_none_are_refused(target: Target, wrong: str) -> None:
    done = target.pctr("run", "--rm", target.image, wrong, "true", status=1)
    assert done.stderr.startswith(b"pctr: ")
    assert wrong not in target.ids()


def test_an_id_in_use_is_left_as_it_is(target: Target, detached: str) -> None:
    done = target.pctr("run", "--rm", target.image, detached, "true", status=1)
    assert b"already exists" in done.stderr
    assert [row["status"] for row in target.rows("task", "ls") if row["task"] == detached] == ["RUNNING"]


# -- tasks -----------------------------------------------------------------------------------------------


def test_a_detached_task_from_list_to_removal(target: Target, detached: str) -> None:
    (row,) = [row for row in target.rows("task", "ls") if row["task"] == detached]
    assert set(row) == {"task", "pid", "status"}
    assert row["status"] == "RUNNING"
    assert str(row["pid"]) in target.text("task", "ps", detached).split()
    waiting = target.start("task", "wait", detached, stdout=subprocess.PIPE)
    target.pctr("task", "kill", "--signal", "TERM", detached)
    out, _ = waiting.communicate(timeout=TIMEOUT)
    assert out == b"9\n"
    assert waiting.returncode == 9
    assert [row["status"] for row in target.rows("task", "ls") if row["task"] == detached] == ["STOPPED"]
    target.pctr("task", "rm", detached)
    assert detached not in {row["task"] for row in target.rows("task", "ls")}
    fifos = target.base / "run" / "fifo"
    assert not os.listdir(fifos)
    target.pctr("container", "rm", detached)
    assert detached not in target.ids()


def test_exec(target: Target, detached: str) -> None:
    done = target.pctr("task", "exec", "-e", "A=b", "-w", "/tmp", "-u", "alice", detached, "sh", "-c",
                       "echo $A $FROM; pwd; id -u; id -G; exit 3", status=3)
    lines = done.stdout.decode().splitlines()
    assert lines[:3] == ["b image", "/tmp", "1000"]
    assert set(lines[3].split()) == {"1000", "2000"}
    data = os.urandom(1 << 20)
    assert target.pctr("task", "exec", "-i", detached, "cat", stdin=data).stdout == data
    assert b"nope" in target.pctr("task", "exec", detached, "nope", status=1).stderr


def test_pause_and_resume(target: Target, detached: str) -> None:
    def status() -> str:
        return next(row["status"] for row in target.rows("task", "ls") if row["task"] == detached)

    target.pctr("task", "pause", detached)
    assert status() == "PAUSED"
    target.pctr("task", "resume", detached)
    assert status() == "RUNNING"


def test_metrics(target: Target, detached: str) -> None:
    (found,) = target.rows("task", "metrics", detached)
    assert found["id"] == detached
    assert found["pids"]["current"] >= 1
    assert "pids.current" in target.text("task", "metrics", detached)


def test_attach_joins_the_streams_until_the_end(target: Target, name: str) -> None:
    target.pctr("run", "-d", "-i", target.image, name, "sh", "-c", "read line; echo got $line; exit 6")
    done = target.pctr("task", "attach", name, stdin=b"something\n", status=6)
    assert done.stdout == b"got something\n"
    target.pctr("container", "rm", name)
    assert name not in target.ids()


def test_create_then_start(target: Target, name: str) -> None:
    assert target.text("container", "create", "--label", "team=web", target.image, name, "sh", "-c",
                       "echo started; exit 4").strip() == name
    (row,) = [row for row in target.rows("container", "ls", 'labels."team"==web') if row["container"] == name]
    assert row["image"] == target.image
    assert target.pctr("task", "start", name, status=4).stdout == b"started\n"
    document = json.loads(target.text("container", "info", name))
    assert document["labels"]["team"] == "web"
    assert document["spec"]["process"]["args"][0] == "sh"
    assert "team=api" in target.text("container", "label", name, "team=api")
    target.pctr("container", "rm", name)


def test_the_images_stop_signal_is_what_kill_sends(target: Target, name: str) -> None:
    script = "trap 'exit 5' QUIT; echo ready; while true; do sleep 0.1; done"
    process = target.start("run", "--rm", target.image, name, "sh", "-c", script, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"
        target.pctr("task", "kill", name)
        assert process.wait(TIMEOUT) == 5


def test_output_to_a_log_file(target: Target, name: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    target.pctr("run", "-d", "--log-uri", f"file://{log}", target.image, name, "sh", "-c", "echo to the file")
    target.pctr("task", "wait", name)
    wait_until(lambda: log.exists() and log.read_text() == "to the file\n", "the log is written")
    target.pctr("container", "rm", name)


def test_shims(target: Target, detached: str) -> None:
    (row,) = [row for row in target.rows("shim", "ls") if row["container"] == detached]
    assert row["shim_pid"] > 1
    assert json.loads(target.text("shim", "info", "--format", "json", detached))["task_pid"] == row["task_pid"]
    assert "running" in target.text("explain", detached)


# -- images ----------------------------------------------------------------------------------------------


def test_images_are_listed_inspected_and_checked(target: Target) -> None:
    (row,) = [row for row in target.rows("image", "ls") if row["ref"] == target.image]
    assert set(row) == {"ref", "type", "digest", "size", "platforms", "labels"}
    assert row["size"] > 100_000
    assert len(row["platforms"]) == 1
    (document,) = json.loads(target.text("image", "inspect", target.image))
    assert document["config"]["config"]["Env"] == ["PATH=/bin", "FROM=image"]
    (checked,) = [row for row in target.rows("image", "check") if row["ref"] == target.image]
    assert checked["status"] == "complete (3/3)"
    assert checked["unpacked"] is True
    assert target.image in target.text("image", "ls", "-q").split()
    layers = target.rows("image", "usage", target.image)
    assert len(layers) == 3
    assert target.rows("image", "pulls") == []


def test_tag_run_and_remove(target: Target, name: str) -> None:
    other = f"suite.example/{name}:tag"
    target.pctr("image", "tag", target.image, other)
    assert target.text("run", "--rm", other, name, "cat", "/etc/marker") == "second layer\n"
    assert b"already exists" in target.pctr("image", "tag", target.image, other, status=1).stderr
    target.pctr("image", "tag", "--force", target.image, other)
    assert "team=web" in target.text("image", "label", other, "team=web")
    assert target.text("image", "rm", "--sync", other).strip() == other
    assert b"not found" in target.pctr("image", "rm", other, status=1).stderr


def test_a_pull_that_fails_names_the_host_and_leaves_no_image(target: Target, registry: FakeRegistry) -> None:
    missing = f"{registry.address}/suite/none:1"
    done = target.pctr("image", "pull", missing, status=1)
    assert registry.address.encode() in done.stderr
    assert missing not in target.text("image", "ls", "-q").split()


def test_commit_export_import(target: Target, name: str, tmp_path: Path) -> None:
    made, archive = f"suite.example/{name}:made", tmp_path / "image.tar"
    target.pctr("run", target.image, name, "sh", "-c", "echo changed > /tmp/made; rm /etc/marker")
    assert target.text("container", "commit", "--message", "a test", name, made).strip() == made
    target.pctr("container", "rm", name)
    look = ("sh", "-c", "cat /tmp/made; test -e /etc/marker || echo removed")
    assert target.text("run", "--rm", made, name, *look) == "changed\nremoved\n"
    target.pctr("image", "export", str(archive), made)
    with tarfile.open(archive) as tar:
        assert {"index.json", "oci-layout"} <= set(tar.getnames())
    target.pctr("image", "rm", "--sync", made)
    assert made in target.text("image", "import", str(archive)).split()
    assert target.text("run", "--rm", made, name, *look) == "changed\nremoved\n"
    saved = target.pctr("image", "save", made).stdout
    target.pctr("image", "rm", "--sync", made)
    assert made in target.pctr("image", "load", stdin=saved).stdout.decode().split()
    plain = f"suite.example/{name}:plain"
    target.pctr("image", "convert", "--oci", "--uncompress", made, plain)
    assert target.text("run", "--rm", plain, name, *look) == "changed\nremoved\n"
    target.pctr("image", "rm", "--sync", made, plain)


def test_an_image_is_mounted_and_unmounted(target: Target, tmp_path: Path) -> None:
    target.pctr("image", "mount", target.image, str(tmp_path))
    try:
        assert (tmp_path / "etc" / "marker").read_text() == "second layer\n"
    finally:
        target.pctr("image", "unmount", "--rm", str(tmp_path))
    assert not os.listdir(tmp_path)
    assert str(tmp_path) not in target.text("snapshot", "ls", "-q")


# -- everything else -------------------------------------------------------------------------------------


def test_content(target: Target, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert target.text("content", "ingest", "--label", "containerd.io/gc.root=suite", "--expected-digest", digest,
                       f"ref-{digest[7:15]}", stdin=data).strip() == digest
    assert target.pctr("content", "get", digest).stdout == data
    (row,) = target.rows("content", "ls", f"digest=={digest}")
    assert row["size"] == len(data)
    assert row["labels"] == {"containerd.io/gc.root": "suite"}
    assert "team=web" in target.text("content", "label", digest, "team=web")
    wrong = target.pctr("content", "ingest", "--expected-digest", f"sha256:{'0' * 64}", f"bad-{digest[7:15]}",
                        stdin=b"other bytes", status=1)
    assert wrong.stderr.startswith(b"pctr: ")
    assert target.text("content", "abort", f"bad-{digest[7:15]}").strip() == f"bad-{digest[7:15]}"
    assert target.text("content", "rm", digest).strip() == digest
    assert target.rows("content", "ls", f"digest=={digest}") == []


def test_snapshots(target: Target, name: str) -> None:
    top = target.rows("image", "usage", target.image)[0]["key"]
    mounts = target.text("snapshot", "prepare", "-t", "/mnt", name, top)
    assert mounts.startswith("mount -t overlay")
    assert target.text("snapshot", "mounts", "/mnt", name) == mounts
    assert json.loads(target.text("snapshot", "info", "--format", "json", name))["parent"] == top
    tree = target.text("snapshot", "tree").splitlines()
    assert any(line.endswith(name) and line.startswith(" ") for line in tree)
    assert json.loads(target.text("snapshot", "tree", "--format", "json"))[name] == top
    assert b"" != target.pctr("snapshot", "diff", name).stdout
    target.pctr("snapshot", "label", name, "team=web")
    assert target.text("snapshot", "commit", f"{name}-done", name).strip() == f"{name}-done"
    target.pctr("snapshot", "view", f"{name}-view", f"{name}-done")
    assert b"" != target.pctr("snapshot", "rm", f"{name}-done", status=1).stderr
    target.pctr("snapshot", "rm", f"{name}-view", f"{name}-done")
    assert name not in target.text("snapshot", "ls", "-q")


def test_namespaces(target: Target, name: str) -> None:
    target.pctr("namespace", "create", name, "team=web")
    assert {"name": name, "labels": {"team": "web"}} in target.rows("namespace", "ls")
    assert "team=api" in target.text("namespace", "label", name, "team=api")
    assert target.rows("-n", name, "image", "ls") == []
    target.pctr("namespace", "rm", name)
    assert name not in {row["name"] for row in target.rows("namespace", "ls")}
    assert b"" != target.pctr("namespace", "rm", "suite", status=1).stderr


def test_leases(target: Target, name: str) -> None:
    assert target.text("lease", "create", "--id", name, "--expires", "1h", "team=web").strip() == name
    (row,) = [row for row in target.rows("lease", "ls") if row["id"] == name]
    assert row["labels"]["team"] == "web"
    assert "containerd.io/gc.expire" in row["labels"]
    target.pctr("lease", "rm", "--sync", name)
    assert name not in {row["id"] for row in target.rows("lease", "ls")}
    target.pctr("gc")


def test_events(target: Target, name: str) -> None:
    process = target.start("events", "--format", "json", f'topic~=^/containers/,event.id=={name}',
                           stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None

        def subscribed() -> bool:
            # A subscription has no acknowledgement: make events until one arrives.
            target.pctr("container", "create", target.image, name, "true")
            target.pctr("container", "rm", name)
            return bool(_readable(process))

        wait_until(subscribed, "an event", TIMEOUT)
        event = json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.communicate(timeout=TIMEOUT)
    assert event["namespace"] == "suite"
    assert event["topic"] in ("/containers/create", "/containers/delete")
    assert event["event"]["id"] == name


def _readable(process: subprocess.Popen[Any]) -> list[Any]:
    import select

    return select.select([process.stdout], [], [], 1.0)[0]


def test_version_info_and_plugins(target: Target) -> None:
    rows = target.rows("version")
    assert [row["part"] for row in rows] == ["client", "server"]
    (facts,) = target.rows("info")
    assert facts["namespace"] == "suite"
    assert facts["images"] >= 1
    kinds = {row["type"] for row in target.rows("plugin", "ls")}
    assert "io.containerd.snapshotter.v1" in kinds
    filtered = target.rows("plugin", "ls", "type==io.containerd.content.v1")
    assert {row["type"] for row in filtered} == {"io.containerd.content.v1"}
