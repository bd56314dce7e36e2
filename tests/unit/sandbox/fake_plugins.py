"""CNI plugins made of shell: they write down how they were called and answer as a file beside them says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SCRIPT = """#!/bin/sh
here=$(dirname "$0"); name=$(basename "$0")
config=$(cat)
printf '%s %s %s %s %s\\n' "$CNI_COMMAND" "$name" "$CNI_CONTAINERID" "$CNI_IFNAME" "$CNI_ARGS" >> "$here/calls"
printf '%s\\n' "$config" >> "$here/$name.$CNI_COMMAND.config"
[ -f "$here/$name.$CNI_COMMAND.hang" ] && exec sleep 600
[ -f "$here/$name.$CNI_COMMAND" ] && cat "$here/$name.$CNI_COMMAND"
[ -f "$here/$name.$CNI_COMMAND.fail" ] && exit 1
exit 0
"""


class FakePlugins:
    """A folder of plugins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def add(self, name: str, result: dict[str, Any] | None = None) -> None:
        """A plugin that answers ADD with `result`."""
        path = self.folder / name
        path.write_text(_SCRIPT)
        path.chmod(0o755)
        if result is not None:
            self.answer(name, "ADD", result)

    def answer(self, name: str, command: str, value: dict[str, Any], *, fail: bool = False) -> None:
        """What the plugin prints for a command, and whether it fails."""
        (self.folder / f"{name}.{command}").write_text(json.dumps(value))
        if fail:
            (self.folder / f"{name}.{command}.fail").touch()

    def heal(self, name: str, command: str) -> None:
        """The plugin works again."""
        (self.folder / f"{name}.{command}").unlink()
        (self.folder / f"{name}.{command}.fail").unlink()

    def hang(self, name: str, command: str) -> None:
        """The plugin never answers a command."""
        (self.folder / f"{name}.{command}.hang").touch()

    def calls(self) -> list[str]:
        """"COMMAND plugin" of every call, in order."""
        try:
            return [" ".join(line.split()[:2]) for line in (self.folder / "calls").read_text().splitlines()]
        except FileNotFoundError:
            return []

    def raw_calls(self) -> list[str]:
        """The lines as they were written."""
        return (self.folder / "calls").read_text().splitlines()

    def configs(self, name: str, command: str) -> list[dict[str, Any]]:
        """What the plugin read on its standard input."""
        lines = (self.folder / f"{name}.{command}.config").read_text().splitlines()
        return [json.loads(line) for line in lines]
