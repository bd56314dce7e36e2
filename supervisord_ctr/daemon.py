"""The whole machine: every part built by a plain constructor call, in the order it starts.

Read `Daemon.run` from top to bottom to see what the daemon consists of; each part's undo is pushed
where the part is made, so it stops in the reverse order. Containers are not part of it: they belong
to their shims and run on.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

from supervisord_ctr import __version__
from supervisord_ctr.aio import Executors
from supervisord_ctr.api.cri.v1.cri_pb2_grpc import (
    add_ImageServiceServicer_to_server,
    add_RuntimeServiceServicer_to_server,
)
from supervisord_ctr.api.services.containers.v1.containers_pb2_grpc import add_ContainersServicer_to_server
from supervisord_ctr.api.services.content.v1.content_pb2_grpc import add_ContentServicer_to_server
from supervisord_ctr.api.services.diff.v1.diff_pb2_grpc import add_DiffServicer_to_server
from supervisord_ctr.api.services.events.v1.events_pb2_grpc import add_EventsServicer_to_server
from supervisord_ctr.api.services.images.v1.images_pb2_grpc import add_ImagesServicer_to_server
from supervisord_ctr.api.services.introspection.v1.introspection_pb2_grpc import add_IntrospectionServicer_to_server
from supervisord_ctr.api.services.leases.v1.leases_pb2_grpc import add_LeasesServicer_to_server
from supervisord_ctr.api.services.mounts.v1.mounts_pb2_grpc import add_MountsServicer_to_server
from supervisord_ctr.api.services.namespaces.v1.namespaces_pb2_grpc import add_NamespacesServicer_to_server
from supervisord_ctr.api.services.sandbox.v1.sandbox_pb2_grpc import (
    add_ControllerServicer_to_server,
    add_StoreServicer_to_server,
)
from supervisord_ctr.api.services.snapshots.v1.snapshots_pb2_grpc import add_SnapshotsServicer_to_server
from supervisord_ctr.api.services.streaming.v1.streaming_pb2_grpc import add_StreamingServicer_to_server
from supervisord_ctr.api.services.tasks.v1.tasks_pb2_grpc import add_TasksServicer_to_server
from supervisord_ctr.api.services.transfer.v1.transfer_pb2_grpc import add_TransferServicer_to_server
from supervisord_ctr.api.services.version.v1.version_pb2_grpc import add_VersionServicer_to_server
from supervisord_ctr.config import Config
from supervisord_ctr.content import LocalContent
from supervisord_ctr.cri.fetcher import PullerFetcher
from supervisord_ctr.cri.orphans import PodOrphans
from supervisord_ctr.cri.room import CriRoom
from supervisord_ctr.diff.pool import UnpackPool
from supervisord_ctr.events import Exchange
from supervisord_ctr.images.hosts import HostsConfig
from supervisord_ctr.images.http import Http, Timeouts
from supervisord_ctr.images.pull import Puller
from supervisord_ctr.images.push import Pusher
from supervisord_ctr.lifecycle import Notifier, exclusive, make_empty_folder, make_private_folder, slim, stop_signals
from supervisord_ctr.linux.mounts import supports_idmap
from supervisord_ctr.metadata import Database, Engine, GcOptions
from supervisord_ctr.model import Platform
from supervisord_ctr.oci import limits
from supervisord_ctr.rpc import Observe, RpcServer
from supervisord_ctr.runtime import RuntimeConfig, Tasks, Zygote
from supervisord_ctr.runtime.info import RuntimeInformant
from supervisord_ctr.runtime.orphans import TaskOrphans
from supervisord_ctr.services.containers import ContainersService
from supervisord_ctr.services.content import ContentService
from supervisord_ctr.services.diff import DiffService
from supervisord_ctr.services.doctor import Doctor, Examiner, MountExaminer, StoreExaminer, doctor_info
from supervisord_ctr.services.events import EventsService
from supervisord_ctr.services.explain import explain_info, pulls_info
from supervisord_ctr.services.images import ImagesService
from supervisord_ctr.services.introspection import (
    Info,
    IntrospectionService,
    Part,
    collector_info,
    runtime_info,
    server_uuid,
)
from supervisord_ctr.services.leases import LeasesService
from supervisord_ctr.services.mounts import MountManager, MountsService
from supervisord_ctr.services.namespaces import NamespacesService
from supervisord_ctr.services.remote import GrpcRemote
from supervisord_ctr.services.restarts import POLICIES, RestartMonitor
from supervisord_ctr.services.sandbox_controller import SandboxControllerService
from supervisord_ctr.services.sandbox_store import SandboxStoreService
from supervisord_ctr.services.snapshots import SnapshotsService
from supervisord_ctr.services.streaming import StreamingService, Streams
from supervisord_ctr.services.tasks import TasksService
from supervisord_ctr.services.transfer import TransferService
from supervisord_ctr.services.version import VersionService
from supervisord_ctr.settings import Settings
from supervisord_ctr.snapshots import Snapshotter
from supervisord_ctr.snapshots.native import NativeSnapshotter
from supervisord_ctr.snapshots.overlay import OverlaySnapshotter
from supervisord_ctr.snapshots.proxy import ProxySnapshotter
from supervisord_ctr.streaming.server import StreamingServer

log = logging.getLogger(__name__)

#: Seconds that running calls get when the daemon stops.
STOP_GRACE = 2.0
#: What the names of containerd's services begin with.
_NATIVE = "containerd.services."


class Daemon:
    """One daemon, from its configuration. `run` returns after SIGTERM, SIGINT or `stop`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._settings = config.settings
        self._root = Path(self._settings.root)
        self._state = Path(self._settings.state)
        self._address = Path(self._settings.address)
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Begin the graceful stop."""
        self._stop.set()

    async def run(self) -> None:
        """Start everything, serve until told to stop, stop everything but the containers."""
        started = time.monotonic()
        os.umask(0o077)
        notifier = Notifier()
        async with AsyncExitStack() as stack:
            make_private_folder(self._root)
            make_private_folder(self._state)
            self._address.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(exclusive(self._root))
            stack.enter_context(stop_signals(self._stop))
            server = await self._build(stack)
            await server.start()
            stack.push_async_callback(server.stop, STOP_GRACE)
            # What lives as long as the daemon need not be looked at by each full collection.
            gc.collect()
            gc.freeze()
            gc.set_threshold(20_000, 50, 100)
            await stack.enter_async_context(slim())
            notifier.ready(self._address)
            log.info("supervisord-ctr %s ready", __version__, extra={
                "address": str(self._address), "root": str(self._root), "seconds": f"{time.monotonic() - started:.3f}"})
            await self._stop.wait()
            notifier.stopping()
            log.info("stopping; containers keep running")
        log.info("stopped")

    async def _build(self, stack: AsyncExitStack) -> RpcServer:
        """Every part, lower floors first; `stack` undoes them in reverse."""
        settings, root, state = self._settings, self._root, self._state
        executors = Executors.create()
        stack.callback(executors.close)

        exchange = Exchange()
        content = LocalContent(root / "content")
        engine = Engine(root / "metadata.db")
        database = Database(engine, content, snapshotters(settings, root, engine, executors), exchange.publish,
                            executors, gc=gc_options(settings),
                            isolated=settings.content.sharing_policy == "isolated")
        stack.push_async_callback(database.close)
        zygote = Zygote(
            page_merging=settings.runtime.shim_page_merging, rest=settings.runtime.shim_rest,
            programs={found.binary or "runc" for found in settings.runtime.classes.values()},
        )
        stack.push_async_callback(zygote.close)
        await asyncio.gather(database.open(), zygote.start())
        mounts = MountManager(state / "mounts", database, executors, roots=(root,))
        stack.push_async_callback(mounts.close)
        await mounts.open()
        database.gc.parts.append(mounts.collect)

        tasks = Tasks(state, root, database, exchange, zygote, executors, runtime_config(settings),
                      address=str(self._address), adjust_spec=limits.clamp)
        await tasks.recover()
        stack.push_async_callback(tasks.close)

        http = Http(timeouts(settings))
        stack.push_async_callback(http.close)
        pool = UnpackPool()
        stack.push_async_callback(pool.close)
        scratch = root / "scratch"
        await executors.run_io(make_empty_folder, scratch)
        hosts = HostsConfig(settings.registry.config_path)
        puller = Puller(
            database, executors, pool, http, hosts, scratch=scratch,
            default_snapshotter=settings.snapshots.default, max_downloads=settings.registry.max_concurrent_downloads,
            retries=settings.registry.retries, sync=settings.snapshots.sync,
        )
        stack.push_async_callback(puller.close)
        await puller.leases.recover()
        streams = Streams()
        pusher = Pusher(database, executors, http, hosts, chunk=settings.registry.push_chunk_size)
        transfer = TransferService(database, puller, pusher, streams)
        stack.push_async_callback(transfer.close)

        observe = await self._metrics(stack, {"tasks": lambda: float(len(tasks)),
                                              "pulls": lambda: float(len(puller.running()))})
        server = RpcServer(self._address, uid=settings.grpc.uid, gid=settings.grpc.gid, observe=observe,
                           max_receive=settings.grpc.max_receive_size, max_send=settings.grpc.max_send_size)
        native = _NATIVE
        serve_records(server, database, tasks)
        server.add(f"{native}diff.v1.Diff", add_DiffServicer_to_server,
                   DiffService(database, executors, pool, scratch, mounts))
        server.add(f"{native}transfer.v1.Transfer", add_TransferServicer_to_server, transfer)
        server.add(f"{native}streaming.v1.Streaming", add_StreamingServicer_to_server, StreamingService(streams))
        server.add(f"{native}events.v1.Events", add_EventsServicer_to_server, EventsService(exchange))
        server.add(f"{native}tasks.v1.Tasks", add_TasksServicer_to_server,
                   TasksService(tasks, database, executors, mounts))
        server.add(f"{native}mounts.v1.Mounts", add_MountsServicer_to_server, MountsService(mounts))
        if settings.restart.interval > 0:
            restarts = RestartMonitor(database, tasks, settings.restart.interval)
            stack.push_async_callback(restarts.close)
            restarts.start()
        controller = SandboxControllerService({"shim": tasks.sandboxes}, exchange)
        stack.push_async_callback(controller.close)
        server.add(f"{native}sandbox.v1.Controller", add_ControllerServicer_to_server, controller)
        cri: CriRoom | None = None
        if settings.cri.enabled:
            cri = CriRoom(settings, database, tasks, zygote, exchange, executors,
                          PullerFetcher(puller, settings.cri.image_pull_progress_timeout))
            await self._serve_kubernetes(stack, server, cri)
        told = [*parts(settings, root, database), Part("io.containerd.transfer.v1", "local", info=pulls_info(puller)),
                Part("io.supervisord-ctr.doctor.v1", "doctor", info=doctor(root, state, database, mounts, tasks, cri)),
                Part("io.supervisord-ctr.explain.v1", "explain", info=explain_info(tasks, cri.core if cri else None))]
        server.add(f"{native}introspection.v1.Introspection", add_IntrospectionServicer_to_server,
                   IntrospectionService(told, server_uuid(root)))
        return server

    async def _serve_kubernetes(self, stack: AsyncExitStack, server: RpcServer, cri: CriRoom) -> None:
        """CRI on the same socket, and the HTTP server behind its exec, attach and port-forward."""
        await cri.start()
        stack.push_async_callback(cri.close)
        streaming = StreamingServer(cri.backend, self._settings.cri.streaming)
        await streaming.start()
        stack.push_async_callback(streaming.close)
        server.add("runtime.v1.RuntimeService", add_RuntimeServiceServicer_to_server, cri.runtime_service(streaming))
        server.add("runtime.v1.ImageService", add_ImageServiceServicer_to_server, cri.image_service())

    async def _metrics(
        self, stack: AsyncExitStack, gauges: Mapping[str, Callable[[], float]]
    ) -> Observe | None:
        """Prometheus, where an address is configured; the library is not loaded otherwise."""
        if not self._settings.metrics.address:
            return None
        from supervisord_ctr.metrics import Metrics

        metrics = Metrics(self._settings.metrics.address, gauges)
        await metrics.start()
        stack.push_async_callback(metrics.close)
        return metrics.observe


def serve_records(server: RpcServer, database: Database, tasks: Tasks) -> None:
    """The services that need little but the database."""
    native = _NATIVE
    server.add(f"{native}version.v1.Version", add_VersionServicer_to_server, VersionService())
    server.add(f"{native}namespaces.v1.Namespaces", add_NamespacesServicer_to_server, NamespacesService(database))
    server.add(f"{native}containers.v1.Containers", add_ContainersServicer_to_server,
               ContainersService(database, tasks.expect))
    server.add(f"{native}images.v1.Images", add_ImagesServicer_to_server, ImagesService(database))
    server.add(f"{native}content.v1.Content", add_ContentServicer_to_server, ContentService(database))
    server.add(f"{native}snapshots.v1.Snapshots", add_SnapshotsServicer_to_server, SnapshotsService(database))
    server.add(f"{native}leases.v1.Leases", add_LeasesServicer_to_server, LeasesService(database))
    server.add(f"{native}sandbox.v1.Store", add_StoreServicer_to_server, SandboxStoreService(database))


def snapshotters(settings: Settings, root: Path, engine: Engine, executors: Executors) -> dict[str, Snapshotter]:
    """Our own, and those that other programs serve."""
    made: dict[str, Snapshotter] = {
        "overlayfs": OverlaySnapshotter(
            root / "snapshots" / "overlayfs", engine.records("overlayfs"), executors, remap_ids=supports_idmap(root)),
        "native": NativeSnapshotter(root / "snapshots" / "native", engine.records("native"), executors),
    }
    for name, plugin in settings.proxy_plugins.items():
        if plugin.type == "snapshot":
            made[name] = ProxySnapshotter(name, GrpcRemote(plugin.address))
    return made


def runtime_config(settings: Settings) -> RuntimeConfig:
    """The runtime room's settings."""
    chosen = settings.runtime.classes[settings.runtime.default]
    own = {"io.containerd.pctr.v1"}
    if chosen.own_shim:
        own.add("io.containerd.runc.v2")
    return RuntimeConfig(
        default=chosen.type, own=frozenset(own), oci_runtime=chosen.binary or "runc", oci_root=chosen.root,
        debug=settings.runtime.shim_debug,
    )


def gc_options(settings: Settings) -> GcOptions:
    """When garbage is collected."""
    told = settings.gc
    return GcOptions(
        schedule_delay=told.schedule_delay, startup_delay=told.startup_delay, period=told.interval or float("inf"),
        deletion_threshold=told.deletion_threshold, mutation_threshold=told.mutation_threshold)


def timeouts(settings: Settings) -> Timeouts:
    """The registry client's patience."""
    told = settings.registry
    return Timeouts(told.connect_timeout, told.header_timeout, told.stall_timeout, told.minimum_rate)


def doctor(
    root: Path, state: Path, database: Database, mounts: MountManager, tasks: Tasks, cri: CriRoom | None
) -> Info:
    """Who finds what was left behind: one examiner for each room."""

    async def namespaces() -> list[str]:
        return [namespace.name for namespace in await database.namespaces.list()]

    examiners: list[Examiner] = [TaskOrphans(tasks, state, namespaces), MountExaminer(root, state, mounts, database)]
    if cri is not None:
        examiners.insert(0, PodOrphans(cri.core, database.addresses))
    return doctor_info(Doctor(examiners, StoreExaminer(database)))


def parts(settings: Settings, root: Path, database: Database) -> list[Part]:
    """What the introspection service tells: our parts under containerd's types and ids."""
    found = [Part("io.containerd.content.v1", "content", {"root": str(root / "content")})]
    for name, snapshotter in database.snapshotters.items():
        found.append(Part("io.containerd.snapshotter.v1", name, {"root": str(root / "snapshots" / name)},
                          sorted(snapshotter.capabilities), host_platform()))
    for name, reason in database.unavailable.items():
        found.append(Part("io.containerd.snapshotter.v1", name, error=reason))
    found.append(Part("io.containerd.metadata.v1", "sqlite", {"path": str(root / "metadata.db")}))
    found.append(Part("io.containerd.gc.v1", "scheduler", info=collector_info(database.gc)))
    found.append(Part("io.containerd.runtime.v2", "task", platform=host_platform(),
                      answer=runtime_info(RuntimeInformant(runtime_config(settings)))))
    found.append(Part("io.containerd.shim.v1", "manager"))
    if settings.restart.interval > 0:
        found.append(Part("io.containerd.monitor.container.v1", "restart", capabilities=POLICIES))
    found.append(Part("io.containerd.differ.v1", "walking", platform=host_platform()))
    found.append(Part("io.containerd.event.v1", "exchange"))
    found.append(Part("io.containerd.streaming.v1", "manager"))
    for name in ("containers", "content", "diff", "events", "healthcheck", "images", "introspection", "leases",
                 "mounts", "namespaces", "sandbox-controllers", "sandboxes", "snapshots", "streaming", "tasks",
                 "transfer", "version", *(["cri"] if settings.cri.enabled else [])):
        found.append(Part("io.containerd.grpc.v1", name))
    return found


def host_platform() -> Platform:
    """The platform whose containers run here."""
    machine = platform.machine()
    return Platform("linux", {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine))
