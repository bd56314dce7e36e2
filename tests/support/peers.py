"""The two sides of a conformance case: our daemon, and the containerd of the distribution beside it.

Owns a containerd of its own folders that serves CRI, from the same registry and with a network like
ours. A case runs on both sides with the same assertions; what the other side's version does not have
is named where the case is declared, by `beyond_containerd`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cri import Cri, Network, Registry, running_cri
from tests.support.daemon import DaemonProcess, wait_until
from tests.support.places import SHORT

OURS = "supervisord-ctr"
CONTAINERD = "containerd"

#: Containers of both sides hold no CAP_SYS_RESOURCE where the machine gives none.
_CONTAINERD_SETTINGS = """
version = 2
root = "{base}/root"
state = "{base}/state"
[grpc]
address = "{base}/s.sock"
[ttrpc]
address = "{base}/s.sock.ttrpc"
[debug]
level = "info"
[plugins."io.containerd.internal.v1.opt"]
path = "{base}/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.second]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.second.options]
BinaryName = "runc"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{network}"
"""

#: The same second handler on our side.
_OUR_HANDLERS = '[runtime.classes.second]\nbinary = "runc"'


def beyond_containerd(what: str) -> pytest.MarkDecorator:
    """The case runs on our side only, because containerd 1.6 has no `what`."""
    words = f"{OURS} (containerd 1.6: no {what})"
    return pytest.mark.parametrize("side", [pytest.param(OURS, id=words)])


class ContainerdProcess(DaemonProcess):
    """Debian's containerd below a private folder."""

    def command(self) -> list[str]:
        """The command line that `start` runs."""
        program = shutil.which("containerd")
        assert program, "containerd is not installed (apt-get install containerd)"
        return [program, "--config", str(self.base / "config.toml")]


@contextlib.contextmanager
def _running_containerd() -> Iterator[Cri]:
    base = Path(tempfile.mkdtemp(prefix="pctr-p-", dir=SHORT))
    registry, network = Registry(), Network(base)
    pause = registry.add("test/pause:1", {"Entrypoint": ["/bin/sleep", "1000000"]})
    daemon = ContainerdProcess(base, _CONTAINERD_SETTINGS.format(base=base, pause=pause, network=network.folder))
    try:
        daemon.start()
        cri = Cri(daemon, registry, network)
        try:
            wait_until(lambda: _ready(cri), f"containerd's networks\n{daemon.log_tail()}")
            yield cri
            cri.sweep()
        finally:
            cri.close()
        daemon.stop()
    finally:
        daemon.clean()
        registry.close()
        network.remove()
        shutil.rmtree(base, ignore_errors=True)


def _ready(cri: Cri) -> bool:
    from supervisord_ctr.api.cri.v1 import cri_pb2 as pb

    return all(condition.status for condition in cri.runtime.Status(pb.StatusRequest()).status.conditions)


class Peers:
    """Both sides, each started when it is first asked for."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._running: dict[str, Cri] = {}

    def get(self, side: str) -> Cri:
        """The CRI client of a side, its image pulled."""
        if side not in self._running:
            made = _running_containerd() if side == CONTAINERD else running_cri(extra=_OUR_HANDLERS)
            self._running[side] = self._stack.enter_context(made)
            self._running[side].pull()
        return self._running[side]


def own_namespace(kind: str) -> str:
    """The namespace of this process, as a container that shares it sees its own."""
    return os.readlink(f"/proc/self/ns/{kind}")
