"""Hosts: which servers are asked for a repository, in which order, and how they are reached.

Owns `DIR/HOST/hosts.toml` in containerd's layout (P18): `server`, `[host."URL"]` in the order of the
file, `capabilities`, `ca`, `client`, `skip_verify`, `header`, `override_path`, `dial_timeout`, and
Docker's layout of certificate files where there is no `hosts.toml`. One key is ours: `fallback = false`
at the top says that nobody but the listed hosts is asked. Files are read on every look-up, so changes
need no restart. Opens no connection.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from supervisord_ctr.errors import InvalidArgument, from_os_error

PULL, RESOLVE, PUSH = "pull", "resolve", "push"
_ALL = frozenset((PULL, RESOLVE, PUSH, "referrers"))
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ns|us|µs|ms|s|m|h)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class RegistryHost:
    """One server: `url` is scheme, host and port; `path` the API's root below it ("/v2").

    `scheme_unsure` says that the other scheme may be tried when this one is not spoken there.
    """

    url: str
    path: str = "/v2"
    capabilities: frozenset[str] = _ALL
    ca: tuple[str, ...] = ()
    client: tuple[tuple[str, str], ...] = ()
    skip_verify: bool = False
    headers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dial_timeout: float | None = None
    scheme_unsure: bool = False
    is_mirror: bool = False

    @property
    def host(self) -> str:
        """Host and port."""
        return urlsplit(self.url).netloc

    def tls_key(self) -> tuple[object, ...]:
        """What distinguishes TLS set-ups: connections are shared among hosts that agree on it."""
        return (self.ca, self.client, self.skip_verify)


def is_loopback(host: str) -> bool:
    """Whether `host` (perhaps with port) names this machine."""
    name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def seconds(text: str) -> float:
    """A Go duration ("1m30s") in seconds."""
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise InvalidArgument(f"{text!r} is not a duration", kind="hosts.toml")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


class HostsConfig:
    """Looks hosts up below `config_path` ("" means there is no configuration)."""

    def __init__(self, config_path: str = "", *, default_scheme: str = "") -> None:
        self._paths = [path for path in config_path.split(":") if path]
        self._default_scheme = default_scheme

    def overridden(self, config_path: str = "", default_scheme: str = "") -> HostsConfig:
        """The same with what one request asks for otherwise."""
        return HostsConfig(
            config_path or ":".join(self._paths), default_scheme=default_scheme or self._default_scheme
        )

    def lookup(self, domain: str, capability: str) -> list[RegistryHost]:
        """The hosts to ask for a repository of `domain`, first the mirrors; InvalidArgument for a broken file.

        Blocking, but only for small local files.
        """
        found = self._load(domain)
        return [host for host in found if capability in host.capabilities]

    def _load(self, domain: str) -> list[RegistryHost]:
        folder = self._folder(domain)
        if folder is None:
            return [self.default(domain)]
        file = folder / "hosts.toml"
        try:
            data = tomllib.loads(file.read_text())
        except FileNotFoundError:
            return [_with_certificates(self.default(domain), folder)]
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"{file}: {error}", kind="hosts.toml", key=domain) from error
        except OSError as error:
            raise from_os_error(error, "read registry hosts") from error
        try:
            return self._parse(domain, folder, data)
        except InvalidArgument as error:
            raise InvalidArgument(f"{file}: {error.message}", kind="hosts.toml", key=domain) from error

    def _folder(self, domain: str) -> Path | None:
        names = [domain, "_default"]
        head, colon, port = domain.rpartition(":")
        if colon:
            names.insert(0, f"{head}_{port}_")
        for path in self._paths:
            for name in names:
                if "/" not in name and name not in (".", "..") and os.path.isdir(folder := os.path.join(path, name)):
                    return Path(folder)
        return None

    def default(self, domain: str) -> RegistryHost:
        """How a domain is reached without configuration: HTTPS, or what a loopback address speaks."""
        name = "registry-1.docker.io" if domain == "docker.io" else domain
        if self._default_scheme:
            return RegistryHost(f"{self._default_scheme}://{name}", skip_verify=is_loopback(name))
        port = urlsplit(f"//{name}").port
        if is_loopback(name):
            if port in (None, 443):
                return RegistryHost(f"https://{name}", skip_verify=True)
            return RegistryHost(f"http://{name}", skip_verify=True, scheme_unsure=port != 80)
        return RegistryHost(f"https://{name}")

    def _parse(self, domain: str, folder: Path, data: dict[str, Any]) -> list[RegistryHost]:
        hosts = []
        tables = data.get("host") or {}
        if not isinstance(tables, dict):
            raise InvalidArgument("host is not a table", kind="hosts.toml")
        for url, table in tables.items():
            if not isinstance(table, dict):
                raise InvalidArgument(f"host {url!r} is not a table", kind="hosts.toml")
            hosts.append(replace(_host(url, folder, table), is_mirror=True))
        if data.get("fallback", True) is False:
            return hosts
        if server := data.get("server"):
            hosts.append(_host(str(server), folder, data))
        else:
            base = self.default(domain)
            hosts.append(_host(base.url, folder, data, base))
        return hosts


def _host(url: str, folder: Path, table: dict[str, Any], base: RegistryHost | None = None) -> RegistryHost:
    if "://" not in url:
        url = f"https://{url}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InvalidArgument(f"{url!r} is not a server", kind="hosts.toml")
    override = bool(table.get("override_path", False))
    path = parts.path.rstrip("/")
    if not override and not path.endswith("/v2"):
        path += "/v2"
    words = table.get("capabilities") or []
    if not isinstance(words, list) or not all(str(word).lower() in _ALL for word in words):
        raise InvalidArgument(f"capabilities {words!r} are not among {sorted(_ALL)}", kind="hosts.toml")
    explicit_tls = any(key in table for key in ("ca", "client", "skip_verify"))
    timeout = table.get("dial_timeout")
    return RegistryHost(
        f"{parts.scheme}://{parts.netloc}", path,
        frozenset(str(word).lower() for word in words) if words else _ALL,
        tuple(str(folder / str(file)) for file in _list(table.get("ca"), "ca")),
        tuple(_pair(item, folder) for item in _list(table.get("client"), "client")),
        bool(table.get("skip_verify", base.skip_verify if base else False)), _headers(table.get("header")),
        seconds(str(timeout)) if timeout else None,
        base.scheme_unsure if base else parts.scheme == "http" and explicit_tls and parts.port != 80,
    )


def _list(value: object, key: str) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise InvalidArgument(f"{key} is neither a string nor a list", kind="hosts.toml")
    return value


def _pair(item: object, folder: Path) -> tuple[str, str]:
    """A client certificate and its key ("" when both are in one file)."""
    if isinstance(item, str):
        return str(folder / item), ""
    if isinstance(item, list) and len(item) == 2:
        return str(folder / str(item[0])), str(folder / str(item[1])) if item[1] else ""
    raise InvalidArgument(f"client {item!r} is not a certificate or a pair of certificate and key", kind="hosts.toml")


def _headers(value: object) -> dict[str, tuple[str, ...]]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidArgument("header is not a table", kind="hosts.toml")
    headers = {str(key): tuple(str(text) for text in _list(texts, "header")) for key, texts in value.items()}
    for key, texts in headers.items():
        if any(byte in text for text in (key, *texts) for byte in "\r\n\0"):
            raise InvalidArgument(f"header {key!r} has a line break in it", kind="hosts.toml")
    return headers


def _with_certificates(host: RegistryHost, folder: Path) -> RegistryHost:
    """Docker's layout: *.crt are authorities, *.cert with *.key are client certificates."""
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())
    client = tuple(
        (str(folder / name), str(folder / key) if (key := name.removesuffix(".cert") + ".key") in names else "")
        for name in names if name.endswith(".cert")
    )
    ca = tuple(str(folder / name) for name in names if name.endswith(".crt"))
    if not ca and not client:
        return host
    return replace(host, ca=ca, client=client, scheme_unsure=False, url=host.url.replace("http:", "https:", 1))
