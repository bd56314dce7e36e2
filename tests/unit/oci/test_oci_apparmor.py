"""AppArmor: what the default profile says, and how it comes into the kernel."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from pctr.__main__ import run

from supervisord_ctr import errors
from supervisord_ctr.oci import apparmor


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel with AppArmor in which one profile is loaded, and a parser that adds what it is given."""
    (tmp_path / "enabled").write_text("Y\n")
    (tmp_path / "profiles").write_text("site-profile (enforce)\nlocal one (complain)\n")
    parser = tmp_path / "apparmor_parser"
    parser.write_text(
        f"#!/bin/sh\ncd {tmp_path}\necho \"$@\" >> calls\ncat > text\n"
        "[ -e broken ] && { echo 'syntax error' >&2; exit 1; }\n"
        "sed -n 's/^profile \\([^ ]*\\) .*/\\1 (enforce)/p' text >> profiles\n"
    )
    parser.chmod(0o755)
    monkeypatch.setattr(apparmor, "ENABLED", str(tmp_path / "enabled"))
    monkeypatch.setattr(apparmor, "PROFILES", str(tmp_path / "profiles"))
    monkeypatch.setattr(apparmor, "_PATH", f"{tmp_path}:{apparmor._PATH}")
    monkeypatch.delenv("container", raising=False)
    return tmp_path


def test_the_default_profile_is_loaded_when_first_asked_for(kernel: Path) -> None:
    assert apparmor.enabled()
    assert apparmor.loaded() == {"site-profile", "local one"}
    for _ in range(2):
        assert apparmor.default_profile() == "cri-containerd.apparmor.d"
    assert (kernel / "calls").read_text() == "-Kr\n"
    assert (kernel / "text").read_text() == apparmor.profile_text("cri-containerd.apparmor.d")


def test_a_container_made_by_hand_that_names_it_has_it_loaded_too(kernel: Path) -> None:
    def make(profile: str) -> None:
        """As far as it goes without a daemon."""
        words = ["container", "create", "--rootfs", "--apparmor-profile", profile, str(kernel), "x"]
        assert run(["--address", str(kernel / "nobody.sock"), *words]) == 1

    make("local one")
    assert not (kernel / "calls").exists()
    make(apparmor.DEFAULT_PROFILE)
    assert apparmor.DEFAULT_PROFILE in apparmor.loaded()


def test_a_default_profile_of_the_administrator_is_kept(kernel: Path) -> None:
    with open(kernel / "profiles", "a") as file:
        file.write("cri-containerd.apparmor.d (enforce)\n")
    assert apparmor.default_profile() == "cri-containerd.apparmor.d"
    assert not (kernel / "calls").exists()


def test_a_profile_that_cannot_be_loaded_is_an_error(kernel: Path) -> None:
    (kernel / "broken").touch()
    with pytest.raises(errors.Internal, match="syntax error"):
        apparmor.default_profile()


def test_without_the_parser_there_is_no_default_profile(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apparmor, "_PATH", str(kernel / "none"))
    assert apparmor.default_profile() == ""


def test_a_daemon_in_somebody_elses_container_confines_nothing(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("container", "docker")
    assert not apparmor.enabled()
    monkeypatch.delenv("container")
    (kernel / "profiles").unlink()
    assert not apparmor.enabled()


@pytest.mark.parametrize("macros", [(), ("abi/3.0", "tunables/global", "abstractions/base")])
def test_the_profile_uses_the_macros_that_there_are(tmp_path: Path, macros: tuple[str, ...]) -> None:
    for name in macros:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    text = apparmor.profile_text("mine", str(tmp_path), "supervisor")
    assert ("abi <abi/3.0>," in text) == ("include <tunables/global>" in text) == bool(macros)
    assert ("include <abstractions/base>" in text) == bool(macros)
    assert ("@{PROC}=/proc/" in text) != bool(macros)
    assert "profile mine flags=(attach_disconnected,mediate_deleted) {" in text
    for rule in ("deny mount,", "signal receive peer={supervisor,unconfined,", "peer=mine,", "deny @{PROC}/{kcore,"):
        assert rule in text


@pytest.mark.skipif(not shutil.which("apparmor_parser"), reason="apparmor_parser is not installed")
def test_the_parser_takes_the_profile() -> None:
    done = subprocess.run(["apparmor_parser", "-QK"], input=apparmor.profile_text("mine"), capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
