"""The network of pods: attached once, detached until it worked, remembered across restarts.

Owns the record of every attachment: it is written before the first plugin runs and deleted after
DEL succeeded, so whatever happens in between — a killed daemon, a failing plugin, a reboot — the
addresses go back. Uses CNI, or the embedded bridge where the configuration asks for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from supervisord_ctr import errors, faults
from supervisord_ctr.aio import KeyedLock
from supervisord_ctr.linux import namespaces
from supervisord_ctr.sandbox import cni

log = logging.getLogger(__name__)

KIND = "network"

INTENT = faults.declare("sandbox.network.intent", "the record of an attachment is written, no plugin ran yet")
ADDED = faults.declare("sandbox.network.added", "every plugin has succeeded, the result is not recorded yet")
DELETED = faults.declare("sandbox.network.deleted", "every plugin has detached, the record still says attached")


class Records(Protocol):
    """Durable values by kind and ID (`metadata.Database.cri`)."""

    async def put(self, kind: str, id: str, value: bytes) -> None:  # noqa: A002
        """Keep `value`; on disk when this returns."""
        ...

    async def list(self, kind: str) -> list[tuple[str, bytes]]:
        """Every value of a kind."""
        ...

    async def delete(self, kind: str, id: str) -> None:  # noqa: A002
        """Forget a value; none there is no error."""
        ...


class Bridge(Protocol):
    """The embedded bridge: attaches a network namespace without plugins."""

    async def attach(self, owner: str, netns: str, port_mappings: Sequence[Mapping[str, Any]]) -> list[str]:
        """Interface and addresses; returns the addresses."""
        ...

    async def detach(self, owner: str) -> None:
        """Give everything back; may be repeated."""
        ...


@dataclass(frozen=True)
class Attached:
    """What is recorded for a pod. `addresses` is empty until the network is there."""

    request: cni.Request
    attachments: tuple[cni.Attachment, ...] = ()
    bridge: bool = False
    addresses: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """The record."""
        return json.dumps({
            "container_id": self.request.container_id, "netns": self.request.netns,
            "arguments": dict(self.request.arguments), "capabilities": dict(self.request.capabilities),
            "attachments": [attachment.to_json() for attachment in self.attachments], "bridge": self.bridge,
            "addresses": list(self.addresses),
        }).encode()

    @classmethod
    def decode(cls, data: bytes) -> Attached:
        """The reverse."""
        value = json.loads(data)
        request = cni.Request(value["container_id"], value["netns"], value["arguments"], value["capabilities"])
        attachments = tuple(cni.Attachment.from_json(item) for item in value["attachments"])
        return cls(request, attachments, bool(value.get("bridge")), tuple(value["addresses"]))


@dataclass
class PodNetworks:
    """Attachments by pod ID. `preference` orders addresses: "ipv4", "ipv6" or "cni"."""

    plugins: cni.Cni
    records: Records
    bridge: Bridge | None = None
    preference: str = "ipv4"
    _attached: dict[str, Attached] = field(default_factory=dict, init=False)
    _locks: KeyedLock = field(default_factory=KeyedLock, init=False)

    async def load(self) -> None:
        """Read the records; call once before anything else."""
        for identity, data in await self.records.list(KIND):
            try:
                self._attached[identity] = Attached.decode(data)
            except (ValueError, KeyError, errors.Error):
                log.exception("network record of sandbox %s cannot be read and is kept for inspection", identity)

    def get(self, pod_id: str) -> Attached | None:
        """What is recorded for a pod."""
        return self._attached.get(pod_id)

    def known(self) -> list[str]:
        """IDs with a record."""
        return list(self._attached)

    async def attach(self, request: cni.Request, namespace: Awaitable[None] | None = None) -> list[str]:
        """Attach a pod and return its addresses, the first being its main one.

        `namespace` makes the network namespace; it is awaited while the intent is written. The result
        is in memory on return and on disk after `confirm`: until then the intent alone is, which is
        all that DEL needs. On failure whatever was attached has been detached again; when that
        failed too, the record stays and `detach` tries again.
        """
        pod_id = request.container_id
        async with self._locks.hold(pod_id):
            known = self._attached.get(pod_id)
            if known is not None and known.addresses:
                return list(known.addresses)
            planned = self._plan(request)
            try:
                saved = self._save(pod_id, planned)
                # Both have ended before anything is undone: what comes after the undo would stay.
                steps = (saved,) if namespace is None else (saved, namespace)
                for result in await asyncio.gather(*steps, return_exceptions=True):
                    if isinstance(result, BaseException):
                        raise result
                faults.point(INTENT)
                done = await self._attach(planned)
            except BaseException:
                await self._undo(pod_id)
                raise
            faults.point(ADDED)
            self._attached[pod_id] = done
            return list(done.addresses)

    async def confirm(self, pod_id: str) -> None:
        """Write down how a pod is attached."""
        known = self._attached.get(pod_id)
        if known is not None:
            await self.records.put(KIND, pod_id, known.encode())

    def _plan(self, request: cni.Request) -> Attached:
        try:
            return Attached(request, tuple(self.plugins.plan()))
        except errors.FailedPrecondition:
            if self.bridge is None:
                raise
            return Attached(request, bridge=True)

    async def _attach(self, planned: Attached) -> Attached:
        request = planned.request
        if planned.bridge:
            assert self.bridge is not None
            ports: Sequence[Mapping[str, Any]] = request.capabilities.get("portMappings") or ()
            found = await self.bridge.attach(request.container_id, request.netns, ports)
            return replace(planned, addresses=tuple(found))
        attachments = tuple(await self.plugins.add(request, planned.attachments))
        first = attachments[0]
        found = cni.prefer(cni.addresses(first.result or {}, first.interface), self.preference)
        if not found:
            raise errors.Unknown(f"failed to find network info for sandbox {request.container_id!r}")
        return replace(planned, attachments=attachments, addresses=tuple(found))

    async def _undo(self, pod_id: str) -> None:
        try:
            await self._detach(pod_id)
        except errors.Error:
            log.exception("network of sandbox %s could not be detached; it is tried again later", pod_id)

    async def detach(self, pod_id: str, then: Callable[[], Awaitable[object]] | None = None) -> None:
        """Detach a pod; a pod without a record is detached already. Raises what the plugin said.

        `then` is awaited beside the forgetting of the record, once nothing is attached any more.
        """
        async with self._locks.hold(pod_id):
            await self._detach(pod_id, then)

    async def _detach(self, pod_id: str, then: Callable[[], Awaitable[object]] | None = None) -> None:
        known = self._attached.get(pod_id)
        if known is None:
            if then is not None:
                await then()
            return
        if known.bridge:
            if self.bridge is None:
                raise errors.FailedPrecondition(
                    f"sandbox {pod_id} is attached to the embedded bridge, which is switched off"
                )
            await self.bridge.detach(pod_id)
        else:
            request = known.request
            if not namespaces.is_pinned(request.netns):
                # Gone, or the plain file that a reboot leaves: plugins give addresses back without it too.
                request = replace(request, netns="")
            await self.plugins.delete(request, known.attachments)
        faults.point(DELETED)
        steps: list[Awaitable[object]] = [self._forget(pod_id)]
        if then is not None:
            steps.append(then())
        for result in await asyncio.gather(*steps, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def _forget(self, pod_id: str) -> None:
        await self.records.delete(KIND, pod_id)
        self._attached.pop(pod_id, None)

    async def _save(self, pod_id: str, value: Attached) -> None:
        # In memory first: whoever is called off while this is written down must find it to take it back.
        self._attached[pod_id] = value
        await self.records.put(KIND, pod_id, value.encode())

    async def release_orphans(self, wanted: Collection[str]) -> list[str]:
        """Detach every recorded pod that is not `wanted`; returns those that still could not be."""
        left: list[str] = []
        for pod_id in self.known():
            if pod_id in wanted:
                continue
            try:
                await self.detach(pod_id)
            except errors.Error as error:
                log.warning("network of former sandbox %s is still attached: %s", pod_id, error.message)
                left.append(pod_id)
        return left

    async def collect(self) -> None:
        """CNI GC with what is recorded; plugins that cannot are left out."""
        valid = [
            (pod_id, attachment.interface)
            for pod_id, known in self._attached.items() for attachment in known.attachments
        ]
        await self.plugins.collect(valid)

    async def status(self) -> str:
        """"" when a pod could be attached now, otherwise the reason in words."""
        reason = await self.plugins.status()
        return "" if reason and self.bridge is not None and self._no_configuration() else reason

    def _no_configuration(self) -> bool:
        try:
            self.plugins.networks()
        except errors.FailedPrecondition:
            return True
        return False
