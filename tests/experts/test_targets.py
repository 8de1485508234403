"""Completions follow from the truth, vary only in wording, can be parsed back and never leak into prompts."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.data.references import compare, row
from echo_ft.data.dataset import Dataset, candidate_order
from echo_ft.data.questions import write_questions
from echo_ft.errors import EchoError
from echo_ft.experts.roles import ROUTINGS, parse_best, parse_letter, render
from echo_ft.experts.targets import (
    COMPARISONS,
    CONCLUSIONS,
    DEFECT_CONCLUSIONS,
    HINTS,
    MARKS,
    NO_DEFECT_CONCLUSIONS,
    NORMAL_COMPARISONS,
    NORMAL_OBSERVATIONS,
    OBSERVATIONS,
    UNMARKED_COMPARISONS,
    UNMARKED_OBSERVATIONS,
    gold_upstream,
    training_exchanges,
)
from echo_ft.files import write_jsonl
from echo_ft.images.masks import PLACES, SPREAD
from echo_ft.records import ROLES, Branch, Case, Entry, Exchange, Inspection, Question, Reference, Seen, Truth, Upstream

KNOWLEDGE = (
    Entry("good", "An even grey disc."),
    Entry("crack", "A thin dark line. The disc breaks under load."),
    Entry("dent", "A round hollow. It rattles in its seat."),
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A textured query with a dark line at the top left, its twin without the line, and two other textures."""
    rng = np.random.default_rng(0)

    def texture() -> np.ndarray:
        small = Image.fromarray(rng.integers(90, 200, (6, 6), dtype=np.uint8))
        return np.array(small.resize((96, 96), Image.Resampling.BICUBIC))

    twin = texture()
    query, mask = twin.copy(), np.zeros((96, 96), dtype=np.uint8)
    query[14:17, 4:28] = 10
    mask[14:17, 4:28] = 255
    for name, pixels in {"query": query, "twin": twin, "mask": mask, "n1": texture(), "n2": texture()}.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return tmp_path


def make_case(
    root: Path,
    condition: str = "crack",
    images: tuple[str, ...] = ("n1.png", "twin.png", "n2.png"),
    mask: str | None = "mask.png",
    knowledge: tuple[Entry, ...] = KNOWLEDGE,
    name: str = "case",
) -> Case:
    query = "twin.png" if condition == "good" else "query.png"
    inspection = Inspection(name, query, "drawn", "disc", condition, "g", mask=mask if condition != "good" else None)
    questions = write_questions(inspection, knowledge, ["good", "crack", "dent"], ["disc", "bolt"], root, seed=0)
    references = tuple(Reference(name, image, 0.9, rank) for rank, image in enumerate(images, start=1))
    seen = Seen(
        query, references, knowledge, tuple(dataclasses.replace(question, answer=None) for question in questions)
    )
    answers = {question.id: question.answer for question in questions if question.answer}
    return Case(name, "drawn", "disc", name, seen, Truth(condition, inspection.mask, (), answers))


def completions(exchanges: list[Exchange]) -> dict[str, str | None]:
    return {branch.id: branch.completion for exchange in exchanges for branch in exchange.branches}


def by_question_type(completed: dict[str, str | None]) -> dict[str, str | None]:
    return {identifier.split("#")[-1]: text for identifier, text in completed.items()}


CASE_NUMBERS = range(60)
"""Numbers of cases that differ only in their ids."""


def all_completions(root: Path, condition: str, role: str, **changes: object) -> dict[str, set[str]]:
    """Collect all completions of a role for cases that differ only in their ids, by question type."""
    completed: dict[str, set[str]] = defaultdict(set)
    for number in CASE_NUMBERS:
        case = make_case(root, condition, name=f"case {number}", **changes)  # type: ignore[arg-type]
        for identifier, text in by_question_type(completions(training_exchanges(case, role, root, "full"))).items():
            completed[identifier].add(str(text))
    return dict(completed)


def all_phrasings(
    observations: Sequence[str], comparisons: Sequence[str], conclusions: Sequence[str], **words: str
) -> set[str]:
    return {
        f"Observe: {observation}. Compare: {comparison}. Conclude: {conclusion}.".format(**words)
        for observation in observations
        for comparison in comparisons
        for conclusion in conclusions
    }


def test_completions_state_the_truth_in_every_phrasing(root: Path) -> None:
    assert all_completions(root, "crack", "reference_extractor") == {
        "best": {"2"},
        "normal": {"An even grey disc."},
    }
    entry = "A thin dark line. The disc breaks under load."
    assert all_completions(root, "crack", "knowledge_guide") == {"guide": {f"crack: {hint} {entry}" for hint in HINTS}}
    marks = ("a dark small elongated mark", "a small dark elongated mark")
    words = {"where": "at the top left", "reference": "the reference"}
    seen = [form.format(mark=mark, **words) for form in OBSERVATIONS for mark in marks]
    subjects = {
        "defect-classification": ("the type of the defect", "crack"),
        "defect-localization": ("the place of the defect", "top left"),
        "defect-description": ("the appearance of the defect", "A thin dark line"),
        "defect-analysis": ("the effect of the defect", "The disc breaks under load"),
    }
    expected = {"anomaly-detection": all_phrasings(seen, COMPARISONS, DEFECT_CONCLUSIONS, name="crack", **words)} | {
        kind: all_phrasings(seen, COMPARISONS, CONCLUSIONS, subject=subject, answer=answer, **words)
        for kind, (subject, answer) in subjects.items()
    }
    completed = all_completions(root, "crack", "reasoning_expert")
    assert completed.keys() == expected.keys()
    for kind, texts in completed.items():
        assert texts <= expected[kind]
        assert len(texts) > len(expected[kind]) / 2, "the ids use most of the phrasings"


def test_several_marks_are_described_as_several(root: Path) -> None:
    query, mask = (np.array(Image.open(root / name)) for name in ("query.png", "mask.png"))
    for x in (40, 60, 80):
        query[12:18, x : x + 6], mask[12:18, x : x + 6] = 10, 255
    Image.fromarray(query).save(root / "query.png")
    Image.fromarray(mask).save(root / "mask.png")
    for texts in all_completions(root, "crack", "reasoning_expert").values():
        observed = {text.split(". Compare: ")[0] for text in texts}
        marks = ("several dark small marks", "several small dark marks")
        assert observed == {f"Observe: {mark} at the top" for mark in marks} | {
            f"Observe: at the top {mark}" for mark in marks
        }


def test_normal_part_is_described_as_normal(root: Path) -> None:
    assert all_completions(root, "good", "knowledge_guide") == {"guide": {"good: An even grey disc."}}
    completed = all_completions(root, "good", "reasoning_expert", images=("n1.png", "n2.png"))
    shown = {"reference": "the reference"}
    assert completed["anomaly-detection"] == all_phrasings(
        NORMAL_OBSERVATIONS, NORMAL_COMPARISONS, NO_DEFECT_CONCLUSIONS, **shown
    )
    for kind, subject, answer in (
        ("object-classification", "the product", "disc"),
        ("object-analysis", "the answer", "An even grey disc"),
    ):
        words = {"subject": subject, "answer": answer, **shown}
        assert completed[kind] == all_phrasings(NORMAL_OBSERVATIONS, NORMAL_COMPARISONS, CONCLUSIONS, **words)


def test_same_case_always_gets_the_same_phrasing(root: Path) -> None:
    assert gold_upstream(make_case(root), root) == gold_upstream(make_case(root), root)


def test_every_phrasing_contains_the_words_that_are_parsed() -> None:
    for forms, slots in (
        (MARKS, ("{tone}", "{size}", "{shape}")),
        (OBSERVATIONS, ("{mark}", "{where}")),
        (CONCLUSIONS, ("{subject}", "{answer}")),
        (DEFECT_CONCLUSIONS, ("{name}",)),
    ):
        assert all(form.count(slot) == 1 for form in forms for slot in slots)
    places = re.compile("|".join(rf"\b{place}\b" for place in (*PLACES, SPREAD)))
    phrases = (
        *HINTS,
        *OBSERVATIONS,
        *COMPARISONS,
        *UNMARKED_OBSERVATIONS,
        *UNMARKED_COMPARISONS,
        *NORMAL_OBSERVATIONS,
        *NORMAL_COMPARISONS,
    )
    assert not any(places.search(form) for form in phrases), "only the defect may add a place"


def test_decision_completion_is_the_answer(root: Path) -> None:
    case = make_case(root)
    assert completions(training_exchanges(case, "decision_maker", root, "full")) == case.truth.answers


def test_training_prompts_are_those_of_inference(root: Path) -> None:
    """The prompts come from `render`, and its parsers turn every completion back into the truth."""
    case = make_case(root)
    gold = gold_upstream(case, root)
    for role in ROLES:
        for routing in ROUTINGS:
            made = training_exchanges(case, role, root, routing)
            assert [strip(exchange) for exchange in made] == render(role, case.id, case.seen, gold, ROUTINGS[routing])
            assert all(branch.completion for exchange in made for branch in exchange.branches)
    best = completions(training_exchanges(case, "reference_extractor", root, "full"))["best"]
    assert parse_best(str(best), 3) == gold.best
    for question in case.seen.questions:
        letter = completions(training_exchanges(case, "decision_maker", root, "full"))[question.id]
        assert parse_letter(str(letter), question.options) == case.truth.answers[question.id]


def strip(exchange: Exchange) -> Exchange:
    branches = tuple(Branch(branch.id, branch.prompt) for branch in exchange.branches)
    return dataclasses.replace(exchange, branches=branches)


def test_best_candidate_is_the_closest_outside_the_defect(root: Path) -> None:
    # This candidate is as dark as the defect in the same place. It would win if the comparison included the defect.
    decoy = np.array(Image.open(root / "query.png")).astype(int)
    decoy = np.clip(decoy + 12, 0, 255)
    decoy[14:17, 4:28] = 10
    Image.fromarray(decoy.astype(np.uint8)).save(root / "decoy.png")
    for images in (("twin.png", "decoy.png", "n1.png"), ("n1.png", "decoy.png", "twin.png"), ("decoy.png", "twin.png")):
        case = make_case(root, images=images)
        assert images[gold_upstream(case, root).best] == "twin.png"


@pytest.mark.parametrize(
    ("retrieved", "won"),
    [
        (("bright.png", "n2.png"), [False, False, True, True]),
        (("n2.png", "bright.png"), [False, False, False, True]),
        (("twin.png", "n2.png"), [True, True, True, True]),
        (("n2.png", "n1.png"), [False, False, False, False]),
    ],
)
def test_benchmark_counts_wins_of_the_retrieved_reference(root: Path, retrieved, won) -> None:
    """It compares the first and then the closest reference of each method, with and without brightness."""
    twin, other = (np.array(Image.open(root / name)).astype(float) for name in ("twin.png", "n1.png"))
    for name, pixels in (("bright", twin.clip(0, 205) + 50), ("mixed", 0.8 * twin + 0.2 * other)):
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{name}.png")
    rows = [
        Reference("case", image, 0.5, rank, method)
        for method, images in (("retrieved", retrieved), ("random", ("mixed.png", "mixed.png")))
        for rank, image in enumerate(images, start=1)
    ]
    question = Question("q", "case", "Anomaly Detection", "Any?", {"A": "Yes.", "B": "No."}, "A")
    marked = Inspection("case", "query.png", "drawn", "disc", "crack", "g", "test", "mask.png")
    for name, records in (("inspections", [marked]), ("questions", [question]), ("references", rows)):
        write_jsonl(root / f"{name}.jsonl", records)
    (root / "knowledge.json").write_text("{}")
    parts, wins = compare(Dataset(root, root, {"config": {}}), "test")
    assert parts == ["drawn/disc/g"]
    assert wins.astype(bool).tolist() == [won]
    assert row("all", parts * 2, np.concatenate([wins, 1 - wins])).count("50.0 (") == 4


def test_shuffled_candidates_have_the_same_best_image(root: Path) -> None:
    case = make_case(root)
    for number in range(6):
        shuffled = candidate_order(f"case {number}", case.seen.references)
        turned = dataclasses.replace(case, seen=dataclasses.replace(case.seen, references=shuffled))
        assert shuffled[gold_upstream(turned, root).best].image == "twin.png"


def test_cases_with_one_reference_and_with_none(root: Path) -> None:
    one = make_case(root, images=("n1.png",))
    assert completions(training_exchanges(one, "reference_extractor", root, "full"))["best"] == "1"
    none = make_case(root, images=())
    assert training_exchanges(none, "reference_extractor", root, "full") == []
    for role in ROLES[1:]:
        for exchange in training_exchanges(none, role, root, "full"):
            assert exchange.images == ("query.png",)
            assert all("reference" not in str(branch.completion) for branch in exchange.branches)


def test_no_place_is_invented_without_a_mask(root: Path) -> None:
    for texts in all_completions(root, "crack", "reasoning_expert", mask=None).values():
        for text in texts:
            observed, _, concluded = text.partition(" Conclude: ")
            assert concluded
            assert any(f"Observe: {form}. Compare: " in observed for form in UNMARKED_OBSERVATIONS)
            assert not re.search(r"\b(top|left|mark)\b", observed)


def test_completions_without_a_known_truth_are_left_out(root: Path) -> None:
    bare = make_case(root, knowledge=(Entry("dent", "A round hollow."),))
    assert training_exchanges(bare, "knowledge_guide", root, "full") == []
    assert completions(training_exchanges(bare, "reference_extractor", root, "full")) == {"best": "2"}
    unanswered = dataclasses.replace(bare, truth=dataclasses.replace(bare.truth, answers={}))
    for role in ("reasoning_expert", "decision_maker"):
        assert training_exchanges(unanswered, role, root, "full") == []
    stray = dataclasses.replace(
        bare, truth=dataclasses.replace(bare.truth, answers=dict.fromkeys(bare.truth.answers, "E"))
    )
    assert training_exchanges(stray, "decision_maker", root, "full") == []


def test_no_reasoning_if_answer_contradicts_condition(root: Path) -> None:
    case = make_case(root)
    question = case.seen.questions[0]
    wrong = next(letter for letter in question.options if letter != case.truth.answers[question.id])
    answers = {**case.truth.answers, question.id: wrong}
    contradicted = dataclasses.replace(case, truth=dataclasses.replace(case.truth, answers=answers))
    assert question.id not in gold_upstream(contradicted, root).reasons


def test_foreign_question_is_concluded_with_its_own_option(root: Path) -> None:
    case = make_case(root)
    foreign = Question("case#7", "case", "Defect Analysis", "What may follow?", {"A": "Nothing.", "B": "It snaps!"})
    case = dataclasses.replace(
        case,
        seen=dataclasses.replace(case.seen, questions=(foreign,)),
        truth=dataclasses.replace(case.truth, answers={"case#7": "B"}),
    )
    completed = completions(training_exchanges(case, "reasoning_expert", root, "full"))["case#7"]
    assert completed is not None
    assert completed.endswith("the effect of the defect is: It snaps!")


def test_truth_reaches_prompts_only_through_earlier_outputs(root: Path) -> None:
    case = make_case(root)
    gold = gold_upstream(case, root)
    sentinel = Truth("SENTINEL", case.truth.mask, (), dict.fromkeys(case.truth.answers, "C"))
    hidden = dataclasses.replace(case, truth=sentinel)
    changed = gold_upstream(hidden, root)
    for routing in ROUTINGS.values():
        for role in ("reference_extractor", "knowledge_guide"):
            before, after = (render(role, case.id, case.seen, words, routing) for words in (gold, changed))
            assert before == after
        for role in ("reasoning_expert", "decision_maker"):
            before, after = (render(role, case.id, case.seen, words, routing) for words in (gold, changed))
            assert [without_outputs(exchange, gold) for exchange in before] == [
                without_outputs(exchange, changed) for exchange in after
            ]
    # The prompts in the rows are among those rendered from the changed outputs.
    prompts = {
        (role, branch.prompt)
        for role in ROLES
        for exchange in render(role, case.id, case.seen, changed)
        for branch in exchange.branches
    }
    for role in ROLES:
        for exchange in training_exchanges(hidden, role, root, "full"):
            assert {(role, branch.prompt) for branch in exchange.branches} <= prompts
            assert "SENTINEL" not in exchange.context.replace(changed.guide or "\0", "")


def without_outputs(exchange: Exchange, outputs: Upstream) -> tuple[object, ...]:
    """Return an exchange without the lines that quote the guide and the reasoning."""

    def quoted(line: str) -> bool:
        return line == f"Guide: {outputs.guide}" or line in {
            f"Reasoning: {reason}" for reason in outputs.reasons.values()
        }

    texts = [exchange.context, *(branch.prompt for branch in exchange.branches)]
    return exchange.images, *("\n".join(line for line in text.split("\n") if not quoted(line)) for text in texts)


def test_predicted_outputs_replace_gold_ones(root: Path) -> None:
    case = make_case(root)
    predicted = Upstream(0, "Even.", "dent: look for this.", {case.seen.questions[0].id: "Observe: nothing."})
    made = training_exchanges(case, "decision_maker", root, "full", upstream=predicted)
    assert completions(made) == case.truth.answers
    assert made[0].images == ("n1.png", "query.png")
    assert "Guide: dent: look for this." in made[0].context
    assert "Reasoning: Observe: nothing." in made[0].branches[0].prompt


def test_tone_is_relative_to_the_reference_shown(root: Path) -> None:
    darker = np.array(Image.open(root / "twin.png"))
    darker[14:17, 4:28] = 0
    query = np.array(Image.open(root / "query.png"))
    query[14:17, 4:28] = 60
    for name, pixels in (("darker", darker), ("query", query)):
        Image.fromarray(pixels).save(root / f"{name}.png")
    case = make_case(root, images=("twin.png", "darker.png", "n1.png"))
    gold = gold_upstream(case, root)
    chosen = dataclasses.replace(gold, best=1)
    with_chosen = gold_upstream(case, root, chosen)
    assert with_chosen.best == gold.best == 0, "the best reference does not depend on the chosen one"
    for upstream, tone in ((gold, "dark"), (chosen, "bright")):
        (made,) = training_exchanges(case, "reasoning_expert", root, "full", upstream)[:1]
        assert made.images[0] == case.seen.references[upstream.best].image
        words = [branch.completion or "" for branch in made.branches]
        assert words
        assert all(f" {tone} " in text for text in words)


def test_unknown_names_and_broken_images_are_reported(root: Path) -> None:
    case = make_case(root)
    with pytest.raises(EchoError, match="routing cannot be 'short'; choose from full, paper"):
        training_exchanges(case, "decision_maker", root, "short")
    with pytest.raises(EchoError, match="no role is named 'judge'"):
        training_exchanges(case, "judge", root, "full")
    (root / "n1.png").write_bytes(b"\x89PNG")
    with pytest.raises(EchoError, match=r"n1\.png cannot be read"):
        training_exchanges(case, "decision_maker", root, "full")
