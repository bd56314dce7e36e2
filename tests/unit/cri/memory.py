"""Records in a dictionary, for tests."""

from __future__ import annotations


class MemoryRecords:
    """`metadata.Database.cri` without a database."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], bytes] = {}

    async def put(self, kind: str, id: str, value: bytes) -> None:  # noqa: A002
        """Keep."""
        self.kept[kind, id] = value

    async def list(self, kind: str) -> list[tuple[str, bytes]]:
        """All of a kind."""
        return [(key[1], value) for key, value in self.kept.items() if key[0] == kind]

    async def delete(self, kind: str, id: str) -> None:  # noqa: A002
        """Forget."""
        self.kept.pop((kind, id), None)
