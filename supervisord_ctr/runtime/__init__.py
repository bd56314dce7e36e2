"""Runtime: bundles, the zygote, shims, tasks, and finding them again after a restart.

Owns everything between "there is a container record" and "its process runs": `Tasks` is the one
entrance. Does not know gRPC (that is `services/tasks.py`), images or networks, and never touches a
container's process itself: shims do.

    bundle      folders of a task: config.json, how to reach its shim
    resolve     runtime names to shim programs
    zygote      the process that forks our shims
    connection  the task API (v2 and v3) over one ttrpc connection
    shims       starting, finding and cleaning up after shims
    forward     events from shims into the exchange
    spec        what the room has to know of a spec
    task        one task, and what tasks need of other rooms
    tasks       the task operations
    checkpoint  CRIU images as blobs
    attach      connections to a process's streams
    recovery    adopting what a former daemon left
    sandboxes   the sandbox API of shims that offer it
"""

from __future__ import annotations

from supervisord_ctr.runtime.sandboxes import Sandboxes
from supervisord_ctr.runtime.tasks import Tasks
from supervisord_ctr.runtime.values import ProcessInfo, RuntimeConfig, TaskMetric, TaskState
from supervisord_ctr.runtime.zygote import Zygote

__all__ = ["ProcessInfo", "RuntimeConfig", "Sandboxes", "TaskMetric", "TaskState", "Tasks", "Zygote"]
