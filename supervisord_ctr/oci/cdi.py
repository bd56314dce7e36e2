"""CDI: devices that vendors describe in /etc/cdi and /var/run/cdi, injected by name.

A name is `vendor/class=device`. Files end in .json, .yaml or .yml; those of the later folder win
over those of the earlier one, and two files of one folder that define the same device make it
unusable, as the specification says.

Source: Container Device Interface specification 0.8 (cncf-tags/container-device-interface).
"""

from __future__ import annotations

import importlib
import json
import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supervisord_ctr.errors import InvalidArgument, NotFound
from supervisord_ctr.oci import devices
from supervisord_ctr.oci.spec import SpecBuilder

FOLDERS = ("/etc/cdi", "/var/run/cdi")
#: Largest description that is read.
MAX_FILE = 16 << 20

_KIND = re.compile(r"[A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?/[A-Za-z](?:[A-Za-z0-9_-]*[A-Za-z0-9])?\Z")
_DEVICE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?\Z")
_HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


def is_name(text: str) -> bool:
    """Whether `text` is a full device name."""
    kind, equals, device = text.partition("=")
    return bool(equals and _KIND.match(kind) and _DEVICE.match(device))


@dataclass
class Registry:
    """What is described in `folders`, read by `load`."""

    folders: Sequence[str | os.PathLike[str]] = FOLDERS
    #: Files that could not be used, and why.
    problems: dict[str, str] = field(default_factory=dict)
    _devices: dict[str, tuple[int, str, Mapping[str, Any]]] = field(default_factory=dict)
    _files: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _conflicts: set[str] = field(default_factory=set)

    def load(self) -> Registry:
        """Read every file anew; a file that is wrong is left out and told in `problems`."""
        for known in (self.problems, self._devices, self._files):
            known.clear()
        self._conflicts.clear()
        for rank, folder in enumerate(self.folders):
            try:
                names = sorted(os.listdir(folder))
            except OSError:
                continue
            for name in names:
                path = Path(folder, name)
                if path.suffix in (".json", ".yaml", ".yml"):
                    try:
                        self._add(path, rank)
                    except (OSError, ValueError, InvalidArgument) as error:
                        self.problems[str(path)] = str(error)
        return self

    def _add(self, path: Path, rank: int) -> None:
        document = _parse(path)
        kind = document.get("kind")
        if not isinstance(kind, str) or not _KIND.match(kind):
            raise InvalidArgument(f"kind {kind!r} is not vendor/class")
        self._files[str(path)] = document
        for entry in document.get("devices") or ():
            name = f"{kind}={entry.get('name')}"
            if not is_name(name):
                raise InvalidArgument(f"device name {name!r} is not valid")
            known = self._devices.get(name)
            if known is not None and known[0] == rank:
                self._conflicts.add(name)
            elif known is not None:
                self._conflicts.discard(name)
            self._devices[name] = (rank, str(path), entry)

    def names(self) -> list[str]:
        """Devices that can be injected."""
        return sorted(name for name in self._devices if name not in self._conflicts)

    def inject(self, builder: SpecBuilder, names: Iterable[str]) -> None:
        """Apply the edits of the devices `names`; `NotFound` lists every one that is not described."""
        wanted = list(names)
        missing = [name for name in wanted if name not in self._devices or name in self._conflicts]
        if missing:
            told = ", ".join(missing)
            raise NotFound(f"CDI device injection failed: unresolvable CDI devices {told}", kind="cdi", key=missing[0])
        applied: set[str] = set()
        for name in wanted:
            _, path, entry = self._devices[name]
            if path not in applied:
                applied.add(path)
                apply_edits(builder, self._files[path].get("containerEdits") or {})
            apply_edits(builder, entry.get("containerEdits") or {})


def _parse(path: Path) -> Mapping[str, Any]:
    data = path.read_bytes()
    if len(data) > MAX_FILE:
        raise InvalidArgument(f"larger than {MAX_FILE} bytes")
    if path.suffix == ".json":
        document = json.loads(data)
    else:
        yaml: Any = importlib.import_module("yaml")  # only machines with YAML descriptions need it
        try:
            document = yaml.safe_load(data)
        except yaml.YAMLError as error:
            raise InvalidArgument(f"not YAML: {error}") from error
    if not isinstance(document, dict):
        raise InvalidArgument("not an object")
    return document


def apply_edits(builder: SpecBuilder, edits: Mapping[str, Any]) -> None:
    """Apply one `containerEdits` object to a spec."""
    builder.with_env(edits.get("env") or ())
    user = builder.process.get("user") or {}
    for node in edits.get("deviceNodes") or ():
        builder.with_devices([_node(node, user)], node.get("permissions") or "rwm")
    for interface in edits.get("netDevices") or ():
        named = {"name": interface["name"]} if interface.get("name") else {}
        builder.linux.setdefault("netDevices", {})[interface["hostInterfaceName"]] = named
    _mounts(builder, edits.get("mounts") or ())
    hooks = builder.spec.setdefault("hooks", {}) if edits.get("hooks") else {}
    for hook in edits.get("hooks") or ():
        if hook.get("hookName") not in _HOOKS:
            raise InvalidArgument(f"unknown hook {hook.get('hookName')!r}", kind="cdi")
        stated = {key: hook[key] for key in ("path", "args", "env", "timeout") if hook.get(key)}
        hooks.setdefault(hook["hookName"], []).append(stated)
    gids = [gid for gid in edits.get("additionalGids") or () if gid]
    if gids:
        present = builder.process.setdefault("user", {"uid": 0, "gid": 0}).setdefault("additionalGids", [])
        present.extend(gid for gid in gids if gid not in present)
    rdt = edits.get("intelRdt")
    if rdt:
        words = ("closID", "l3CacheSchema", "memBwSchema", "enableCMT", "enableMBM")
        builder.linux["intelRdt"] = {key: rdt[key] for key in words if rdt.get(key)}


def _mounts(builder: SpecBuilder, entries: Sequence[Mapping[str, Any]]) -> None:
    """Put mounts in the place of those that are there, and all of them in an order in which none hides another."""
    if not entries:
        return
    builder.without_mounts(*(entry["containerPath"] for entry in entries))
    builder.with_mounts(
        {
            "destination": entry["containerPath"], "source": entry["hostPath"],
            "type": entry.get("type") or "bind", "options": list(entry.get("options") or ("rbind",)),
        }
        for entry in entries
    )
    builder.spec["mounts"].sort(key=lambda entry: posixpath.normpath(entry["destination"]).rstrip("/").count("/"))


def _node(node: Mapping[str, Any], user: Mapping[str, Any]) -> devices.Device:
    """The device of a `deviceNodes` entry; what it leaves out of the device comes from the host's node.

    Its owner is the container's user unless it states one: the host's owner means nothing in there.
    """
    path, kind = node["path"], node.get("type") or ""
    whole = bool(kind) and (bool(node.get("major")) or kind == "p")
    major, minor, mode = node.get("major") or 0, node.get("minor") or 0, node.get("fileMode")
    if not whole or mode is None:
        try:
            found = devices.from_path(node.get("hostPath") or path, follow=True)
        except InvalidArgument:
            if not whole:
                raise
        else:
            mode = found.mode if mode is None else mode
            if not whole:
                kind, major, minor = found.kind, found.major, found.minor
    return devices.Device(
        path, "c" if kind == "u" else kind, major, minor, 0o666 if mode is None else mode,
        node.get("uid", user.get("uid", 0)), node.get("gid", user.get("gid", 0)),
    )
