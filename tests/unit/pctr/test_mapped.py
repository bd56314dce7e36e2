"""Owners of files, shifted for a user namespace."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

import pytest
from pctr.command import Failed
from pctr.mapped import change_owners

from supervisord_ctr.linux.idmaps import IdMap

MAPS = [IdMap(0, 100_000, 1000), IdMap(1000, 300_000, 10)]
#: vfs_cap_data, revision 2, with cap_net_raw permitted and effective (linux/capability.h).
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)


def owner(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid


def test_everything_changes_hands_and_keeps_its_rights(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "folder").mkdir(parents=True)
    outside.mkdir()
    (outside / "file").write_text("")
    tool, pipe = root / "folder" / "tool", root / "pipe"
    tool.write_text("")
    os.chown(tool, 5, 1003)
    tool.chmod(0o6755)
    os.setxattr(tool, "security.capability", CAPABILITY)
    os.link(tool, root / "again")
    os.mkfifo(pipe)
    (root / "link").symlink_to(outside / "file")
    (root / "folder-link").symlink_to(outside)
    change_owners(str(root), MAPS, MAPS)
    for path in (root, root / "folder", pipe, root / "link", root / "folder-link"):
        assert owner(path) == (100_000, 100_000), path
    assert owner(tool) == owner(root / "again") == (100_005, 300_003)
    assert stat.S_IMODE(tool.stat().st_mode) == 0o6755
    assert os.getxattr(tool, "security.capability")[:8] == CAPABILITY[:8]
    assert owner(outside) == owner(outside / "file") == (0, 0)


def test_a_stranger_is_told(tmp_path: Path) -> None:
    (tmp_path / "odd").write_text("")
    os.chown(tmp_path / "odd", 4242, 0)
    with pytest.raises(Failed, match=r"odd: its owner 4242:0 is in none of the mappings"):
        change_owners(str(tmp_path), MAPS, MAPS)
