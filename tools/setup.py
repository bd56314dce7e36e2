#!/usr/bin/env python3
"""Install what the project needs: Python packages into a virtual environment, programs with apt.

    tools/setup.py python VENV       make VENV and install the project and its tools into it
    tools/setup.py programs demo     what the demonstration runs
    tools/setup.py programs test     what the tests run as well

Only the standard library is used, with any Python from 3.11 on. What cannot be installed is named,
with the command that would do it.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import struct
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

#: program or file -> Debian package
DEMO = {
    "runc": "runc",
    "docker-registry": "docker-registry",
    "busybox": "busybox-static",
    "ip": "iproute2",
}
TEST = {
    **DEMO,
    "containerd": "containerd",
    "crun": "crun",
    "skopeo": "skopeo",
    "umoci": "umoci",
    "iptables": "iptables",
    "nft": "nftables",
    "apparmor_parser": "apparmor",
    "mkfs.ext4": "e2fsprogs",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "criu": "criu",
    "strace": "strace",
    "ps": "procps",
    "gcc": "gcc",
    "/usr/include/stdio.h": "libc6-dev",
}


def missing(wanted: dict[str, str]) -> dict[str, str]:
    """The programs of `wanted` that this machine lacks."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin"

    def there(name: str) -> bool:
        return os.path.exists(name) if name.startswith("/") else shutil.which(name, path=path) is not None

    lacking = {name: package for name, package in wanted.items() if not there(name)}
    if "busybox" not in lacking and "busybox" in wanted and not static_busybox():
        lacking["busybox"] = wanted["busybox"]
    return lacking


def static_busybox() -> bool:
    """Whether the installed busybox needs no interpreter (elf(5), PT_INTERP), so that an image may hold it alone."""
    program = shutil.which("busybox")
    if program is None:
        return False
    with open(program, "rb") as handle:
        header = handle.read(64)
        if header[:5] != b"\x7fELF\x02":
            return False
        table, size, count = struct.unpack_from("<Q", header, 32)[0], *struct.unpack_from("<HH", header, 54)
        handle.seek(table)
        kinds = [struct.unpack_from("<I", handle.read(size))[0] for _ in range(count)]
    return 3 not in kinds


def install_programs(kind: str) -> None:
    """Install what is missing, or say exactly what is."""
    wanted = {"demo": DEMO, "test": TEST}[kind]
    lacking = missing(wanted)
    if not lacking:
        return
    packages = sorted(set(lacking.values()))
    command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    print(f"installing: {' '.join(packages)}", flush=True)
    if os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for attempt in (["apt-get", "update", "-q"], command):
            result = subprocess.run(attempt, check=False, env=environment, stdin=subprocess.DEVNULL,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if result.returncode:
                print(result.stdout[-4000:], file=sys.stderr)
    lacking = missing(wanted)
    if lacking:
        lines = "\n".join(f"  {name} (Debian package {package})" for name, package in sorted(lacking.items()))
        sys.exit(f"missing programs:\n{lines}\ninstall them as root: {' '.join(command)}")


def install_python(venv: pathlib.Path) -> None:
    """Make the virtual environment and install the project, editable, with its development tools."""
    if sys.version_info < (3, 11):
        sys.exit(f"python 3.11 or later is needed, this is {sys.version.split()[0]}: set PYTHON=/path/to/python3")
    python = venv / "bin" / "python"
    if not (python.exists() and (venv / "bin" / "pip").exists()):
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=False,
                              capture_output=True, text=True)
        if made.returncode and os.geteuid() == 0 and shutil.which("apt-get"):
            for command in (["apt-get", "update", "-q"],
                            ["apt-get", "install", "-y", "--no-install-recommends", "python3-venv", "python3-pip"]):
                subprocess.run(command, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=False,
                                  capture_output=True, text=True)
        if made.returncode:
            sys.exit(f"cannot make {venv}: {made.stdout}{made.stderr}\n(on Debian: apt-get install python3-venv)")
    print("installing python packages", flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", f"{ROOT}[dev]"]
    for _ in range(3):
        if subprocess.run(pip, check=False, stdin=subprocess.DEVNULL).returncode == 0:
            quicken(python)
            return
    sys.exit(f"pip failed: {' '.join(pip)}")


def quicken(python: pathlib.Path) -> None:
    """Make every start faster: paths in place of the import hook of an editable install, and bytecode beforehand.

    The hook costs each start of `pctr` and of the daemon some 15 ms; bytecode is never written later where
    PYTHONDONTWRITEBYTECODE is set or the checkout belongs to somebody else.
    """
    program = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = pathlib.Path(subprocess.run([str(python), "-c", program], check=True, capture_output=True,
                                           text=True).stdout.strip())
    for hook in packages.glob("__editable__.supervisord_ctr-*.pth"):
        hook.write_text("".join(f"{ROOT / folder}\n" for folder in ("", "shim", "cli")))
    folders = [str(ROOT / folder) for folder in ("supervisord_ctr", "shim", "cli")]
    subprocess.run([str(python), "-m", "compileall", "-q", *folders], check=False, stdin=subprocess.DEVNULL)


def main() -> None:
    match sys.argv[1:]:
        case ["python", venv]:
            install_python(pathlib.Path(venv))
        case ["programs", ("demo" | "test") as kind]:
            install_programs(kind)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
