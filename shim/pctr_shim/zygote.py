"""The zygote: a small program with the shim's modules loaded, which forks a shim on request.

The daemon executes it once (`python -I -m pctr_shim.zygote FD`) and talks to it over FD, one end
of a `socketpair(AF_UNIX, SOCK_SEQPACKET)`. Each packet is one JSON object in UTF-8, at most 64 KiB.
When the daemon's end closes, the zygote ends. It may be killed at any time: shims have sessions of
their own, do not depend on it, and the daemon starts another one.

Every request has a `serial` (int), which its reply repeats. Replies to `cleanup` may come later
than replies to later requests; all others come in order. A reply is either the object stated below
or `{"serial": N, "error": {"code": C, "message": "…"}}` with a code of `errors.Code`.

`{"op": "ping", "serial": N}`
    → `{"serial": N, "pid": PID}`

`{"op": "fork-shim", "serial": N, "namespace": "default", "id": "c1", "bundle": "/run/…/c1", "socket": "/run/…/s/ab12",
"events": "/run/…/events.sock", "runtime": "runc", "runtime_root": "/run/supervisord-ctr/runc", …}`
    → `{"serial": N, "pid": PID, "start_time": TICKS, "address": "unix:///run/…/s/ab12"}`

    The shim's socket (mode 0600, below 108 bytes) is listening when the reply comes: connect at
    once. `id` is the container or, for the shim of a pod, the sandbox. `bundle` becomes the working
    directory and must exist. `start_time` is field 22 of /proc/PID/stat: with the PID it names the
    process beyond reuse. Optional keys and their defaults:

    "events": ""            path of the daemon's ttrpc socket that takes events ("": none are sent)
    "runtime": "runc"       OCI runtime when the task's options name none
    "runtime_root": "/run/containerd/runc"   state of the OCI runtime; the namespace is appended
    "log": ""               file that takes the shim's log ("": the zygote's stderr)
    "debug": false
    "cgroups": []           folders of cgroups that the shim joins before it serves
    "oom_score_adj": null   e.g. -998; clamped to what the kernel allows us
    "env": {}               added to the environment of the runtime and of loggers

`{"op": "fork-pause", "serial": N, "netns": "/path", "ipcns": "/path", "utsns": "/path", "hostname": "", "cgroups": []}`
    → `{"serial": N, "pid": PID, "start_time": TICKS}`

    A process that is number 1 of a new PID namespace, for pods whose containers share one (design:
    pods without a pause image). Containers join `/proc/PID/ns/pid`. Paths are optional: "" keeps the
    zygote's namespace. It has an empty read-only root, no descriptors, no capabilities,
    no_new_privs, a seccomp filter, is not dumpable and reaps. SIGKILL it to end the namespace.

`{"op": "cleanup", "serial": N, "namespace": "default", "id": "c1", "bundle": "/run/…/c1", "runtime": "runc",
"runtime_root": "…"}`
    → `{"serial": N, "pid": PID, "exit_status": 137, "exited_at": SECONDS, "oom_kills": 0, "oom_level": ""}`

    What is left of a container whose shim died: kills it, removes it from the OCI runtime, takes
    its root file system's mounts away. The exit is the recorded one when the shim had written it,
    else 137 at the time of the call. The bundle's folder stays: it is the daemon's.

Not here: what a shim does (`service.py`), how a foreign daemon starts one (`__main__.py`).
"""

from __future__ import annotations
