"""`pctr completion`: the script in a real bash, as it is called there when TAB is pressed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT = 120
_ASK = r"""
source <(pctr completion bash) || exit 1
complete -p pctr > /dev/null || exit 2
COMP_LINE="$LINE" COMP_POINT=${#LINE} COMP_TYPE=9
_python_argcomplete pctr
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One in which `pctr` is this checkout's, and no daemon is there."""
    program = tmp_path / "pctr"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m pctr "$@"\n')
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PCTR_ADDRESS": str(tmp_path / "nobody.sock")}


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(("line", "expected", "absent"), [
    ("pctr im", {"image"}, {"run"}),
    ("pctr pod ", {"ls", "logs", "stop"}, {"pull"}),
    ("pctr task exec --pri", {"--privileged"}, {"--tty"}),
    ("pctr run --net ", {"none", "host", "bridge"}, set()),
    ("pctr image ls --format j", {"json"}, {"table"}),
])
def test_bash(environment: dict[str, str], line: str, expected: set[str], absent: set[str]) -> None:
    done = subprocess.run(["bash", "--norc", "-c", _ASK], env={**environment, "LINE": line}, capture_output=True,
                          text=True, timeout=TIMEOUT, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    offered = {word.strip() for word in done.stdout.splitlines()}
    assert expected <= offered
    assert not absent & offered


@pytest.mark.parametrize(("shell", "mark"), [("bash", "complete "), ("zsh", "compdef "), ("fish", "complete ")])
def test_there_is_a_script_for_each_shell(environment: dict[str, str], shell: str, mark: str) -> None:
    done = subprocess.run(["pctr", "completion", shell], env=environment, capture_output=True, text=True, check=True,
                          timeout=TIMEOUT)
    assert mark in done.stdout
    assert "pctr" in done.stdout
    if (program := shutil.which(shell)) is not None:
        subprocess.run([program, "-n", "/dev/stdin"], input=done.stdout, text=True, check=True, timeout=TIMEOUT)
