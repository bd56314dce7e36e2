"""An OCI runtime that plays CRIU's part: the state is a file, a restore creates anew; everything else runc does.

For machines on whose kernel criu cannot work. The images of a checkpoint are what was asked, in the file
`asked`; a folder with "refuse" in its name is refused.
"""

from __future__ import annotations

from pathlib import Path

_PROGRAM = """#!/bin/sh
real=/usr/sbin/runc
all="$*"
root=$2
log=$4
case "$all" in
*" checkpoint "*)
    while [ $# -gt 1 ]; do
        case "$1" in --image-path) images=$2;; --work-path) work=$2;; esac
        shift
    done
    echo "$all" > "$images/asked"
    case "$images" in *refuse*) echo "criu said no" > "$work/dump.log"
        echo '{"level":"error","msg":"criu failed: type DUMP errno 0"}' >> "$log"; exit 1;; esac
    case "$all" in *--leave-running*) exit 0;; esac
    exec $real --root "$root" kill "$1" KILL;;
*" restore "*)
    while [ $# -gt 1 ]; do
        case "$1" in --image-path) images=$2;; --bundle) bundle=$2;; --pid-file) pid=$2;; esac
        shift
    done
    [ -f "$images/asked" ] || exit 1
    $real --root "$root" create --bundle "$bundle" --pid-file "$pid" "$1" && exec $real --root "$root" start "$1";;
esac
exec $real "$@"
"""


def write(path: Path) -> None:
    """Put the program there."""
    path.write_text(_PROGRAM)
    path.chmod(0o755)
