"""Users: a table of images and USER values, and images that try to cheat."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.oci import users
from supervisord_ctr.oci.users import User, resolve

PASSWD = """root:x:0:0:root:/root:/bin/sh
# a comment
daemon:x:1:1::/:/bin/false

app:x:1000:1001:App:/home/app:/bin/sh
1234:x:77:78::/:
2147483648:x:5:5::/:
big:x:4294967295:1::/:
broken:x:notanumber:1
short:x
"""
GROUP = """root:x:0:root
daemon:x:1:
adm:x:4:app,root
app:x:1001:app
wheel:x:10:root,app
1234:x:99:app
video:x:44:app
video:x:45:other
"""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(PASSWD)
    (tmp_path / "etc/group").write_text(GROUP)
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(("text", "wanted"), [
    ("", User(0, 0, (0, 4, 10))),
    ("root", User(0, 0, (0, 4, 10))),
    ("0", User(0, 0, (0, 4, 10))),
    ("app", User(1000, 1001, (1001, 4, 10, 99, 44))),
    ("1000", User(1000, 1001, (1001, 4, 10, 99, 44))),
    ("app:adm", User(1000, 4, (4, 10, 99, 44))),
    ("app:44", User(1000, 44, (4, 10, 99, 44))),
    ("1000:1000", User(1000, 1000, (1000, 4, 10, 99, 44))),
    ("5000", User(5000, 0, (0,))),
    ("5000:6000", User(5000, 6000, (6000,))),
    ("daemon", User(1, 1, (1,))),
    # A number is never a name, not even where an account is called so.
    ("1234", User(1234, 0, (0,))),
    ("2147483647", User(2147483647, 0, (0,))),
    ("app:1234", User(1000, 1234, (1234, 4, 10, 99, 44))),
])
def test_s7_users_and_their_groups(root: int, text: str, wanted: User) -> None:
    assert resolve(root, text) == wanted


@pytest.mark.parametrize("text", [
    "2147483648", "4294967295", "4294967296", "99999999999999999999", "1" * 4000, "-1", "-0x1:1", "0:2147483648",
    "app:99999999999999999999", "app:-5",
])
def test_s6_numbers_out_of_range_are_errors(root: int, text: str) -> None:
    with pytest.raises(InvalidArgument):
        resolve(root, text)


@pytest.mark.parametrize("text", ["nobody", "app:nogroup", ":1", "app:", "a:b:c", " 1000", "1_000", "१२३", "broken:x"])
def test_names_that_are_not_there_are_errors(root: int, text: str) -> None:
    with pytest.raises(InvalidArgument):
        resolve(root, text)


def test_an_account_with_an_impossible_number_is_refused(root: int) -> None:
    with pytest.raises(InvalidArgument):
        resolve(root, "big")


def test_extra_groups_by_name_and_number(root: int) -> None:
    assert resolve(root, "app", extra_groups=["44", "daemon", "777"], supplementary=False) == User(
        1000, 1001, (1001, 44, 1, 777)
    )


def test_an_image_without_accounts_runs_as_numbers(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    try:
        assert resolve(fd, "") == User()
        assert resolve(fd, "7:8") == User(7, 8, (8,))
        with pytest.raises(InvalidArgument):
            resolve(fd, "app")
    finally:
        os.close(fd)


def test_s2_links_stay_inside_the_root(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("evil:x:1:1::/:\n")
    image = tmp_path / "image"
    (image / "etc").mkdir(parents=True)
    (image / "store").mkdir()
    (image / "store/passwd").write_text("inside:x:5:6::/:\n")
    fd = os.open(image, os.O_PATH | os.O_DIRECTORY)
    try:
        os.symlink("../../../../secret", image / "etc/passwd")
        with pytest.raises(InvalidArgument):
            resolve(fd, "evil")
        os.unlink(image / "etc/passwd")
        os.symlink(f"{tmp_path}/secret", image / "etc/passwd")
        with pytest.raises(InvalidArgument):
            resolve(fd, "evil")
        os.unlink(image / "etc/passwd")
        # An absolute link means the image's own root.
        os.symlink("/store/passwd", image / "etc/passwd")
        assert resolve(fd, "inside") == User(5, 6, (6,))
    finally:
        os.close(fd)


def test_s2_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    os.mkfifo(tmp_path / "etc/passwd")
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    try:
        with pytest.raises(InvalidArgument, match="not a regular file"):
            resolve(fd, "app")
        os.unlink(tmp_path / "etc/passwd")
        (tmp_path / "etc/passwd").mkdir()
        with pytest.raises(InvalidArgument):
            resolve(fd, "app")
    finally:
        os.close(fd)


def test_s8_huge_account_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    with open(tmp_path / "etc/passwd", "wb") as file:
        file.truncate(users.MAX_FILE + 1)
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    try:
        with pytest.raises(InvalidArgument, match="larger"):
            resolve(fd, "app")
    finally:
        os.close(fd)
