"""AppArmor profiles: which are loaded, and the default one, which is loaded when first asked for.

The default profile lets a container do what other engines' default profiles let it do. It has the name that
containerd's CRI uses, so that a profile which an administrator loaded under it beforehand is the one that counts.

Sources: apparmor.d(5), apparmor_parser(8).
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import subprocess
import threading
from pathlib import Path

from supervisord_ctr import errors

log = logging.getLogger(__name__)

DEFAULT_PROFILE = "cri-containerd.apparmor.d"
ENABLED = "/sys/module/apparmor/parameters/enabled"
PROFILES = "/sys/kernel/security/apparmor/profiles"
_MACROS = "/etc/apparmor.d"
_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_PARSER_LIMIT = 60.0
_ABI = "abi/3.0"
#: Set by who starts a container's first process (systemd.io/CONTAINER_INTERFACE).
_CONTAINER_MARK = "container"

#: A container may do what its user and its capabilities allow, but for mounting and for writing to the kernel's own
#: files. Rules cannot take back a part of what another denies, so what stays open is spelled out by what differs
#: from it, a letter at a time: the folders of processes and sys/kernel/shm* in /proc, fs/cgroup in /sys.
_RULES = """\
  file,
  network,
  capability,
  umount,
  deny mount,
  ptrace peer={name},
  signal peer={name},
  signal receive peer={{{daemon},unconfined,runc,crun}},
  deny @{{PROC}}/{{[^0-9s],s[^y],sy[^s],sys[^/],sys/[^k],sys/k[^e],sys/ke[^r]}}** w,
  deny @{{PROC}}/sys/kernel/{{[^s],s[^h],sh[^m]}}** w,
  deny @{{PROC}}/{{kcore,sysrq-trigger}} mrwklx,
  deny /sys/{{[^f],f[^s],fs/[^c],fs/c[^g]}}** wklx,
  deny /sys/{{firmware,kernel/security,devices/virtual/powercap}}/** mrwklx,
"""

_loading = threading.Lock()


def enabled() -> bool:
    """Whether the kernel enforces AppArmor profiles, and this process is not in a container of somebody else's.

    There the host's profiles count, and none can be loaded.
    """
    if os.environ.get(_CONTAINER_MARK) or not os.path.exists(PROFILES):
        return False
    try:
        return Path(ENABLED).read_text(encoding="ascii").startswith("Y")
    except OSError:
        return False


def loaded() -> set[str]:
    """Names of the profiles that the kernel has."""
    try:
        text = Path(PROFILES).read_text(encoding="utf-8")
    except OSError:
        return set()
    return {line.rpartition(" (")[0] for line in text.splitlines()}


def default_profile() -> str:
    """The name of the default profile, which is loaded when this returns; "" where no program can load it.

    Blocking. `Internal` when the program fails: a container that is to be confined does not run unconfined.
    """
    with _loading:
        if DEFAULT_PROFILE in loaded():
            return DEFAULT_PROFILE
        parser = shutil.which("apparmor_parser", path=_PATH)
        if parser is None:
            _tell_of_no_parser()
            return ""
        _load(parser, profile_text(DEFAULT_PROFILE))
        log.info("loaded the apparmor profile %s", DEFAULT_PROFILE)
    return DEFAULT_PROFILE


@functools.cache
def _tell_of_no_parser() -> None:
    log.warning("apparmor_parser is not installed: containers run without the profile %s", DEFAULT_PROFILE)


def profile_text(name: str, macros: str = _MACROS, daemon: str | None = None) -> str:
    """The default profile under a name; `daemon` is the profile of who sends signals, by default this process's."""
    def there(macro: str) -> bool:
        return os.path.exists(os.path.join(macros, macro))

    abi = f"abi <{_ABI}>,\n" if there(_ABI) else ""
    tunables = "include <tunables/global>" if there("tunables/global") else "@{PROC}=/proc/"
    base = "  include <abstractions/base>\n" if there("abstractions/base") else ""
    rules = _RULES.format(name=name, daemon=_own_profile() if daemon is None else daemon)
    return f"{abi}{tunables}\nprofile {name} flags=(attach_disconnected,mediate_deleted) {{\n{base}{rules}}}\n"


def _own_profile() -> str:
    """What this process is confined by: "NAME (MODE)" without the mode."""
    try:
        text = Path("/proc/self/attr/current").read_text(encoding="utf-8").strip("\0\n")
    except OSError:
        return "unconfined"
    return text.rpartition(" (")[0] or text or "unconfined"


def _load(parser: str, text: str) -> None:
    # No cache (-K): the text depends on this process; replacing (-r) is no error when somebody else was first.
    try:
        done = subprocess.run([parser, "-Kr"], input=text, capture_output=True, text=True, check=False,
                              timeout=_PARSER_LIMIT, env={"PATH": _PATH}, cwd="/")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise errors.Internal(f"apparmor profile {DEFAULT_PROFILE}: {error}", kind="apparmor") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise errors.Internal(
            f"apparmor profile {DEFAULT_PROFILE}: {parser} ended with {done.returncode}: {said}", kind="apparmor",
            key=DEFAULT_PROFILE,
        )
