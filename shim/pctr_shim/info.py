"""What an OCI runtime can do, as it says itself (`runc features`), for `-info`."""

from __future__ import annotations

import json
import os
import shutil

from google.protobuf.any_pb2 import Any

_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"


def runtime_features(binary: str) -> Any | None:
    """The features as an Any of JSON; None when the runtime does not tell or is not installed."""
    path = binary if "/" in binary else shutil.which(binary)
    if path is None:
        return None
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        actions: list[tuple[int, ...]] = [(os.POSIX_SPAWN_DUP2, writer, 1)]
        pid = os.posix_spawn(path, [path, "features"], os.environ, file_actions=actions)
    except OSError:
        os.close(reader)
        return None
    finally:
        os.close(writer)
    with os.fdopen(reader, "rb") as file:
        data = file.read(1 << 20)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        json.loads(data)
    except ValueError:
        return None
    return Any(type_url=_TYPE, value=data) if status == 0 else None
