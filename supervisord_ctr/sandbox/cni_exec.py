"""Running one CNI plugin: environment, standard input, result and errors.

Source: CNI specification 1.1.0, sections 2 (execution protocol) and 5 (result types). Plugins are
programs of the host, found in the configured folders only and run by absolute path (S16).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from supervisord_ctr import errors

#: Largest answer of a plugin in bytes.
_LIMIT = 1 << 20
#: Code of the specification's "try again later".
TRY_AGAIN = 11
#: Codes of STATUS: the plugin cannot serve ADD; it can, but existing pods have limited connectivity.
NOT_AVAILABLE, LIMITED = 50, 51


class PluginError(errors.Unknown):
    """A plugin said no. `number` is the specification's error code, 0 when it gave none."""

    def __init__(self, message: str, *, number: int = 0, key: str = "") -> None:
        super().__init__(message, kind="cni plugin", key=key)
        self.number = number


def find_plugin(name: str, folders: Sequence[str]) -> str:
    """Absolute path of the plugin; raises `NotFound` that lists the folders searched."""
    if "/" in name or name in ("", ".", ".."):
        raise errors.InvalidArgument(f"cni plugin type {name!r} must be a plain file name", kind="cni plugin", key=name)
    for folder in folders:
        path = Path(folder) / name
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    raise errors.NotFound(
        f"failed to find plugin {name!r} in path [{' '.join(folders)}]", kind="cni plugin", key=name
    )


async def run_plugin(
    path: str, command: str, config: Mapping[str, Any], *, container_id: str = "", netns: str = "",
    interface: str = "", arguments: Mapping[str, str] | None = None, folders: Sequence[str] = (),
    timeout: float = 60.0,
) -> dict[str, Any]:
    """Run a plugin; returns its JSON answer ({} when it printed none).

    Raises `PluginError` with the plugin's own words, or `DeadlineExceeded` after `timeout` seconds,
    when the plugin's whole process group has been killed.
    """
    environment = {
        "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        "CNI_COMMAND": command, "CNI_CONTAINERID": container_id, "CNI_NETNS": netns, "CNI_IFNAME": interface,
        "CNI_ARGS": ";".join(f"{key}={value}" for key, value in (arguments or {}).items()),
        "CNI_PATH": ":".join(folders),
    }
    name = os.path.basename(path)
    try:
        process = await asyncio.create_subprocess_exec(
            path, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=environment, start_new_session=True, limit=_LIMIT,
        )
    except OSError as error:
        raise errors.from_os_error(error, f"cni plugin {name} cannot be run:") from error
    try:
        async with asyncio.timeout(timeout):
            output, complaints = await process.communicate(json.dumps(config).encode())
    except TimeoutError:
        raise errors.DeadlineExceeded(
            f"cni plugin {name} did not finish {command} within {timeout:g} s", kind="cni plugin", key=name
        ) from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return _answer(name, command, process.returncode or 0, output[:_LIMIT], complaints)


def _answer(name: str, command: str, status: int, output: bytes, complaints: bytes) -> dict[str, Any]:
    try:
        value = json.loads(output) if output.strip() else {}
    except ValueError:
        value = None
    if status == 0 and isinstance(value, dict):
        return value
    if isinstance(value, dict) and (value.get("msg") or value.get("code")):
        text = str(value.get("msg", "")) or f"error code {value.get('code')}"
        if value.get("details"):
            text += f": {value['details']}"
        number = value.get("code", 0)
        raise PluginError(
            f"plugin type={json.dumps(name)} failed ({command.lower()}): {text}",
            number=number if isinstance(number, int) else 0, key=name,
        )
    told = (complaints or output).decode("utf-8", "replace").strip()[-500:]
    what = f"exit status {status}" if status >= 0 else f"signal {-status}"
    raise PluginError(
        f"plugin type={json.dumps(name)} failed ({command.lower()}): {what}{': ' + told if told else ''}", key=name
    )
