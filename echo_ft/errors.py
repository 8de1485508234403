"""The exception for errors that a user can fix."""

from __future__ import annotations


class EchoError(Exception):
    """An error that the user can fix. The message says what is wrong, where, and what to do.

    Commands print the message without a traceback and exit with status 2.
    """
