"""Sandboxes by shim: what containerd calls the "shim" sandboxer.

A sandbox is a shim that lives without containers and takes those of its group. One of ours has no
process of its own (D7): it is ready while its shim lives, and ends when it is stopped. A foreign
shim that serves `containerd.runtime.sandbox.v1.Sandbox` is asked; one that does not offers no
sandboxes, and says so with Unimplemented.

Bundles are in `<state>/sandboxes/<namespace>/<id>`, beside those of tasks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import Message

from supervisord_ctr import errors
from supervisord_ctr.aio import KeyedLock
from supervisord_ctr.api.runtime.sandbox.v1 import sandbox_pb2 as api
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.model import Exit, Mount, Platform, Sandbox, TypedValue
from supervisord_ctr.names import check_identifier
from supervisord_ctr.runtime import bundle as bundles
from supervisord_ctr.runtime.bundle import Bundle
from supervisord_ctr.runtime.connection import seconds
from supervisord_ctr.runtime.shims import Launch, Shim

if TYPE_CHECKING:
    from supervisord_ctr.runtime.tasks import Tasks

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)

_SERVICE = "containerd.runtime.sandbox.v1.Sandbox"
READY, NOT_READY = "SANDBOX_READY", "SANDBOX_NOTREADY"


@dataclass(frozen=True, slots=True)
class SandboxStatus:
    """What a sandbox is doing; times are 0.0 for "not yet"."""

    id: str
    pid: int = 0
    state: str = NOT_READY
    created_at: float = 0.0
    exited_at: float = 0.0
    address: str = ""
    version: int = 0
    info: Mapping[str, str] = field(default_factory=dict)
    extra: TypedValue | None = None
    spec: TypedValue | None = None


@dataclass(eq=False)
class _Held:
    bundle: Bundle
    shim: Shim
    created_at: float
    started: bool = False
    exit: Exit | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def foreign(self) -> bool:
        return bool(self.shim.record.binary)

    @property
    def member(self) -> str:
        """What keeps the shim alive while it has no containers, in place of a task's id."""
        return f"sandbox:{self.bundle.id}"

    def end(self, status: int) -> None:
        if self.exit is None:
            self.exit = Exit(status, time.time())
        self.ended.set()


class Sandboxes:
    """The sandboxes that shims keep, by namespace and id."""

    def __init__(self, tasks: Tasks, state_dir: Path, root_dir: Path) -> None:
        self._tasks = tasks
        self._state = state_dir / "sandboxes"
        self._root = root_dir / "sandboxes"
        self._locks = KeyedLock()
        self._held: dict[tuple[str, str], _Held] = {}

    async def recover(self) -> None:
        """Connect to the shims of a former daemon's sandboxes; remove what is left of dead ones."""
        for bundle in await self._tasks.run_io(bundles.find_all, self._state):
            await self.reconsider(bundle)

    async def reconsider(self, bundle: Bundle) -> None:
        """Hold the sandbox of a bundle when its shim answers, remove what is left of it otherwise."""
        record = await self._tasks.run_io(bundle.read_record)
        try:
            if record is None:
                raise errors.NotFound("no record")
            shim = await self._tasks.shims.connect(bundle, record, timeout=self._tasks.config.load_timeout)
        except errors.Error as error:
            log.warning("sandbox %s in %s is gone: %s", bundle.id, bundle.namespace, error)
            with contextlib.suppress(errors.Error):
                await self._tasks.run_io(bundle.delete)
            return
        self._hold(_Held(bundle, shim, bundle.path.stat().st_mtime, started=True))

    def holds(self, namespace: str, sandbox: str) -> bool:
        """Whether a sandbox is there, or is being made or taken away right now."""
        return (namespace, sandbox) in self._held or self._locks.locked((namespace, sandbox))

    async def recheck(self, bundle: Bundle) -> None:
        """`reconsider` a bundle that may belong to a sandbox by now."""
        async with self._locks.hold((bundle.namespace, bundle.id)):
            if (bundle.namespace, bundle.id) not in self._held:
                await self.reconsider(bundle)

    @property
    def folders(self) -> tuple[Path, Path]:
        """Where bundles and working folders of sandboxes are."""
        return self._state, self._root

    def _hold(self, held: _Held) -> None:
        self._held[held.bundle.namespace, held.bundle.id] = held
        held.shim.tasks.add(held.member)
        self._tasks.own(self._watch(held), f"sandbox {held.bundle.id}")

    async def _watch(self, held: _Held) -> None:
        await held.shim.service.client.wait_closed()
        held.end(137)

    def _get(self, namespace: str, sandbox: str) -> _Held:
        held = self._held.get((namespace, sandbox))
        if held is None:
            raise errors.NotFound(f"sandbox {sandbox!r}: not found", kind="sandbox", key=sandbox)
        return held

    async def _ask(self, held: _Held, method: str, request: Message, response: type[M]) -> M:
        return await held.shim.service.call_service(_SERVICE, method, request, response)

    async def create(
        self, namespace: str, sandbox: Sandbox, *, rootfs: Sequence[Mount] = (), options: TypedValue | None = None,
        netns: str = "", annotations: Mapping[str, str] | None = None,
    ) -> None:
        """Start the shim of a sandbox. `AlreadyExists` when it runs."""
        check_identifier(sandbox.id, "sandbox id")
        key = (namespace, sandbox.id)
        async with self._locks.hold(key):
            if key in self._held:
                raise errors.AlreadyExists(f"sandbox {sandbox.id} already running", kind="sandbox", key=sandbox.id)
            spec = sandbox.spec.value if sandbox.spec is not None else None
            async with contextlib.AsyncExitStack() as undo:
                bundle = await self._tasks.run_io(
                    Bundle.create, self._state, self._root, namespace, sandbox.id, spec or None
                )
                undo.push_async_callback(self._tasks.run_io, bundle.delete)
                launch = Launch(bundle, sandbox.runtime.name, sandbox.runtime.options, sandbox.id)
                shim = await self._tasks.shims.launch(launch)
                held = _Held(bundle, shim, time.time())
                shim.tasks.discard(bundle.id)
                shim.tasks.add(held.member)
                undo.push_async_callback(self._tasks.shims.release, shim, held.member)
                record = replace(shim.record, sandbox=True, group=sandbox.id)
                shim.record = record
                await self._tasks.run_io(bundle.write_record, record)
                if held.foreign:
                    request = api.CreateSandboxRequest(
                        sandbox_id=sandbox.id, bundle_path=str(bundle.path), netns_path=netns,
                        annotations=dict(annotations or {}),
                        rootfs=[
                            types_pb2.Mount(
                                type=part.type, source=part.source, target=part.target, options=part.options
                            )
                            for part in rootfs
                        ],
                    )
                    if options is not None:
                        request.options.type_url, request.options.value = options.type_url, options.value
                    await self._ask(held, "CreateSandbox", request, api.CreateSandboxResponse)
                undo.pop_all()
                self._hold(held)

    async def start(self, namespace: str, sandbox: str) -> SandboxStatus:
        """Make it ready."""
        held = self._get(namespace, sandbox)
        endpoint = {"address": held.shim.address, "version": held.shim.service.version}
        if held.foreign:
            found = await self._ask(
                held, "StartSandbox", api.StartSandboxRequest(sandbox_id=sandbox), api.StartSandboxResponse
            )
            spec = TypedValue(found.spec.type_url, found.spec.value) if found.HasField("spec") else None
            held.created_at = seconds(found.created_at) or held.created_at
            status = SandboxStatus(sandbox, found.pid, READY, held.created_at, spec=spec)
        else:
            status = SandboxStatus(sandbox, held.shim.record.pid, READY, held.created_at)
        held.started = True
        return replace(status, address=str(endpoint["address"]), version=held.shim.service.version)

    async def platform(self, namespace: str, sandbox: str) -> Platform:
        """What containers of the sandbox run on."""
        held = self._get(namespace, sandbox)
        if held.foreign:
            found = (await self._ask(
                held, "Platform", api.PlatformRequest(sandbox_id=sandbox), api.PlatformResponse
            )).platform
            return Platform(found.os, found.architecture, found.variant)
        machine = os.uname().machine
        return Platform("linux", {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine))

    async def stop(self, namespace: str, sandbox: str, timeout: int = 0) -> None:
        """End it; its shim stays until `shutdown`. A sandbox that is not there is stopped."""
        held = self._held.get((namespace, sandbox))
        if held is None:
            return
        if held.foreign:
            request = api.StopSandboxRequest(sandbox_id=sandbox, timeout_secs=timeout)
            with contextlib.suppress(errors.NotFound, errors.Unavailable):
                await self._ask(held, "StopSandbox", request, api.StopSandboxResponse)
        held.end(0)

    async def wait(self, namespace: str, sandbox: str) -> Exit:
        """How it ended, as soon as it has."""
        held = self._get(namespace, sandbox)
        if held.foreign and held.exit is None:
            found = await self._ask(
                held, "WaitSandbox", api.WaitSandboxRequest(sandbox_id=sandbox), api.WaitSandboxResponse
            )
            return Exit(found.exit_status, seconds(found.exited_at))
        await held.ended.wait()
        assert held.exit is not None
        return held.exit

    async def status(self, namespace: str, sandbox: str, verbose: bool = False) -> SandboxStatus:
        """What it is doing; one that is not there has ended."""
        held = self._held.get((namespace, sandbox))
        if held is None:
            return SandboxStatus(sandbox, exited_at=time.time())
        if held.foreign:
            request = api.SandboxStatusRequest(sandbox_id=sandbox, verbose=verbose)
            found = await self._ask(held, "SandboxStatus", request, api.SandboxStatusResponse)
            extra = TypedValue(found.extra.type_url, found.extra.value) if found.HasField("extra") else None
            status = SandboxStatus(
                found.sandbox_id, found.pid, found.state, seconds(found.created_at), seconds(found.exited_at),
                info=dict(found.info), extra=extra,
            )
        elif held.exit is not None:
            status = SandboxStatus(sandbox, 0, NOT_READY, held.created_at, held.exit.at)
        else:
            state = READY if held.started else NOT_READY
            status = SandboxStatus(sandbox, held.shim.record.pid, state, held.created_at)
        return replace(status, address=held.shim.address, version=held.shim.service.version)

    async def metrics(self, namespace: str, sandbox: str) -> tuple[float, str, TypedValue | None]:
        """Time, id and numbers of the sandbox's own resources; ours have none."""
        held = self._get(namespace, sandbox)
        if held.foreign:
            found = (await self._ask(
                held, "SandboxMetrics", api.SandboxMetricsRequest(sandbox_id=sandbox), api.SandboxMetricsResponse
            )).metrics
            return seconds(found.timestamp), found.id, TypedValue(found.data.type_url, found.data.value)
        return time.time(), sandbox, None

    async def shutdown(self, namespace: str, sandbox: str) -> None:
        """End its shim and remove what is left. FailedPrecondition while containers are in it."""
        key = (namespace, sandbox)
        async with self._locks.hold(key):
            held = self._get(namespace, sandbox)
            others = sorted(held.shim.tasks - {held.member})
            if others:
                raise errors.FailedPrecondition(
                    f"sandbox {sandbox} still has containers: {', '.join(others)}", kind="sandbox", key=sandbox
                )
            if held.foreign:
                with contextlib.suppress(errors.Unavailable):
                    await self._ask(
                        held, "ShutdownSandbox", api.ShutdownSandboxRequest(sandbox_id=sandbox),
                        api.ShutdownSandboxResponse,
                    )
            await self._tasks.shims.release(held.shim, held.member)
            held.end(0)
            await self._tasks.run_io(held.bundle.delete)
            self._held.pop(key, None)
