"""Interfaces of the embedded bridge that go by themselves."""

from __future__ import annotations

import errno

import pytest
from pyroute2.netlink.exceptions import NetlinkError

from supervisord_ctr.sandbox.bridge import _delete_link


class Route:
    """A kernel that knows the interface and answers its removal with `code`."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.asked: list[tuple[str, int]] = []

    def link_lookup(self, *, ifname: str) -> list[int]:
        return [7] if ifname == "known" else []

    def link(self, word: str, *, index: int) -> None:
        self.asked.append((word, index))
        if self.code:
            raise NetlinkError(self.code)


def test_an_interface_that_vanished_meanwhile_is_gone() -> None:
    route = Route(errno.ENODEV)
    _delete_link(route, "known")
    assert route.asked == [("del", 7)]
    _delete_link(route, "unknown")
    assert route.asked == [("del", 7)]


def test_one_that_cannot_be_removed_is_told() -> None:
    with pytest.raises(NetlinkError):
        _delete_link(Route(errno.EPERM), "known")
