"""Environments of pods on the real kernel: made, whole, taken down, from whatever state."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.linux import mounts, namespaces
from supervisord_ctr.linux.idmaps import IdMap
from supervisord_ctr.sandbox.environment import Environments, Wanted
from supervisord_ctr.sandbox.files import Dns
from tests.support.daemon import mounts_below


@pytest.fixture(autouse=True)
def nothing_stays_mounted(tmp_path: Path) -> Iterator[None]:
    """Also after a failure: the mounts would outlive the tests, and their folder could not be removed."""
    yield
    for place in sorted(mounts_below(tmp_path), reverse=True):
        mounts.unmount_all(place)


def made(tmp_path: Path, **fields: object) -> tuple[Environments, Wanted]:
    environments = Environments(tmp_path / "pods")
    wanted = Wanted(secrets.token_hex(32), **fields)  # type: ignore[arg-type]
    wanted.check()
    environments.make_network_namespace(wanted)
    environments.make_rest(wanted)
    return environments, wanted


def test_p20_a_pod_is_namespaces_without_a_process(tmp_path: Path) -> None:
    dns = Dns(["10.0.0.10"], ["cluster.local"], ["ndots:5"])
    environments, wanted = made(tmp_path, hostname="inside", dns=dns)
    assert environments.intact(wanted)
    for kind in ("net", "ipc", "uts"):
        assert not namespaces.same_namespace(environments.namespace(wanted.id, kind), f"/proc/self/ns/{kind}")
    name = namespaces.call_in(
        environments.namespace(wanted.id, "uts"), namespaces.CLONE_NEWUTS, lambda: os.uname().nodename)
    assert name == "inside"
    files = environments.files(wanted.id)
    assert files.resolv.read_text() == "search cluster.local\nnameserver 10.0.0.10\noptions ndots:5\n"
    assert files.hostname.read_text() == "inside\n"
    assert str(files.shm) in mounts_below(tmp_path)
    environments.remove(wanted.id)
    environments.remove(wanted.id)
    assert mounts_below(tmp_path) == []
    assert environments.known() == []
    assert not environments.intact(wanted)


def test_making_twice_is_making_once(tmp_path: Path) -> None:
    environments, wanted = made(tmp_path)
    before = os.stat(environments.namespace(wanted.id, "net")).st_ino
    environments.make_network_namespace(wanted)
    environments.make_rest(wanted)
    assert os.stat(environments.namespace(wanted.id, "net")).st_ino == before
    environments.remove(wanted.id)


def test_what_a_crash_left_is_made_good(tmp_path: Path) -> None:
    environments = Environments(tmp_path / "pods")
    wanted = Wanted("c" * 64)
    path = environments.namespace(wanted.id, "net")
    path.parent.mkdir(parents=True)
    path.touch()
    environments.make_network_namespace(wanted)
    assert namespaces.is_pinned(path)
    environments.remove(wanted.id)


def test_a_lost_namespace_is_noticed(tmp_path: Path) -> None:
    environments, wanted = made(tmp_path)
    namespaces.unpin(environments.namespace(wanted.id, "ipc"))
    assert not environments.intact(wanted)
    environments.remove(wanted.id)


def test_sysctls_go_into_the_namespaces(tmp_path: Path) -> None:
    environments, wanted = made(tmp_path, sysctls={"net.core.somaxconn": "77", "kernel.shm_rmid_forced": "1"})

    def read(path: str) -> str:
        return Path(path).read_text().strip()

    assert namespaces.in_netns(
        environments.namespace(wanted.id, "net"), lambda: read("/proc/sys/net/core/somaxconn")) == "77"
    assert namespaces.call_in(
        environments.namespace(wanted.id, "ipc"), namespaces.CLONE_NEWIPC,
        lambda: read("/proc/sys/kernel/shm_rmid_forced")) == "1"
    assert read("/proc/sys/net/core/somaxconn") != "77"
    environments.remove(wanted.id)


def test_a_user_namespace_owns_the_others(tmp_path: Path) -> None:
    ranges = (IdMap(0, 500_000, 1000),)
    environments, wanted = made(tmp_path, uids=ranges, gids=ranges)
    assert environments.intact(wanted)
    assert os.stat(environments.files(wanted.id).shm).st_uid == 500_000
    environments.remove(wanted.id)


@pytest.mark.parametrize("fields", [
    {"hostname": "a\nb"}, {"hostname": "x" * 65}, {"dns": Dns(["10.0.0.1\nnameserver 6.6.6.6"])},
    {"sysctls": {"kernel.panic": "1"}}, {"own_network": False, "sysctls": {"net.ipv4.ip_forward": "1"}},
    {"sysctls": {"net.ipv4.ip_forward": "1\n2"}},
])
def test_s10_what_must_not_be_is_refused_before_anything_is_made(tmp_path: Path, fields: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        made(tmp_path, **fields)
    assert not (tmp_path / "pods").exists()


def test_s11_ids_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument):
        Environments(tmp_path).files("../../etc")
