"""What pods and containers left behind: namespaces, networks, addresses, interfaces, folders, snapshots (P5).

Owns finding what belongs to no pod and no container while pods are made and removed. Taking it away
is mostly `recovery.one_pass`, which a start runs too. Nothing of a pod that is ready is touched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from supervisord_ctr import errors
from supervisord_ctr.cri import ids, recovery
from supervisord_ctr.cri.core import Core
from supervisord_ctr.linux import mounts
from supervisord_ctr.metadata.tables import Addresses
from supervisord_ctr.model import Finding, SnapshotKind
from supervisord_ctr.names import CRI_NAMESPACE, LABEL_GC_ROOT
from supervisord_ctr.runtime.orphans import size_of
from supervisord_ctr.sandbox.bridge import EmbeddedBridge

_OURS = re.compile(r"([0-9a-f]{64})(?:-volume-[0-9]+)?\Z")
_PINNED = {"net": "netns", "ipc": "ipcns", "uts": "utsns", "user": "userns"}
_FOLDERS = {
    "volume-folder": "volumes of a container that is gone",
    "container-folder": "the folder of a container that is gone",
}


class PodOrphans:
    """An examiner (`services.doctor`)."""

    def __init__(self, core: Core, addresses: Addresses) -> None:
        self._core = core
        self._addresses = addresses

    @property
    def _bridge(self) -> EmbeddedBridge | None:
        bridge = self._core.networks.bridge
        return bridge if isinstance(bridge, EmbeddedBridge) else None

    async def find(self) -> list[Finding]:
        """Everything that belongs to no pod and no container."""
        run_io = self._core.executors.run_io
        found = await run_io(self._environments, self._needed())
        found += self._networks()
        found += await self._leases()
        found += await run_io(self._interfaces, self._core.networks.known())
        containers = {*(container.id for container in self._core.state.containers()), *self._core.stages.all()}
        found += await run_io(self._folders, containers)
        found += await self._stored()
        return found

    async def repair(self, findings: Sequence[Finding]) -> dict[Finding, str]:
        """Take them away; what could not be, and why."""
        left: dict[Finding, str] = {}
        swept = False
        for finding in findings:
            try:
                if finding.kind == "network":
                    await self._core.networks.detach(finding.id)
                elif finding.kind == "address":
                    await self._release(finding.id)
                elif finding.kind == "interface":
                    if self._bridge is not None:
                        await self._core.executors.run_io(self._bridge.remove_interface, finding.id)
                elif finding.kind == "exec-pipes":
                    await self._core.executors.run_io(recovery.remove_folder, Path(finding.id))
                elif finding.kind in (*_PINNED.values(), "shm", "sandbox-folder"):
                    await self._remove_environment(finding)
                elif not swept:
                    swept = True
                    await recovery.one_pass(self._core)
            except (errors.Error, OSError) as error:
                left[finding] = str(error)
        return left

    # -- namespaces ----------------------------------------------------------------------------------

    def _needed(self) -> set[str]:
        """Pods that exist, are being made or removed, or whose network still has to be detached."""
        core = self._core
        return {*(pod.id for pod in core.state.pods()), *core.stages.all(), *core.networks.known()}

    def _environments(self, needed: set[str]) -> list[Finding]:
        found = []
        for pod_id in self._core.environments.known():
            if pod_id in needed:
                continue
            folder = self._core.environments.files(pod_id).folder
            for entry in mounts.mounts_below(folder):
                name = os.path.basename(entry.target)
                kind = _PINNED.get(name, "shm") if entry.fstype == "nsfs" else "shm"
                found.append(Finding(kind, entry.target, "pinned for a pod that is gone", "remove"))
            found.append(Finding("sandbox-folder", str(folder), "files of a pod that is gone", "remove",
                                 size_of(folder)))
        return found

    async def _remove_environment(self, finding: Finding) -> None:
        base = self._core.run / "sandboxes"
        pod_id = Path(finding.id).relative_to(base).parts[0]
        if pod_id not in self._needed():
            await self._core.executors.run_io(self._core.environments.remove, pod_id)

    # -- networks ------------------------------------------------------------------------------------

    def _networks(self) -> list[Finding]:
        wanted = recovery.wanted_networks(self._core)
        found = []
        for pod_id in self._core.networks.known():
            attached = self._core.networks.get(pod_id)
            if pod_id in wanted or attached is None:
                continue
            where = ", ".join(attached.addresses) or "no address"
            found.append(Finding("network", pod_id, f"attached for a pod that is gone or stopped ({where})", "remove"))
        return found

    async def _leases(self) -> list[Finding]:
        known = set(self._core.networks.known())
        return [
            Finding("address", f"{address} {owner}", f"leased in {network}, its owner is gone", "remove")
            for network, address, owner in await self._addresses.all() if owner not in known
        ]

    async def _release(self, name: str) -> None:
        owner = name.partition(" ")[2]
        if owner in self._core.networks.known():
            return
        if self._bridge is not None:
            await self._bridge.detach(owner)
        for network, _, holder in await self._addresses.all():
            if holder == owner:
                await self._addresses.release(network, owner)

    def _interfaces(self, owners: Sequence[str]) -> list[Finding]:
        if self._bridge is None:
            return []
        problem = "attached to the embedded bridge, its owner is gone"
        return [Finding("interface", name, problem, "remove") for name in self._bridge.stray_interfaces(owners)]

    # -- folders, stored containers, snapshots ---------------------------------------------------------

    def _folders(self, busy: set[str]) -> list[Finding]:
        core, found = self._core, []
        for folder, kind in (
            (core.run / "image-volumes", "volume-folder"), (core.root / "containers", "container-folder")
        ):
            for path in _inside(folder):
                if path.name not in busy:
                    found.append(Finding(kind, str(path), _FOLDERS[kind], "remove", size_of(path)))
        for path in _inside(core.run / "exec"):
            try:
                owner = (path / "container").read_text()
            except OSError:
                owner = ""
            if owner not in busy:
                found.append(Finding("exec-pipes", str(path), "pipes of an exec that is gone", "remove"))
        return found

    async def _stored(self) -> list[Finding]:
        core, found = self._core, []
        busy = set(core.stages.all())

        def needed(identity: str) -> bool:
            return core.state.container_or_none(identity) is not None or identity in busy

        labels = [f'labels."{ids.LABEL_KIND}"=={ids.KIND_CONTAINER}']
        for stored in await core.database.containers.list(CRI_NAMESPACE, labels):
            if _OURS.match(stored.id) and not needed(stored.id):
                found.append(Finding("container", stored.id, "a container whose creation was cut off", "remove"))
        for name, snapshotter in core.database.snapshotters.items():
            for info in await snapshotter.walk(CRI_NAMESPACE):
                match = _OURS.match(info.name)
                if info.kind == SnapshotKind.COMMITTED or match is None or LABEL_GC_ROOT not in info.labels:
                    continue
                if not needed(match[1]):
                    usage = await snapshotter.usage(CRI_NAMESPACE, info.name)
                    problem = "a snapshot of a container that is gone"
                    found.append(Finding("snapshot", f"{name}/{info.name}", problem, "remove", usage.size))
        return found


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
