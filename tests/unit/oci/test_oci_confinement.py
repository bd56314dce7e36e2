"""Capabilities, seccomp and devices."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from supervisord_ctr.errors import InvalidArgument, NotFound
from supervisord_ctr.oci import capabilities, cdi, devices, seccomp
from supervisord_ctr.oci.spec import SpecBuilder


def _allowed(profile: dict[str, object]) -> set[str]:
    rules = profile["syscalls"]
    assert isinstance(rules, list)
    return {name for rule in rules if rule["action"] == "SCMP_ACT_ALLOW" and not rule.get("args")
            for name in rule["names"]}


def test_names_are_normalised() -> None:
    assert capabilities.normalise("net_raw") == capabilities.normalise("CAP_NET_RAW") == "CAP_NET_RAW"
    with pytest.raises(InvalidArgument):
        capabilities.normalise("CAP_FROB")
    assert len(capabilities.NAMES) == 41
    assert capabilities.NAMES[21] == "CAP_SYS_ADMIN"


def test_adding_and_dropping() -> None:
    base = ["CAP_CHOWN", "CAP_KILL"]
    assert capabilities.change(base, add=["sys_admin"], drop=["kill"]) == ["CAP_CHOWN", "CAP_SYS_ADMIN"]
    assert capabilities.change(base, add=["sys_admin"], drop=["ALL"]) == ["CAP_SYS_ADMIN"]
    everything = capabilities.change(base, add=["all"], drop=["kill"])
    assert set(everything) == set(capabilities.current()) - {"CAP_KILL"}


def test_capabilities_of_a_process(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nCapEff:\t0000000000000003\n")
    assert capabilities.of_process("CapEff", str(status)) == ("CAP_CHOWN", "CAP_DAC_OVERRIDE")


def test_the_profile_follows_the_capabilities() -> None:
    plain = seccomp.default_profile(capabilities.DEFAULT, "x86_64")
    assert plain["defaultAction"] == "SCMP_ACT_ERRNO"
    assert plain["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    allowed = _allowed(plain)
    assert {"read", "openat2", "chroot", "arch_prctl", "ptrace"} <= allowed
    assert not {"mount", "bpf", "keyctl", "add_key", "io_uring_setup", "userfaultfd", "unshare", "clone"} & allowed
    admin = _allowed(seccomp.default_profile(["CAP_SYS_ADMIN"], "x86_64"))
    assert {"mount", "bpf", "unshare", "clone", "clone3"} <= admin
    assert "chroot" not in admin


_I386, _NO_MACHINE = 3, 0xBAD


def test_which_32_bit_programs_the_kernel_runs() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    answer = libc.syscall(0x40000000 | 39)
    assert seccomp.runs_x32() == (answer == os.getpid()), "getpid by its x32 number works where x32 does"
    assert not seccomp.runs_x32(_NO_MACHINE)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="i386 programs run on x86_64 only")
def test_a_machine_that_the_kernel_runs_is_told_from_one_that_it_does_not() -> None:
    program = b"\x7fELF\1\1\1" + bytes(9) + struct.pack("<HHIIIIIHHHHHH", 2, _I386, 1, 0x8054, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    code = b"\xb8\1\0\0\0\xbb\x07\0\0\0\xcd\x80"  # exit(7)
    program += struct.pack("<8I", 1, 0, 0x8000, 0x8000, 84 + len(code), 84 + len(code), 5, 0x1000) + code
    child = os.memfd_create("i386", 0)
    os.write(child, program)
    try:
        ran = subprocess.run([f"/proc/self/fd/{child}"], pass_fds=[child]).returncode == 7
    except OSError:
        ran = False
    os.close(child)
    assert seccomp.runs_x32(_I386) == ran


@pytest.mark.parametrize(("refusal", "left_out"), [(errno.ENOEXEC, True), (errno.ENOENT, False), (errno.EACCES, False)])
def test_x32_is_left_out_only_where_the_kernel_refuses_it(
    refusal: int, left_out: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(seccomp, "_runs", {})
    monkeypatch.setattr(os, "execve", refuse)
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="x86_64"))
    expected = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", *([] if left_out else ["SCMP_ARCH_X32"])]
    assert seccomp.default_profile([])["architectures"] == expected
    assert seccomp.default_profile([], "x86_64")["architectures"][-1] == "SCMP_ARCH_X32"


def test_namespaces_need_the_capability() -> None:
    rules = seccomp.default_profile([], "x86_64")["syscalls"]
    clone = next(rule for rule in rules if rule["names"] == ["clone"])
    assert clone["args"] == [{"index": 0, "value": 0x7E020000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]
    clone3 = next(rule for rule in rules if rule["names"] == ["clone3"])
    assert (clone3["action"], clone3["errnoRet"]) == ("SCMP_ACT_ERRNO", 38)
    assert next(rule for rule in seccomp.default_profile([], "s390x")["syscalls"]
                if rule["names"] == ["clone"])["args"][0]["index"] == 1


def test_two_socket_families_are_kept_out() -> None:
    rules = [rule["args"] for rule in seccomp.default_profile([], "x86_64")["syscalls"] if rule["names"] == ["socket"]]
    assert all(len(conditions) == 1 for conditions in rules)

    def passes(family: int) -> bool:
        tests = {"SCMP_CMP_LT": family.__lt__, "SCMP_CMP_EQ": family.__eq__, "SCMP_CMP_GT": family.__gt__}
        return any(tests[item["op"]](item["value"]) for (item,) in rules)

    assert [family for family in range(46) if not passes(family)] == [38, 40]


def test_every_name_is_listed_once() -> None:
    names = seccomp.default_profile([], "x86_64")["syscalls"][0]["names"]
    assert len(names) == len(set(names)) == 363


def test_profiles_from_files(tmp_path: Path) -> None:
    good = tmp_path / "good.json"
    good.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW"}))
    assert seccomp.load_profile(good) == {"defaultAction": "SCMP_ACT_ALLOW"}
    for name, content in (("list", "[]"), ("text", "{"), ("empty", "{}")):
        (tmp_path / name).write_text(content)
        with pytest.raises(InvalidArgument):
            seccomp.load_profile(tmp_path / name)
    with pytest.raises(InvalidArgument, match="larger"):
        seccomp.load_profile(good, limit=3)
    with pytest.raises(InvalidArgument):
        seccomp.load_profile(tmp_path / "missing")


def test_devices_by_path() -> None:
    null = devices.from_path("/dev/null")
    assert (null.kind, null.major, null.minor) == ("c", 1, 3)
    assert null.rule("r") == {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "r"}
    for path in ("/etc/passwd", "/dev/nothing-here"):
        with pytest.raises(InvalidArgument):
            devices.from_path(path)


def test_devices_as_command_lines_write_them() -> None:
    (made,), access = devices.parse("/dev/null:/dev/mine:rw")
    assert (made.path, access) == ("/dev/mine", "rw")
    (made,), access = devices.parse("/dev/zero")
    assert (made.path, access) == ("/dev/zero", "rwm")
    for bad in ("null", "/dev/null:xyz", "/dev/null:/a:rw:x"):
        with pytest.raises(InvalidArgument):
            devices.parse(bad)


def test_host_devices_leave_private_folders_out() -> None:
    found = {device.path for device in devices.host_devices()}
    assert "/dev/null" in found
    assert not any(path.startswith(("/dev/pts/", "/dev/shm/", "/dev/mqueue/")) for path in found)
    assert "/dev/console" not in found


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    static, dynamic = tmp_path / "etc", tmp_path / "run"
    static.mkdir()
    dynamic.mkdir()
    (static / "acme.json").write_text(json.dumps({
        "cdiVersion": "0.6.0", "kind": "acme.com/gpu", "containerEdits": {"env": ["DRIVER=1"]},
        "devices": [
            {"name": "0", "containerEdits": {
                "deviceNodes": [{"path": "/dev/gpu0", "hostPath": "/dev/null", "permissions": "rw"}],
                "mounts": [{"hostPath": "/lib/gpu", "containerPath": "/lib/gpu", "options": ["ro", "rbind"]}],
                "hooks": [{"hookName": "createContainer", "path": "/bin/hook", "args": ["hook"]}],
                "additionalGids": [0, 44],
            }},
            {"name": "1", "containerEdits": {"env": ["ONE=static"]}},
        ],
    }))
    (dynamic / "acme.yaml").write_text(
        "cdiVersion: 0.6.0\nkind: acme.com/gpu\ndevices:\n- name: '1'\n  containerEdits:\n    env: [ONE=dynamic]\n"
    )
    (static / "broken.json").write_text("{")
    (static / "readme.txt").write_text("not a spec")
    return static, dynamic


def test_cdi_devices_are_injected(folders: tuple[Path, Path]) -> None:
    registry = cdi.Registry(folders).load()
    assert registry.names() == ["acme.com/gpu=0", "acme.com/gpu=1"]
    assert [os.path.basename(path) for path in registry.problems] == ["broken.json"]
    builder = SpecBuilder("n", "c")
    registry.inject(builder, ["acme.com/gpu=0", "acme.com/gpu=1"])
    assert builder.process["env"] == ["DRIVER=1", "ONE=dynamic"]
    assert builder.linux["devices"][0]["path"] == "/dev/gpu0"
    assert builder.resources["devices"][-1] == {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rw"}
    assert builder.spec["mounts"][-1]["options"] == ["ro", "rbind"]
    assert builder.spec["hooks"]["createContainer"][0]["path"] == "/bin/hook"
    assert builder.process["user"]["additionalGids"] == [44]


def test_cdi_mounts_replace_and_hide_nothing() -> None:
    builder = SpecBuilder("n", "c")
    builder.with_mounts([
        {"destination": "/usr/lib/x", "type": "bind", "source": "/x", "options": []},
        {"destination": "/etc/one", "type": "bind", "source": "/old", "options": []},
    ])
    cdi.apply_edits(builder, {"mounts": [
        {"hostPath": "/usr-of-vendor", "containerPath": "/usr", "options": ["ro"]},
        {"hostPath": "/new", "containerPath": "/etc/one/"},
    ], "netDevices": [{"hostInterfaceName": "eth7", "name": "fast0"}, {"hostInterfaceName": "eth8"}]})
    places = [entry["destination"] for entry in builder.spec["mounts"]]
    assert places.index("/usr") < places.index("/usr/lib/x")
    assert [entry["source"] for entry in builder.spec["mounts"] if entry["destination"].startswith("/etc/one")] == ["/new"]
    assert builder.linux["netDevices"] == {"eth7": {"name": "fast0"}, "eth8": {}}


def test_cdi_devices_belong_to_the_containers_user_unless_they_say_otherwise() -> None:
    builder = SpecBuilder("n", "c")
    builder.process["user"] = {"uid": 1000, "gid": 50}
    cdi.apply_edits(builder, {"deviceNodes": [
        {"path": "/dev/a", "hostPath": "/dev/null"}, {"path": "/dev/b", "hostPath": "/dev/null", "uid": 7, "gid": 8},
        {"path": "/dev/c", "type": "c", "major": 195, "minor": 3}, {"path": "/dev/d", "type": "u", "major": 1, "minor": 5},
    ]})
    made = {entry["path"]: entry for entry in builder.linux["devices"]}
    assert (made["/dev/a"]["uid"], made["/dev/a"]["gid"], made["/dev/a"]["fileMode"]) == (1000, 50, 0o666)
    assert (made["/dev/b"]["uid"], made["/dev/b"]["gid"]) == (7, 8)
    assert (made["/dev/c"]["major"], made["/dev/c"]["minor"], made["/dev/c"]["fileMode"]) == (195, 3, 0o666)
    assert made["/dev/d"]["type"] == "c"


def test_cdi_tells_every_missing_device(folders: tuple[Path, Path]) -> None:
    with pytest.raises(NotFound, match="acme.com/gpu=7, acme.com/gpu=8"):
        cdi.Registry(folders).load().inject(SpecBuilder("n", "c"), ["acme.com/gpu=7", "acme.com/gpu=0", "acme.com/gpu=8"])


def test_cdi_two_files_that_define_one_device_conflict(folders: tuple[Path, Path]) -> None:
    (folders[0] / "twin.json").write_text(json.dumps({
        "kind": "acme.com/gpu", "devices": [{"name": "0", "containerEdits": {"env": ["A=1"]}}],
    }))
    assert "acme.com/gpu=0" not in cdi.Registry(folders).load().names()


@pytest.mark.parametrize(("text", "valid"), [
    ("acme.com/gpu=0", True), ("a/b=c", True), ("a/b=all-1:2", True), ("/b=c", False), ("a/b", False), ("a/b=", False),
    ("a/b=c d", False), ("1a/b=c", False),
])
def test_cdi_names(text: str, valid: bool) -> None:
    assert cdi.is_name(text) is valid
