"""Lists of containers are kept until something is committed: they are never older than what a client was told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from supervisord_ctr.model import Container, Runtime, TypedValue
from tests.support.stores import Stores, open_stores


@pytest.fixture
async def stores(tmp_path: Path) -> AsyncIterator[Stores]:
    async with open_stores(tmp_path) as made:
        await made.database.namespaces.create("one")
        await made.database.namespaces.create("two")
        yield made


def container(name: str) -> Container:
    """A record that may be stored."""
    return Container(name, runtime=Runtime("io.containerd.runc.v2"), spec=TypedValue("type", b"spec"))


async def test_p11_a_list_is_read_once_while_nothing_changes(stores: Stores) -> None:
    containers = stores.database.containers
    for name in ("a", "b"):
        await containers.create("one", container(name))
    first = await containers.list("one")
    again = await containers.list("one")
    assert [item.id for item in first] == ["a", "b"]
    assert all(before is after for before, after in zip(first, again, strict=True))
    first.clear()
    assert len(await containers.list("one")) == 2


async def test_a_list_shows_every_change_at_once(stores: Stores) -> None:
    containers = stores.database.containers
    await containers.create("one", container("a"))
    kept = (await containers.list("one"))[0]
    await containers.create("one", container("b"))
    assert [item.id for item in await containers.list("one")] == ["a", "b"]
    assert (await containers.list("one"))[0] is kept
    await containers.update("one", replace(kept, labels={"k": "v"}), ["labels"])
    assert (await containers.list("one"))[0].labels == {"k": "v"}
    await containers.delete("one", "a")
    assert [item.id for item in await containers.list("one")] == ["b"]


async def test_a_list_is_of_its_namespace(stores: Stores) -> None:
    containers = stores.database.containers
    await containers.create("one", container("a"))
    await containers.create("two", container("c"))
    for _ in range(2):
        assert [item.id for item in await containers.list("one")] == ["a"]
        assert [item.id for item in await containers.list("two")] == ["c"]
    assert [item.id for item in await containers.list("two", ["id==c"])] == ["c"]


async def test_a_record_made_again_is_the_new_one(stores: Stores) -> None:
    containers = stores.database.containers
    await containers.create("one", container("a"))
    assert (await containers.list("one"))[0].image == ""
    await containers.delete("one", "a")
    await containers.create("one", replace(container("a"), image="new"))
    assert (await containers.list("one"))[0].image == "new"
