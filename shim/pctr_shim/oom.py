"""Out-of-memory kills in a container's cgroup, also in one that is gone before it could be asked.

systemd removes a scope as soon as its last process has ended, and the scope's counts with it. Counts of
version 2 are sums over all that is or was below a group, so the parent tells: what it has counted since the
container was made, less what the shim's other containers account for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from supervisord_ctr.linux import cgroups


class OomCount:
    """The kills of one container. `told` is shared by the containers of a shim: parent's folder → kills told."""

    def __init__(self, group: cgroups.Cgroup, told: dict[str, int], before: int | None = None) -> None:
        self.kills = 0
        self.level = ""
        self._group = group
        self._told = told
        self._parent = group.parent()
        self._before = self._untold() if before is None else before

    def _untold(self) -> int:
        if self._parent is None:
            return 0
        return self._parent.oom_kills() - self._told.get(self._parent.folders[""], 0)

    def leave(self) -> dict[str, Any]:
        """For the next worker."""
        return {"kills": self.kills, "level": self.level, "before": self._before}

    @classmethod
    def resume(cls, group: cgroups.Cgroup, told: dict[str, int], left: Mapping[str, Any]) -> OomCount:
        """What `leave` described."""
        count = cls(group, told, left["before"])
        count.kills, count.level = left["kills"], left["level"]
        return count

    def update(self, *, killed: bool = False) -> bool:
        """Count anew; whether there are more than before.

        `killed` says that the first process was, by nobody who asked the shim: then a group that is gone is
        made up for.
        """
        count, parents = self._group.oom_kills(), False
        if killed and not count and not self.kills and not self._group.exists():
            count, parents = self._untold() - self._before, True
        if count <= self.kills:
            return False
        if self._parent is not None:
            folder = self._parent.folders[""]
            self._told[folder] = self._told.get(folder, 0) + count - self.kills
        self.kills = count
        self.level = self._level_from_parent() if parents else self._group.oom_level()
        return True

    def _level_from_parent(self) -> str:
        return "pod" if self._parent is not None and self._parent.oom_level() == "container" else "container"
