"""The embedded bridge: a network for containers and pods where there is no CNI.

Owns one bridge on the host, a veth pair for each attached network namespace, the addresses (the
table is in the database) and, where the host has `nft`, masquerading and port mappings in a table
of its own. Speaks netlink through pyroute2, which is loaded at the first use: it is large.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import ipaddress
import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from supervisord_ctr import errors
from supervisord_ctr.aio import Executors
from supervisord_ctr.linux import namespaces

log = logging.getLogger(__name__)

_INTERFACE = re.compile(r"pc[0-9a-f]{12}\Z")
_NFT_FOLDERS = "/usr/sbin:/sbin:/usr/bin:/bin"


class Addresses(Protocol):
    """The table of addresses (`metadata.Database.addresses`)."""

    async def lease(self, network: str, owner: str) -> str:
        """The owner's address, the same again for the same owner."""
        ...

    async def release(self, network: str, owner: str) -> None:
        """Give it back; may be repeated."""
        ...


def _delete_link(route: Any, name: str) -> None:
    """Remove an interface, if it is there: the kernel may take it first, with the namespace of its peer."""
    from pyroute2.netlink.exceptions import NetlinkError

    for index in route.link_lookup(ifname=name):
        try:
            route.link("del", index=index)
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise


def interface_name(owner: str) -> str:
    """The host's end of an owner's veth pair: 15 characters at most, the same for the same owner."""
    return "pc" + hashlib.sha256(owner.encode()).hexdigest()[:12]


class EmbeddedBridge:
    """`network.Bridge` over pyroute2."""

    def __init__(self, addresses: Addresses, executors: Executors, name: str, subnet: str) -> None:
        self._addresses = addresses
        self._executors = executors
        self._name = name
        try:
            self._subnet = ipaddress.ip_network(subnet)
        except ValueError as error:
            raise errors.InvalidArgument(f"subnet {subnet!r} of the embedded bridge: {error}") from error
        self._lock = asyncio.Lock()

    @property
    def gateway(self) -> str:
        """The bridge's own address: the first of the subnet."""
        return str(self._subnet[1])

    async def attach(self, owner: str, netns: str, port_mappings: Sequence[Mapping[str, Any]] = ()) -> list[str]:
        """Give `netns` an eth0 on the bridge; returns its address. Repeating it leaves one interface."""
        address = (await self._addresses.lease(str(self._subnet), owner)).partition("/")[0]
        try:
            async with self._lock:
                await self._executors.run_io(self._ensure_bridge)
            await self._executors.run_io(self._attach, owner, netns, address)
            await self._executors.run_io(self._map_ports, owner, address, list(port_mappings))
        except OSError as error:
            raise errors.from_os_error(error, f"failed to attach {owner} to bridge {self._name}:") from error
        except errors.Error:
            raise
        except Exception as error:
            if type(error).__module__.startswith("pyroute2"):
                raise errors.Unknown(f"failed to attach {owner} to bridge {self._name}: {error}") from error
            raise
        return [address]

    async def detach(self, owner: str) -> None:
        """Take the interface and the port mappings away and give the address back."""
        await self._executors.run_io(self._detach, owner)
        await self._addresses.release(str(self._subnet), owner)

    def stray_interfaces(self, owners: Collection[str]) -> list[str]:
        """The host's ends of pairs on this bridge that belong to none of `owners`. Blocks."""
        known = {interface_name(owner) for owner in owners}
        try:
            ports = os.listdir(f"/sys/class/net/{self._name}/brif")
        except FileNotFoundError:
            return []
        return sorted(name for name in ports if _INTERFACE.match(name) and name not in known)

    def remove_interface(self, name: str) -> None:
        """Take away one end of a pair, and so the other. Blocks; one that is gone is fine."""
        from pyroute2 import IPRoute

        with IPRoute() as route:
            for index in route.link_lookup(ifname=name):
                route.link("del", index=index)

    def _ensure_bridge(self) -> None:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            found = route.link_lookup(ifname=self._name)
            if not found:
                route.link("add", ifname=self._name, kind="bridge")
                found = route.link_lookup(ifname=self._name)
            known = [entry.get_attr("IFA_ADDRESS") for entry in route.get_addr(index=found[0])]
            if self.gateway not in known:
                route.addr("add", index=found[0], address=self.gateway, prefixlen=self._subnet.prefixlen)
            route.link("set", index=found[0], state="up")
        name = "ipv4/ip_forward" if self._subnet.version == 4 else "ipv6/conf/all/forwarding"
        forward = Path("/proc/sys/net") / name
        if forward.read_text(encoding="ascii").strip() == "0":
            forward.write_text("1", encoding="ascii")
        self._masquerade()

    def _attach(self, owner: str, netns: str, address: str) -> None:
        from pyroute2 import IPRoute

        name, peer = interface_name(owner), "tp" + interface_name(owner)[2:]
        fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with IPRoute() as route:
                _delete_link(route, name)
                bridge = route.link_lookup(ifname=self._name)[0]
                route.link("add", ifname=name, kind="veth", peer={"ifname": peer})
                route.link("set", index=route.link_lookup(ifname=name)[0], master=bridge, state="up")
                route.link("set", index=route.link_lookup(ifname=peer)[0], net_ns_fd=fd)
        finally:
            os.close(fd)
        def inside() -> None:
            # pyroute2's own way into a namespace forks this process, which a daemon must never do.
            with IPRoute() as inner:
                index = inner.link_lookup(ifname=peer)[0]
                inner.link("set", index=index, ifname="eth0")
                inner.addr("add", index=index, address=address, prefixlen=self._subnet.prefixlen)
                inner.link("set", index=index, state="up")
                inner.route("add", dst="default", gateway=self.gateway)

        namespaces.in_netns(netns, inside)

    def _detach(self, owner: str) -> None:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            _delete_link(route, interface_name(owner))
        self._unmap_ports(owner)

    # -- nft -------------------------------------------------------------------------------------------

    @property
    def _table(self) -> str:
        return f"{'ip' if self._subnet.version == 4 else 'ip6'} supervisord-ctr-{self._name}"

    def _nft(self, script: str, *, must: bool) -> bool:
        program = shutil.which("nft", path=_NFT_FOLDERS)
        if program is None:
            if must:
                raise errors.FailedPrecondition("port mappings of the embedded bridge need nft, which is not installed")
            log.warning("nft is not installed: containers on %s reach the host but nothing beyond", self._name)
            return False
        done = subprocess.run(
            [program, "-f", "-"], input=script, text=True, capture_output=True, timeout=30, check=False
        )
        if done.returncode:
            message = f"nft failed: {done.stderr.strip()[:300]}"
            if must:
                raise errors.Unknown(message)
            log.warning("%s", message)
        return done.returncode == 0

    def _masquerade(self) -> None:
        family, name = self._table.split(" ", 1)
        self._nft(
            f"table {family} {name} {{\n"
            "  chain postrouting { type nat hook postrouting priority srcnat; }\n"
            "  chain prerouting { type nat hook prerouting priority dstnat; }\n"
            "  chain output { type nat hook output priority -100; }\n"
            "}\n"
            f"flush chain {family} {name} postrouting\n"
            f"add rule {family} {name} postrouting {family} saddr {self._subnet} {family} daddr != {self._subnet}"
            " masquerade\n",
            must=False,
        )

    def _map_ports(self, owner: str, address: str, mappings: Sequence[Mapping[str, Any]]) -> None:
        if not mappings:
            return
        family, name = self._table.split(" ", 1)
        lines: list[str] = []
        for mapping in mappings:
            host = mapping.get("hostIP") or ""
            match = f"{family} daddr {ipaddress.ip_address(host)} " if host and host not in ("0.0.0.0", "::") else ""
            target = f"{address}:{int(mapping['containerPort'])}"
            rule = (
                f"{match}fib daddr type local {mapping['protocol']} dport {int(mapping['hostPort'])} "
                f"dnat to {target} comment {json.dumps(interface_name(owner))}"
            )
            lines += [f"add rule {family} {name} {chain} {rule}" for chain in ("prerouting", "output")]
        self._nft("\n".join(lines) + "\n", must=True)

    def _unmap_ports(self, owner: str) -> None:
        program = shutil.which("nft", path=_NFT_FOLDERS)
        if program is None:
            return
        family, name = self._table.split(" ", 1)
        listed = subprocess.run(
            [program, "-j", "-a", "list", "table", family, name], text=True, capture_output=True, timeout=30,
            check=False,
        )
        if listed.returncode:
            return
        mark = interface_name(owner)
        for entry in json.loads(listed.stdout).get("nftables", ()):
            rule = entry.get("rule")
            if rule and rule.get("comment") == mark:
                self._nft(f"delete rule {family} {name} {rule['chain']} handle {rule['handle']}\n", must=False)
