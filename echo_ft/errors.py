from __future__ import annotations


class EchoError(Exception):
    """An error whose message a user can act on: what is wrong, where, and the remedy. Shown without a traceback."""
