"""The case viewer of the report and comparison pages: its data and its images.

A page filters a small index of all cases. The cases themselves are in compressed blocks, which it unpacks to show a
case. A page with 10,000 cases therefore opens at once and needs no network.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_ft.data.dataset import load_cases
from echo_ft.errors import EchoError
from echo_ft.files import read_complete_rows
from echo_ft.images.boxes import Box, matched_ious
from echo_ft.inference.run_folder import TRACES
from echo_ft.metrics.grounding.scores import named_boxes, true_boxes
from echo_ft.metrics.loading import Run
from echo_ft.metrics.prediction_table import is_correct
from echo_ft.records import GOOD, GROUNDING, QUESTION_TYPES, ROLES, Case, Prediction, Trace
from evaluation.case_images import ImageStore
from evaluation.review import run_dataset

CASES_PER_BLOCK = 32
"""Number of cases that the page unpacks together."""


@dataclass(frozen=True)
class CaseViewer:
    """What a page needs to show its cases."""

    index: Mapping[str, Any]
    """The names of runs, question types, products and conditions, and the values of each case that the filters use."""
    blocks: Sequence[str]
    """Blocks of CASES_PER_BLOCK cases: JSON, compressed with gzip, in base64."""
    images: ImageStore


def make_viewer(runs: Mapping[str, Run], images: ImageStore) -> CaseViewer:
    """Collect the cases of runs on the same questions. The keys of `runs` are their names on the page.

    Images and masks come from the dataset of the last run, and words from the traces. References come from the dataset
    as each run used it, or from the traces if the dataset is missing. Files that no longer exist are left out, because
    the page works without them.
    """
    names, some = list(runs), list(runs.values())
    answers_of_first = [*some[0].predictions, *some[0].grounding]
    rows = [_by_case([*run.predictions, *run.grounding]) for run in some]
    traces = [_by_case(read_complete_rows(run.folder / TRACES, Trace)) for run in some]
    loaded: dict[str, tuple[Path | None, dict[str, Case]]] = {}
    for run in some:
        if _cases_key(run) not in loaded:
            loaded[_cases_key(run)] = _dataset_cases(run)
    cases = [loaded[_cases_key(run)][1] for run in some]
    images.read_from(loaded[_cases_key(some[-1])][0])
    order = sorted(rows[0], key=lambda case: _sort_key(rows[0][case][0]))
    asked = {one.kind for one in answers_of_first}
    kinds = [*(kind for kind in QUESTION_TYPES if kind in asked), *sorted(asked - {*QUESTION_TYPES})]
    products = sorted({_product(one) for one in answers_of_first})
    conditions = sorted({one.condition for one in answers_of_first}, key=lambda name: (name != GOOD, name))
    index: dict[str, Any] = {"runs": names, "kinds": kinds, "products": products, "conditions": conditions}
    index |= {"corruptions": [_corruption(run) for run in some]}
    index |= {"roles": [role.replace("_", " ") for role in ROLES], "block": CASES_PER_BLOCK, "cases": []}
    described = []
    for case in order:
        questions = _shared_questions([run.get(case, []) for run in rows])
        if not questions:
            continue
        first = questions[0][0]
        own = [run.get(case) for run in cases]
        described.append(_describe_case(own, questions, [found.get(case, []) for found in traces], images))
        index["cases"].append(
            [
                case,
                products.index(_product(first)),
                conditions.index(first.condition),
                described[-1]["query"]["image"],
                [kinds.index(answers[0].kind) for answers in questions],
                ["".join(_status(answers[place]) for answers in questions) for place in range(len(some))],
                "".join("01"[len({one.parsed or one.text for one in answers}) > 1] for answers in questions),
            ]
        )
    blocks = [_pack(described[start : start + CASES_PER_BLOCK]) for start in range(0, len(described), CASES_PER_BLOCK)]
    index["images"] = images.finish()
    return CaseViewer(index, blocks, images)


def _shared_questions(runs: Sequence[Sequence[Prediction]]) -> list[list[Prediction]]:
    """Return the answers of all runs to each question about a case. Only questions about boxes can lack an answer."""
    by_question = [{one.question: one for one in run} for run in runs]
    return [[run[name] for run in by_question] for name in by_question[0] if all(name in run for run in by_question)]


def _by_case(rows: Any) -> dict[str, list[Any]]:
    found = defaultdict(list)
    for row in rows:
        found[row.case].append(row)
    return found


def _cases_key(run: Run) -> str:
    """Return everything that the cases of a run depend on, as JSON."""
    keys = ("dataset", "dataset_fingerprint", "split", "reference", "references")
    return json.dumps([run.provenance.get(key) for key in keys])


def _corruption(run: Run) -> str | None:
    """Return how a run degraded its queries, such as `blur 3`, or None if it did not."""
    kind = run.provenance.get("corruption")
    return None if kind is None else f"{kind} {run.provenance.get('severity')}".replace("_", " ")


def _dataset_cases(run: Run) -> tuple[Path | None, dict[str, Case]]:
    """Return the image folder and the cases of a run's dataset, with the references that the run used.

    Both are empty if the dataset is missing or was rebuilt.
    """
    try:
        dataset = run_dataset(run)
    except EchoError:
        return None, {}
    split, reference = (str(run.provenance.get(*pair)) for pair in (("split",), ("reference", "retrieved")))
    try:
        cases = load_cases(dataset, split, reference, run.provenance.get("references"))
        return dataset.root, {case.id: case for case in cases}
    except (EchoError, OSError, KeyError, TypeError, ValueError):  # a page works without masks
        return dataset.root, {}


def _sort_key(prediction: Prediction) -> tuple[str, ...]:
    return prediction.dataset, prediction.product, prediction.condition, prediction.case


def _product(prediction: Prediction) -> str:
    return f"{prediction.dataset}/{prediction.product}"


def _status(prediction: Prediction) -> str:
    """Return `1` for a correct answer, `0` for a wrong one, `-` for an unparsed one and `!` for a failed one."""
    if prediction.error is not None:
        return "!"
    if prediction.parsed is None:
        return "-"
    return "01"[_finds_boxes(prediction) if prediction.kind == GROUNDING else is_correct(prediction)]


def _finds_boxes(prediction: Prediction) -> bool:
    """Return whether the answer finds every true box at an IoU of 0.5, and has no box on a good image."""
    named, true = named_boxes(prediction) or (), true_boxes(prediction)
    return bool(named) == bool(true) and all(iou >= 0.5 for iou in matched_ious(named, true))


def _describe_case(
    cases: Sequence[Case | None],
    questions: Sequence[Sequence[Prediction]],
    traces: Sequence[Sequence[Trace]],
    images: ImageStore,
) -> dict[str, Any]:
    """Return the content of the page for one case, which each run has loaded with its own references.

    `questions` holds the answers of every run to each question.
    """
    first = questions[0][0]
    candidates = [_candidates(first.image, case, own) for case, own in zip(cases, traces, strict=True)]
    numbers = {answers[0].question: place for place, answers in enumerate(questions, start=1)}
    return {
        "group": first.group,
        "query": {"path": first.image, **images.add_query(first.image, cases[-1])},
        "references": [
            {
                "path": path,
                "image": images.add(path),
                "numbers": [run.get(path) for run in candidates],
                "chosen": [place for place, own in enumerate(traces) if _baseline(own, first.image) == path],
            }
            for path in dict.fromkeys(path for run in candidates for path in run)
        ],
        "questions": [_describe_question(answers) for answers in questions],
        "words": [
            [_describe_trace(trace, numbers, {first.image: "query"} | _names(own)) for trace in said]
            for said, own in zip(traces, candidates, strict=True)
        ],
    }


def _names(candidates: Mapping[str, int]) -> dict[str, str]:
    return {path: f"candidate {number}" for path, number in candidates.items()}


def _describe_trace(trace: Trace, numbers: Mapping[str, int], names: Mapping[str, str]) -> list[Any]:
    """Return role, question number or branch, text, whether the text was cut off, names of the images, and prompt."""
    images = [names.get(path, path) for path in trace.images]
    about = numbers.get(trace.branch, trace.branch)
    return [ROLES.index(trace.role), about, trace.text, trace.cut, images, f"{trace.context}{trace.prompt}"]


def _describe_question(answers: Sequence[Prediction]) -> dict[str, Any]:
    first = answers[0]
    return {
        "kind": first.kind,
        "text": first.question_text,
        "options": list(first.options.items()),
        "answer": first.answer,
        "runs": [[one.parsed, one.text, one.error, _rounded(one.probabilities), _boxes(one)] for one in answers],
    }


def _rounded(probabilities: Mapping[str, float] | None) -> dict[str, float] | None:
    return None if probabilities is None else {letter: round(p, 4) for letter, p in probabilities.items()}


def _boxes(prediction: Prediction) -> tuple[Box, ...]:
    """Return the boxes, in thousandths, in the answer to a question about boxes; empty for other questions."""
    return named_boxes(prediction) or () if prediction.kind == GROUNDING else ()


def _candidates(query: str, case: Case | None, traces: Sequence[Trace]) -> dict[str, int]:
    """Return the number that the reference extractor of a run gives to each reference."""
    paths = [reference.image for reference in case.seen.references] if case is not None else []
    if case is None:
        paths = [path for trace in traces for path in trace.images if path != query]
    return {path: number for number, path in enumerate(dict.fromkeys(paths), start=1)}


def _baseline(traces: Sequence[Trace], query: str) -> str | None:
    """Return the reference that the experts after the reference extractor saw."""
    later = (trace.images for trace in traces if trace.role != ROLES[0])
    return next((path for paths in later for path in paths if path != query), None)


def _pack(cases: Sequence[Mapping[str, Any]]) -> str:
    text = json.dumps(cases, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(errors="replace"), mtime=0)).decode()
