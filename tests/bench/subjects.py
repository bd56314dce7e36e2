"""The two daemons under measurement, each started by us with folders, socket, cgroup and bridge of its own."""

from __future__ import annotations

import abc
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tests.bench import processes
from tests.bench.client import Client
from tests.bench.waiting import wait_until

CAP_SYS_RESOURCE = 24
CNI_FOLDERS = ("/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni")


def cni_plugins() -> str | None:
    """Folder of the CNI plugins bridge, host-local and loopback, if they are installed."""
    for folder in CNI_FOLDERS:
        if all(os.access(f"{folder}/{name}", os.X_OK) for name in ("bridge", "host-local", "loopback")):
            return folder
    return None


class Subject(abc.ABC):
    """One daemon: how it is configured and started, and which processes belong to it."""

    name = ""
    cli: tuple[str, ...] = ()
    pull_words: tuple[str, ...] = ()
    remove_words: tuple[str, ...] = ()

    def __init__(self, work: Path, registry: str, number: int) -> None:
        self.folder = work / self.name
        self.folder.mkdir()
        self.root, self.state = self.folder / "root", work / "run" / self.name
        self.address = str(work / "run" / f"{self.name}.sock")
        self.registry = registry
        self.tag = f"{self.name}-{os.getpid()}"
        self.cgroup = f"/{work.name}-{self.name}"
        self.bridge = f"br{work.name[-8:]}{number}"  # begins with a letter, as the plugins want it
        self.subnet = f"10.213.{number}.0/24"
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None
        self._write_hosts()
        self._write_cni()
        self.config = self.folder / "config.toml"
        self.config.write_text(self.settings(), encoding="utf-8")

    @abc.abstractmethod
    def settings(self) -> str:
        """Text of the configuration file."""

    @abc.abstractmethod
    def command(self) -> list[str]:
        """Command line of the daemon."""

    def _write_hosts(self) -> None:
        folder = self.folder / "hosts" / self.registry
        folder.mkdir(parents=True)
        (folder / "hosts.toml").write_text(
            f'server = "http://{self.registry}"\n[host."http://{self.registry}"]\n'
            'capabilities = ["pull", "resolve"]\n', encoding="utf-8")

    def _write_cni(self) -> None:
        folder = self.folder / "cni"
        folder.mkdir()
        plugin = {"type": "bridge", "bridge": self.bridge, "isGateway": True,
                  "ipam": {"type": "host-local", "dataDir": str(self.folder / "addresses"),
                           "ranges": [[{"subnet": self.subnet}]]}}
        text = json.dumps({"cniVersion": "1.0.0", "name": self.bridge, "plugins": [plugin]})
        (folder / "10-bench.conflist").write_text(text, encoding="utf-8")

    @property
    def client(self) -> Client:
        """The gRPC client of this daemon."""
        if self._client is None:
            self._client = Client(self.address)
        return self._client

    @property
    def pid(self) -> int:
        """Process id of the daemon."""
        if self._process is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._process.pid

    def start(self) -> None:
        """Start the daemon and return when it serves."""
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(self.command(), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                             start_new_session=True, env=self.environment())
        wait_until(self._serves, f"{self.name} to serve {self.address}; see {self.folder / 'log'}", timeout=120)

    def _serves(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            tail = (self.folder / "log").read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"{self.name} ended with {self._process.returncode}: {tail}")
        if not os.path.exists(self.address):
            return False
        return self.client.serves()

    def environment(self) -> dict[str, str]:
        """Environment of the daemon and of the commands."""
        return dict(os.environ)

    def stop(self) -> None:
        """End the daemon; containers go on."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(30)
        self._process = None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.address)

    def run(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[bytes]:
        """Run a command of this daemon's command line client; CalledProcessError when it fails."""
        command = [*self.cli, "--address", self.address, *words]
        return subprocess.run(command, check=True, capture_output=True, timeout=timeout, env=self.environment())

    def shims(self, tasks: list[int]) -> set[int]:
        """The shims of the tasks: the parents of their processes, and what those run of their own program."""
        parents = {processes.parent(pid) for pid in tasks} - {0, 1, self.pid}
        family = set().union(*(processes.descendants(pid) for pid in parents)) - set(tasks)
        return parents | {pid for pid in family if processes.program(pid) == processes.program(processes.parent(pid))}

    def daemon_processes(self, shims: set[int]) -> set[int]:
        """The daemon and its helpers: what descends from it, less `shims` and what descends from those."""
        mine = processes.descendants(self.pid)
        for shim in shims & mine:
            mine -= processes.descendants(shim)
        return mine

    def sweep(self) -> None:
        """After the end of the daemon: end what it left running, unmount what it left mounted, remove its files."""
        self.stop()
        for _ in range(50):
            left = self._left_running()
            if not left:
                break
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: not self._left_running(), f"the ends of {self.name}'s processes", timeout=2)
        for _ in range(3):
            for point in self._mounts():
                subprocess.run(["umount", "-l", point], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", self.bridge], check=False, capture_output=True)
        self._remove_cgroups()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.state, ignore_errors=True)

    def _left_running(self) -> set[int]:
        """Shims (our folder is among their arguments or is where they stand) and what runs in our cgroups."""
        found: set[int] = set()
        for pid in processes.processes():
            if pid != os.getpid() and processes.program(pid).startswith(("containerd", "python", "runc", "crun")):
                words = f"{processes.command(pid)} {processes.directory(pid)}/"
                if any(f"{folder}/" in words for folder in (self.folder, self.state)) or f" {self.address} " in words:
                    found.add(pid)
        for folder in self._cgroups():
            with contextlib.suppress(OSError):
                found |= {int(pid) for pid in (folder / "cgroup.procs").read_text(encoding="utf-8").split()}
        return found

    def _mounts(self) -> list[str]:
        text = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
        points = [line.split()[4].replace("\\040", " ") for line in text.splitlines()]
        ours = (f"{self.folder}/", f"{self.state}/")
        return [point for point in reversed(points) if point.startswith(ours)]

    def _cgroups(self) -> list[Path]:
        """Our cgroups in every hierarchy, leaves first."""
        found: list[Path] = []
        for top in [Path("/sys/fs/cgroup"), *(item for item in Path("/sys/fs/cgroup").iterdir() if item.is_dir())]:
            if (top / self.cgroup.strip("/")).is_dir():
                found += [Path(where) for where, _, _ in os.walk(top / self.cgroup.strip("/"), topdown=False)]
        return found

    def _remove_cgroups(self) -> None:
        for folder in [*self._cgroups(), *Path("/sys/fs/cgroup").glob("*/bench"), Path("/sys/fs/cgroup/bench")]:
            with contextlib.suppress(OSError):  # the last ones are of the namespace: another run may still use them
                folder.rmdir()


class Ours(Subject):
    """This project's daemon, from the environment that runs the benchmark."""

    name = "ours"
    pull_words = ("image", "pull")
    remove_words = ("image", "rm")

    def __init__(self, work: Path, registry: str, number: int) -> None:
        self._programs = Path(sys.executable).parent
        self.cli = (str(self._programs / "pctr"),)
        super().__init__(work, registry, number)

    def settings(self) -> str:
        plugins = cni_plugins() or CNI_FOLDERS[0]
        return (
            f'root = "{self.root}"\nstate = "{self.state}"\naddress = "{self.address}"\nlog_level = "warning"\n'
            f'[registry]\nconfig_path = "{self.folder / "hosts"}"\n'
            f'[cri.cni]\nconf_dir = "{self.folder / "cni"}"\nbin_dirs = ["{plugins}"]\n')

    def command(self) -> list[str]:
        return [str(self._programs / "supervisord-ctr"), "--config", str(self.config)]


class Theirs(Subject):
    """A containerd: the one on the PATH, or the program that the caller names."""

    name = "theirs"
    pull_words = ("images", "pull", "--plain-http")
    remove_words = ("images", "rm", "--sync")

    def __init__(self, work: Path, registry: str, number: int, program: str) -> None:
        self._program = program
        beside = Path(program).parent / "ctr"
        self.cli = (str(beside) if beside.exists() else (shutil.which("ctr") or "ctr"),)
        words = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        match = re.search(r"\b[v ]?(\d+)\.(\d+)\.\d+", words)
        self.major = int(match.group(1)) if match else 1
        super().__init__(work, registry, number)

    def settings(self) -> str:
        plugins = cni_plugins() or CNI_FOLDERS[0]
        clamp = "false" if processes.has_capability(CAP_SYS_RESOURCE) else "true"
        pause, hosts = f"{self.registry}/bench/pause:latest", self.folder / "hosts"
        head = (
            f'root = "{self.root}"\nstate = "{self.state}"\n[grpc]\naddress = "{self.address}"\n[debug]\nlevel = "warn"\n'
            f'[plugins."io.containerd.internal.v1.opt"]\npath = "{self.folder / "opt"}"\n')
        if self.major >= 2:
            return (
                f'version = 3\n{head}[plugins."io.containerd.nri.v1.nri"]\ndisable = true\n'
                f'[plugins."io.containerd.cri.v1.images".registry]\nconfig_path = "{hosts}"\n'
                f'[plugins."io.containerd.cri.v1.images".pinned_images]\nsandbox = "{pause}"\n'
                f'[plugins."io.containerd.cri.v1.runtime"]\nrestrict_oom_score_adj = {clamp}\n'
                f'[plugins."io.containerd.cri.v1.runtime".cni]\nbin_dirs = ["{plugins}"]\n'
                f'conf_dir = "{self.folder / "cni"}"\n')
        return (
            f'version = 2\n{head}[plugins."io.containerd.grpc.v1.cri"]\nsandbox_image = "{pause}"\n'
            f'restrict_oom_score_adj = {clamp}\n[plugins."io.containerd.grpc.v1.cri".registry]\n'
            f'config_path = "{hosts}"\n[plugins."io.containerd.grpc.v1.cri".cni]\nbin_dir = "{plugins}"\n'
            f'conf_dir = "{self.folder / "cni"}"\n')

    def command(self) -> list[str]:
        return [self._program, "--config", str(self.config)]

    def environment(self) -> dict[str, str]:
        folder = str(Path(self._program).resolve().parent)
        return {**os.environ, "PATH": f"{folder}:{os.environ.get('PATH', '')}"}


def find_containerd() -> str:
    """The containerd to compare with: $CONTAINERD, or the one on the PATH; empty when there is none."""
    named = os.environ.get("CONTAINERD")
    if named:
        found = shutil.which(named)
        if found is None:
            raise RuntimeError(f"CONTAINERD names {named}, which is not a program")
        return str(Path(found).absolute())
    return shutil.which("containerd") or ""
