"""A verdict holds with 95% confidence: its bounds are exact, and wrong verdicts are rare for one limit and for two."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from echo_ft.gate.certificate import (
    ESCAPES,
    FAIL,
    FALSE_ALARMS,
    PASS,
    UNDECIDED,
    choose_threshold,
    judge,
    judge_share,
    lower_bound,
    overall,
    parts_to_pass,
    upper_bound,
)
from echo_ft.metrics.detection import Units
from tests.conftest import ROOT

BOTH = {FALSE_ALARMS: 0.05, ESCAPES: 0.1}


def units(good: list[float], defective: list[float]) -> Units:
    truth = np.array([False] * len(good) + [True] * len(defective))
    return Units(np.arange(len(truth)), truth, np.array(good + defective))


@pytest.mark.parametrize(("errors", "parts"), [(0, 1), (0, 59), (1, 93), (7, 40), (40, 40), (3, 5000)])
def test_bounds_are_those_of_clopper_and_pearson(errors: int, parts: int) -> None:
    # Two one-sided bounds of 95% are the ends of a two-sided interval of 90%.
    expected = binomtest(errors, parts).proportion_ci(confidence_level=0.9, method="exact")
    assert upper_bound(errors, parts) == pytest.approx(expected.high)
    assert lower_bound(errors, parts) == pytest.approx(expected.low)


def test_bounds_by_hand() -> None:
    """Without an error, the upper bound p solves (1 - p)^n = 0.05."""
    assert upper_bound(0, 59) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert lower_bound(2, 2) == pytest.approx(math.sqrt(0.05))
    assert (upper_bound(0, 0), upper_bound(3, 3), lower_bound(0, 9)) == (1, 1, 0)


@pytest.mark.parametrize(("limit", "parts"), [(0.05, 59), (0.01, 299), (0.02, 149), (0.5, 5), (0.001, 2995)])
def test_the_needed_parts_agree_with_theory(limit: float, parts: int) -> None:
    assert parts == math.ceil(math.log(0.05) / math.log(1 - limit))
    assert parts_to_pass(limit) == parts
    assert judge_share(0, parts, limit, 1).verdict == PASS
    assert judge_share(0, parts - 1, limit, 1).verdict == UNDECIDED
    assert judge_share(0, parts - 1, limit, 1).more_without_error == 1


def test_the_documented_numbers_of_parts_are_right() -> None:
    page = (ROOT / "docs" / "gate.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+)% \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page, flags=re.MULTILINE)
    assert len(rows) == 4
    for limit, *parts in rows:
        assert [parts_to_pass(int(limit) / 100, errors) for errors in (0, 1, 2, 5)] == list(map(int, parts))
        for errors, count in zip((0, 1, 2, 5), map(int, parts), strict=True):
            assert binom.cdf(errors, count, int(limit) / 100) <= 0.05 < binom.cdf(errors, count - 1, int(limit) / 100)


@pytest.mark.parametrize(("errors", "parts"), [(0, 10), (1, 60), (3, 100), (4, 60), (9, 100)])
def test_so_many_more_parts_would_decide(errors: int, parts: int) -> None:
    found = judge_share(errors, parts, 0.05, 2)
    assert found.verdict == UNDECIDED
    assert judge_share(errors, parts + found.more_without_error, 0.05, 2).verdict == PASS
    assert judge_share(errors, parts + found.more_without_error - 1, 0.05, 2).verdict == UNDECIDED
    wanted = PASS if errors / parts < 0.05 else FAIL

    favourable, unfavourable = (math.floor, math.ceil) if wanted == PASS else (math.ceil, math.floor)
    assert found.more_at_this_rate is not None
    enough, half = parts + found.more_at_this_rate, parts + found.more_at_this_rate // 2
    assert judge_share(favourable(errors * enough / parts), enough, 0.05, 2).verdict == wanted
    assert judge_share(unfavourable(errors * half / parts), half, 0.05, 2).verdict == UNDECIDED


def test_no_number_of_parts_decides_if_the_share_is_the_limit() -> None:
    found = judge_share(5, 100, 0.05, 1)
    assert (found.verdict, found.more_at_this_rate) == (UNDECIDED, None)
    assert found.more_without_error == 208 - 100
    nothing = judge_share(0, 0, 0.05, 1)
    assert (nothing.verdict, nothing.more_without_error, nothing.more_at_this_rate) == (UNDECIDED, 59, 59)


def wrong_verdicts(alarms: float, escapes: float, parts: int, limits: dict[str, float]) -> tuple[float, float]:
    """Probability of a wrong pass and of a wrong fail, summed over all possible numbers of errors."""
    rates = {FALSE_ALARMS: alarms, ESCAPES: escapes}
    verdicts = {
        name: [judge_share(k, parts, limit, len(limits)) for k in range(parts + 1)] for name, limit in limits.items()
    }
    chances = {name: binom.pmf(np.arange(parts + 1), parts, rates[name]) for name in limits}
    bad = any(rates[name] > limit for name, limit in limits.items())
    every_pass = math.prod(
        sum(c for c, one in zip(chances[n], verdicts[n], strict=True) if one.verdict == PASS) for n in limits
    )
    no_fail = math.prod(
        sum(c for c, one in zip(chances[n], verdicts[n], strict=True) if one.verdict != FAIL) for n in limits
    )
    return (every_pass, 0.0) if bad else (0.0, 1 - no_fail)


@pytest.mark.parametrize("parts", [30, 100, 400])
@pytest.mark.parametrize("alarms", [0.0, 0.02, 0.05, 0.0501, 0.2])
@pytest.mark.parametrize("escapes", [0.0, 0.05, 0.1, 0.1001, 0.3])
def test_a_wrong_verdict_has_at_most_five_percent_exactly(parts: int, alarms: float, escapes: float) -> None:
    assert max(wrong_verdicts(alarms, escapes, parts, BOTH)) <= 0.05
    assert max(wrong_verdicts(alarms, escapes, parts, {FALSE_ALARMS: 0.05})) <= 0.05


def test_the_error_budget_is_used_and_not_wasted() -> None:
    """Two limits need no stricter upper bounds, because a single rate above its limit is enough to prevent a pass."""
    passed, _ = wrong_verdicts(0.0501, 0.0, 400, BOTH)
    _, failed = wrong_verdicts(0.0499, 0.0999, 400, BOTH)
    assert 0.03 < passed <= 0.05
    assert 0.03 < failed <= 0.05
    # With 95% for each lower bound instead of 97.5%, one of the two would fail too often.
    alone = sum(binom.pmf(k, 400, 0.0999) for k in range(401) if lower_bound(k, 400) > 0.1)
    other = sum(binom.pmf(k, 400, 0.0499) for k in range(401) if lower_bound(k, 400) > 0.05)
    assert 1 - (1 - alone) * (1 - other) > 0.06


def test_one_verdict_for_all_limits() -> None:
    passed, failed, undecided = judge_share(0, 100, 0.05, 2), judge_share(40, 100, 0.1, 2), judge_share(3, 50, 0.1, 2)
    assert [one.verdict for one in (passed, failed, undecided)] == [PASS, FAIL, UNDECIDED]
    assert overall({FALSE_ALARMS: passed}) == PASS
    assert overall({FALSE_ALARMS: passed, ESCAPES: undecided}) == UNDECIDED
    assert overall({FALSE_ALARMS: undecided, ESCAPES: failed}) == FAIL


def test_parts_are_counted_by_class_and_flagged_from_the_threshold_on() -> None:
    found = judge(units([0.1, 0.5, 0.6, math.inf], [0.4, 0.5, -math.inf]), 0.5, BOTH)
    assert (found[FALSE_ALARMS].errors, found[FALSE_ALARMS].parts) == (3, 4)
    assert (found[ESCAPES].errors, found[ESCAPES].parts) == (2, 3)
    assert list(judge(units([0.1], [0.9]), 0.5, {ESCAPES: 0.1})) == [ESCAPES]


def test_the_threshold_lies_between_separate_classes() -> None:
    assert choose_threshold(units([0.1, 0.2], [0.6, 0.9]), BOTH) == pytest.approx(0.4)
    # Parts without a P(defect) do not move it.
    assert choose_threshold(units([0.1, 0.2, math.inf], [0.6, 0.9, -math.inf]), BOTH) == pytest.approx(0.4)


def test_the_threshold_favours_the_stricter_limit() -> None:
    """The classes overlap in one pair: either the good part at 0.6 is flagged or the defective one at 0.4 is missed."""
    overlapping = units([0.1, 0.2, 0.6], [0.4, 0.8, 0.9])
    strict_alarms = choose_threshold(overlapping, {FALSE_ALARMS: 0.01, ESCAPES: 0.2})
    strict_escapes = choose_threshold(overlapping, {FALSE_ALARMS: 0.2, ESCAPES: 0.01})
    assert strict_alarms == pytest.approx(0.7)
    assert strict_escapes == pytest.approx(0.3)
    # A gate with only one of the limits still counts the other error.
    assert choose_threshold(overlapping, {FALSE_ALARMS: 0.01}) == pytest.approx(0.7)
    assert choose_threshold(overlapping, {ESCAPES: 0.01}) == pytest.approx(0.3)


def test_neighbouring_numbers_are_told_apart() -> None:
    low = 0.7
    high = float(np.nextafter(low, 1))
    threshold = choose_threshold(units([low], [high]), BOTH)
    assert low < threshold <= high
    constant = choose_threshold(units([0.5], [0.5]), {FALSE_ALARMS: 0.01})
    assert constant > 0.5, "flag nothing rather than everything"
