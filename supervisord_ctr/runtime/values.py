"""Values of the runtime room: what tasks look like to those who ask, and the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from supervisord_ctr.model import TaskStatus, TypedValue


@dataclass(frozen=True, slots=True)
class TaskState:
    """One process: the task's own when `exec_id` is empty."""

    id: str
    exec_id: str = ""
    pid: int = 0
    status: TaskStatus = TaskStatus.UNKNOWN
    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False
    exit_status: int = 0
    exited_at: float = 0.0
    bundle: str = ""


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """A process inside a container; `info` is a `containerd.runc.v1.ProcessDetails` for exec'd ones."""

    pid: int
    info: TypedValue | None = None


@dataclass(frozen=True, slots=True)
class TaskMetric:
    """What a task's cgroup says: `data` is `io.containerd.cgroups.v1.Metrics` or that of v2."""

    id: str
    at: float
    data: TypedValue


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """Settings of `[runtime]`.

    `default` serves containers that name no runtime. Runtimes in `own` are served by forks of the
    zygote; every other name is resolved to a program. Times are seconds.
    """

    default: str = "io.containerd.runc.v2"
    own: frozenset[str] = frozenset({"io.containerd.runc.v2", "io.containerd.pctr.v1"})
    #: OCI runtime of our own shims when neither options nor the name say otherwise.
    oci_runtime: str = "runc"
    #: Where the OCI runtime of our own shims keeps its state; "" is `<state>/runc`.
    oci_root: str = ""
    #: Cgroup folders that our shims join; empty leaves them in the daemon's.
    shim_cgroups: tuple[str, ...] = ()
    #: `oom_score_adj` of our shims; None is one more than the daemon's, so that they are killed before it.
    shim_oom_score: int | None = None
    #: Added to the environment of shims.
    shim_env: Mapping[str, str] = field(default_factory=dict)
    debug: bool = False
    #: How long a shim that exists may take to answer at start-up before its task is listed as unknown.
    load_timeout: float = 5.0
    #: How long a shim found without its task may still be making it for the daemon before.
    create_grace: float = 3.0
    #: How long one step of a clean-up may take.
    cleanup_timeout: float = 10.0
    #: How long a program may take to start a foreign shim.
    start_timeout: float = 30.0
    #: How long one task may take to tell its state in a list.
    state_timeout: float = 2.0
