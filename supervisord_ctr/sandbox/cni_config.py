"""CNI configurations: which networks a pod joins, read from a folder and read again when it changes.

Owns parsing of `*.conflist`, `*.conf` and `*.json` files (CNI specification, section 1) and noticing
changes. A change is noticed by names, sizes and times of the folder's files, looked at when a pod
is made and when somebody asks for the status: no thread and no descriptor is spent on watching.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supervisord_ctr.errors import FailedPrecondition, InvalidArgument

#: Versions of the specification that this client speaks, newest last.
SUPPORTED_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
_ENDINGS = (".conf", ".conflist", ".json")
#: Largest configuration file in bytes.
_LIMIT = 1 << 20


def version_of(text: str) -> tuple[int, ...]:
    """"1.0.0" as (1, 0, 0); raises `InvalidArgument`."""
    try:
        return tuple(int(part) for part in text.split("."))
    except ValueError:
        raise InvalidArgument(f"cni version {text!r} is not three numbers", kind="cni version", key=text) from None


@dataclass(frozen=True)
class NetworkList:
    """One network: a name and the plugins that make it, in the order of ADD."""

    name: str
    version: str
    plugins: tuple[Mapping[str, Any], ...]
    path: str = ""
    disable_check: bool = False
    disable_gc: bool = False

    def supports(self, version: str) -> bool:
        """Whether the network speaks at least `version` of the specification."""
        return version_of(self.version) >= version_of(version)

    def to_json(self) -> dict[str, Any]:
        """What is written down, so that DEL uses the configuration that ADD used."""
        return {
            "name": self.name, "cniVersion": self.version, "plugins": [dict(plugin) for plugin in self.plugins],
            "disableCheck": self.disable_check, "disableGC": self.disable_gc,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], path: str = "") -> NetworkList:
        """A conflist; raises `InvalidArgument` that names the file and what is wrong."""
        where = path or "network configuration"
        name = value.get("name")
        if not isinstance(name, str) or not name:
            raise InvalidArgument(f"{where}: a network needs a name")
        plugins = value.get("plugins")
        if not isinstance(plugins, list) or not plugins:
            raise InvalidArgument(f"{where}: network {name!r} lists no plugins")
        for plugin in plugins:
            if not isinstance(plugin, dict) or not isinstance(plugin.get("type"), str) or not plugin["type"]:
                raise InvalidArgument(f"{where}: a plugin of network {name!r} has no type")
        return cls(
            name, _pick_version(value, where), tuple(plugins), path, bool(value.get("disableCheck")),
            bool(value.get("disableGC")),
        )


def _pick_version(value: Mapping[str, Any], where: str) -> str:
    """The newest version that the list offers and this client speaks (specification 1.1, cniVersions)."""
    offered = [text for text in (value.get("cniVersions") or []) if isinstance(text, str)]
    single = value.get("cniVersion", "")
    if single:
        offered.append(single)
    if not offered:
        offered = ["0.2.0"]
    known = [text for text in offered if text in SUPPORTED_VERSIONS]
    if not known:
        raise InvalidArgument(f"{where}: cni versions {', '.join(offered)} are not spoken here")
    return max(known, key=version_of)


def parse_file(path: Path) -> NetworkList:
    """The network in one file: a list, or a single plugin, which becomes a list of one."""
    try:
        with open(path, "rb") as handle:
            data = handle.read(_LIMIT + 1)
    except OSError as error:
        raise InvalidArgument(f"cni configuration {path}: {error.strerror}") from error
    if len(data) > _LIMIT:
        raise InvalidArgument(f"cni configuration {path} is larger than {_LIMIT} bytes")
    try:
        value = json.loads(data)
    except ValueError as error:
        raise InvalidArgument(f"cni configuration {path}: {error}") from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"cni configuration {path} is not an object")
    if path.suffix != ".conflist" and "plugins" not in value:
        plugin = {key: item for key, item in value.items() if key not in ("name", "cniVersion", "cniVersions")}
        value = {"name": value.get("name"), "cniVersion": value.get("cniVersion", ""), "plugins": [plugin]}
    return NetworkList.from_json(value, str(path))


@dataclass
class ConfigFolder:
    """The networks of a folder, at most `limit` of them (0: all), in the order of file names.

    `load()` looks whether anything changed and answers from memory when not. `error` tells why no
    network could be had the last time, in words for the status of the runtime.
    """

    path: Path
    limit: int = 1
    error: str = field(default="cni config not initialized", init=False)
    _seen: object = field(default=None, init=False)
    _networks: tuple[NetworkList, ...] = field(default=(), init=False)

    def load(self) -> tuple[NetworkList, ...]:
        """The networks that a new pod joins; raises `FailedPrecondition` that says what is missing."""
        signature = self._signature()
        if signature != self._seen:
            self._read(signature)
        if not self._networks:
            raise FailedPrecondition(self.error, kind="cni", key=str(self.path))
        return self._networks

    def _signature(self) -> object:
        found: list[tuple[str, int, int, int]] = []
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if entry.name.endswith(_ENDINGS):
                        about = entry.stat()
                        found.append((entry.name, about.st_size, about.st_mtime_ns, about.st_ino))
        except OSError:
            return None if self._seen is None else ()
        return tuple(sorted(found))

    def _read(self, signature: object) -> None:
        networks: list[NetworkList] = []
        errors: list[str] = []
        names: Sequence[str] = [item[0] for item in signature] if isinstance(signature, tuple) else []
        for name in names:
            if self.limit and len(networks) >= self.limit:
                break
            try:
                networks.append(parse_file(self.path / name))
            except InvalidArgument as error:
                errors.append(error.message)
        self._seen = signature
        # A broken edit does not take the network of a running node away, an emptied folder does.
        if networks or not errors:
            self._networks = tuple(networks)
        self.error = "; ".join(errors) or f"cni plugin not initialized: no network configuration in {self.path}"
