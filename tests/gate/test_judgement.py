"""A run is judged on parts that did not choose its threshold, and only if it can represent new parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echo_ft.errors import EchoError
from echo_ft.gate.judgement import choosing_parts, judge_run
from echo_ft.metrics.loading import Run
from echo_ft.records import GOOD, Prediction, Rejection
from tests.support.predictions import CLASSIFICATION, DETECTION, make_prediction

LIMITS = {"false_alarms": 0.05, "escapes": 0.1}


def make_run(rows: list[Prediction], **provenance: Any) -> Run:
    return Run(Path("runs/line"), rows, {"dataset": "data/line", **provenance}, [], [])


def scored(row: Prediction, score: float | None) -> Prediction:
    return dataclasses.replace(row, probabilities=None if score is None else {"A": score, "B": 1 - score})


def failed(row: Prediction) -> Prediction:
    return dataclasses.replace(row, text="", parsed=None, probabilities=None, error="no space left")


def parts(good: int, defective: int, images: int = 2) -> list[Prediction]:
    """Separable parts of two products: only the first image of a defective part scores high."""
    rows = []
    for place in range(good + defective):
        bad = place >= good
        for image in range(images):
            row = make_prediction(
                place * images + image, DETECTION, True, "crack" if bad else GOOD, product="pq"[place % 2],
                group=f"part {place}",
            )  # fmt: skip
            rows.append(scored(row, 0.9 if bad and image == 0 else 0.1 + 0.001 * place / (good + defective)))
    return rows


def test_a_separable_run_passes_with_enough_parts() -> None:
    found = judge_run(make_run(parts(good=90, defective=45)), LIMITS)
    assert found["split"]["choosing"] == {"good": 30, "defective": 15}
    assert found["split"]["judged"] == {"good": 60, "defective": 30}
    assert 0.11 < found["threshold"] < 0.9
    assert (found["verdict"], found["decided_by"], found["confidence"]) == ("pass", "P(defect)", 0.95)
    assert found["findings"]["false_alarms"]["errors"] == found["findings"]["escapes"]["errors"] == 0
    assert found["findings"]["false_alarms"]["upper"] == pytest.approx(1 - 0.05 ** (1 / 60))
    assert found["sentence"] == (
        "pass: at most 5% of good parts are flagged and at most 10% of defective parts are missed, with 95% "
        f"confidence, flagging from P(defect) {found['threshold']:.6g}"
    )
    assert found["more_parts"] == []
    assert found["notes"] == ["270 images show 135 parts; a part is flagged if any of its images is"]


def test_too_few_parts_say_how_many_more_would_decide() -> None:
    found = judge_run(make_run(parts(good=60, defective=45, images=1)), LIMITS)
    assert found["verdict"] == "not enough parts"
    assert found["sentence"].startswith("not enough parts: 40 good parts are too few to decide with 95% confidence")
    assert found["more_parts"] == [
        "19 more judged good parts would pass if none of them is flagged",
        "one in 3 parts chooses the threshold, so add half as many again, or choose it on another run with "
        "--calibration",
    ]
    assert found["notes"][0].startswith("each of the 105 images counts as a separate part; if several show one part")


def test_the_threshold_does_not_depend_on_the_judged_parts() -> None:
    """Flagging half of the judged good parts changes the verdict, not the threshold."""
    rows = parts(good=90, defective=45)
    before = judge_run(make_run(rows), LIMITS)
    names = sorted({(row.dataset, row.product, row.group) for row in rows})
    defective = np.array([int(name[2].split()[1]) >= 90 for name in names])
    chosen = {name for name, one in zip(names, choosing_parts(names, defective), strict=True) if one}
    judged_good = [name for name, bad in zip(names, defective, strict=True) if not bad and name not in chosen]
    noisy = set(judged_good[::2])
    changed = [scored(row, 0.95) if (row.dataset, row.product, row.group) in noisy else row for row in rows]
    after = judge_run(make_run(changed), LIMITS)
    assert after["threshold"] == before["threshold"]
    assert (after["verdict"], after["findings"]["false_alarms"]["errors"]) == ("fail", 30)
    assert after["sentence"].startswith("fail: more than 5% of good parts are flagged, with 95% confidence")
    assert after["findings"]["escapes"]["verdict"] == "pass"


def test_parts_are_divided_by_class_and_product_and_always_alike() -> None:
    names = [("d", product, f"{place}") for product in "pqr" for place in range(30)]
    defective = np.array([int(name[2]) % 5 == 0 for name in names])
    chosen = choosing_parts(names, defective)
    assert (chosen[defective].sum(), chosen[~defective].sum()) == (6, 24)
    for product in "pqr":
        of_product = np.array([name[1] == product for name in names])
        assert (chosen & of_product & ~defective).sum() == 8
        assert (chosen & of_product & defective).sum() == 2
    order = np.random.default_rng(0).permutation(len(names))
    again = choosing_parts([names[place] for place in order], defective[order])
    assert (again == chosen[order]).all()
    # No part of a regular sequence of names is left out or preferred.
    assert len({int(name[2]) % 3 for name, one in zip(names, chosen, strict=True) if one}) == 3


def test_another_run_chooses_the_threshold_and_all_parts_are_judged() -> None:
    run, other = parts(good=60, defective=30), [scored(row, 0.5) for row in parts(good=9, defective=0)]
    other += [scored(row, 0.7) for row in parts(good=0, defective=6)]
    other = [
        dataclasses.replace(row, case=f"{row.condition} {row.case}", image=f"{row.condition}-{row.image}")
        for row in other
    ]
    validation = dataclasses.replace(make_run(other), folder=Path("runs/validation"))
    found = judge_run(make_run(run), LIMITS, validation)
    assert found["threshold"] == pytest.approx(0.6)
    assert found["split"]["judged"] == {"good": 60, "defective": 30}
    assert found["verdict"] == "pass"
    assert found["split"]["how"] == "the threshold is chosen on runs/validation and judged on all parts of this run"


def test_a_gate_that_flags_nothing_says_so() -> None:
    """Good and defective parts have equal scores, so flagging nothing is best for a limit on false alarms."""
    rows = [scored(row, 1.0) for row in parts(good=90, defective=45)]
    found = judge_run(make_run(rows), {"false_alarms": 0.05})
    assert (found["verdict"], found["findings"]["false_alarms"]["errors"]) == ("pass", 0)
    assert found["sentence"].endswith("with 95% confidence, flagging from P(defect) 1, which no image reaches")


def test_a_run_without_probabilities_is_judged_by_its_answers_on_all_parts() -> None:
    rows = [scored(row, None) for row in parts(good=60, defective=30)]
    wrong = next(place for place, row in enumerate(rows) if row.condition != GOOD)
    rows[wrong] = dataclasses.replace(rows[wrong], parsed="B")  # the other image of the part still finds it
    found = judge_run(make_run(rows), LIMITS)
    assert (found["verdict"], found["threshold"], found["decided_by"]) == ("pass", None, "answers")
    assert found["split"]["choosing"] is None
    assert found["sentence"].endswith("with 95% confidence, by its answers")
    rows[wrong + 1] = dataclasses.replace(rows[wrong + 1], parsed=None)
    escaped = judge_run(make_run(rows), LIMITS)
    assert (escaped["verdict"], escaped["findings"]["escapes"]["errors"]) == ("not enough parts", 1)


def test_a_run_whose_questions_have_a_third_option_is_judged_by_its_answers() -> None:
    """P(defect) is not known for the good images, which would all count as flagged."""
    options = {"A": "Yes.", "B": "No.", "C": "Cannot tell."}
    rows = [
        dataclasses.replace(row, options=options, probabilities={**(row.probabilities or {}), "C": 0.0})
        for row in parts(good=60, defective=30, images=1)
    ]
    found = judge_run(make_run(rows), LIMITS)
    assert (found["verdict"], found["decided_by"]) == ("pass", "answers")


def test_images_without_a_probability_count_against_the_run() -> None:
    unscored = {f"part {place}" for place in (*range(7, 17), *range(95, 105))}
    rows = [scored(row, None) if row.group in unscored else row for row in parts(good=90, defective=45)]
    names = sorted({(row.dataset, row.product, row.group) for row in rows})
    defective = np.array([int(name[2].split()[1]) >= 90 for name in names])
    judged = ~choosing_parts(names, defective)
    expected = judged & np.array([name[2] in unscored for name in names])
    found = judge_run(make_run(rows), LIMITS)
    assert found["threshold"] == pytest.approx(0.5, abs=0.01), "they do not move the threshold"
    assert found["findings"]["false_alarms"]["errors"] == (expected & ~defective).sum() > 3
    assert found["findings"]["escapes"]["errors"] == (expected & defective).sum() > 3


def test_without_a_defective_part_no_threshold_is_chosen_and_no_part_judged() -> None:
    found = judge_run(make_run(parts(9, 0)), LIMITS)
    assert (found["verdict"], found["threshold"]) == ("not enough parts", None)
    assert found["split"]["choosing"] == {"good": 3, "defective": 0}
    assert found["split"]["judged"] == {"good": 0, "defective": 0}
    assert found["sentence"] == "not enough parts: no threshold can be chosen"
    assert found["more_parts"][0].endswith("; it could be chosen only from 3 good and 0 defective parts")
    assert found["more_parts"][1:3] == [
        "59 more judged good parts would pass if none of them is flagged",
        "29 more judged defective parts would pass if none of them is missed",
    ]
    one_sided = judge_run(make_run(parts(9, 0)), {"false_alarms": 0.05})
    assert one_sided["verdict"] == "not enough parts"


def test_a_missing_answer_of_another_program_counts_against_it() -> None:
    rows = [failed(row) if row.group == "part 3" else scored(row, None) for row in parts(good=60, defective=30)]
    answers = dataclasses.replace(make_run(rows), provenance={"answers": "answers.jsonl"})
    assert judge_run(answers, LIMITS)["findings"]["false_alarms"]["errors"] == 1


def test_unknown_training_data_are_stated() -> None:
    unknown = {"dataset": "data/gone", "photographs_trained_on": None, "of_photographs": 36}
    found = judge_run(make_run(parts(9, 9), trained_on=[unknown]), LIMITS)
    assert found["notes"][-1].startswith("the training data data/gone could not be compared with these images")
    older = judge_run(make_run(parts(9, 9), adapters={"decision_maker": {}}), LIMITS)
    assert older["notes"][-1].startswith("it is not known how the model was trained")
    answers = dataclasses.replace(make_run(parts(9, 9)), provenance={"answers": "answers.json"})
    assert judge_run(answers, LIMITS)["notes"][-1].startswith("it is not known how the model was trained")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            dataclasses.replace(make_run(parts(9, 9)), complete=False),
            "runs/line is not complete, so --gate cannot judge it; resume it",
        ),
        (
            make_run([failed(row) for row in parts(9, 9)]),
            r"36 predictions of runs/line failed \(first: no space left\), so --gate cannot judge it; rerun the same "
            "evaluation.run command to retry them",
        ),
        (
            make_run(parts(9, 9), trained_on=[{"photographs_trained_on": 2, "of_photographs": 36}]),
            "2 of 36 images of runs/line were trained on, so --gate cannot judge it; run the test split",
        ),
        (
            dataclasses.replace(make_run(parts(9, 9)), rejections=[Rejection("row 3", "no answer")]),
            r"1 rows of runs/line cannot be scored \(first: row 3, no answer\)",
        ),
        (make_run([make_prediction(0, CLASSIFICATION, True)]), "has no Anomaly Detection question, which --gate needs"),
    ],
)
def test_a_run_that_cannot_stand_for_new_parts_is_refused(run: Run, message: str) -> None:
    with pytest.raises(EchoError, match=message):
        judge_run(run, LIMITS)
