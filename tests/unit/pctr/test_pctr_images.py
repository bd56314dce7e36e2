"""Names, platforms and chain IDs of images; what becomes of options in a spec."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from pctr import image_config, light
from pctr.__main__ import parse
from pctr.command import UsageError
from pctr.commands.run import split_words
from pctr.create import _root_has_groups, anonymous_mounts, build_spec, container_labels
from pctr.explaining import describe_exit
from pctr.image_config import ImageConfig

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.images import reference


@pytest.mark.parametrize("name", [
    "busybox", "busybox:1.36", "team/app", "localhost/app", "localhost:5000/app:1", "registry:5000/a/b/c:tag",
    "quay.io/x/y", "docker.io/library/busybox", "docker.io/busybox", "index.docker.io/busybox",
    f"busybox@sha256:{'a' * 64}", f"reg.example/app:1@sha256:{'b' * 64}",
])
def test_names_in_full_are_those_of_the_daemon(name: str) -> None:
    expected = reference.parse(name)
    full = expected.canonical()
    if not expected.tag and not expected.digest:
        full += ":latest"
    assert image_config.normalise(name) == full


def test_chain_ids_are_those_of_the_specification() -> None:
    one, two = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"
    assert image_config.chain_id([]) == ""
    assert image_config.chain_id([one]) == one
    assert image_config.chain_id([one, two]) == "sha256:" + hashlib.sha256(f"{one} {two}".encode()).hexdigest()


def _index(*platforms: tuple[str, str, str]) -> dict[str, Any]:
    return {"manifests": [
        {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": f"{number}",
         "platform": {"os": system, "architecture": machine, "variant": variant}}
        for number, (system, machine, variant) in enumerate(platforms)
    ]}


def test_the_manifest_of_a_platform() -> None:
    index = _index(("linux", "amd64", ""), ("linux", "arm64", "v8"), ("linux", "arm", "v7"), ("windows", "amd64", ""))
    for wanted, digest in (("linux/amd64", "0"), ("linux/arm64", "1"), ("linux/arm/v7", "2"), ("linux/arm", "2")):
        chosen = image_config.choose_manifest(index, wanted)
        assert chosen is not None
        assert chosen["digest"] == digest
    assert image_config.choose_manifest(index, "linux/s390x") is None


def test_words_of_a_run() -> None:
    assert split_words(["busybox"]) == ("busybox", "", [])
    assert split_words(["busybox", "x", "sh", "-c", "exit"]) == ("busybox", "x", ["sh", "-c", "exit"])
    for words in ([], ["busybox", "--rm"]):
        with pytest.raises(UsageError):
            split_words(words)


IMAGE = ImageConfig("docker.io/library/web:latest", "sha256:m", "sha256:c", {
    "config": {"Env": ["PATH=/bin", "A=image"], "Entrypoint": ["/entry"], "Cmd": ["serve"], "WorkingDir": "/srv",
               "StopSignal": "SIGQUIT",
               "Labels": {"team": "web", "containerd.io/gc.root": "evil", "io.kubernetes.pod.name": "evil"},
               "Volumes": {"/data": {}, "relative": {}}},
    "rootfs": {"diff_ids": ["sha256:1"]},
})


def _spec(options: str = "", command: str = "") -> dict[str, Any]:
    args = parse(["run", *shlex.split(options), "web", "x"])
    return json.loads(build_spec(args, "ns", "x", IMAGE, shlex.split(command)).to_json())  # type: ignore[no-any-return]


def test_the_images_config_decides_what_is_not_said() -> None:
    process = _spec()["process"]
    assert process["args"] == ["/entry", "serve"]
    assert process["cwd"] == "/srv"
    assert "A=image" in process["env"]
    assert _spec(command="other -x")["process"]["args"] == ["/entry", "other", "-x"]


def test_options_win_over_the_image() -> None:
    process = _spec("-e A=mine -e B=2 -w /tmp --entrypoint /bin/sh", "-c ls")["process"]
    assert process["args"] == ["/bin/sh", "-c", "ls"]
    assert process["cwd"] == "/tmp"
    assert {"A=mine", "B=2"} <= set(process["env"])
    assert "A=image" not in process["env"]
    assert _spec("--entrypoint ''", "ls")["process"]["args"] == ["ls"]


def test_environment_files_and_bare_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "env"
    file.write_text("# comment\nFROM_FILE=a b\n\nOURS\n")
    monkeypatch.setenv("OURS", "here")
    env = _spec(f"--env-file {file} -e ABSENT_EVERYWHERE")["process"]["env"]
    assert {"FROM_FILE=a b", "OURS=here"} <= set(env)
    assert not any(entry.startswith("ABSENT_EVERYWHERE") for entry in env)


def test_limits() -> None:
    resources = _spec("--memory 64m --cpus 1.5 --pids-limit 20 --cpu-shares 10 --cpuset-cpus 0")["linux"]["resources"]
    assert resources["memory"]["limit"] == 64 << 20
    assert resources["cpu"] == {"shares": 10, "quota": 150_000, "period": 100_000, "cpus": "0"}
    assert resources["pids"]["limit"] == 20
    with pytest.raises(UsageError):
        _spec("--cpus 0")


def test_network_and_namespaces() -> None:
    kinds = {entry["type"] for entry in _spec()["linux"]["namespaces"]}
    assert {"network", "pid", "ipc", "uts", "mount"} <= kinds
    host = _spec("--net host --pid host --ipc host")
    assert not {"network", "pid", "ipc"} & {entry["type"] for entry in host["linux"]["namespaces"]}
    assert any(entry["destination"] == "/etc/resolv.conf" for entry in host["mounts"])
    joined = _spec("--with-ns network:/run/netns/x")["linux"]["namespaces"]
    assert {"type": "network", "path": "/run/netns/x"} in joined
    with pytest.raises(UsageError):
        _spec("--with-ns network:relative")


def test_mounts_and_volumes() -> None:
    mounts = _spec("--mount type=bind,src=/a,dst=/b,ro -v /c:/d:ro --mount type=tmpfs,dst=/t")["mounts"]
    by_place = {entry["destination"]: entry for entry in mounts}
    assert by_place["/b"]["source"] == "/a"
    assert "ro" in by_place["/b"]["options"]
    assert by_place["/d"]["options"] == ["rbind", "ro"]
    assert by_place["/t"]["type"] == "tmpfs"
    for wrong in ("-v relative:/d", "-v /only"):
        with pytest.raises(UsageError):
            _spec(wrong)
    assert [entry["destination"] for entry in anonymous_mounts(IMAGE.runtime["Volumes"])] == ["/data"]


def test_s10_volumes_hold_no_control_bytes() -> None:
    with pytest.raises(InvalidArgument):
        anonymous_mounts({"/da\nta": {}})


def test_privileges() -> None:
    assert "seccomp" in _spec()["linux"]
    assert "seccomp" not in _spec("--privileged")["linux"]
    assert "seccomp" not in _spec("--seccomp-profile unconfined")["linux"]
    assert _spec()["process"]["noNewPrivileges"]
    assert not _spec("--allow-new-privs")["process"]["noNewPrivileges"]
    bounding = _spec("--cap-drop ALL --cap-add NET_ADMIN")["process"]["capabilities"]["bounding"]
    assert bounding == ["CAP_NET_ADMIN"]


def test_s7_nothing_is_inheritable() -> None:
    assert not _spec()["process"]["capabilities"].get("inheritable")


def test_s4_reserved_labels_of_an_image_are_dropped() -> None:
    args = parse(["run", "--label", "mine=1", "web"])
    assert container_labels(args, IMAGE) == {
        "team": "web", "mine": "1", "io.containerd.image.config.stop-signal": "SIGQUIT",
    }


def _layers(tmp_path: Path, *groups: str | None) -> list[light.Mount]:
    folders = []
    for number, text in enumerate(groups):
        folder = tmp_path / str(number)
        (folder / "etc").mkdir(parents=True)
        if text is not None:
            (folder / "etc" / "group").write_text(text)
        folders.append(str(folder))
    return [light.Mount(type="overlay", source="overlay", options=[f"lowerdir={':'.join(folders)}"])]


def test_root_without_groups_needs_no_look_from_inside(tmp_path: Path) -> None:
    assert not _root_has_groups(_layers(tmp_path / "a", None, "root:x:0:\nwheel:x:10:alice\n"))
    assert not _root_has_groups(_layers(tmp_path / "b", "root:x:0:\n", "wheel:x:10:root\n"))
    assert _root_has_groups(_layers(tmp_path / "c", None, "wheel:x:10:alice,root\n"))
    assert not _root_has_groups(_layers(tmp_path / "d", None))


def test_s2_links_in_an_image_are_never_followed_on_the_host(tmp_path: Path) -> None:
    mounts = _layers(tmp_path, None)
    os.symlink("/etc/group", tmp_path / "0" / "etc" / "group")
    assert _root_has_groups(mounts)
    assert _root_has_groups([light.Mount(type="proxy", source="x")])


def test_exit_statuses_in_words() -> None:
    assert describe_exit(0) == "0"
    assert describe_exit(137) == "137, killed by SIGKILL"
    assert describe_exit(255) == "255"
