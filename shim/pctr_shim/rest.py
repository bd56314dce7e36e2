"""Rest: what a worker hands to its keeper when nothing goes on, and how the next worker goes on from there.

Owns the decision and the description of the whole shim; each object describes itself (`belongings`). The
decision errs on the side of working on: whatever the loop watches, and every task on it, has to be known here.

Description (JSON): {"request": what the zygote was asked for, "listeners": […], "connections": [[number, [[stream,
request in hexadecimal], …]], …], "tasks": see `TaskService.leave`, "events": see `Publisher.leave`, "patience":
seconds, "since": seconds of the monotonic clock}; numbers count descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import selectors
import socket
import time
from collections.abc import Mapping
from io import BufferedRandom
from typing import Any

from pctr_shim import keeper
from pctr_shim.belongings import Belongings, Busy
from pctr_shim.serve import Loop, Shim
from supervisord_ctr import faults

log = logging.getLogger(__name__)

WOKEN = faults.declare("shim.rest.woken", "a new worker runs and has taken up nothing yet")
TAKEN_UP = faults.declare("shim.rest.taken-up", "a new worker has taken up all tasks; the keeper does not know")
RESUMED = faults.declare("shim.rest.resumed", "a new worker has taken up everything and answered nobody")

#: A shim that is woken again within this time (seconds) waits twice as long the next time, up to `_LONGEST`.
_SHORT = 30.0
_LONGEST = 60.0


class Rest:
    """Has one worker hand over when its loop has been quiet for `patience` seconds."""

    def __init__(self, loop: Loop, shim: Shim, post: keeper.Post, request: Mapping[str, Any], patience: float) -> None:
        self._loop = loop
        self._shim = shim
        self._post = post
        self._request = request
        self._patience = patience

    def begin(self) -> None:
        """From now on."""
        self._loop.when_quiet(self._patience, self._quiet)

    def _quiet(self) -> None:
        belongings = Belongings()
        try:
            description = json.dumps(self._describe(belongings))
            marks = self._marks(belongings)
        except Busy as reason:
            log.debug("no rest: %s", reason)
            return
        except Exception:
            log.exception("no rest")
            return
        log.debug("rests, with %d descriptors", len(belongings.descriptors))
        try:
            with _in_memory(description.encode()) as file:
                if keeper.hand_over(self._post, [(fd, marks[fd]) for fd in belongings.descriptors], file.fileno()):
                    os._exit(0)
            log.warning("no rest: the keeper did not get everything: there are too many open files")
        except ConnectionError as error:
            log.error("%s: so the shim ends", error)
            os._exit(1)
        except OSError as error:
            log.warning("no rest: %s", error)

    def _describe(self, belongings: Belongings) -> dict[str, Any]:
        shim = self._shim
        if shim.reaper.busy or shim.publisher.busy:
            raise Busy("a program or an event")
        standing = shim.server.standing()
        if standing is None:
            raise Busy("a request")
        return {
            "request": self._request, "patience": self._patience, "since": time.monotonic(),
            "listeners": [belongings.leave(fd) for fd in shim.server.listeners],
            "connections": [
                [belongings.leave(one.descriptor), [(stream, data.hex()) for stream, data in one.requests]]
                for one in standing
            ],
            "tasks": shim.tasks.leave(belongings), "events": shim.publisher.leave(),
        }

    def _marks(self, belongings: Belongings) -> dict[int, int]:
        """What the keeper shall do with each descriptor; `Busy` when the loop does anything that is not known here."""
        marks = dict.fromkeys(belongings.descriptors, keeper.KEEP)
        connections = self._shim.server.descriptors
        unimportant = {self._post.keeper.fileno(), self._shim.publisher.descriptor}
        for fd, events in self._loop.watched():
            if fd in unimportant:
                continue
            if events != selectors.EVENT_READ or fd not in marks:
                raise Busy(f"descriptor {fd}")
            marks[fd] = keeper.CONNECTION if fd in connections else keeper.WATCH
        if len(asyncio.all_tasks()) != 1 + self._shim.publisher.tasks + self._shim.server.calls:
            raise Busy("a task")
        return marks


def _in_memory(data: bytes) -> BufferedRandom:
    """A file that only its descriptors name, which holds `data`."""
    file = os.fdopen(os.memfd_create("shim", os.MFD_CLOEXEC), "w+b")
    try:
        file.write(data)
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


def read(post: keeper.Post) -> dict[str, Any]:
    """What the worker before this one left."""
    size = os.fstat(post.description).st_size
    found: dict[str, Any] = json.loads(os.pread(post.description, size, 0))
    os.close(post.description)
    return found


def next_patience(patience: float, first: float, rested: float) -> float:
    """How long to be quiet before the next rest: rests that end soon cost more than they save."""
    return min(max(patience, first) * 2, _LONGEST) if rested < _SHORT else first


async def resume(shim: Shim, post: keeper.Post, left: Mapping[str, Any]) -> None:
    """Go on with what was left; the shim has its configuration.

    Until the keeper is told, nothing is read, written or answered, and the loop does not run: another worker can do
    the same again.
    """
    belongings = Belongings(post.descriptors)
    shim.publisher.take_up(left["events"])
    shim.tasks.take_up(left["tasks"], belongings)
    faults.point(TAKEN_UP)
    post.taken_up()
    for number in left["listeners"]:
        await shim.server.serve(socket.socket(fileno=belongings.take(number)))
    for number, requests in left["connections"]:
        if (fd := belongings.take(number)) < 0:
            continue  # its client has gone
        connection = socket.socket(fileno=fd)
        with contextlib.suppress(OSError):  # it has ended meanwhile
            await shim.server.take_over(connection, [(stream, bytes.fromhex(data)) for stream, data in requests])
    log.debug("woken, with %d descriptors", len(post.descriptors))
    faults.point(RESUMED)
