"""CNI: ADD, CHECK, DEL, GC and STATUS of whole networks, as libcni does them.

Owns the order of plugins, what is put into their configuration (previous result, capabilities) and
how results of several networks become one. What was attached is the caller's record: `Attachment`
values go in and out, and hold the configuration that ADD used, so that DEL works after the
configuration files changed or went. Source: CNI specification 1.1.0, sections 3 to 5.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from supervisord_ctr import errors
from supervisord_ctr.sandbox.cni_config import ConfigFolder, NetworkList
from supervisord_ctr.sandbox.cni_exec import LIMITED, PluginError, find_plugin, run_plugin

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is asked of the networks for one pod. `capabilities` are runtimeConfig values by name."""

    container_id: str
    netns: str
    arguments: Mapping[str, str] = field(default_factory=dict)
    capabilities: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Attachment:
    """One network of one pod: what was asked, and the result when ADD succeeded."""

    network: NetworkList
    interface: str
    result: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for the record."""
        return {"network": self.network.to_json(), "interface": self.interface, "result": self.result}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Attachment:
        """The reverse."""
        return cls(NetworkList.from_json(value["network"]), value["interface"], value.get("result"))


def addresses(result: Mapping[str, Any], interface: str) -> list[str]:
    """IP addresses of `interface` in the sandbox, IPv4 before IPv6 when both lead the list.

    The order of the plugin is kept; results of versions before 0.3.0 (ip4, ip6) are read too.
    """
    found: list[str] = []
    for old in ("ip4", "ip6"):
        if isinstance(result.get(old), dict) and result[old].get("ip"):
            found.append(str(ipaddress.ip_interface(result[old]["ip"]).ip))
    interfaces = result.get("interfaces") or []
    for entry in result.get("ips") or []:
        index = entry.get("interface")
        if isinstance(index, int) and interfaces:
            about = interfaces[index] if 0 <= index < len(interfaces) else {}
            if about.get("name") != interface or not about.get("sandbox"):
                continue
        found.append(str(ipaddress.ip_interface(entry["address"]).ip))
    return found


def prefer(found: Sequence[str], preference: str = "ipv4") -> list[str]:
    """`found` with the first address of the preferred family in front ("ipv4", "ipv6" or "cni")."""
    if preference == "cni":
        return list(found)
    wanted = 6 if preference == "ipv6" else 4
    for index, address in enumerate(found):
        if ipaddress.ip_address(address).version == wanted:
            return [address, *found[:index], *found[index + 1:]]
    return list(found)


def _has_nothing_to_do(plugin: Mapping[str, Any], request: Request) -> bool:
    """Whether a chained plugin of the CNI project would hand on the result it gets, as it does without its capability.

    Starting it only to learn that costs as much as the rest of a pod's network. Known for two
    plugins, whose documentation says so; every other one is run whatever was asked.
    """
    if plugin["type"] == "portmap":
        return not request.capabilities.get("portMappings")
    if plugin["type"] == "bandwidth":
        stated = any(plugin.get(key) for key in ("ingressRate", "egressRate"))
        return not stated and not request.capabilities.get("bandwidth")
    return False


class Cni:
    """The plugins of this host and the networks of one configuration folder."""

    def __init__(
        self, folder: ConfigFolder, plugin_folders: Sequence[str], timeout: float = 60.0, *, skip_idle: bool = True
    ) -> None:
        self._folder = folder
        self._plugin_folders = tuple(plugin_folders)
        self._timeout = timeout
        self._skip_idle = skip_idle

    def plan(self) -> list[Attachment]:
        """What a new pod will be attached to; raises `FailedPrecondition` when there is no network."""
        return [Attachment(network, f"eth{index}") for index, network in enumerate(self._folder.load())]

    def networks(self) -> tuple[NetworkList, ...]:
        """The networks in force; raises `FailedPrecondition` when there is none."""
        return self._folder.load()

    async def add(self, request: Request, attachments: Sequence[Attachment]) -> list[Attachment]:
        """Attach to all networks side by side; on failure nothing is undone: the caller DELs all of them.

        Raises the first failure; networks that were attached by then are known to their plugins and
        are given back by `delete` with the same attachments.
        """
        results = await asyncio.gather(
            *(self._add_one(request, attachment) for attachment in attachments), return_exceptions=True
        )
        done: list[Attachment] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            done.append(result)
        return done

    async def _add_one(self, request: Request, attachment: Attachment) -> Attachment:
        previous: Mapping[str, Any] | None = None
        for plugin in self._needed(attachment, request):
            previous = await self._run("ADD", request, attachment, plugin, previous)
        return replace(attachment, result=previous or {})

    def _needed(self, attachment: Attachment, request: Request) -> list[Mapping[str, Any]]:
        """The plugins to run, in order: the first always, chained ones unless they are known to be idle."""
        first, *chained = attachment.network.plugins
        return [first, *(each for each in chained if not (self._skip_idle and _has_nothing_to_do(each, request)))]

    async def check(self, request: Request, attachments: Sequence[Attachment]) -> None:
        """Raise `PluginError` when a network is no longer as ADD left it (from 0.4.0 on)."""
        for attachment in attachments:
            if not attachment.network.supports("0.4.0") or attachment.network.disable_check:
                continue
            for plugin in self._needed(attachment, request):
                await self._run("CHECK", request, attachment, plugin, attachment.result)

    async def delete(self, request: Request, attachments: Sequence[Attachment]) -> None:
        """Detach from all networks, the last plugin first; every network is tried before the first error is raised.

        Plugins take a DEL for what does not exist (any more) as success, so this may be repeated.
        """
        failures: list[errors.Error] = []
        for attachment in reversed(attachments):
            try:
                for plugin in reversed(self._needed(attachment, request)):
                    await self._run("DEL", request, attachment, plugin, attachment.result)
            except errors.Error as error:
                failures.append(error)
        if failures:
            raise failures[0]

    async def collect(self, valid: Sequence[tuple[str, str]]) -> None:
        """GC: tell every network which attachments (container ID, interface) are still wanted."""
        for network in self._folder.load():
            if not network.supports("1.1.0") or network.disable_gc:
                continue
            wanted = [{"containerID": identity, "ifname": interface} for identity, interface in valid]
            for plugin in network.plugins:
                config = self._config(network, plugin, None)
                config["cni.dev/valid-attachments"] = wanted
                await self._exec("GC", config, plugin)

    async def status(self) -> str:
        """"" when pods can be attached, otherwise the reason, in words."""
        try:
            networks = self._folder.load()
            for network in networks:
                for plugin in network.plugins:
                    path = find_plugin(plugin["type"], self._plugin_folders)
                    if network.supports("1.1.0"):
                        await run_plugin(
                            path, "STATUS", self._config(network, plugin, None), folders=self._plugin_folders,
                            timeout=min(10.0, self._timeout),
                        )
        except PluginError as error:
            return "" if error.number == LIMITED else error.message
        except errors.Error as error:
            return error.message
        return ""

    def _config(
        self, network: NetworkList, plugin: Mapping[str, Any], previous: Mapping[str, Any] | None,
        capabilities: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        config = {key: value for key, value in plugin.items() if key != "capabilities"}
        config["name"], config["cniVersion"] = network.name, network.version
        wanted = plugin.get("capabilities") or {}
        given = {
            name: value for name, value in (capabilities or {}).items()
            if wanted.get(name) and value not in (None, [], {}, "")
        }
        if given:
            config["runtimeConfig"] = given
        if previous is not None:
            config["prevResult"] = previous
        return config

    async def _run(
        self, command: str, request: Request, attachment: Attachment, plugin: Mapping[str, Any],
        previous: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        network = attachment.network
        if command == "DEL" and not network.supports("0.4.0"):
            previous = None
        config = self._config(network, plugin, previous, request.capabilities)
        result = await self._exec(
            command, config, plugin, container_id=request.container_id, netns=request.netns,
            interface=attachment.interface, arguments=request.arguments,
        )
        if command == "ADD":
            result.setdefault("cniVersion", network.version)
        return result

    async def _exec(
        self, command: str, config: Mapping[str, Any], plugin: Mapping[str, Any], **keywords: Any
    ) -> dict[str, Any]:
        path = find_plugin(plugin["type"], self._plugin_folders)
        return await run_plugin(
            path, command, config, folders=self._plugin_folders, timeout=self._timeout, **keywords
        )
