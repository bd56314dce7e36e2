"""`pctr` and what is stored: registries that ask for a password, single blobs, conversions, checks, pruning.

On our daemon and on Debian's containerd, as `test_pctr_commands`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_registry import FakeRegistry, ask_basic, fake_registry
from tests.support.pctr_target import Target, busybox_image
from tests.support.registry import RunningRegistry, running_registry


@pytest.fixture
def layer(target: Target) -> str:
    """The digest of the image's second layer."""
    (document,) = json.loads(target.text("image", "inspect", target.image))
    digest: str = document["manifest"]["layers"][1]["digest"]
    return digest


# -- registries that know their users ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def closed() -> Iterator[FakeRegistry]:
    """A registry for alice only."""
    with fake_registry() as made:
        made.rules.append(ask_basic("alice", "open:sesame"))
        yield made


def test_a_pull_with_the_right_password_and_the_wrong_ones(target: Target, closed: FakeRegistry, name: str) -> None:
    image = closed.add(f"closed/{name}", "1", busybox_image())
    for words in ((), ("--user", "alice:wrong"), ("--user", "bob:open:sesame")):
        done = target.pctr("image", "pull", "-q", *words, image, status=1)
        assert done.stderr.startswith(b"pctr: ")
        assert done.stderr.count(b"\n") == 1
        assert b"sesame" not in done.stderr
    assert image not in target.text("image", "ls", "-q").split()
    assert target.text("image", "pull", "-q", "--user", "alice:open:sesame", image).strip() == image
    assert target.text("run", "--rm", image, name, "cat", "/etc/marker") == "second layer\n"
    target.pctr("image", "rm", image)


def test_a_password_on_standard_input_and_none_at_all(target: Target, closed: FakeRegistry, name: str) -> None:
    image = closed.add(f"closed/{name}", "1", busybox_image())
    done = target.pctr("image", "pull", "-q", "--user", "alice", image, status=1)
    assert done.stderr == b"pctr: no password of alice was given\n"
    target.pctr("image", "pull", "-q", "--user", "alice", image, stdin=b"open:sesame\n")
    target.pctr("image", "rm", image)


def test_credentials_of_docker(target: Target, closed: FakeRegistry, name: str, tmp_path: Path) -> None:
    image = closed.add(f"closed/{name}", "1", busybox_image())
    (tmp_path / "config.json").write_text(json.dumps({
        "auths": {closed.address: {"username": "alice", "password": "open:sesame"}}}))
    other = Target(target.name, target.base, target.address)
    other.environment["DOCKER_CONFIG"] = str(tmp_path)
    other.pctr("image", "pull", "-q", image)
    target.pctr("image", "rm", image)


# -- single blobs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_registry() -> Iterator[RunningRegistry]:
    with running_registry() as made:
        yield made


def test_a_blob_is_pushed_and_fetched(target: Target, real_registry: RunningRegistry, layer: str, name: str) -> None:
    repository = f"{real_registry.address}/single/{name}"
    assert not real_registry.has_blob(f"single/{name}", layer)
    assert target.text("content", "push-object", repository, layer).strip() == layer
    assert real_registry.has_blob(f"single/{name}", layer)
    assert target.text("content", "push-object", "-q", repository, layer).strip() == layer
    data = target.pctr("content", "fetch-object", repository, layer).stdout
    assert f"sha256:{hashlib.sha256(data).hexdigest()}" == layer
    nothing = f"sha256:{'0' * 64}"
    for words in (("fetch-object", repository, nothing), ("push-object", repository, nothing),
                  ("fetch-object", repository, "no-digest"), ("push-object", repository, "no-digest")):
        done = target.pctr("content", *words, status=1)
        assert done.stderr.startswith(b"pctr: ")
        assert done.stderr.count(b"\n") == 1
        assert not done.stdout


def test_an_edited_copy(target: Target, name: str) -> None:
    first = target.text("content", "ingest", "--label", "containerd.io/gc.root=suite", name, stdin=name.encode()).strip()
    second = target.text("content", "edit", "--label", "containerd.io/gc.root=suite", "--editor",
                         f"sed -i s/{name}/{name}-changed/", "--validate", "grep -q changed", first).strip()
    assert second == f"sha256:{hashlib.sha256(f'{name}-changed'.encode()).hexdigest()}"
    assert target.pctr("content", "get", second).stdout == f"{name}-changed".encode()
    for words in (("--editor", "false"), ("--editor", "true", "--validate", "false"), ("--editor", "/no/such/editor")):
        done = target.pctr("content", "edit", *words, first, status=1)
        assert b"nothing was stored" in done.stderr
        assert done.stderr.count(b"\n") == 1
    target.pctr("content", "rm", first, second)


# -- images --------------------------------------------------------------------------------------------------


def test_conversions(target: Target, name: str) -> None:
    (machine,) = next(row["platforms"] for row in target.rows("image", "ls") if row["ref"] == target.image)
    one = f"suite.example/{name}:one"
    assert target.text("image", "convert", "--platform", machine, "--uncompress", target.image, one).strip() == one
    (document,) = json.loads(target.text("image", "inspect", one))
    assert {layer["mediaType"].rpartition(".")[2] for layer in document["manifest"]["layers"]} == {"tar"}
    assert document["manifest"]["layers"][1]["digest"] == document["config"]["rootfs"]["diff_ids"][1]
    assert target.text("run", "--rm", one, name, "cat", "/etc/marker") == "second layer\n"
    done = target.pctr("image", "convert", "--platform", "linux/mips", target.image, f"{one}-none", status=1)
    assert b"nothing for linux/mips" in done.stderr
    assert f"{one}-none" not in target.text("image", "ls", "-q").split()
    target.pctr("image", "rm", "--sync", one)


def test_usage_and_check_tell_what_is_there(target: Target, name: str) -> None:
    layers = target.rows("image", "usage", target.image)
    assert layers[-1]["key"] == "total"
    assert layers[-1]["size"] == sum(row["size"] for row in layers[:-1]) > 500_000
    assert layers[-1]["inodes"] == sum(row["inodes"] for row in layers[:-1]) > 5
    elsewhere = ("-n", name)
    target.pctr(*elsewhere, "image", "pull", "--no-unpack", target.image)
    (row,) = target.rows(*elsewhere, "image", "check")
    assert (row["ref"], row["status"], row["unpacked"]) == (target.image, "complete (3/3)", False)
    assert row["size"]["present"] == row["size"]["total"]
    assert b"not found" in target.pctr(*elsewhere, "image", "usage", target.image, status=1).stderr
    target.pctr(*elsewhere, "image", "unpack", target.image)
    (row,) = target.rows(*elsewhere, "image", "check", f"name=={target.image}")
    assert row["unpacked"] is True
    assert target.rows(*elsewhere, "image", "check", "name==nobody") == []
    _empty(target, name)


def test_pruning_spares_what_containers_use(target: Target, name: str) -> None:
    elsewhere = ("-n", name)
    used, unused = f"suite.example/{name}:used", f"suite.example/{name}:unused"
    target.pctr(*elsewhere, "image", "pull", target.image)
    target.pctr(*elsewhere, "image", "tag", target.image, used)
    target.pctr(*elsewhere, "image", "convert", "--uncompress", target.image, unused)
    target.pctr(*elsewhere, "container", "create", used, name)
    assert target.text(*elsewhere, "image", "prune", "--all", "--dry-run").split() == [unused]
    # Another name of what is in use goes with it, not alone.
    assert target.text(*elsewhere, "image", "prune", "--all").split() == [unused]
    assert set(target.text(*elsewhere, "image", "ls", "-q").split()) == {used, target.image}
    target.pctr(*elsewhere, "container", "rm", name)
    assert set(target.text(*elsewhere, "image", "prune", "--all").split()) == {used, target.image}
    assert target.rows(*elsewhere, "content", "ls") == []
    _empty(target, name)


def test_layers_of_unpacked_images_need_not_stay(target: Target, name: str) -> None:
    elsewhere = ("-n", name)
    target.pctr(*elsewhere, "image", "pull", target.image)
    # The last deletion with --sync collects; a second image gives something to delete.
    target.pctr(*elsewhere, "image", "tag", target.image, "suite.example/second:1")
    before = {row["digest"] for row in target.rows(*elsewhere, "content", "ls")}
    named = target.text(*elsewhere, "content", "prune", "--references", "--dry-run").split()
    assert named
    assert set(named) < before
    assert set(target.text(*elsewhere, "content", "prune", "--references").split()) == set(named)
    assert target.text(*elsewhere, "content", "prune", "--references") == ""
    target.pctr(*elsewhere, "image", "rm", "--sync", "suite.example/second:1")
    after = {row["digest"] for row in target.rows(*elsewhere, "content", "ls")}
    assert len(before - after) == 2
    assert target.text(*elsewhere, "run", "--rm", target.image, name, "cat", "/etc/marker") == "second layer\n"
    _empty(target, name)


def _empty(target: Target, namespace: str) -> None:
    elsewhere = ("-n", namespace)
    for image in target.text(*elsewhere, "image", "ls", "-q").split():
        target.pctr(*elsewhere, "image", "rm", "--sync", image)
    target.pctr("namespace", "rm", namespace)


def test_mounts_of_images(target: Target, tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    target.pctr("image", "mount", "--rw", target.image, str(folder))
    try:
        (folder / "etc" / "marker").write_text("changed\n")
        assert b"mounted there already" in target.pctr("image", "mount", target.image, str(folder), status=1).stderr
        target.pctr("image", "mount", target.image, str(other))
        try:
            assert (other / "etc" / "marker").read_text() == "second layer\n"
            with pytest.raises(OSError):
                (other / "new").touch()
        finally:
            target.pctr("image", "unmount", "--rm", str(other))
    finally:
        target.pctr("image", "unmount", str(folder))
    assert not os.listdir(folder)
    target.pctr("image", "unmount", "--rm", str(folder))
    assert str(tmp_path) not in target.text("snapshot", "ls", "-q")
    for words in (("mount", target.image, str(tmp_path / "none")), ("mount", "none.example/none:1", str(folder)),
                  ("unmount", str(folder)), ("unmount", "--rm", str(folder))):
        done = target.pctr("image", *words, status=1)
        assert done.stderr.startswith(b"pctr: ")
        assert done.stderr.count(b"\n") == 1


# -- runs that cannot be -------------------------------------------------------------------------------------


def test_notes_that_cannot_be_written_leave_no_container(target: Target, name: str) -> None:
    for option in ("--pid-file", "--cidfile"):
        for words in (("--rm",), ("-d",)):
            done = target.pctr("run", *words, option, "/proc/none/x", target.image, name, "sleep", "1000", status=1)
            assert done.stderr == b"pctr: /proc/none/x: no such file or directory\n"
    assert name not in target.ids()
    assert name not in {row["task"] for row in target.rows("task", "ls")}


def test_notes(target: Target, name: str, tmp_path: Path) -> None:
    pid, cid = tmp_path / "pid", tmp_path / "cid"
    target.pctr("run", "-d", "--pid-file", str(pid), "--cidfile", str(cid), target.image, name, "sleep", "1000")
    assert cid.read_text() == name
    (row,) = [row for row in target.rows("task", "ls") if row["task"] == name]
    assert pid.read_text() == str(row["pid"])
    assert target.text("task", "exec", name, "--", "echo", "dashes") == "dashes\n"
    target.pctr("container", "rm", "--force", name)


def test_a_checkpoint_that_fails_says_why_and_the_task_runs_on(target: Target, name: str, tmp_path: Path) -> None:
    # A checkpoint may interrupt a sleep.
    target.pctr("run", "-d", target.image, name, "sh", "-c", "while :; do sleep 1000; done")
    try:
        done = target.pctr("task", "checkpoint", "--image-path", str(tmp_path / "images"), "--work-path",
                           str(tmp_path / "work"), name, status=None)
        if done.returncode == 0:  # where criu works, its images must be there
            assert list((tmp_path / "images").iterdir())
        else:
            assert done.returncode == 1
            assert done.stderr.startswith(b"pctr: ")
            assert done.stderr.count(b"\n") == 1
            assert b"criu" in done.stderr.lower()
        (row,) = [row for row in target.rows("task", "ls") if row["task"] == name]
        assert row["status"] == "RUNNING"
        assert target.text("task", "exec", name, "echo", "alive") == "alive\n"
    finally:
        target.pctr("container", "rm", "--force", name)
    assert b"not found" in target.pctr("task", "checkpoint", name, status=1).stderr
