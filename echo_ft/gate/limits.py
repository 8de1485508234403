"""The limits of a gate, as the user writes them: `false_alarms<=0.01, escapes<=0.02`."""

from __future__ import annotations

import difflib
import math

from echo_ft.errors import EchoError
from echo_ft.gate.certificate import ESCAPES, FALSE_ALARMS

NAMES = (FALSE_ALARMS, ESCAPES)
EXAMPLE = '--gate "false_alarms<=0.01, escapes<=0.02"'


MIN_LIMIT = 1e-6
"""Smallest limit. It takes three million parts without an error to show a smaller one."""


def parse_limits(text: str) -> dict[str, float]:
    """Return {`false_alarms` or `escapes`: limit}, in this order.

    Raises EchoError for an unknown or repeated name, a comparison other than `<=`, and a limit that is not between
    MIN_LIMIT and 1.
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, sign, value = (item.strip() for item in part.partition("<="))
        if not sign:
            raise EchoError(f"--gate: {part.strip()!r} has no '<='; write {EXAMPLE}")
        if name not in NAMES:
            near = difflib.get_close_matches(name.lower().replace(" ", "_").replace("-", "_"), NAMES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use {' or '.join(NAMES)}"
            raise EchoError(f"--gate: there is no limit for {name!r}; {hint}")
        if name in limits:
            raise EchoError(f"--gate: {name} has two limits; give one")
        limits[name] = _share(name, value)
    return {name: limits[name] for name in NAMES if name in limits}


def _share(name: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        remedy = "write 1% as 0.01" if text.endswith("%") else f"write {EXAMPLE}"
        raise EchoError(f"--gate: the limit for {name} is {text!r}, which is not a number; {remedy}") from None
    if share == 0:
        raise EchoError(f"--gate: no number of parts can show that {name} never occur; give a limit above 0")
    if not (math.isfinite(share) and 0 < share < 1):
        raise EchoError(f"--gate: the limit for {name} is {text}; give a fraction between 0 and 1, such as 0.01 for 1%")
    if share < MIN_LIMIT:
        raise EchoError(f"--gate: no run has enough parts to show that {name} are below {share:g}; give a larger limit")
    return share
