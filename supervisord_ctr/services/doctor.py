"""The examination of the whole daemon (`pctr doctor`, P5): what is wrong, what was left behind, and the repair.

Owns asking every examiner, telling what lasts from what is only passing, and the order: nothing is
changed unless a repair is asked for, and then only what an examiner found and finds again. How each
thing is found and removed belongs to the room whose thing it is.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from supervisord_ctr.errors import Error
from supervisord_ctr.linux import mounts
from supervisord_ctr.metadata import Database
from supervisord_ctr.metadata.doctor import examine
from supervisord_ctr.model import Finding
from supervisord_ctr.services.introspection import Info
from supervisord_ctr.services.mounts import MountManager

log = logging.getLogger(__name__)

#: Seconds between two looks: what only the first one sees belonged to work that was under way.
PAUSE = 0.3
#: What a repair takes away; the other remedies are not ours to apply.
REPAIRABLE = ("remove", "gc")

#: Below these folders of `state` other rooms look, or mounts come and go with running calls.
_OTHERS = ("tasks", "sandboxes", "cri", "checkpoints", "runc")
#: Folders of `root`, and from which depth on a mount below them is a stray ("snapshots/NAME/snapshots/NUMBER").
_DEPTHS = {"snapshots": 4, "tasks": 3, "sandboxes": 3}


class Examiner(Protocol):
    """Finds what is wrong in one room, and takes away what it found."""

    async def find(self) -> list[Finding]:
        """Everything; changes nothing."""

    async def repair(self, findings: Sequence[Finding]) -> dict[Finding, str]:
        """Take findings away after looking at each again; what could not be, and why."""


class StoreExaminer:
    """Database, content and snapshots. With `verify` every blob is read once and its digest compared."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.verify = False

    async def find(self) -> list[Finding]:
        """See `metadata.doctor.examine`."""
        return await examine(self._database, verify=self.verify)

    async def repair(self, findings: Sequence[Finding]) -> dict[Finding, str]:
        """One collection removes all of it."""
        report = await self._database.gc.collect()
        return dict.fromkeys(findings, "; ".join(report.errors)) if report.errors else {}


class MountExaminer:
    """Mounts of the mount service without a record, and mounts below our folders that no part explains.

    Below the root folder only places inside snapshots and working folders count: people may mount a
    disk on any folder above them.
    """

    def __init__(self, root: Path, state: Path, manager: MountManager, database: Database) -> None:
        self._root = Path(os.path.realpath(root))
        self._state = Path(os.path.realpath(state))
        self._manager = manager
        self._run_io = database.executors.run_io

    async def find(self) -> list[Finding]:
        """Folders of activations, then other mounts."""
        strays = await self._manager.strays()
        found = [Finding("mount-folder", path, "an activated mount without a record", "remove") for path in strays]
        found += await self._run_io(self._unexplained)
        return found

    def _unexplained(self) -> list[Finding]:
        others = (*(self._state / name for name in _OTHERS), Path(os.path.realpath(self._manager.folder)))
        found = []
        for entry in mounts.mount_table():
            path = Path(entry.target)
            if path.is_relative_to(self._state):
                stray = path != self._state and not any(path.is_relative_to(other) for other in others)
            elif path.is_relative_to(self._root):
                inner = path.relative_to(self._root).parts
                stray = len(inner) >= _DEPTHS.get(inner[0] if inner else "", len(inner) + 1)
            else:
                continue
            if stray:
                problem = f"a mount ({entry.fstype}) that no part explains"
                found.append(Finding("mount", entry.target, problem, "remove"))
        return found

    async def repair(self, findings: Sequence[Finding]) -> dict[Finding, str]:
        """Unmount, lazily: who has a file open there keeps it."""
        left: dict[Finding, str] = {}
        for finding in findings:
            try:
                if finding.kind == "mount-folder":
                    await self._manager.remove_stray(finding.id)
                else:
                    await self._run_io(mounts.unmount_all, finding.id)
            except (Error, OSError) as error:
                left[finding] = str(error)
        return left


class Doctor:
    """All examiners; examinations run one after the other."""

    def __init__(self, examiners: Sequence[Examiner], store: StoreExaminer, pause: float = PAUSE) -> None:
        self._examiners = (store, *examiners)
        self._store = store
        self._pause = pause
        self._lock = asyncio.Lock()

    async def examine(self, *, verify: bool = False, repair: bool = False) -> list[tuple[Finding, str]]:
        """Each finding with its state: "found", "removed", or "left: WHY" after a repair that failed."""
        async with self._lock:
            self._store.verify = False
            found = await self._lasting(verify)
            if not repair:
                return [(finding, "found") for _, finding in found]
            return await self._repair(found)

    async def _look(self) -> list[tuple[Examiner, Finding]]:
        return [(examiner, finding) for examiner in self._examiners for finding in await self._find(examiner)]

    async def _find(self, examiner: Examiner) -> list[Finding]:
        """A room that cannot be examined is a finding itself: the others are examined all the same."""
        try:
            return await examiner.find()
        except (Error, OSError) as error:
            log.exception("examination failed")
            return [Finding("examination", type(examiner).__name__, str(error), "hand")]

    async def _lasting(self, verify: bool) -> list[tuple[Examiner, Finding]]:
        """What two looks see."""
        first = {(finding.kind, finding.id) for _, finding in await self._look()}
        await asyncio.sleep(self._pause)
        again = [(examiner, finding) for examiner, finding in await self._look()
                 if (finding.kind, finding.id) in first]
        if verify:
            seen = {(finding.kind, finding.id) for _, finding in again}
            self._store.verify = True
            again += [(self._store, finding) for finding in await self._find(self._store)
                      if (finding.kind, finding.id) not in seen and finding.remedy == "pull"]
            self._store.verify = False
        return again

    async def _repair(self, found: Sequence[tuple[Examiner, Finding]]) -> list[tuple[Finding, str]]:
        why: dict[Finding, str] = {}
        for examiner in self._examiners:
            own = [finding for owner, finding in found if owner is examiner and finding.remedy in REPAIRABLE]
            if own:
                log.warning("repair: taking %d things away, first %s %s", len(own), own[0].kind, own[0].id)
                why.update(await examiner.repair(own))
        still = {(finding.kind, finding.id) for _, finding in await self._look()}
        result = []
        for _, finding in found:
            if finding.remedy not in REPAIRABLE:
                result.append((finding, "found"))
            elif (finding.kind, finding.id) not in still:
                result.append((finding, "removed"))
            else:
                result.append((finding, f"left: {why.get(finding) or 'it is still there'}"))
        return result


def doctor_info(doctor: Doctor) -> Info:
    """The doctor through `PluginInfo`: {"repair": bool, "verify": bool} → {"findings": [{"kind", "id", "problem",
    "remedy", "size", "state"}]}."""

    async def info(question: Mapping[str, Any]) -> Mapping[str, Any]:
        found = await doctor.examine(verify=bool(question.get("verify")), repair=bool(question.get("repair")))
        return {"findings": [
            {"kind": finding.kind, "id": finding.id, "problem": finding.problem, "remedy": finding.remedy,
             "size": finding.size, "state": state}
            for finding, state in found
        ]}

    return info
