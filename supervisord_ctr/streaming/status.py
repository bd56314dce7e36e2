"""Statuses: what the error stream says when a command has ended.

From protocol v4 on it is a `metav1.Status` in JSON, with the exit code as a cause; before, it is the
message alone and nothing for success. The words are those that the kubelet's streaming library uses,
because kubectl and people's scripts know them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Status:
    """A `metav1.Status`, as far as streams use it."""

    status: str
    message: str = ""
    reason: str = ""
    code: int = 0
    causes: tuple[tuple[str, str], ...] = field(default=())

    def to_json(self) -> bytes:
        """The v4 form; unset fields are left out."""
        value: dict[str, Any] = {"metadata": {}, "status": self.status}
        if self.message:
            value["message"] = self.message
        if self.reason:
            value["reason"] = self.reason
        if self.causes:
            value["details"] = {"causes": [{"reason": reason, "message": text} for reason, text in self.causes]}
        if self.code:
            value["code"] = self.code
        return json.dumps(value, separators=(",", ":")).encode()

    def to_text(self) -> bytes:
        """The form before v4."""
        return b"" if self.status == "Success" else self.message.encode()


SUCCESS = Status("Success")


def of_exit(code: int, argv: Sequence[str]) -> Status:
    """How a command ended that ran."""
    if code == 0:
        return SUCCESS
    shown = " ".join(argv)
    return Status(
        "Failure",
        f"command terminated with non-zero exit code: error executing command [{shown}], exit code {code}",
        "NonZeroExitCode",
        causes=(("ExitCode", str(code)),),
    )


def of_failure(message: str) -> Status:
    """Something that went wrong on this side."""
    return Status("Failure", f"Internal error occurred: {message}", "InternalError", 500)


def exit_code(status: dict[str, Any]) -> int | None:
    """The exit code in a decoded v4 status: 0 for success, None when it tells of no exit."""
    if status.get("status") == "Success":
        return 0
    if status.get("reason") == "NonZeroExitCode":
        for cause in (status.get("details") or {}).get("causes") or ():
            if cause.get("reason") == "ExitCode":
                return int(cause["message"])
    return None
