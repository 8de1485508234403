"""The bootstrap covers, the weighted AUROC is scikit-learn's, the tests are the textbook's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from echo_ft import statistics


def test_every_stratum_is_resampled_to_its_own_size_and_the_seed_repeats_it() -> None:
    strata = ["a", "b", "a", "a", "b", "c"]
    weights = statistics.resample(strata, resamples=50, seed=3)
    for name in "abc":
        members = [index for index, stratum in enumerate(strata) if stratum == name]
        assert (weights[:, members].sum(axis=1) == len(members)).all()
    assert (weights == statistics.resample(strata, resamples=50, seed=3)).all()
    assert (weights != statistics.resample(strata, resamples=50, seed=4)).any()


def test_auroc_in_a_resample_is_that_of_scikit_learn_with_multiplicities_as_sample_weights() -> None:
    random = np.random.default_rng(0)
    positive = random.random(80) < 0.4
    scores = np.round(random.normal(size=80) + positive, 1)  # rounding makes ties
    weights = statistics.resample(positive.tolist(), resamples=25)
    expected = [roc_auc_score(positive, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(statistics.auroc(weights, scores, positive), expected, rtol=0, atol=1e-12)


def test_auroc_without_one_of_the_sides_is_nan() -> None:
    assert np.isnan(statistics.auroc(np.ones((2, 3)), np.array([0.1, 0.2, 0.3]), np.array([True, True, True]))).all()
    assert np.isnan(statistics.auroc(np.ones((1, 0)), np.array([]), np.array([], dtype=bool))).all()


def test_an_interval_leaves_resamples_without_the_figure_out() -> None:
    values = np.array([[np.nan, np.nan], [1.0, np.nan], [3.0, np.nan]])
    low, high = statistics.percentile_interval(values, level=1.0)
    assert (low[0], high[0]) == (1.0, 3.0)
    assert np.isnan(low[1]) and np.isnan(high[1])


def test_mcnemar_is_the_exact_two_sided_binomial_test() -> None:
    assert statistics.mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert statistics.mcnemar(9, 1) == statistics.mcnemar(1, 9)
    assert statistics.mcnemar(0, 0) == 1.0


def test_holm_multiplies_step_by_step_and_never_decreases() -> None:
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def _coverage(runs: int, resamples: int, by_image: bool, images: int = 80, questions: int = 5) -> float:
    """How often the interval holds the true mean, when the questions of an image share most of their luck."""
    random = np.random.default_rng(1)
    covered = 0
    for run in range(runs):
        shares = random.beta(0.6, 0.4, size=images)  # the true accuracy over all images is 0.6
        correct = (random.random((images, questions)) < shares[:, None]).astype(float)
        values = correct.mean(axis=1) if by_image else correct.ravel()
        weights = statistics.resample([0] * len(values), resamples, seed=run)
        low, high = statistics.percentile_interval(weights @ values / len(values))
        covered += low <= 0.6 <= high
    return covered / runs


def test_the_interval_over_images_covers_and_one_over_questions_would_not() -> None:
    assert _coverage(150, 300, by_image=True) > 0.88
    assert _coverage(150, 300, by_image=False) < 0.80


@pytest.mark.slow
def test_the_interval_covers_in_95_of_100_of_many_simulations() -> None:
    assert 0.925 < _coverage(1000, 2000, by_image=True) < 0.97
