"""Users and groups as a container's own /etc/passwd and /etc/group define them.

Both files belong to the image and are hostile input: they are opened with `openat2` below the root
(S2), must be regular, and no more than 10 MiB of them are read (S8). A USER of digits is a number
and never a name, in 0 … 2^31-1 or an error (S6).

Source: OCI image specification, config.md, "User"; passwd(5), group(5).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from supervisord_ctr.errors import InvalidArgument

#: Most bytes that are read of passwd or group.
MAX_FILE = 10 << 20
#: Largest id that OCI runtimes accept.
MAX_ID = 2**31 - 1

_NUMBER = re.compile(r"[+-]?[0-9]+\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class User:
    """Who a process runs as; `additional_gids` begins with `gid`."""

    uid: int = 0
    gid: int = 0
    additional_gids: tuple[int, ...] = (0,)

    def to_spec(self) -> dict[str, object]:
        """The `process.user` object."""
        return {"uid": self.uid, "gid": self.gid, "additionalGids": list(self.additional_gids)}


@dataclass(frozen=True, slots=True)
class _Passwd:
    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class _Group:
    name: str
    gid: int
    members: tuple[str, ...]


def parse_id(text: str, what: str, whole: str) -> int | None:
    """The number in `text`, or None when it is a name.

    Raises `InvalidArgument` for a number outside 0 … 2^31-1; `what` is "uid" or "gid" and `whole`
    the value the user gave, for the message.
    """
    if not _NUMBER.match(text):
        return None
    # 20 digits and more are refused before they become an integer of their size.
    value = int(text) if len(text) <= 20 else -1
    if not 0 <= value <= MAX_ID:
        raise InvalidArgument(f"invalid user {whole[:80]!r}: {what} out of range 0 to {MAX_ID}", kind="user", key=whole)
    return value


def _read(root_fd: int, path: str) -> str | None:
    """Text of a file below the root, None when there is none."""
    from supervisord_ctr.linux import files  # loads ctypes, which a spec without users need not pay for

    try:
        fd = files.open_in_root(root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InvalidArgument(f"cannot open /{path} of the image: {error.strerror}", kind="file", key=path) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidArgument(f"/{path} of the image is not a regular file", kind="file", key=path)
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(MAX_FILE + 1)
    finally:
        os.close(fd)
    if len(data) > MAX_FILE:
        raise InvalidArgument(f"/{path} of the image is larger than {MAX_FILE} bytes", kind="file", key=path)
    return data.decode("utf-8", "surrogateescape")


def _number(text: str) -> int:
    return int(text) if _NUMBER.match(text) and len(text) <= 20 else 0


def _passwd(text: str) -> Iterator[_Passwd]:
    for line in text.split("\n"):
        line = line.strip()
        if line and not line.startswith("#"):
            parts = line.split(":")
            if len(parts) >= 4 and parts[0]:
                yield _Passwd(parts[0], _number(parts[2]), _number(parts[3]))


def _groups(text: str) -> Iterator[_Group]:
    for line in text.split("\n"):
        line = line.strip()
        if line and not line.startswith("#"):
            parts = line.split(":")
            if len(parts) >= 3 and parts[0]:
                members = tuple(filter(None, parts[3].split(","))) if len(parts) > 3 else ()
                yield _Group(parts[0], _number(parts[2]), members)


class Accounts:
    """passwd and group of one root, each read once and only when needed."""

    def __init__(self, root_fd: int) -> None:
        self._root_fd = root_fd
        self._users: list[_Passwd] | None = None
        self._group_list: list[_Group] | None = None

    def _all_users(self) -> list[_Passwd]:
        if self._users is None:
            self._users = list(_passwd(_read(self._root_fd, "etc/passwd") or ""))
        return self._users

    def _all_groups(self) -> list[_Group]:
        if self._group_list is None:
            self._group_list = list(_groups(_read(self._root_fd, "etc/group") or ""))
        return self._group_list

    def by_name(self, name: str) -> _Passwd:
        """The first account of that name, or `InvalidArgument`."""
        for entry in self._all_users():
            if entry.name == name:
                return entry
        raise InvalidArgument(f"user {name!r} is not in /etc/passwd of the image", kind="user", key=name)

    def by_uid(self, uid: int) -> _Passwd | None:
        """The first account with that number."""
        return next((entry for entry in self._all_users() if entry.uid == uid), None)

    def gid_of(self, name: str) -> int:
        """The number of the first group of that name, or `InvalidArgument`."""
        for entry in self._all_groups():
            if entry.name == name:
                return entry.gid
        raise InvalidArgument(f"group {name!r} is not in /etc/group of the image", kind="group", key=name)

    def supplementary(self, name: str) -> list[int]:
        """Groups that list `name` as a member, the one named like the user left out."""
        found: list[int] = []
        for entry in self._all_groups():
            if entry.name != name and name in entry.members and entry.gid not in found:
                found.append(entry.gid)
        return found


def _with_primary(gid: int, gids: Iterable[int]) -> tuple[int, ...]:
    listed = tuple(gids)
    return listed if gid in listed else (gid, *listed)


def resolve(root_fd: int, user: str, *, extra_groups: Iterable[str] = (), supplementary: bool = True) -> User:
    """Who `user` is ("name", "uid", "name:group", "uid:gid" … or "" for root) inside the root.

    `root_fd` is an open directory, the root file system. A number without an account keeps group 0;
    a name without one is `InvalidArgument`. `supplementary` adds the groups that list the account
    as a member; `extra_groups` adds groups by name or number.
    """
    accounts = Accounts(root_fd)
    uid, gid, name = _identify(accounts, user)
    gids: list[int] = []
    if supplementary:
        if not name:
            account = accounts.by_uid(uid)
            name = account.name if account is not None else ""
        if not user:
            name = "root"
        if name:
            gids = accounts.supplementary(name)
    for group in extra_groups:
        number = parse_id(group, "gid", group)
        extra = accounts.gid_of(group) if number is None else number
        if extra not in gids:
            gids.append(extra)
    return User(uid, gid, _with_primary(gid, gids))


def _identify(accounts: Accounts, user: str) -> tuple[int, int, str]:
    """uid, gid and account name ("" when unknown) of a USER value."""
    if not user:
        return 0, 0, ""
    name, colon, group = user.partition(":")
    if ":" in group or not name or (colon and not group):
        raise InvalidArgument(f"invalid user {user!r}: neither user nor user:group", kind="user", key=user)
    number = parse_id(name, "uid", user)
    group_number = parse_id(group, "gid", user) if colon else None
    if number is None:
        account: _Passwd | None = accounts.by_name(name)
    else:
        account = None if colon else accounts.by_uid(number)
    uid = account.uid if account is not None else number or 0
    if colon:
        gid = accounts.gid_of(group) if group_number is None else group_number
    else:
        gid = account.gid if account is not None else 0
    for value, what in ((uid, "uid"), (gid, "gid")):
        if not 0 <= value <= MAX_ID:
            raise InvalidArgument(f"invalid user {user!r}: its {what} {value} is out of range", kind="user", key=user)
    return uid, gid, account.name if account is not None else ""
