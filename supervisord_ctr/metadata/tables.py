"""Small tables that other rooms keep here: CRI records, the address table, activated mounts."""

from __future__ import annotations

import ipaddress

from supervisord_ctr.errors import AlreadyExists, NotFound, ResourceExhausted
from supervisord_ctr.metadata.codec import ensure_namespace
from supervisord_ctr.metadata.engine import Engine, Transaction


class CriRecords:
    """Durable records of the Kubernetes face, by kind and id; the value is opaque here."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def put(self, kind: str, id: str, value: bytes, *, durable: bool = True) -> None:  # noqa: A002
        """Insert or replace."""

        def work(tx: Transaction) -> None:
            tx.execute("INSERT OR REPLACE INTO cri_records VALUES (?, ?, ?)", (kind, id, value))

        await self._engine.write(work, durable=durable)

    async def get(self, kind: str, id: str) -> bytes:  # noqa: A002
        """NotFound."""
        row = self._engine.row("SELECT value FROM cri_records WHERE kind = ? AND id = ?", (kind, id))
        if row is None:
            raise NotFound(f'{kind} "{id}": not found', kind=kind, key=id)
        return bytes(row[0])

    async def list(self, kind: str) -> list[tuple[str, bytes]]:
        """All records of a kind, by id."""
        rows = self._engine.rows("SELECT id, value FROM cri_records WHERE kind = ? ORDER BY id", (kind,))
        return [(key, bytes(value)) for key, value in rows]

    async def delete(self, kind: str, id: str) -> None:  # noqa: A002
        """A record that is not there is fine."""

        def work(tx: Transaction) -> None:
            tx.execute("DELETE FROM cri_records WHERE kind = ? AND id = ?", (kind, id))

        await self._engine.write(work)


class Addresses:
    """The address table of the embedded bridge: one row per leased address."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def lease(self, network: str, owner: str) -> str:
        """The owner's address in `network` (CIDR text, "10.88.0.0/16"); the same again for the same owner.

        The network's, the broadcast and the first host address (the gateway's) are never given out.
        Addresses are handed out in turn, so that one just released rests as long as possible.
        ResourceExhausted when none is free.
        """
        net = ipaddress.ip_network(network)

        def work(tx: Transaction) -> str:
            row = tx.row("SELECT address FROM addresses WHERE network = ? AND owner = ?", (network, owner))
            if row is not None:
                return str(row[0])
            taken = {int(ipaddress.ip_address(a)) for (a,) in tx.rows(
                "SELECT address FROM addresses WHERE network = ?", (network,)
            )}
            first = int(net.network_address) + 2
            last = int(net.broadcast_address) - 1
            fact = f"address:{network}"
            row = tx.row("SELECT value FROM facts WHERE key = ?", (fact,))
            start = min(max(int(row[0]) + 1 if row else first, first), last + 1)
            for candidate in (*range(start, min(last + 1, start + len(taken) + 1)), *range(first, start)):
                if candidate <= last and candidate not in taken:
                    address = str(ipaddress.ip_address(candidate))
                    tx.execute("INSERT INTO addresses VALUES (?, ?, ?)", (network, address, owner))
                    tx.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (fact, str(candidate)))
                    return address
            raise ResourceExhausted(f"network {network}: all {len(taken)} addresses are leased", key=network)

        return await self._engine.write(work)

    async def release(self, network: str, owner: str) -> None:
        """Give the owner's address back; an owner without one is fine."""

        def work(tx: Transaction) -> None:
            tx.execute("DELETE FROM addresses WHERE network = ? AND owner = ?", (network, owner))

        await self._engine.write(work)

    async def all(self) -> list[tuple[str, str, str]]:
        """(network, address, owner) of every network."""
        rows = self._engine.rows("SELECT network, address, owner FROM addresses ORDER BY network, address")
        return [(str(network), str(address), str(owner)) for network, address, owner in rows]

    async def list(self, network: str) -> list[tuple[str, str]]:
        """(address, owner) pairs."""
        rows = self._engine.rows("SELECT address, owner FROM addresses WHERE network = ?", (network,))
        return [(str(address), str(owner)) for address, owner in rows]


class Activations:
    """What the mount service activated, by namespace and name; the value is a JSON text of its own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def create(self, namespace: str, name: str, value: str) -> None:
        """AlreadyExists."""

        def work(tx: Transaction) -> None:
            ensure_namespace(tx, namespace)
            if not tx.execute("INSERT OR IGNORE INTO activations VALUES (?, ?, ?)", (namespace, name, value)):
                raise AlreadyExists(f'mount "{name}": already exists', kind="mount", key=name)

        await self._engine.write(work)

    async def get(self, namespace: str, name: str) -> str:
        """NotFound."""
        row = self._engine.row("SELECT value FROM activations WHERE namespace = ? AND name = ?", (namespace, name))
        if row is None:
            raise NotFound(f'mount "{name}": not found', kind="mount", key=name)
        return str(row[0])

    async def list(self, namespace: str = "") -> list[tuple[str, str, str]]:
        """(namespace, name, value), of all namespaces for an empty one."""
        return [
            (str(space), str(name), str(value))
            for space, name, value in self._engine.rows(
                "SELECT namespace, name, value FROM activations WHERE ? IN ('', namespace) ORDER BY namespace, name",
                (namespace,),
            )
        ]

    async def put(self, namespace: str, name: str, value: str) -> None:
        """Replace the value of one that exists; NotFound."""

        def work(tx: Transaction) -> None:
            if not tx.execute(
                "UPDATE activations SET value = ? WHERE namespace = ? AND name = ?", (value, namespace, name)
            ):
                raise NotFound(f'mount "{name}": not found', kind="mount", key=name)

        await self._engine.write(work)

    async def delete(self, namespace: str, name: str) -> None:
        """NotFound."""

        def work(tx: Transaction) -> None:
            if not tx.execute("DELETE FROM activations WHERE namespace = ? AND name = ?", (namespace, name)):
                raise NotFound(f'mount "{name}": not found', kind="mount", key=name)

        await self._engine.write(work)
