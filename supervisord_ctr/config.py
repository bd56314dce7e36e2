"""Configuration: TOML file and command line into `Settings`, with the origin of every value.

Owns reading and checking. The settings themselves, their defaults and their meaning are in
`settings.py`. An unknown key or a value of the wrong type is an error that names file and key,
never ignored: a typing slip must not change what runs.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.settings import Settings

DEFAULT_PATH = Path("/etc/supervisord-ctr/config.toml")


@dataclass(frozen=True)
class Value:
    """One value in force: its dotted key, and "default", "file PATH" or "option --NAME"."""

    key: str
    value: Any
    origin: str
    help: str


@dataclass(frozen=True)
class Config:
    """Settings and where each one came from; a key that is not in `origins` has its default."""

    settings: Settings
    origins: Mapping[str, str]

    def values(self) -> list[Value]:
        """Every value in force, in the order of the sections."""
        return list(_walk(self.settings, "", self.origins))


def _walk(section: Any, prefix: str, origins: Mapping[str, str]) -> Iterator[Value]:
    for item in dataclasses.fields(section):
        key, value = prefix + item.name, getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(value, key + ".", origins)
        elif isinstance(value, Mapping):
            for name, entry in value.items():
                yield from _walk(entry, f"{key}.{name}.", origins)
        else:
            yield Value(key, value, origins.get(key, "default"), item.metadata.get("help", ""))


def _build(
    kind: type[Any], table: Mapping[str, Any], prefix: str, path: Path, origins: dict[str, str], base: Any
) -> Any:
    """`base` with what `table` says, checked against the annotations of the dataclass `kind`."""
    hints = typing.get_type_hints(kind)
    known = {item.name for item in dataclasses.fields(kind)}
    changes: dict[str, Any] = {}
    for name, value in table.items():
        key = prefix + name
        if name not in known:
            raise InvalidArgument(f"{path}: unknown key {key}; known here: {', '.join(sorted(known))}")
        changes[name] = _convert(hints[name], value, key, path, origins, getattr(base, name))
    return dataclasses.replace(base, **changes)


def _convert(hint: Any, value: Any, key: str, path: Path, origins: dict[str, str], current: Any) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise InvalidArgument(f"{path}: {key} must be a table")
        return _build(typing.cast("type[Any]", hint), value, key + ".", path, origins, current)
    if origin is not None and issubclass(origin, Mapping):
        entry = typing.get_args(hint)[1]
        if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
            raise InvalidArgument(f"{path}: {key} must be a table of tables")
        made = dict(current)
        for name, table in value.items():
            made[name] = _build(entry, table, f"{key}.{name}.", path, origins, current.get(name) or entry())
        return made
    expected: Any = list if origin is list else hint
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise InvalidArgument(f"{path}: {key} must be {_words(hint)}, not {value!r}")
    if origin is list and not all(isinstance(item, str) for item in value):
        raise InvalidArgument(f"{path}: {key} must be {_words(hint)}, not {value!r}")
    if expected in (int, float) and not value >= 0:  # also what is no number at all (nan)
        raise InvalidArgument(f"{path}: {key} must not be below 0, not {value!r}")
    origins[key] = f"file {path}"
    return value


def _words(hint: Any) -> str:
    names: dict[Any, str] = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return names.get(hint, "a list of strings")


def _check(settings: Settings) -> None:
    """Refuse values of the right type that cannot work."""
    if settings.log_level not in ("debug", "info", "warning", "error"):
        raise InvalidArgument(f"log_level {settings.log_level!r} must be debug, info, warning or error")
    if settings.log_format not in ("text", "json"):
        raise InvalidArgument(f"log_format {settings.log_format!r} must be text or json")
    if settings.cri.cgroup_driver not in ("cgroupfs", "systemd"):
        raise InvalidArgument(f"cri.cgroup_driver {settings.cri.cgroup_driver!r} must be cgroupfs or systemd")
    if settings.content.sharing_policy not in ("shared", "isolated"):
        raise InvalidArgument(
            f"content.sharing_policy {settings.content.sharing_policy!r} must be shared or isolated"
        )
    for name in ("root", "state", "address"):
        if not getattr(settings, name).startswith("/"):
            raise InvalidArgument(f"{name} {getattr(settings, name)!r} must be an absolute path")
    if len(settings.address.encode()) > 107:
        raise InvalidArgument(f"address {settings.address} is longer than the 107 bytes of a unix socket path")
    if settings.root == settings.state:
        raise InvalidArgument(f"root and state are both {settings.root}; they must differ")
    if settings.runtime.default not in settings.runtime.classes:
        raise InvalidArgument(f"runtime.default {settings.runtime.default!r} is not one of runtime.classes")
    for name, plugin in settings.proxy_plugins.items():
        if plugin.type != "snapshot":
            raise InvalidArgument(f"proxy_plugins.{name}: type {plugin.type!r} is not supported, only snapshot is")
        if not plugin.address:
            raise InvalidArgument(f"proxy_plugins.{name} needs an address, the path of its socket")
    if not 256 <= settings.cri.max_log_line <= 1 << 20:
        raise InvalidArgument(f"cri.max_log_line {settings.cri.max_log_line} must be from 256 to {1 << 20} bytes")
    if not 2 <= settings.cri.selinux_category_range <= 1024:
        raise InvalidArgument(
            f"cri.selinux_category_range {settings.cri.selinux_category_range} must be from 2 to 1024"
        )
    if bool(settings.cri.streaming.tls_certificate) != bool(settings.cri.streaming.tls_key):
        raise InvalidArgument("cri.streaming.tls_certificate and cri.streaming.tls_key go together")


def load(path: Path | None, options: Mapping[str, str] | None = None) -> Config:
    """Settings from the file at `path` (None: the default file, if it exists) and `options` over it.

    `options` maps top-level names ("root", "log_level") to the text given on the command line. A
    `state` or `root` that moved takes the socket's default path along. Raises `InvalidArgument`
    for a file that cannot be read or holds anything unknown or of the wrong type.
    """
    origins: dict[str, str] = {}
    settings = Settings()
    given = path is not None
    path = path or DEFAULT_PATH
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if given:
            raise InvalidArgument(f"no configuration file {path}") from None
        table = {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidArgument(f"configuration file {path}: {error}") from error
    settings = _build(Settings, table, "", path, origins, settings)
    for name, text in (options or {}).items():
        settings = dataclasses.replace(settings, **{name: text})
        origins[name] = f"option --{name.replace('_', '-')}"
    if "address" not in origins and "state" in origins:
        settings = dataclasses.replace(settings, address=str(Path(settings.state) / "supervisord-ctr.sock"))
        origins["address"] = f"below state ({origins['state']})"
    _check(settings)
    return Config(settings, origins)


def toml_text(value: Any) -> str:
    """`value` as TOML writes it (strings, numbers, booleans and lists of strings are JSON's)."""
    return json.dumps(value, ensure_ascii=False)


def render(config: Config) -> str:
    """The whole configuration as TOML, each line with its origin and meaning as a comment."""
    tables: dict[str, list[Value]] = {"": []}
    for entry in config.values():
        tables.setdefault(entry.key.rpartition(".")[0], []).append(entry)
    lines: list[str] = []
    for table, entries in tables.items():
        lines += ["", f"[{table}]"] if table else []
        for entry in entries:
            name = entry.key.rpartition(".")[2]
            lines.append(f"{name} = {toml_text(entry.value)}  # {entry.origin}: {entry.help}")
    return "\n".join(lines) + "\n"
