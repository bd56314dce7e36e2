"""The CRI room as one part of the machine: built from the stores, started after the tasks have recovered.

Owns the order of start and stop. `runtime_service` and `image_service` are registered by the
composition root; `backend` is what its streaming server serves.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from supervisord_ctr.aio import Executors, Operations, TaskOwner
from supervisord_ctr.cri import exec_process, recovery
from supervisord_ctr.cri.core import Core
from supervisord_ctr.cri.events import EventHub
from supervisord_ctr.cri.fetcher import PullerFetcher
from supervisord_ctr.cri.image_reader import ImageReader
from supervisord_ctr.cri.image_service import ImageService
from supervisord_ctr.cri.image_store import ImageStore
from supervisord_ctr.cri.service import RuntimeService
from supervisord_ctr.cri.state import State
from supervisord_ctr.cri.streaming_backend import StreamingBackend
from supervisord_ctr.sandbox.bridge import EmbeddedBridge
from supervisord_ctr.sandbox.cni import Cni
from supervisord_ctr.sandbox.cni_config import ConfigFolder
from supervisord_ctr.sandbox.environment import Environments
from supervisord_ctr.sandbox.network import PodNetworks
from supervisord_ctr.settings import Settings
from supervisord_ctr.streaming import Urls

if TYPE_CHECKING:
    from supervisord_ctr.events import Exchange
    from supervisord_ctr.metadata import Database
    from supervisord_ctr.runtime import Tasks, Zygote


class _Forker:
    """The zygote, as the pods use it."""

    def __init__(self, zygote: Zygote) -> None:
        self._zygote = zygote

    async def fork_pause(
        self, *, netns: str = "", ipcns: str = "", utsns: str = "", userns: str = "", hostname: str = "",
        label: str = "", mount_label: str = "",
    ) -> tuple[int, int]:
        forked = await self._zygote.fork_pause(
            netns=netns, ipcns=ipcns, utsns=utsns, userns=userns, hostname=hostname, label=label,
            mount_label=mount_label,
        )
        return forked.pid, forked.start_time


class CriRoom:
    """Everything of CRI. `await start()` before the socket is served; `await close()` leaves containers running."""

    def __init__(
        self, settings: Settings, database: Database, tasks: Tasks, zygote: Zygote, exchange: Exchange,
        executors: Executors, fetcher: PullerFetcher,
    ) -> None:
        self._owner = TaskOwner("cri")
        self._exchange = exchange
        root, run = Path(settings.root) / "cri", Path(settings.state) / "cri"
        cni = settings.cri.cni
        plugins = Cni(
            ConfigFolder(Path(cni.conf_dir), cni.max_conf_num), cni.bin_dirs, cni.plugin_timeout,
            skip_idle=cni.skip_idle_plugins,
        )
        bridge = None
        if cni.embedded_bridge:
            bridge = EmbeddedBridge(database.addresses, executors, cni.bridge_name, cni.bridge_subnet)
        self.core = Core(
            settings=settings, database=database, tasks=tasks, exchange=exchange, executors=executors,
            owner=self._owner, operations=Operations(self._owner), state=State(database.cri), events=EventHub(),
            environments=Environments(run / "sandboxes"), networks=PodNetworks(plugins, database.cri, bridge),
            forker=_Forker(zygote),
            images=ImageStore(database, ImageReader(database, fetcher), settings.cri.pinned_images),
            root=root, run=run,
        )
        self.backend = StreamingBackend(self.core)
        self._fetcher = fetcher

    def runtime_service(self, urls: Urls) -> RuntimeService:
        """The servicer of runtime.v1.RuntimeService."""
        return RuntimeService(self.core, urls)

    def image_service(self) -> ImageService:
        """The servicer of runtime.v1.ImageService."""
        return ImageService(self.core, self._fetcher)

    async def start(self) -> None:
        """Bring memory in line with the machine; orphans are taken away in the background."""
        self.core.root.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.core.run.mkdir(mode=0o711, parents=True, exist_ok=True)
        execs = await self.core.executors.run_io(exec_process.leftovers, self.core.run / "exec")
        await recovery.recover(self.core)
        self._owner.start(exec_process.end_leftovers(self.core, execs), "leftover execs")
        self._owner.start(recovery.take_orphans_away(self.core), "orphans")
        self._owner.start(self.core.images.follow(self._exchange), "images")
        self._owner.start(self.core.stats.run(self.core), "layers")

    async def close(self) -> None:
        """End streams and background work; pods and containers stay."""
        self.core.closing = True
        self.core.events.close()
        await self._owner.close()
