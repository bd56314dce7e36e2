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
import subprocess
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
    streams = [os.memfd_create(f"cni-{word}", os.MFD_CLOEXEC) for word in ("config", "result", "complaints")]
    try:
        os.write(streams[0], json.dumps(config).encode())
        os.lseek(streams[0], 0, os.SEEK_SET)
        try:
            process = await asyncio.to_thread(_start, path, environment, streams)
        except OSError as error:
            raise errors.from_os_error(error, f"cni plugin {name} cannot be run:") from error
        if not await _wait(process, timeout):
            raise errors.DeadlineExceeded(
                f"cni plugin {name} did not finish {command} within {timeout:g} s", kind="cni plugin", key=name
            )
        output, complaints = (os.pread(fd, _LIMIT, 0) for fd in streams[1:])
        return _answer(name, command, process.returncode, output, complaints)
    finally:
        for fd in streams:
            os.close(fd)


def _start(path: str, environment: Mapping[str, str], streams: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start the program with files in memory as its streams: nothing has to be pumped while it runs."""
    return subprocess.Popen(
        [path], stdin=streams[0], stdout=streams[1], stderr=streams[2], env=dict(environment), start_new_session=True
    )


def _wake(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


async def _wait(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Reap the process; False when it had to be killed, with its group, because the time was up."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    watch = os.pidfd_open(process.pid)
    loop.add_reader(watch, _wake, ended)
    try:
        async with asyncio.timeout(timeout):
            await ended
        return True
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(watch)
        os.close(watch)
        if not ended.done() or ended.cancelled():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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
