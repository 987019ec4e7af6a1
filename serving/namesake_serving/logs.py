"""The server's log: lines for people, or one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from datetime import UTC, datetime
from typing import Literal


class Json(logging.Formatter):
    """An object a line: ``time``, ``level``, ``logger``, ``message``, and what the record has in ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def begin(form: Literal["text", "json"], loudness: Literal["quiet", "normal", "verbose"] = "normal") -> None:
    """Log to standard error from now on: ``quiet`` no lines of requests and steps, ``verbose`` also what libraries log
    of themselves and warn of.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = logging.WARNING if loudness == "quiet" else logging.INFO
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("alembic").setLevel(logging.NOTSET if loudness == "verbose" else logging.WARNING)
    logging.captureWarnings(loudness == "verbose")
    if loudness == "verbose" and not sys.warnoptions:  # else the user has said which
        warnings.simplefilter("default")
