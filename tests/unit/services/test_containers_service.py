"""The kept messages of List are those of the present records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from supervisord_ctr.api.services.containers.v1 import containers_pb2 as pb
from supervisord_ctr.model import Container, Runtime, TypedValue
from supervisord_ctr.services.containers import ContainersService
from tests.support.stores import open_stores


class Context:
    """The headers of a request."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("containerd-namespace", "n"),)


async def images(service: ContainersService) -> dict[str, str]:
    answer: Any = await service.List(pb.ListContainersRequest(), Context())  # type: ignore[arg-type]
    assert isinstance(answer, bytes)  # handed on as it is kept
    return {item.id: item.image for item in pb.ListContainersResponse.FromString(answer).containers}


async def test_a_list_shows_what_was_changed_made_again_and_removed(tmp_path: Path) -> None:
    async with open_stores(tmp_path, collect=False) as stores:
        containers = stores.database.containers
        service = ContainersService(stores.database)
        first = Container("a", image="one", runtime=Runtime("r"), spec=TypedValue("s", b"x"))
        await containers.create("n", first)
        assert await images(service) == {"a": "one"}
        await containers.update("n", Container("a", image="two"), ["image"])
        assert await images(service) == {"a": "two"}
        await containers.delete("n", "a")
        assert await images(service) == {}
        await containers.create("n", first)
        assert await images(service) == {"a": "one"}
