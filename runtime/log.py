"""Log records: one line each on stderr, for people on a terminal and as JSON elsewhere.

Holds no prompt, output, header or key: fields that could carry one are withheld here, whoever
passes them, so that one careless call does not put a user's words into a log store. Libraries
that log through the standard library come out in the same form, from warnings upwards.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Any, Final, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

WITHHELD_FIELDS: Final = frozenset(
    {
        "api_key",
        "authorization",
        "body",
        "content",
        "headers",
        "input",
        "messages",
        "output",
        "prompt",
        "stop",
        "text",
        "token_ids",
        "tokens",
    }
)
"""Names of fields whose values never reach a log."""

_SILENT: Final = ("aiohttp.access",)
"""Loggers with a line for each request: that is what metrics are for."""

Logger = FilteringBoundLogger


def configure_logging(actor: str, *, stream: TextIO | None = None) -> None:
    """Make every record of this process carry ``actor``, and go to ``stream`` (stderr if None).

    Colours are used on a terminal unless ``NO_COLOR`` is set (https://no-color.org).
    """
    target = stream if stream is not None else sys.stderr
    on_terminal = target.isatty()
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _withhold,
    ]
    if on_terminal:
        renderers: list[Processor] = [
            _keep_to_one_line,
            structlog.dev.ConsoleRenderer(
                colors=not os.environ.get("NO_COLOR"),
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
    else:
        renderers = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ]
    structlog.configure(
        processors=[*shared, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(target),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(actor=actor)
    logging.root.handlers = [_Forward()]
    logging.root.setLevel(logging.WARNING)
    for name in _SILENT:
        logging.getLogger(name).disabled = True


def get_logger() -> Logger:
    """The logger for a module: ``log.info("what happened", field=value)``."""
    return cast("Logger", structlog.get_logger())


def where_it_failed(error: BaseException) -> str:
    """The frames that an error has passed, and its kind: its message may quote what was sent."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]
    return "\n".join([*lines, type(error).__name__])


class _Forward(logging.Handler):
    """Hands a record of the standard library's logging to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"logger": record.name}
        if record.exc_info is not None and record.exc_info[0] is not None:
            fields["exc_info"] = record.exc_info
        level = min(max(record.levelno, logging.INFO), logging.CRITICAL)
        get_logger().log(level - level % 10, record.getMessage(), **fields)


def _withhold(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace the values of fields that must never be logged."""
    for name in WITHHELD_FIELDS & event.keys():
        event[name] = "[withheld]"
    return event


def _keep_to_one_line(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Quote text with line breaks or escape codes, which could forge further records."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[name] = repr(value)
    return event
