"""Runtime names: which program serves `io.containerd.NAME.VERSION`, or an absolute path.

`io.containerd.runc.v2` → `containerd-shim-runc-v2`, looked for in PATH and beside this program.
Source: containerd, core/runtime/v2/README.md, "Binary Naming".
"""

from __future__ import annotations

import os
import shutil
import sys

from supervisord_ctr.errors import InvalidArgument, NotFound


def binary_name(runtime: str) -> str:
    """`containerd-shim-NAME-VERSION` for a dotted name; `InvalidArgument` when it is none."""
    parts = runtime.split(".")
    if len(parts) < 2 or not all(parts[-2:]) or not parts[0] or "/" in runtime:
        raise InvalidArgument(
            f"invalid runtime name {runtime}, correct runtime name should be either format like "
            "`io.containerd.runc.v2` or a full path to the binary", kind="runtime", key=runtime,
        )
    return f"containerd-shim-{parts[-2]}-{parts[-1]}"


def find(runtime: str) -> str:
    """Path of the shim program for `runtime`; `NotFound` when it is not installed."""
    if os.path.isabs(runtime):
        if not os.path.exists(runtime):
            raise NotFound(f"runtime {runtime}: no such file", kind="runtime", key=runtime)
        return runtime
    name = binary_name(runtime)
    found = shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))
    if found is None:
        raise NotFound(f"runtime {runtime!r} binary not installed: {name} is not in PATH", kind="runtime", key=runtime)
    return os.path.abspath(found)
