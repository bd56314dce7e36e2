"""Every command with nothing, too little or nobody to talk to: one line on standard error, never a traceback."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from pctr.__main__ import run
from pctr.command import Command
from pctr.commands import GROUPS, load

DIGEST = f"sha256:{'0' * 64}"
#: Words that make sense, for each command that needs the daemon.
WORDS = {
    "run": "--rm busybox x true",
    "image pull": "-q busybox", "image push": "-q busybox", "image pulls": "", "image ls": "", "image inspect": "busybox",
    "image usage": "busybox", "image check": "", "image rm": "busybox", "image tag": "busybox other",
    "image label": "busybox a=b", "image prune": "--all", "image import": "-q -", "image export": "- busybox",
    "image load": "-q", "image save": "busybox", "image mount": "busybox /", "image unmount": "--rm /no/such/folder",
    "image unpack": "busybox", "image convert": "--oci busybox other",
    "container ls": "", "container info": "x", "container create": "busybox x", "container rm": "x",
    "container commit": "x new", "container label": "x a=b", "container checkpoint": "x new", "container restore": "y new",
    "task ls": "", "task start": "x", "task attach": "x", "task exec": "x true", "task kill": "x", "task pause": "x",
    "task resume": "x", "task wait": "x", "task ps": "x", "task metrics": "x", "task rm": "x", "task checkpoint": "x",
    "task restore": "--image-path /tmp x", "task update": "--memory 64m x",
    "content ls": "", "content get": DIGEST, "content fetch": "-q busybox",
    "content push-object": f"-q 127.0.0.1:1/app {DIGEST}", "content ingest": "ref /dev/null", "content active": "",
    "content abort": "ref", "content rm": DIGEST, "content label": f"{DIGEST} a=b", "content edit": f"--editor true {DIGEST}",
    "content prune": "--references",
    "snapshot ls": "", "snapshot tree": "", "snapshot info": "x", "snapshot mounts": "/mnt x", "snapshot prepare": "x",
    "snapshot view": "x y", "snapshot commit": "x y", "snapshot rm": "x", "snapshot usage": "x", "snapshot diff": "x",
    "snapshot unpack": DIGEST, "snapshot label": "x a=b",
    "namespace ls": "", "namespace create": "x", "namespace label": "x a=b", "namespace rm": "x",
    "lease ls": "", "lease create": "", "lease rm": "x", "lease resources": "x",
    "sandbox ls": "", "sandbox run": "x", "sandbox info": "x", "sandbox rm": "x",
    "pod ls": "", "pod inspect": "x", "pod stop": "x", "pod rm": "x", "pod logs": "x", "pod stats": "",
    "pod exec": "x true", "pod attach": "x", "pod port-forward": "x 8080",
    "shim ls": "", "shim info": "x", "plugin ls": "", "events": "", "explain": "x", "gc": "", "doctor": "", "info": "",
}
#: What does without a daemon.
ALONE = {"completion", "content fetch-object", "oci spec", "version"}
#: Commands that cannot do without words.
NEEDY = [
    name for name, words in WORDS.items()
    if words and name not in ("image load", "image prune", "content prune", "snapshot usage")
]


def _commands() -> dict[str, Command]:
    found = {}
    for group in GROUPS:
        loaded = load(group)
        if isinstance(loaded, Command):
            found[group] = loaded
        else:
            found.update({f"{group} {command.name}": command for command in loaded})
    return found


@pytest.fixture(autouse=True)
def own_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No settings of the machine's; what a command does to signals is undone."""
    for name in ("PCTR_ADDRESS", "CONTAINERD_ADDRESS", "PCTR_NAMESPACE", "CONTAINERD_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PCTR_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in former.items():
        signal.signal(number, handler)


def _one_line(captured: str) -> str:
    assert captured.startswith("pctr: "), captured
    assert captured.endswith("\n")
    assert captured.count("\n") == 1, captured
    return captured


def test_every_command_is_here() -> None:
    assert set(_commands()) == set(WORDS) | ALONE


@pytest.mark.parametrize("name", WORDS)
def test_without_a_daemon_one_line_says_so(name: str, own_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = own_world / "nobody.sock"
    assert run(["--address", str(address), *name.split(), *WORDS[name].split()]) == 1
    said = _one_line(capsys.readouterr().err)
    assert f"no daemon answers on {address}: start it with 'supervisord-ctr --address {address}'" in said


def test_the_version_of_pctr_is_told_without_a_daemon(own_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--address", str(own_world / "nobody.sock"), "version"]) in (0, 1)
    captured = capsys.readouterr()
    assert "client" in captured.out
    assert captured.err.count("\n") <= 1


def test_a_blob_of_a_registry_that_nobody_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["content", "fetch-object", "127.0.0.1:1/app", DIGEST]) == 1
    assert "127.0.0.1:1" in _one_line(capsys.readouterr().err)


@pytest.mark.parametrize("name", [*NEEDY, "completion"])
def test_missing_words_are_a_mistake_of_the_caller(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = run(name.split())
    except SystemExit as left:
        status = int(left.code or 0)
    assert status == 2
    said = _one_line(capsys.readouterr().err)
    assert "--help'" in said


@pytest.mark.parametrize("name", [*WORDS, *sorted(ALONE)])
def test_options_that_there_are_not(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run([*name.split(), "--no-such-option"])
    assert left.value.code == 2
    said = _one_line(capsys.readouterr().err)
    assert f"see 'pctr {name} --help'" in said


@pytest.mark.parametrize("line", [
    "run --config {file} busybox x", "run --env-file {file} busybox x", "run --memory lots busybox x",
    "run --cpus 0 busybox x", "run -v here busybox x", "run --rlimit nofile=many busybox x", "run --sysctl a busybox x",
    "run --uidmap 0:1 busybox x", "run --with-ns net busybox x", "run --label =a busybox x", "run --rm -d busybox x",
    "run busybox --rm", "run", "run -t --null-io busybox x", "task exec x", "task exec x --", "task exec x -- -a",
    "task kill -s NOPE x", "task update x", "image prune", "image convert busybox other", "content prune",
    "pod logs --since yesterday x", "completion tcsh", "image nope", "nope", "--nope image ls",
])
def test_words_that_make_no_sense(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"\xff\xfe no JSON")
    try:
        status = run(["--address", str(tmp_path / "nobody.sock"), *line.format(file=wrong).split()])
    except SystemExit as left:
        status = int(left.code or 0)
    said = _one_line(capsys.readouterr().err)
    # What needs the image first is only found with a daemon there.
    assert status == 2 or (status == 1 and "no daemon answers" in said)


@pytest.mark.parametrize("option", ["--env-file", "--config"])
def test_files_that_cannot_be_read_are_named(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    assert run(["oci", "spec", "--rootfs", option, str(missing), str(tmp_path), "x"]) == 1
    assert _one_line(capsys.readouterr().err) == f"pctr: {missing}: no such file or directory\n"


@pytest.mark.parametrize("cgroup", ["", "--cgroup /a/b", "--cgroup system.slice"])
def test_a_cgroup_that_systemd_cannot_make_is_refused_before_anybody_is_asked(
    cgroup: str, own_world: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    words = f"run --runc-systemd-cgroup {cgroup} busybox x".split()
    assert run(["--address", str(own_world / "nobody.sock"), *words]) == 2
    assert "--runc-systemd-cgroup needs --cgroup SLICE:PREFIX:NAME" in _one_line(capsys.readouterr().err)


def test_a_cgroup_for_systemd_is_taken(own_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "run --runc-systemd-cgroup --cgroup system.slice:pctr:x busybox x".split()
    assert run(["--address", str(own_world / "nobody.sock"), *words]) == 1
    assert "no daemon answers" in _one_line(capsys.readouterr().err)
