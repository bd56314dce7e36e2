"""Answers of the daemon that the published API has no call for: why something waits, and what is being pulled.

Owns the words of the answers; what is known belongs to the rooms (P10, P22, P23).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

from supervisord_ctr.images.progress import COMPLETE, EXISTS, EXTRACTED, EXTRACTING, Progress
from supervisord_ctr.images.pull import Puller
from supervisord_ctr.runtime import Tasks
from supervisord_ctr.runtime.explain import explain
from supervisord_ctr.services.introspection import Info

_HERE = frozenset({COMPLETE, EXISTS, EXTRACTED, EXTRACTING})


class Pods(Protocol):
    """What the CRI room tells of pods and their containers (`cri.core.Core`)."""

    def explain(self, *words: str) -> dict[str, Any]:
        """"doing" and "errors"."""


def explain_info(tasks: Tasks, pods: Pods | None) -> Info:
    """Through `PluginInfo`: {"names": [NAME…], "namespace", "container"} → what is being done to it, what failed on
    it, and what its task's shim knows."""

    async def info(question: Mapping[str, Any]) -> Mapping[str, Any]:
        names = [str(name) for name in question.get("names") or ()]
        answer: dict[str, Any] = dict(pods.explain(*names)) if pods is not None and names else {}
        namespace, container = str(question.get("namespace") or ""), str(question.get("container") or "")
        if namespace and container:
            answer.update(await explain(tasks, namespace, container))
        return answer

    return info


def _done(blob: Progress) -> int:
    """Bytes of a blob that are here: those of one that is being unpacked are."""
    return blob.total if blob.event in _HERE else blob.progress


def pulls_info(puller: Puller) -> Info:
    """Through `PluginInfo`: {} → {"pulls": [{"namespace", "reference", "stage", "started", "quiet", "waiting", "done",
    "total", "blobs": [{"digest", "media_type", "event", "done", "total"}]}]}; "quiet" is seconds without progress."""

    async def info(question: Mapping[str, Any]) -> Mapping[str, Any]:
        pulls = []
        for running in puller.running():
            blobs = running.blobs()
            pulls.append({
                "namespace": running.namespace, "reference": running.reference, "stage": running.tracker.stage,
                "started": running.tracker.started, "quiet": time.monotonic() - running.tracker.moved,
                "waiting": running.waiting, "done": sum(map(_done, blobs)), "total": sum(blob.total for blob in blobs),
                "blobs": [
                    {"digest": blob.descriptor.digest, "media_type": blob.descriptor.media_type, "event": blob.event,
                     "done": _done(blob), "total": blob.total}
                    for blob in blobs if blob.descriptor is not None
                ],
            })
        return {"pulls": pulls}

    return info
