"""The default spec, and the builder's changes to it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.oci import capabilities, limits, spec
from supervisord_ctr.oci.spec import SpecBuilder, check_cwd, default_spec, merge_env, parse_mount
from supervisord_ctr.oci.users import User


def test_the_default_spec_confines() -> None:
    made = default_spec("default", "c1")
    assert made["linux"]["cgroupsPath"] == "/default/c1"
    assert [item["type"] for item in made["linux"]["namespaces"]] == ["pid", "ipc", "uts", "mount", "network"]
    assert made["process"]["noNewPrivileges"] is True
    assert made["linux"]["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    assert [item["destination"] for item in made["mounts"]] == [
        "/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys", "/run",
    ]
    assert made["root"] == {"path": "rootfs"}


def test_s16_masked_paths_include_powercap() -> None:
    assert "/sys/devices/virtual/powercap" in default_spec("n", "c")["linux"]["maskedPaths"]
    assert "/proc/sys" in default_spec("n", "c")["linux"]["readonlyPaths"]


def test_s7_nothing_is_inheritable() -> None:
    held = default_spec("n", "c")["process"]["capabilities"]
    assert set(held) == {"bounding", "effective", "permitted"}
    assert len(held["bounding"]) == 14
    assert held["bounding"] == held["effective"] == held["permitted"]


def test_two_specs_share_nothing() -> None:
    first, second = default_spec("n", "a"), default_spec("n", "b")
    first["mounts"][0]["options"].append("x")
    first["process"]["capabilities"]["bounding"].clear()
    assert second["mounts"][0]["options"] == ["nosuid", "noexec", "nodev"]
    assert second["process"]["capabilities"]["bounding"]


@pytest.mark.parametrize("path", [
    "/proc/self/fd/7", "/proc", "/proc/1/cwd", "//proc/self/fd/7", "/./proc/self", "/x/../proc/self/fd/3", "/dev/fd/9",
    "/dev/../proc/self", "relative", "", "/a\0b",
])
def test_s3_a_working_directory_that_may_be_a_descriptor_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument):
        check_cwd(path)


@pytest.mark.parametrize("path", ["/", "/proceed", "/home/proc", "/dev/fdx", "/srv/..data"])
def test_other_working_directories_are_fine(path: str) -> None:
    assert check_cwd(path) == path


def test_environment_is_merged_like_containerd() -> None:
    assert merge_env(["A=1", "B=2"], ["B=3", "C=4", "A"]) == ["B=3", "C=4"]
    assert merge_env(["A=1"], ["A="]) == ["A="]
    assert merge_env([], ["X"]) == []


def test_an_image_fills_what_the_request_leaves_open() -> None:
    builder = SpecBuilder("n", "c").with_env(["MINE=1"])
    builder.with_image_config({"Env": ["PATH=/bin", "MINE=0"], "Entrypoint": ["/e"], "Cmd": ["a"], "WorkingDir": "/w"})
    assert builder.process["args"] == ["/e", "a"]
    assert builder.process["cwd"] == "/w"
    assert builder.process["env"] == ["PATH=/bin", "MINE=1"]
    builder.with_image_config({"Entrypoint": ["/e"], "Cmd": ["a"]}, ["b", "c"])
    assert builder.process["args"] == ["/e", "b", "c"]
    assert builder.process["cwd"] == "/"


def test_an_image_without_environment_gets_a_path() -> None:
    assert SpecBuilder("n", "c").with_image().process["env"] == [spec.DEFAULT_PATH]


def test_a_spec_without_a_command_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no command"):
        SpecBuilder("n", "c").to_json()
    assert json.loads(SpecBuilder("n", "c").with_args(["true"]).to_json())["process"]["args"] == ["true"]


def test_terminal_sets_term() -> None:
    builder = SpecBuilder("n", "c").with_terminal(80, 24)
    assert builder.process["terminal"] is True
    assert builder.process["consoleSize"] == {"width": 80, "height": 24}
    assert "TERM=xterm" in builder.process["env"]


def test_privileged_takes_the_confinement_away() -> None:
    builder = SpecBuilder("n", "c").with_seccomp_default().with_privileged()
    assert builder.process["capabilities"]["bounding"] == list(capabilities.current())
    assert builder.linux["maskedPaths"] == []
    assert "seccomp" not in builder.linux
    assert builder.resources["devices"] == [{"allow": True, "access": "rwm"}]
    assert next(item for item in builder.spec["mounts"] if item["type"] == "sysfs")["options"][-1] == "rw"
    assert any(device["path"] == "/dev/null" for device in builder.linux["devices"])


def test_namespaces_are_replaced_and_removed() -> None:
    builder = SpecBuilder("n", "c").with_namespace("network", "/run/netns/x").with_host_namespace("uts")
    found = {item["type"]: item.get("path", "") for item in builder.linux["namespaces"]}
    assert found == {"pid": "", "ipc": "", "mount": "", "network": "/run/netns/x"}


def test_resources_keep_what_is_not_named() -> None:
    builder = SpecBuilder("n", "c").with_cpu(shares=512).with_cpu(quota=5000, period=10000).with_memory(1 << 20)
    assert builder.resources["cpu"] == {"shares": 512, "quota": 5000, "period": 10000}
    assert builder.resources["memory"] == {"limit": 1 << 20}
    assert builder.with_pids_limit(9).resources["pids"] == {"limit": 9}


def test_shm_size() -> None:
    builder = SpecBuilder("n", "c").with_shm_size(1 << 20)
    shm = next(item for item in builder.spec["mounts"] if item["destination"] == "/dev/shm")
    assert shm["options"][-1] == "size=1024k"
    assert sum(word.startswith("size=") for word in shm["options"]) == 1
    with pytest.raises(InvalidArgument):
        builder.without_mounts("/dev/shm").with_shm_size(1)


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b"])
def test_s10_sysctls_hold_no_control_bytes(value: str) -> None:
    with pytest.raises(InvalidArgument):
        SpecBuilder("n", "c").with_sysctls({"net.x": value})
    with pytest.raises(InvalidArgument):
        SpecBuilder("n", "c").with_sysctls({value: "1"})


def test_mounts_as_command_lines_write_them() -> None:
    assert parse_mount("type=bind,src=/a,dst=/b,options=rbind:ro") == {
        "destination": "/b", "type": "bind", "source": "/a", "options": ["rbind", "ro"],
    }
    assert parse_mount("source=/a,target=/b,readonly")["options"] == ["rbind", "ro"]
    assert parse_mount("type=tmpfs,dst=/t,options=size=1m")["options"] == ["size=1m"]


@pytest.mark.parametrize("text", ["dst=/b", "src=/a", "src=a,dst=/b", "src=/a,dst=b", "src=/a,dst=/b,frob", ""])
def test_wrong_mounts_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_mount(text)


def test_rlimits_replace_their_namesake() -> None:
    builder = SpecBuilder("n", "c").with_rlimit("nofile", 10, 20)
    assert builder.process["rlimits"] == [{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20}]
    for bad in (("nofile", 30, 20), ("frob", 1, 1)):
        with pytest.raises(InvalidArgument):
            builder.with_rlimit(*bad)


def test_a_user_is_written_with_its_groups() -> None:
    builder = SpecBuilder("n", "c").with_user(User(1, 2, (2, 3)))
    assert builder.process["user"] == {"uid": 1, "gid": 2, "additionalGids": [2, 3]}


def test_limits_are_clamped_without_the_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "can_raise", lambda: False)
    monkeypatch.setattr(limits, "own_oom_score_adj", lambda: 0)
    monkeypatch.setattr(limits, "_own_hard", lambda kind: 1000)
    made = SpecBuilder("n", "c").with_oom_score(-998).with_rlimit("nofile", 5000, 6000).with_rlimit("core", 0, 0)
    notes = limits.clamp(made.spec)
    assert made.process["oomScoreAdj"] == 0
    assert {item["type"]: (item["soft"], item["hard"]) for item in made.process["rlimits"]} == {
        "RLIMIT_NOFILE": (1000, 1000), "RLIMIT_CORE": (0, 0),
    }
    assert len(notes) == 2


def test_limits_are_left_with_the_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "can_raise", lambda: True)
    made = SpecBuilder("n", "c").with_oom_score(-998)
    assert limits.clamp(made.spec) == []
    assert made.process["oomScoreAdj"] == -998


def test_building_a_spec_loads_neither_asyncio_nor_protobuf() -> None:
    code = (
        "import sys; from supervisord_ctr.oci.spec import SpecBuilder; "
        "SpecBuilder('n', 'c').with_args(['true']).with_default_devices().with_seccomp_default().to_json(); "
        "print([name for name in ('asyncio', 'google.protobuf', 'grpc', 'ctypes') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
