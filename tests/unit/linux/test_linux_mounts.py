"""Mount options, mountinfo, overlays with many layers, lazy unmounting."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.linux import libc, mounts
from supervisord_ctr.model import Mount


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder without mounts afterwards."""
    tmp_path = tmp_path.resolve()
    yield tmp_path
    mounts.unmount_below(tmp_path)


def test_a_label_of_selinux_is_an_option_of_all_but_bind_mounts() -> None:
    overlay, bind = Mount("overlay", "overlay", ("lowerdir=/a",)), Mount("bind", "/a", ("rbind", "ro"))
    labelled = Mount("overlay", "overlay", ("lowerdir=/a", 'context="u:r:t:s0:c1,c2"'))
    assert mounts.with_context([overlay, bind], "u:r:t:s0:c1,c2") == (labelled, bind)
    assert mounts.with_context([overlay, bind], "") == (overlay, bind)


def test_words_become_flags_and_data() -> None:
    options = mounts.parse_options(
        ["rbind", "ro", "nosuid", "rslave", "lowerdir=/a:/b", "index=off", "userxattr", "defaults", "uidmap=0:1:2", "gidmap=0:1:2"]
    )
    assert options.flags == mounts.MS_BIND | mounts.MS_REC | mounts.MS_RDONLY | mounts.MS_NOSUID
    assert options.propagation == mounts.MS_SLAVE | mounts.MS_REC
    assert options.data == ("lowerdir=/a:/b", "index=off", "userxattr")
    assert (options.uidmap, options.gidmap) == ("0:1:2", "0:1:2")


def test_later_words_win() -> None:
    assert mounts.parse_options(["ro", "rw"]).flags == 0
    assert mounts.parse_options(["nodev", "dev", "nodev"]).flags == mounts.MS_NODEV


@pytest.mark.parametrize("words", [["X-containerd.something=1"], ["uidmap=0:1:2"], ["gidmap=0:1:2"]])
def test_words_that_cannot_be_honoured_are_refused(words: list[str]) -> None:
    with pytest.raises(InvalidArgument):
        mounts.parse_options(words)


def test_mountinfo_is_read_with_its_escapes() -> None:
    text = (
        "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n"
        "broken line\n"
        "37 35 0:5 / /x rw - tmpfs tmpfs rw\n"
    )
    first, second = mounts.parse_mountinfo(text)
    assert (first.target, first.root, first.propagation, first.fstype) == ("/mnt 2", "/mnt1", ("master:1",), "ext3")
    assert (second.target, second.propagation, second.super_options) == ("/x", (), "rw")


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=200))
def test_mountinfo_never_chokes(text: str) -> None:
    try:
        mounts.parse_mountinfo(text)
    except ValueError as error:
        assert "int()" in str(error) or "codec" in str(error)


def test_bind_mounts_are_read_only_when_asked(folder: Path) -> None:
    for name in ("source", "target"):
        (folder / name).mkdir()
    (folder / "source" / "file").write_text("x")
    mounts.mount_all([Mount("bind", str(folder / "source"), ("rbind", "ro"))], folder / "target")
    assert (folder / "target" / "file").read_text() == "x"
    with pytest.raises(OSError, match="Read-only"):
        (folder / "target" / "other").write_text("y")
    assert mounts.is_mountpoint(folder / "target")
    assert [entry.target for entry in mounts.mounts_below(folder)] == [str(folder / "target")]


def test_p24_recursive_read_only_reaches_mounts_below(folder: Path) -> None:
    for name in ("source/inner", "target"):
        (folder / name).mkdir(parents=True)
    mounts.mount("tmpfs", folder / "source" / "inner", "tmpfs")
    mounts.mount_all([Mount("bind", str(folder / "source"), ("rbind", "rro"))], folder / "target")
    with pytest.raises(OSError, match="Read-only"):
        (folder / "target" / "inner" / "file").write_text("y")
    (folder / "source" / "inner" / "file").write_text("the source stays writable")


def test_unmount_all_uncovers_every_layer(folder: Path) -> None:
    target = folder / "target"
    target.mkdir()
    for _ in range(3):
        mounts.mount("tmpfs", target, "tmpfs")
    mounts.unmount_all(target)
    assert not mounts.is_mountpoint(target)
    mounts.unmount_all(target)
    mounts.unmount_all(folder / "absent")


def test_an_overlay_of_more_layers_than_a_page_of_options_holds(folder: Path) -> None:
    layers = []
    for number in range(90):
        layer = folder / "a-folder-with-quite-a-long-name-for-snapshots" / str(number) / "fs"
        layer.mkdir(parents=True)
        (layer / f"file{number}").touch()
        layers.append(str(layer))
    for name in ("upper", "work", "target"):
        (folder / name).mkdir()
    before = os.getcwd()
    options = (f"upperdir={folder}/upper", f"workdir={folder}/work", "lowerdir=" + ":".join(layers))
    assert len(",".join(options)) > 4096
    mounts.mount_all([Mount("overlay", "overlay", options)], folder / "target")
    assert len(os.listdir(folder / "target")) == 90
    assert os.getcwd() == before


def test_a_failure_takes_back_what_was_mounted(folder: Path) -> None:
    (folder / "target").mkdir()
    with pytest.raises(OSError):
        mounts.mount_all([Mount("tmpfs", "tmpfs"), Mount("bind", "/no/such/source", ("bind",))], folder / "target")
    assert mounts.mounts_below(folder) == []


def test_s2_a_target_inside_is_resolved_inside(folder: Path) -> None:
    (folder / "root").mkdir()
    (folder / "outside").mkdir()
    (folder / "root" / "link").symlink_to("/../outside")
    (folder / "root" / "outside").mkdir()
    mounts.mount_all([Mount("tmpfs", "tmpfs", (), "link")], folder / "root")
    assert [entry.target for entry in mounts.mounts_below(folder)] == [str(folder / "root" / "outside")]


def test_temporary_mounts_leave_nothing(folder: Path) -> None:
    with mounts.temp_mount([Mount("tmpfs", "tmpfs")], folder) as place:
        Path(place, "file").touch()
    assert list(folder.iterdir()) == []


def test_idmapped_mounts_shift_owners(folder: Path) -> None:
    if not mounts.supports_idmap(folder):
        pytest.skip("this kernel has no id-mapped mounts")
    for name in ("source", "target"):
        (folder / name).mkdir()
    (folder / "source" / "file").touch()
    options = ("rbind", "uidmap=0:1000:10", "gidmap=0:2000:10")
    mounts.mount_all([Mount("bind", str(folder / "source"), options)], folder / "target")
    found = os.stat(folder / "target" / "file")
    assert (found.st_uid, found.st_gid) == (1000, 2000)


def test_idmapped_mounts_leave_their_shared_source_alone(folder: Path) -> None:
    """Mounts of a host with systemd are shared: what happens to a copy happens to its source, unless it is cut off."""
    if not mounts.supports_idmap(folder):
        pytest.skip("this kernel has no id-mapped mounts")
    shared = folder / "shared"
    for path in (shared, folder / "target", folder / "other"):
        path.mkdir()
    mounts.mount_all([Mount("bind", str(shared), ("rbind",))], shared)  # tmpfs can be id-mapped from Linux 6.3 on only
    mounts.mount("", str(shared), "", mounts.MS_SHARED)
    (shared / "source" / "below").mkdir(parents=True)
    (shared / "source" / "file").touch()
    mounts.mount_all([Mount("bind", str(folder / "other"), ("bind",))], shared / "source" / "below")
    mounts.mount("", str(shared / "source" / "below"), "", mounts.MS_SHARED)
    before = mounts.mounts_below(shared)
    options = ("rbind", "uidmap=0:1000:10", "gidmap=0:2000:10")
    for make in (
        lambda: mounts.mount_all([Mount("bind", str(shared / "source"), options)], folder / "target"),
        lambda: _idmap(shared / "source", folder / "target"),
    ):
        make()
        assert os.stat(folder / "target" / "file").st_uid == 1000
        assert os.stat(shared / "source" / "file").st_uid == 0
        assert mounts.mounts_below(shared) == before
        mounts.unmount_all(folder / "target")
        assert mounts.mounts_below(shared) == before


def _idmap(source: Path, target: Path) -> None:
    with mounts.user_namespace("0:1000:10", "0:2000:10") as userns:
        mounts.idmap_mount(source, target, userns, recursive=True, map_below=False)


def test_idmapped_overlays_shift_their_lower_layers(folder: Path) -> None:
    if not mounts.supports_idmap(folder):
        pytest.skip("this kernel has no id-mapped mounts")
    for name in ("layers/1", "layers/2", "upper", "work", "target"):
        (folder / name).mkdir(parents=True)
    (folder / "layers" / "1" / "file").touch()
    options = (f"lowerdir={folder}/layers/1:{folder}/layers/2", f"upperdir={folder}/upper", f"workdir={folder}/work",
               "uidmap=0:1000:10", "gidmap=0:2000:10")
    mounts.mount_all([Mount("overlay", "overlay", options)], folder / "target")
    assert os.stat(folder / "target" / "file").st_uid == 1000


@pytest.mark.parametrize("text", ["", "0:1", "a:b:c", "0:1:-2", "0:1:2:3"])
def test_id_maps_are_checked(text: str) -> None:
    with pytest.raises(InvalidArgument), mounts.user_namespace(text, "0:1:1"):
        raise AssertionError("unreachable")


def test_each_file_system_is_asked_for_itself_and_nothing_stays_mounted(
    folder: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A temporary folder on a tmpfs, which cannot be id-mapped before Linux 6.3, says nothing of the data's disk."""
    asked: list[int] = []
    syscall = libc.syscall

    def refuse_tmpfs(number: int, *arguments: object, **rest: object) -> int:
        if number == libc.SYS_OPEN_TREE:
            asked.append(os.stat(os.fsdecode(arguments[1])).st_dev)  # type: ignore[arg-type]
        if number == libc.SYS_MOUNT_SETATTR and asked[-1] == other.stat().st_dev:
            raise OSError(errno.EINVAL, "cannot be id-mapped")
        return syscall(number, *arguments, **rest)  # type: ignore[arg-type]

    if not mounts.supports_idmap(folder):
        pytest.skip("this kernel has no id-mapped mounts")
    other = folder / "other"
    other.mkdir()
    mounts.mount_all([Mount("tmpfs", "tmpfs")], other)
    before = mounts.mounts_below(folder)
    monkeypatch.setattr(libc, "syscall", refuse_tmpfs)
    monkeypatch.setattr(mounts, "_idmap_supported", {})
    for _ in range(2):
        assert not mounts.supports_idmap(other)
        assert mounts.supports_idmap(folder)
    assert asked == [other.stat().st_dev, folder.stat().st_dev], "once for each"
    assert mounts.mounts_below(folder) == before
