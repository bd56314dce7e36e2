"""`--net bridge`: the embedded bridge from the client's side, so that it works with every daemon.

The task has been created and not started: its network namespace is there and empty. The bridge,
the veth pair and masquerading are `supervisord_ctr.sandbox.bridge`'s; the table of addresses is a
locked file here, apart from the daemon's own, with a network of its own. An address belongs to a
process and is free again when that has gone, so a client that is killed leaks nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import json
import os
from collections.abc import Iterator
from typing import Any

from pctr.stdio import runtime_folder
from supervisord_ctr import errors
from supervisord_ctr.aio import Executors

BRIDGE = "pctr-run0"
SUBNET = "10.98.0.0/16"


def _start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot: with its id, what tells it from a later one."""
    try:
        with open(f"/proc/{pid}/stat", encoding="latin-1") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


class FileAddresses:
    """Addresses in a file; each belongs to an owner's process."""

    def __init__(self, pid: int, path: str = "") -> None:
        self._pid = pid
        self._path = path or os.path.join(runtime_folder(), "bridge.json")

    async def lease(self, network: str, owner: str) -> str:
        """The owner's address; those of processes that have gone are given out again."""
        with self._table() as table:
            known = table.setdefault(network, {})
            for name, entry in list(known.items()):
                if _start_time(entry["pid"]) != entry["started"]:
                    del known[name]
            if owner in known:
                return str(known[owner]["address"])
            used = {entry["address"] for entry in known.values()}
            hosts = ipaddress.ip_network(network).hosts()
            next(hosts)  # the bridge's own
            for address in map(str, hosts):
                if address not in used:
                    known[owner] = {"address": address, "pid": self._pid, "started": _start_time(self._pid)}
                    return address
        raise errors.ResourceExhausted(f"network {network}: no address is left", kind="network", key=network)

    async def release(self, network: str, owner: str) -> None:
        """Give an address back."""
        with self._table() as table:
            table.get(network, {}).pop(owner, None)

    @contextlib.contextmanager
    def _table(self) -> Iterator[dict[str, Any]]:
        """The table, locked; written back when the block ends well."""
        os.makedirs(os.path.dirname(self._path), 0o700, exist_ok=True)
        with open(self._path, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            try:
                table = json.load(file)
            except ValueError:
                table = {}
            yield table
            file.seek(0)
            file.truncate()
            json.dump(table, file)


def _run(pid: int, owner: str, *, attach: bool) -> list[str]:
    from supervisord_ctr.sandbox.bridge import EmbeddedBridge

    async def main() -> list[str]:
        executors = Executors.create(io=2, cpu=1)
        try:
            bridge = EmbeddedBridge(FileAddresses(pid), executors, BRIDGE, SUBNET)
            if attach:
                return await bridge.attach(owner, f"/proc/{pid}/ns/net")
            await bridge.detach(owner)
            return []
        finally:
            executors.close()

    return asyncio.run(main())


def attach(pid: int, owner: str) -> str:
    """Give the process's network namespace an address on the bridge; returns it."""
    return _run(pid, owner, attach=True)[0]


def detach(pid: int, owner: str) -> None:
    """Give everything back."""
    _run(pid, owner, attach=False)
