"""The log: for people on a terminal, fields in the journal, JSON lines everywhere else.

The rule of the file: one event is one line. Tracebacks are shown at level debug only; above it, an exception becomes
its type, its text and where it was raised. `configure_log` is called once, by main. What a daemon binds to its context
(``machine``) is in every line of its tasks, whoever writes it.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from migrated.daemon.config import Log
from migrated.daemon.journal import PRIORITIES, SOCKET, journal_processors

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_FIRST = ("timestamp", "level", "event")


def configure_log(
    settings: Log,
    stream: TextIO = sys.stderr,
    environment: Mapping[str, str] = os.environ,
    journal: str = SOCKET,
) -> FilteringBoundLogger:
    """Set up logging for this process and return its logger. ``journal`` is the path of its socket."""
    structlog.configure(
        processors=_processors(settings, stream, environment, journal),
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[settings.level]),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=False,
    )
    logger = cast("FilteringBoundLogger", structlog.get_logger())
    _adopt_library_logs(logger)
    return logger


def _processors(settings: Log, stream: TextIO, environment: Mapping[str, str], journal: str) -> list[Processor]:
    console = settings.format == "console" or (settings.format == "auto" and stream.isatty())
    in_journal = _is_journal(stream, environment)
    processors: list[Processor] = [structlog.contextvars.merge_contextvars, structlog.processors.add_log_level]
    if settings.level != "debug":
        processors.append(_shorten_exception)
    if console:
        processors += [
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(
                colors=stream.isatty() and not environment.get("NO_COLOR"),
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
    else:
        processors.append(structlog.processors.format_exc_info)
        if in_journal and settings.format == "auto":
            processors += journal_processors(journal)
        # What the journal does not take as fields comes to it as a line.
        processors += [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _order,
            structlog.processors.JSONRenderer(),
        ]
    if in_journal:
        processors.append(_put_priority)
    return processors


def _is_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Return whether ``stream`` is the one that systemd connected to the journal (systemd.exec(5), JOURNAL_STREAM).

    INVOCATION_ID alone would not do: it is also set where the output was redirected to a file afterwards.
    """
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _put_priority(logger: WrappedLogger, method: str, rendered: Any) -> str:
    """Put the priority at the beginning of each line, as sd-daemon(3) has it."""
    prefix = f"<{PRIORITIES.get(method, 6)}>"
    return "\n".join(prefix + line for line in str(rendered).splitlines())


def _order(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Put what every line has first, then the rest as it was bound."""
    return {**{name: event.pop(name) for name in _FIRST if name in event}, **event}


def _shorten_exception(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Turn an exception into one line: what, and where."""
    error = _exception_of(event.pop("exc_info", None))
    if error is not None:
        event["exception"] = f"{type(error).__name__}: {error}"
        if frames := traceback.extract_tb(error.__traceback__):
            event["raised_at"] = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}"
    return event


def _exception_of(info: object) -> BaseException | None:
    match info:
        case BaseException():
            return info
        case (_, BaseException() as error, _):
            return error
        case None | False | (None, None, None):
            return None
        case _:
            return sys.exc_info()[1]


class _Adopter(logging.Handler):
    """Hands records of the standard library's loggers (asyncio's above all) to ours."""

    def __init__(self, logger: FilteringBoundLogger) -> None:
        super().__init__(logging.WARNING)
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        level = min(max(record.levelno // 10 * 10, logging.DEBUG), logging.CRITICAL)
        self._logger.log(
            level, "library_message", logger=record.name, text=record.getMessage(), exc_info=record.exc_info
        )


def _adopt_library_logs(logger: FilteringBoundLogger) -> None:
    root = logging.getLogger()
    root.handlers = [_Adopter(logger)]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
