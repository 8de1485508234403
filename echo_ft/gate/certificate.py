"""A certificate that false alarms and escapes are within limits, with 95% confidence over parts.

A threshold is chosen on one set of parts and judged on another. Given the threshold, each judged part is an independent
trial, so exact binomial bounds hold (Clopper and Pearson, "The Use of Confidence or Fiducial Limits Illustrated in the
Case of the Binomial", 1934). A verdict is wrong with a probability of at most 5%, whatever the true shares are:

- `pass` claims that every share is below its limit. Every upper bound must be within its limit, each with 95%
  confidence. If one share is above its limit, this one bound alone fails in 95% of the cases, so a wrong pass has a
  probability of at most 5% (an intersection-union test: Berger, "Multiparameter Hypothesis Testing and Acceptance
  Sampling", 1982).
- `fail` claims that some share is above its limit. One lower bound must be above its limit. Each limit is another
  chance to be wrong, so the limits share the 5% (Bonferroni).

`benchmarks/evaluation/certificates.py` measures how often a verdict is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import betainc, betaincinv

from echo_ft.metrics.detection import Units

CONFIDENCE = 0.95
"""Smallest probability of avoiding a wrong verdict."""

PASS, FAIL, UNDECIDED = "pass", "fail", "not enough parts"
"""The verdicts."""

FALSE_ALARMS, ESCAPES = "false_alarms", "escapes"
"""The shares that can have a limit: good parts that are flagged, and defective parts that are not."""


@dataclass(frozen=True)
class Finding:
    """The result for one share and its limit. Shares are from 0 to 1."""

    limit: float
    parts: int
    """Judged parts of the class: good ones for false alarms, defective ones for escapes."""
    errors: int
    """How many of them are false alarms or escapes."""
    lower: float
    """Lower bound of the share; above the limit, the verdict is `fail`."""
    upper: float
    """Upper bound of the share; up to the limit, the verdict is `pass`."""
    verdict: str
    more_without_error: int | None
    """Number of further parts with which the run would pass if none of them is an error; None if the verdict is
    settled."""
    more_at_this_rate: int | None
    """Number of further parts with which the verdict would be settled at this error rate; None if settled or at the
    limit."""


def upper_bound(errors: int, parts: int, confidence: float = CONFIDENCE) -> float:
    """Return the exact upper bound of a share, given the number of `errors` among `parts`."""
    return float(betaincinv(errors + 1, parts - errors, confidence)) if errors < parts else 1.0


def lower_bound(errors: int, parts: int, confidence: float = CONFIDENCE) -> float:
    """Return the exact lower bound of a share, given the number of `errors` among `parts`."""
    return float(betaincinv(errors, parts - errors + 1, 1 - confidence)) if errors else 0.0


def parts_to_pass(limit: float, errors: int = 0) -> int:
    """Return the smallest number of parts at which the upper bound is at most `limit`, given this number of `errors`.

    Without an error, a limit of 5% takes 59 parts, and a limit of 1% takes 299.
    """
    return _first(errors + 1, lambda parts: betainc(errors + 1, parts - errors, limit) >= CONFIDENCE)


def _first(start: int, holds: Callable[[int], bool]) -> int:
    """Return the smallest number from `start` on for which `holds` is true; once true, it must stay true."""
    high = start
    while not holds(high):
        high *= 2
    low = max(start, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _parts_at_rate(share: float, limit: float, parts: int, fail_confidence: float) -> int | None:
    """Return how many parts, at least `parts`, settle the verdict with this `share` of errors; None at the limit."""
    if share == limit:
        return None
    if share < limit:
        return _first(parts, lambda n: betainc(share * n + 1, n - share * n, limit) >= CONFIDENCE)
    return _first(parts, lambda n: betainc(share * n, n - share * n + 1, limit) <= 1 - fail_confidence)


def judge_share(errors: int, parts: int, limit: float, limits: int) -> Finding:
    """Judge one share; `limits` is the number of shares that have a limit."""
    fail_confidence = 1 - (1 - CONFIDENCE) / limits
    lower, upper = lower_bound(errors, parts, fail_confidence), upper_bound(errors, parts)
    verdict = PASS if upper <= limit else FAIL if lower > limit else UNDECIDED
    if verdict != UNDECIDED:
        return Finding(limit, parts, errors, lower, upper, verdict, None, None)
    share = errors / parts if parts else 0.0
    decided = _parts_at_rate(share, limit, max(parts, 1), fail_confidence)
    more = parts_to_pass(limit, errors) - parts, None if decided is None else decided - parts
    return Finding(limit, parts, errors, lower, upper, verdict, *more)


def judge(units: Units, threshold: float, limits: Mapping[str, float]) -> dict[str, Finding]:
    """Judge each share that has a limit on parts that had no influence on the threshold."""
    wrong = (units.scores >= threshold) != units.defective
    classes = {FALSE_ALARMS: ~units.defective, ESCAPES: units.defective}
    return {
        name: judge_share(int(wrong[classes[name]].sum()), int(classes[name].sum()), limit, len(limits))
        for name, limit in limits.items()
    }


def overall(findings: Mapping[str, Finding]) -> str:
    """Return the verdict on all limits together."""
    verdicts = {finding.verdict for finding in findings.values()}
    return FAIL if FAIL in verdicts else UNDECIDED if UNDECIDED in verdicts else PASS


def choose_threshold(units: Units, limits: Mapping[str, float]) -> float:
    """Return the threshold that minimises the larger ratio of an error to its limit on these parts.

    An error without a limit is divided by 1, so that a gate for false alarms alone still finds defects. Errors are
    estimated as (errors + 1/2) / (parts + 1). The candidates lie between neighbouring scores, and below and above all
    scores. Both classes must be present, and at least one score finite.
    """
    good, defective = np.sort(units.scores[~units.defective]), np.sort(units.scores[units.defective])
    scores = np.unique(units.scores[np.isfinite(units.scores)])
    between = (scores[:-1] + scores[1:]) / 2
    between = np.where(between > scores[:-1], between, scores[1:])  # neighbours may have no number between them
    candidates = np.concatenate([scores[:1], between, [np.nextafter(scores[-1], math.inf)]])
    alarms = len(good) - np.searchsorted(good, candidates)
    missed = np.searchsorted(defective, candidates)
    ratios = [
        (errors + 0.5) / (count + 1) / limits.get(name, 1.0)
        for name, errors, count in ((FALSE_ALARMS, alarms, len(good)), (ESCAPES, missed, len(defective)))
    ]
    best = np.lexsort([np.add(*ratios), np.maximum(*ratios)])[0]
    return float(candidates[best])
