"""The experts' outputs before the decision are scored strictly against the truth, with counts and intervals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from echo_ft.experts.pipeline import PipelineConfig, run_cases
from echo_ft.experts.targets import gold_upstream
from echo_ft.images import masks
from echo_ft.inference.run_folder import ROW_DIGESTS, RUN_DESCRIPTION
from echo_ft.metrics import experts
from echo_ft.metrics.experts import Judgement, concluded_letter, named_condition, named_location
from echo_ft.metrics.intervals import resample
from echo_ft.metrics.metric_values import share_with_interval
from echo_ft.metrics.prediction_table import make_prediction_table
from echo_ft.records import GOOD, LETTERS, Case, Entry, Exchange, Generation, Trace
from evaluation import formatting, score
from evaluation.run import main as run_main
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS, make_case, make_dataset

KNOWN = (Entry("good", "Even."), Entry("stain", "Dark."), Entry("stain: rim", "A rim."), Entry("dent", "Deep."))


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("good: Even.", "good"),
        ("stain: look for this. Dark.", "stain"),
        ("  Stain:\nlook for this.", "stain"),
        ("stain: rim: look for this.", "stain: rim"),
        ("stain", None),
        ("The stain: dark.", None),
        ("stains: dark.", None),
        ("scratch: look for this.", None),
        ("", None),
    ],
)
def test_guide_names_a_condition_only_by_its_entry_and_a_colon(text: str, condition: str | None) -> None:
    assert named_condition(text, KNOWN) == condition


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("Observe: a dark small round mark at the top left. Compare: the reference differs there.", "top left"),
        ("In the center there is a mark, in the CENTER. Conclude: yes, at the bottom.", "center"),
        ("Observe: several marks across much of the image. Conclude: no.", masks.SPREAD),
        ("A mark at the right.", "right"),
        ("Marks at the top and at the left.", None),
        ("A stopped clock, a bright spot.", None),
        ("Conclude: the place of the defect is: top left.", None),
        ("", None),
    ],
)
def test_location_is_the_only_one_in_the_observation(text: str, location: str | None) -> None:
    assert named_location(text) == location


YES_NO = {"A": "No.", "B": "Yes."}
PLACES = {"A": "left", "B": "Top left.", "C": "across much of the image", "D": "center"}


@pytest.mark.parametrize(
    ("text", "options", "letter"),
    [
        ("Observe: a mark. Conclude: yes, there is a defect: no bolt.", YES_NO, "B"),
        ("Observe: yes? Conclude: no, there is no defect.", YES_NO, "A"),
        ("Conclude: it may be yes or no.", YES_NO, None),
        ("Conclude: nobody knows.", YES_NO, None),
        ("There is a mark. So the answer is yes.", YES_NO, "B"),
        ("Yes, a mark. It is dark.", YES_NO, None),
        ("Conclude: the place of the defect is: top left.", PLACES, "B"),
        ("Conclude: the place of the defect is: left.", PLACES, "A"),
        ("Conclude: so the place of the defect is: across much of the image.", PLACES, "C"),
        ("Conclude: left or center.", PLACES, None),
        ("Conclude: the leftmost part.", PLACES, None),
        ("", PLACES, None),
    ],
)
def test_conclusion_is_the_only_option_that_it_quotes(text: str, options: dict[str, str], letter: str | None) -> None:
    assert concluded_letter(text, options) == letter


def draw_case(root: Path, number: int) -> Case:
    """Draw a case with a defect in one cell of the grid, or a normal case."""
    case = make_case(root, f"line/part/{number}", sizes=((90, 90), (96, 90), (90, 90)), seed=3 * number)
    if number % 2:
        case = replace(case, seen=replace(case.seen, references=case.seen.references[::-1]))
    if number % 3 == 2:
        questions = tuple(question for question in case.seen.questions if not question.kind.startswith("Defect"))
        answers = {question.id: case.truth.answers[question.id] for question in questions}
        answers[questions[0].id] = "B"
        seen = replace(case.seen, questions=questions)
        return replace(case, seen=seen, truth=replace(case.truth, condition=GOOD, answers=answers))
    column, row = number % 3 * 30, number // 3 % 3 * 30
    return replace(case, truth=replace(case.truth, boxes=((column + 5, row + 5, column + 20, row + 25),)))


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    return [draw_case(tmp_path, number) for number in range(18)]


class GoldBackend:
    """A backend with gold outputs for every expert, or the fixed `texts` of each role. Decisions are always right."""

    def __init__(self, cases: Sequence[Case], root: Path, texts: dict[str, str] | None = None) -> None:
        self.gold = {case.id: gold_upstream(case, root) for case in cases}
        self.truth = {case.id: case.truth for case in cases}
        self.texts = texts

    def generate(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        return [[self._answer(role, one.case, branch.id) for branch in one.branches] for one in exchanges]

    def _answer(self, role: str, case: str, branch: str) -> Generation:
        gold = self.gold[case]
        texts = {"best": str(gold.best + 1), "normal": gold.normal, "guide": gold.guide, **gold.reasons}
        text = texts.get(branch, "")
        if role == "decision_maker":
            text = self.truth[case].answers[branch]
        elif self.texts is not None:
            text = self.texts[role]
        return Generation(text, dict.fromkeys(LETTERS, 0.0))


def score_cases(cases: Sequence[Case], backend: GoldBackend, root: Path) -> dict:
    outcomes = run_cases(cases, backend.generate, PipelineConfig())
    table = make_prediction_table([one for outcome in outcomes for one in outcome.predictions])
    return experts.score_experts(table, cases, [trace for outcome in outcomes for trace in outcome.traces], root)


def test_training_targets_are_always_scored_as_correct(cases: list[Case], tmp_path: Path) -> None:
    """The phrasings come from `targets`, so the parsers here must accept all of them."""
    found = score_cases(cases, GoldBackend(cases, tmp_path), tmp_path)
    assert found["unreadable"] == []
    figures = found["figures"]
    assert set(figures) == set(formatting.EXPERT_LABELS)
    for name, one in figures.items():
        assert (one["value"], one["unread"]) == (1.0, 0), name
    assert figures["best_reference"]["texts"] == figures["condition"]["cases"] == 18
    assert figures["best_reference"]["chance"] == figures["condition"]["chance"] == 0.5
    assert (figures["place"]["texts"], figures["place"]["cases"]) == (12 * 7, 12)
    assert set(found["conditions"]) == {"line/washer/good", "line/washer/stain"}
    assert figures["conclusion"]["texts"] == 12 * 7 + 6 * 3


def test_unparsed_outputs_are_wrong_and_counted_and_never_guessed(cases: list[Case], tmp_path: Path) -> None:
    texts = {
        "reference_extractor": "the first, I think",
        "knowledge_guide": "It looks like a stain",
        "reasoning_expert": "There is something at the top or at the left.",
    }
    figures = score_cases(cases, GoldBackend(cases, tmp_path, texts), tmp_path)["figures"]
    for one in figures.values():
        assert one["value"] == 0.0
        assert one["unread"] == one["texts"] > 0


def test_shares_equal_those_counted_by_hand(cases: list[Case], tmp_path: Path) -> None:
    """The outputs always say `1`, `stain` and `top left`. 12 of 18 cases are stains; 2 of their marks are there."""
    texts = {
        "reference_extractor": "1",
        "knowledge_guide": "stain: look for this.",
        "reasoning_expert": "Observe: a mark at the top left. Conclude: yes, there is a defect: stain.",
    }
    backend = GoldBackend(cases, tmp_path, texts)
    figures = score_cases(cases, backend, tmp_path)["figures"]
    first = sum(gold.best == 0 for gold in backend.gold.values())
    assert 0 < first < 18
    assert figures["best_reference"]["value"] == pytest.approx(first / 18)
    assert figures["condition"]["value"] == pytest.approx(12 / 18)
    assert figures["condition_recall"]["value"] == 0.5
    low, high = figures["condition_recall"]["interval"]
    assert 0.2 < low < 0.4
    assert low + high == pytest.approx(1), "all parts of a condition have the same answer"
    assert figures["place"]["value"] == figures["place_touched"]["value"] == pytest.approx(2 / 12)
    # The conclusion agrees with the decision on 12 defective parts, and disagrees on 6 normal ones.
    assert figures["conclusion"]["value"] * figures["conclusion"]["texts"] == pytest.approx(12 + 12)
    for name in ("best_reference", "condition", "place", "conclusion"):
        low, high = figures[name]["interval"]
        assert 0 <= low <= figures[name]["value"] <= high <= 1


def test_condition_of_one_part_leaves_the_mean_without_an_interval(cases: list[Case], tmp_path: Path) -> None:
    """The output is always `good`, which is right for one condition of three. `dent` has one part, so no spread."""
    knowledge = (*cases[0].seen.knowledge, Entry("dent", "Deep."))
    cases = [replace(case, seen=replace(case.seen, knowledge=knowledge)) for case in cases]
    cases[0] = replace(cases[0], truth=replace(cases[0].truth, condition="dent"))
    texts = {"reference_extractor": "1", "knowledge_guide": "good: even.", "reasoning_expert": ""}
    found = score_cases(cases, GoldBackend(cases, tmp_path, texts), tmp_path)
    recall = found["figures"]["condition_recall"]
    assert recall["interval"] is None
    assert recall["value"] == pytest.approx(1 / 3)
    assert {name: one["texts"] for name, one in found["conditions"].items()} == {
        "line/washer/dent": 1, "line/washer/good": 6, "line/washer/stain": 11,
    }  # fmt: skip


def test_chance_of_the_mean_over_conditions_is_averaged_like_it(cases: list[Case], tmp_path: Path) -> None:
    """The guide chooses from four entries in two stain cases, and from two entries in all others."""
    four = (*cases[0].seen.knowledge, Entry("dent", "Deep."), Entry("crack", "Long."))
    changed = [place for place, case in enumerate(cases) if case.truth.condition == "stain"][:2]
    cases = [
        replace(case, seen=replace(case.seen, knowledge=four)) if place in changed else case
        for place, case in enumerate(cases)
    ]
    figures = score_cases(cases, GoldBackend(cases, tmp_path), tmp_path)["figures"]
    assert figures["condition"]["chance"] == pytest.approx((16 / 2 + 2 / 4) / 18)
    assert figures["condition_recall"]["chance"] == pytest.approx((1 / 2 + (10 / 2 + 2 / 4) / 12) / 2)


@pytest.mark.parametrize(("conditions", "parts", "lowest"), [(10, 3, 0.92), (10, 2, 0.9)])
def test_interval_of_the_mean_over_conditions_contains_the_truth(conditions: int, parts: int, lowest: float) -> None:
    """Simulate 400 test sets with three images per part. The guide's accuracy differs between conditions and parts."""
    random = np.random.default_rng(1)
    accuracies = np.linspace(0.3, 0.9, conditions)
    count = conditions * parts * 3
    table = SimpleNamespace(part_index=np.arange(count) // 3)
    images = {f"{number}": number for number in range(count)}
    contained = []
    for _ in range(400):
        # The accuracy on a part varies around the accuracy on its condition. Answers are drawn with the part's
        # accuracy.
        of_parts = random.beta(4 * accuracies[:, None], 4 * (1 - accuracies[:, None]), (conditions, parts))
        correct = (random.random((conditions, parts, 3)) < of_parts[..., None]).reshape(conditions, -1)
        groups = [
            [
                Judgement("condition", f"{number * parts * 3 + place}", bool(one), True, 0.5)
                for place, one in enumerate(row)
            ]
            for number, row in enumerate(correct)
        ]
        low, high = experts.mean_over_groups(table, images, groups)["interval"]
        contained.append(low - 1e-9 <= accuracies.mean() <= high + 1e-9)
    assert lowest <= np.mean(contained) <= 0.985


def test_recall_of_one_condition_has_the_interval_of_its_share() -> None:
    correct = np.arange(12) % 2 == 0
    table = SimpleNamespace(part_index=np.arange(12), images=tuple(range(12)))
    own = [Judgement("condition", f"{place}", bool(one), True, 0.5) for place, one in enumerate(correct)]
    found = experts.mean_over_groups(table, {f"{place}": place for place in range(12)}, [own])
    assert share_with_interval(table, resample([0] * 12), np.arange(12), correct) == (
        found["value"], pytest.approx(found["interval"])
    )  # fmt: skip


def test_location_with_some_of_the_defect_differs_from_its_own(tmp_path: Path) -> None:
    case = draw_case(tmp_path, 0)
    case = replace(
        case, truth=replace(case.truth, boxes=((5, 5, 60, 25),))
    )  # in two cells, with the center in the second
    texts = {
        "reference_extractor": "1",
        "knowledge_guide": "",
        "reasoning_expert": "Observe: a mark at the top left. Conclude: yes.",
    }
    figures = score_cases([case], GoldBackend([case], tmp_path, texts), tmp_path)["figures"]
    assert (figures["place"]["value"], figures["place_touched"]["value"]) == (0.0, 1.0)


def test_single_candidates_and_broken_images_are_left_out(cases: list[Case], tmp_path: Path) -> None:
    backend = GoldBackend(cases, tmp_path)
    single = replace(cases[0], seen=replace(cases[0].seen, references=cases[0].seen.references[:1]))
    (tmp_path / cases[1].seen.query).write_text("no image")
    found = score_cases([single, *cases[1:]], backend, tmp_path)
    assert found["figures"]["best_reference"]["texts"] == 16
    assert found["figures"]["condition"]["texts"] == 18
    (reason,) = found["unreadable"]
    assert Path(cases[1].seen.query).name in reason


def test_experts_that_did_not_run_have_no_score(cases: list[Case], tmp_path: Path) -> None:
    outcomes = run_cases(
        cases, GoldBackend(cases, tmp_path).generate, PipelineConfig(knowledge="none", reasoning="off")
    )
    table = make_prediction_table([one for outcome in outcomes for one in outcome.predictions])
    traces = [trace for outcome in outcomes for trace in outcome.traces]
    assert set(experts.score_experts(table, cases, traces, tmp_path)["figures"]) == {"best_reference"}
    failed = make_prediction_table(
        [replace(one, error="broken") for outcome in outcomes for one in outcome.predictions]
    )
    assert experts.score_experts(failed, cases, [], tmp_path) == {"figures": {}, "conditions": {}, "unreadable": []}


def test_report_scores_the_experts_or_states_why_it_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, folder = make_dataset(tmp_path / "data", train=1, validation=1, test=2), tmp_path / "run"
    options = {"dataset": dataset, "output": folder, "model_name_or_path": ECHO_TINY, "dtype": "float32"}
    options |= {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "max_new_tokens": 6}
    run_main([str(argument) for name, value in options.items() for argument in (f"--{name}", value)])

    def report() -> tuple[dict, str, str]:
        score.main([str(folder)])
        page = (folder / "report.html").read_text()
        return json.loads((folder / "report.json").read_text())["experts"], page, capsys.readouterr().out

    found, page, printed = report()
    assert found["figures"]["best_reference"]["texts"] == found["figures"]["condition"]["texts"] == 2
    assert found["figures"]["conclusion"]["texts"] == 14
    assert "place" not in found["figures"]
    assert "knowledge guide: true condition" in page
    assert "knowledge guide: true condition" in printed

    described = json.loads((folder / RUN_DESCRIPTION).read_text())
    del described[ROW_DIGESTS]  # as in a run that was killed, whose rows are not sealed yet
    (folder / RUN_DESCRIPTION).write_text(json.dumps(described))
    with open(folder / "traces.jsonl", "a") as file:
        file.write('{"case": "test/0", "ro')  # the run was killed while it wrote this line
    assert report()[0] == found

    whole = (folder / "traces.jsonl").read_text()
    (folder / "traces.jsonl").write_text("".join(line for line in whole.splitlines(True) if '"test/1"' not in line))
    assert "traces.jsonl has no row for 1 cases (first: test/1); restore the file" in report()[0]["unavailable"]
    (folder / "traces.jsonl").write_text(whole)

    changed = dataset / "images" / "test_0_2.png"
    original = changed.read_bytes()
    changed.write_bytes(original + b" ")
    assert "have changed since" in report()[0]["unavailable"]
    assert "have changed since" in (folder / "report.html").read_text()
    changed.write_bytes(original)
    manifest = json.loads((dataset / "manifest.json").read_text())
    (dataset / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "another"}))
    assert "has been rebuilt since" in report()[0]["unavailable"]
    shutil.rmtree(dataset)
    found, page, printed = report()
    assert "there is no dataset" in found["unavailable"]
    assert "No scores: there is no dataset" in page
    assert "no scores for the experts before the decision: there is no dataset" in printed
    (folder / "traces.jsonl").unlink()
    assert report()[0] == {"unavailable": "the run has no traces.jsonl"}


def test_duplicate_traces_of_a_stopped_run_count_once(cases: list[Case], tmp_path: Path) -> None:
    outcomes = run_cases(cases, GoldBackend(cases, tmp_path).generate, PipelineConfig())
    table = make_prediction_table([one for outcome in outcomes[:9] for one in outcome.predictions])
    traces: list[Trace] = [trace for outcome in outcomes for trace in outcome.traces]
    once = experts.score_experts(table, cases, [one for outcome in outcomes[:9] for one in outcome.traces], tmp_path)
    assert experts.score_experts(table, cases, [*traces, *traces[:40]], tmp_path) == once
