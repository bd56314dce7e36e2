"""The doctor's own part: what lasts is told, repairs are asked for and checked, one failure hides nothing (P5)."""

from __future__ import annotations

from collections.abc import Sequence

from supervisord_ctr.errors import Unavailable
from supervisord_ctr.model import Finding
from supervisord_ctr.services.doctor import Doctor, doctor_info


class Room:
    """An examiner whose findings are a list for each look; the last one stays."""

    def __init__(self, *looks: Sequence[Finding], stubborn: str = "") -> None:
        self._looks = [list(look) for look in looks]
        self._stubborn = stubborn
        self.repaired: list[Finding] = []
        self.verify = False

    async def find(self) -> list[Finding]:
        look = self._looks[0] if len(self._looks) == 1 else self._looks.pop(0)
        return [finding for finding in look if finding not in self.repaired]

    async def repair(self, findings: Sequence[Finding]) -> dict[Finding, str]:
        if self._stubborn:
            return dict.fromkeys(findings, self._stubborn)
        self.repaired += findings
        return {}


class Broken(Room):
    """An examiner that cannot look."""

    async def find(self) -> list[Finding]:
        raise Unavailable("the room is locked")


def finding(kind: str, name: str, remedy: str = "remove") -> Finding:
    return Finding(kind, name, "left behind", remedy, 7)


def doctor(*rooms: Room, store: Room | None = None) -> Doctor:
    return Doctor(rooms, store or Room([]), pause=0)  # type: ignore[arg-type]


async def test_what_only_one_look_sees_is_not_told() -> None:
    stays, passes, comes = finding("bundle", "stays"), finding("bundle", "passes"), finding("bundle", "comes")
    room = Room([stays, passes], [stays, comes])
    assert await doctor(room).examine() == [(stays, "found")]


async def test_nothing_is_changed_unless_a_repair_is_asked_for() -> None:
    room = Room([finding("shim", "a")])
    await doctor(room).examine()
    assert room.repaired == []
    assert await doctor(room).examine(repair=True) == [(finding("shim", "a"), "removed")]
    assert room.repaired == [finding("shim", "a")]


async def test_only_what_a_repair_may_take_is_taken() -> None:
    kept = [finding("shim", name, remedy) for name, remedy in (("a", "hand"), ("b", "pull"), ("c", "release"))]
    room = Room([*kept, finding("blob", "d", "gc")])
    states = dict(await doctor(room).examine(repair=True))
    assert [states[found] for found in kept] == ["found"] * 3
    assert room.repaired == [finding("blob", "d", "gc")]


async def test_why_something_is_left_is_told() -> None:
    room = Room([finding("mount", "m")], stubborn="device is busy")
    assert await doctor(room).examine(repair=True) == [(finding("mount", "m"), "left: device is busy")]


async def test_a_room_that_cannot_be_examined_hides_no_other() -> None:
    found = await doctor(Broken(), Room([finding("cgroup", "/ns/a")])).examine()
    assert [(told.kind, told.problem, told.remedy) for told, _ in found] == [
        ("examination", "the room is locked", "hand"), ("cgroup", "left behind", "remove")]


async def test_the_answer_is_what_a_struct_holds() -> None:
    answer = await doctor_info(doctor(Room([finding("netns", "p")])))({"repair": False})
    assert answer == {"findings": [{
        "kind": "netns", "id": "p", "problem": "left behind", "remedy": "remove", "size": 7, "state": "found"}]}
