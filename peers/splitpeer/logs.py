"""Logs: one line per event, as text for people or JSON for collectors.

An event has a dotted name (``link.refused``) and fields. Never in a log: patient names, ids or keys, pixels,
activations, gradients, key material; but a peer's own log names its own files where somebody has to look at them.
The formatters cannot recognise a patient id: callers of `event` must keep to this.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from typing import Any, Literal, TextIO

from splitproto.errors import printable

_HANDLER = "splitpeer"
_RESERVED = ("time", "level", "event", "logger", "message", "traceback")


def event(logger: logging.Logger, name: str, level: int = logging.INFO, /, **fields: Any) -> None:
    """Log the event `name` with `fields`: ``event(log, "link.refused", peer="hub", cause="expired")``."""
    if logger.isEnabledFor(level):
        logger.log(level, name, extra={"fields": fields}, stacklevel=2)


def handle(key: bytes) -> str:
    """A patient's name in logs: tells patients apart, and contains nothing of the key."""
    return hashlib.sha256(b"splitproto handle v1\0" + key).hexdigest()[:8]


def setup(
    format: Literal["text", "json"] = "text",  # noqa: A002  (the key in peer.toml)
    level: str = "info",
    stream: TextIO | None = None,
) -> None:
    """Write this process's log to `stream` (default: standard error). Calling it again replaces the former.

    Libraries other than ours are heard from "warning" upwards only.
    """
    handler = _Standard() if stream is None else logging.StreamHandler(stream)
    handler.set_name(_HANDLER)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    for former in [h for h in root.handlers if h.get_name() == _HANDLER]:
        root.removeHandler(former)
    root.addHandler(handler)
    for package in ("splitpeer", "splitproto"):
        logging.getLogger(package).setLevel(level.upper())


class _Standard(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at that moment: a live progress bar puts itself in between."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = getattr(record, "fields", {})
    return {key + "_" if key in _RESERVED else key: value for key, value in fields.items()}


class TextFormatter(logging.Formatter):
    """``12:04:31 warning link.refused peer=hub cause="certificate expired"``, local time."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        pairs = [f"{key}={self._shown(value)}" for key, value in _fields(record).items()]
        message = printable(" ".join(record.getMessage().split()))
        # Fields may hold what a peer wrote: printable, or not at all.
        line = " ".join([clock, f"{record.levelname.lower():7}", message, *pairs])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line

    @staticmethod
    def _shown(value: object) -> str:
        text = "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
        text = printable(text)
        plain = text and text.isprintable() and not any(c in text for c in ' "=')
        return text if plain else json.dumps(text, ensure_ascii=False)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (ISO 8601, UTC), level, event or message, logger, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        kind = "event" if hasattr(record, "fields") else "message"
        entry: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            kind: record.getMessage(),
            "logger": record.name,
            **_fields(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        # ASCII: a terminal that shows the log sees no control or direction mark of a name.
        return json.dumps(entry, default=str)
