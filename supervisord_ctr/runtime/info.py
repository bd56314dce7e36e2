"""What a runtime can do, asked of its shim program (`-info`): introspection, not needed to run anything.

Owns the question and its answer; which program serves a name is `resolve`'s.
Source: containerd, core/runtime/v2/README.md, "The -info flag".
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError

from supervisord_ctr import errors
from supervisord_ctr.api.runc.v1 import options_pb2
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.runtime import resolve
from supervisord_ctr.runtime.values import RuntimeConfig

#: Serves the runtimes that are forks of the zygote.
_OWN = "io.containerd.pctr.v1"


class RuntimeInformant:
    """Answers `containerd.types.RuntimeRequest` with `containerd.types.RuntimeInfo`."""

    def __init__(self, config: RuntimeConfig) -> None:
        self._config = config

    async def ask(self, request: types_pb2.RuntimeRequest) -> types_pb2.RuntimeInfo:
        """`NotFound` for a runtime that is not installed, `Unknown` when its program fails."""
        name = request.runtime_path or self._config.default
        options = request.options
        if name in self._config.own:
            program = resolve.find(_OWN)
            if not options.type_url and self._config.oci_runtime != "runc":
                chosen = options_pb2.Options(binary_name=self._config.oci_runtime)
                options = AnyMessage(type_url=chosen.DESCRIPTOR.full_name, value=chosen.SerializeToString())
        else:
            program = resolve.find(name)
        output = await _run(program, options.SerializeToString(), self._config.start_timeout, self._config.shim_env)
        try:
            return types_pb2.RuntimeInfo.FromString(output)
        except DecodeError as error:
            raise errors.Unknown(f"{program} -info does not answer with a RuntimeInfo: {error}", kind="shim") from error


async def _run(program: str, data: bytes, timeout: float, environment: Mapping[str, str]) -> bytes:
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            program, "-info", stdin=pipe, stdout=pipe, stderr=pipe, env={**os.environ, **environment})
    except OSError as error:
        raise errors.from_os_error(error, f"run shim {program}") from error
    try:
        out, err = await asyncio.wait_for(process.communicate(data), timeout)
    except TimeoutError:
        raise errors.DeadlineExceeded(f"shim {program} -info took longer than {timeout:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        text = err.decode("utf-8", "replace").strip()[-2000:]
        raise errors.Unknown(f"failed to run {program} -info: exit status {process.returncode}: {text}", kind="shim")
    return out
