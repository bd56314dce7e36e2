"""`supervisord-ctr`: the daemon's command line.

Owns arguments and exit statuses: 0 after a graceful stop, 1 when the daemon cannot run (one line on
standard error says why), 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

from supervisord_ctr import __version__, config, errors, logs, settings
from supervisord_ctr.linux import heap

#: Threads of the daemon wait for disks far more often than for memory.
_ARENAS = 2

EPILOG = """examples:
  supervisord-ctr                                   run with /etc/supervisord-ctr/config.toml, if it exists
  supervisord-ctr --root /srv/ctr --log-level debug run in a folder of its own
  supervisord-ctr --config my.toml --address /run/my.sock   take another configuration and another socket
  supervisord-ctr config show                       print every value in force and where it came from
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="supervisord-ctr",
        description="container supervisor: containerd's gRPC API and Kubernetes' CRI on one unix socket",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--config", metavar="FILE", type=Path, help=f"configuration file (default {config.DEFAULT_PATH})")
    usual = settings.Settings()
    made.add_argument("--root", metavar="DIR", help=f"folder of what must survive a reboot (default {usual.root})")
    made.add_argument("--state", metavar="DIR", help=f"folder of what a reboot may take (default {usual.state})")
    made.add_argument("--address", metavar="SOCKET", help=f"path of the socket (default {usual.address})")
    made.add_argument("--log-level", metavar="LEVEL",
                      help=f"debug, info, warning or error (default {usual.log_level})")
    made.add_argument("--log-format", metavar="FORMAT", help=f"text or json (default {usual.log_format})")
    made.add_argument("--version", action="version", version=f"supervisord-ctr {__version__}")
    commands = made.add_subparsers(dest="command", metavar="COMMAND")
    show = commands.add_parser("config", help="look at the configuration", description="look at the configuration",
                               epilog="example:\n  supervisord-ctr --config my.toml config show --format json",
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    show.add_argument("action", choices=["show"], help="print every value in force and its origin")
    show.add_argument("--format", choices=["toml", "json"], default="toml", help="how to print (default toml)")
    return made


def show_config(loaded: config.Config, form: str) -> None:
    """Print every value in force and its origin (P21)."""
    if form == "json":
        rows = [{"key": v.key, "value": v.value, "origin": v.origin, "help": v.help} for v in loaded.values()]
        print(json.dumps(rows, indent=2))
    else:
        print(config.render(loaded), end="")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    options = parser().parse_args(arguments)
    given = {name: value for name in ("root", "state", "address", "log_level", "log_format")
             if (value := getattr(options, name)) is not None}
    try:
        loaded = config.load(options.config, given)
        if options.command == "config":
            show_config(loaded, options.format)
            return
        if os.geteuid() != 0:
            raise errors.PermissionDenied("must run as root: it mounts file systems and makes namespaces")
        logs.configure(loaded.settings.log_level, loaded.settings.log_format)
        heap.limit_arenas(_ARENAS)
        from supervisord_ctr.daemon import Daemon

        asyncio.run(Daemon(loaded).run())
    except errors.Error as error:
        print(f"supervisord-ctr: {error.message}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)


if __name__ == "__main__":
    main()
