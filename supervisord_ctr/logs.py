"""Log records as lines that people and programs read: `key=value` text or JSON.

Owns the format and the handler of the daemon's own records. Values are quoted and control bytes
escaped, so that nothing from a client can start a line of its own (S10).
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import IO, Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    fields: dict[str, Any] = {
        "time": f"{stamp}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "logger": record.name.removeprefix("supervisord_ctr."),
        "msg": record.getMessage(),
    }
    fields.update((key, value) for key, value in vars(record).items() if key not in _STANDARD)
    return fields


class TextFormatter(logging.Formatter):
    """`time=… level=… logger=… msg="…" key=value`; tracebacks follow on indented lines."""

    def format(self, record: logging.LogRecord) -> str:
        line = " ".join(f"{key}={self._word(value)}" for key, value in _fields(record).items())
        if record.exc_info:
            line += "\n    " + self.formatException(record.exc_info).replace("\n", "\n    ")
        return line

    @staticmethod
    def _word(value: Any) -> str:
        text = str(value)
        if text and text.isprintable() and not any(char in text for char in ' "='):
            return text
        return json.dumps(text, ensure_ascii=False)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


def configure(level: str, form: str, stream: IO[str] | None = None) -> None:
    """Send every record at `level` or above to `stream` (standard error) as "text" or "json"."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for noisy in ("asyncio", "aiohttp", "grpc"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
