"""A summary of rejected images and rows for error messages."""

from __future__ import annotations

from collections.abc import Sequence

from echo_ft.records import Rejection


def first_rejection(rejections: Sequence[Rejection]) -> str:
    """Return a clause that says how many items were rejected, and why the first one was.

    Returns an empty string if none were rejected.
    """
    if not rejections:
        return ""
    return f"; {len(rejections)} rejected (first: {rejections[0].item}: {rejections[0].reason})"
