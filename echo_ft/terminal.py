"""What the library reports to a person at a terminal: through `logging`, so that other programs can redirect it."""

from __future__ import annotations

import logging
import sys

LOGGER = logging.getLogger("echo_ft")
"""Progress at level INFO, warnings and errors above. Silent until a program adds a handler."""


class TerminalHandler(logging.Handler):
    """Writes progress to stdout, and warnings and errors with their level to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record to the stream that is current now, not to the one at start-up."""
        severe = record.levelno >= logging.WARNING
        stream = sys.stderr if severe else sys.stdout
        prefix = f"{record.levelname.lower()}: " if severe else ""
        stream.write(f"{prefix}{record.getMessage()}\n")
        stream.flush()


def log_to_terminal() -> None:
    """Show what the library reports. Commands call this; a second call changes nothing."""
    if not any(isinstance(handler, TerminalHandler) for handler in LOGGER.handlers):
        LOGGER.addHandler(TerminalHandler())
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
