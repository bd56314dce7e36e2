"""Bundles: what stands in them, who may pass, and removal that can be repeated."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from supervisord_ctr import faults
from supervisord_ctr.errors import AlreadyExists, InvalidArgument
from supervisord_ctr.runtime import bundle as bundles
from supervisord_ctr.runtime.bundle import Bundle, Record


def _make(tmp_path: Path, name: str = "c1", **options: int) -> Bundle:
    return Bundle.create(tmp_path / "state", tmp_path / "root", "ns", name, b"{}", **options)


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_s12_nobody_else_may_enter(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        bundle = _make(tmp_path)
    finally:
        os.umask(before)
    assert _mode(bundle.path) == 0o700
    assert _mode(bundle.path.parent) == 0o711
    assert _mode(bundle.rootfs) == 0o711
    assert _mode(bundle.path / "config.json") == 0o600
    assert os.readlink(bundle.path / "work") == str(tmp_path / "root/ns/c1")


def test_s12_a_mapped_group_may_pass(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir(mode=0o700)
    Bundle.create(top / "tasks", tmp_path / "root", "ns", "plain", b"{}")
    assert _mode(top) == 0o700
    bundle = Bundle.create(top / "tasks", tmp_path / "root", "ns", "mapped", b"{}", gid=100000)
    assert _mode(bundle.path) == 0o710
    assert bundle.path.stat().st_gid == 100000
    assert _mode(top) == 0o711


def test_a_second_bundle_of_that_name_is_refused(tmp_path: Path) -> None:
    _make(tmp_path)
    with pytest.raises(AlreadyExists):
        _make(tmp_path)


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 77, "a b", ".hidden"])
def test_s11_names_are_checked(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument):
        _make(tmp_path, name)
    assert not (tmp_path / "state/ns").exists()


def test_a_record_comes_back(tmp_path: Path) -> None:
    bundle = _make(tmp_path)
    assert bundle.read_record() is None
    record = Record("io.containerd.x.v1", "/bin/x", "unix:///run/x", pid=3, start_time=4, group="pod")
    bundle.write_record(record)
    assert bundle.read_record() == record
    assert (bundle.path / "address").read_text() == "unix:///run/x"
    assert json.loads((bundle.path / "bootstrap.json").read_bytes()) == {
        "version": 3, "address": "unix:///run/x", "protocol": "ttrpc",
    }
    assert (bundle.path / "shim-binary-path").read_text() == "/bin/x"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"pid": 1}', '"x"'])
def test_p6_a_damaged_record_still_leads_to_the_shim(tmp_path: Path, damage: str) -> None:
    bundle = _make(tmp_path)
    bundle.write_record(Record("io.containerd.x.v1", "/bin/x", "unix:///run/x", version=2))
    (bundle.path / "runtime.json").write_text(damage)
    assert bundle.read_record() == Record("", address="unix:///run/x", version=2)
    (bundle.path / "bootstrap.json").write_text(damage)
    assert bundle.read_record() is None


def test_removal_takes_the_working_folder_along(tmp_path: Path) -> None:
    bundle = _make(tmp_path)
    (tmp_path / "root/ns/c1/file").write_text("x")
    bundle.delete()
    bundle.delete()
    assert not bundle.path.exists()
    assert list((tmp_path / "root/ns").iterdir()) == []
    assert list((tmp_path / "state/ns").iterdir()) == []


def test_a_failed_removal_can_be_repeated(tmp_path: Path) -> None:
    bundle = _make(tmp_path)
    faults.arm("runtime.bundle.removing=error:EIO@1")
    try:
        with pytest.raises(OSError):
            bundle.delete()
        assert bundle.path.exists()
        bundle.delete()
    finally:
        faults.arm("")
    assert not bundle.path.exists()


def test_finding_bundles_finishes_removals(tmp_path: Path) -> None:
    _make(tmp_path, "a")
    _make(tmp_path, "b")
    half = tmp_path / "state/ns/.gone"
    half.mkdir()
    (half / "config.json").write_text("{}")
    (tmp_path / "state/ns/stray").write_text("no folder")
    assert [bundle.id for bundle in bundles.find_all(tmp_path / "state")] == ["a", "b"]
    assert not half.exists()
    assert bundles.find_all(tmp_path / "nowhere") == []


def test_working_folders_of_before_a_reboot_go(tmp_path: Path) -> None:
    kept = _make(tmp_path, "kept")
    (tmp_path / "root/ns/lost").mkdir()
    bundles.sweep_work(tmp_path / "state", tmp_path / "root")
    assert os.listdir(tmp_path / "root/ns") == ["kept"]
    assert kept.path.exists()
