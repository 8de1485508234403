"""Loading of runs and answer files for scoring and comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo_ft.data.dataset import Dataset, load_dataset, read_digests
from echo_ft.errors import EchoError
from echo_ft.files import write_json, write_jsonl
from echo_ft.inference.run_folder import CONTINUED_WITH, CUT, ROW_DIGESTS, changed_file
from echo_ft.inputs import check_fields, from_dict, read_bytes, read_json_file, read_json_object
from echo_ft.metrics.answer_files import GivenAnswers
from echo_ft.metrics.answer_files.plain import read_plain_answers
from echo_ft.metrics.answer_files.robustmad import read_robustmad_answers
from echo_ft.metrics.mmad import Answer, read_answers, to_predictions
from echo_ft.provenance import fingerprint_bytes
from echo_ft.records import GROUNDING, UNLABELLED, Prediction, Rejection
from echo_ft.strict_yaml import read_json

TRAINED_APART = {
    "by_product": "across products",
    "by_dataset": "across datasets",
    "by_condition": "across defects",
}
"""Splits of a build that hold out more than parts, each with the protocol of a run on its test split."""

MAX_SUM = 1.01
"""Largest sum of probabilities that rounding explains."""

NOT_AUDITED = "not audited"
"""Part of a protocol if data_prep.audit has not compared the training data with the run's dataset."""


@dataclass(frozen=True)
class TrainingSource:
    """An entry of `trained_on` in run.json, as `model.training_overlap` describes it."""

    dataset: str
    dataset_fingerprint: str
    photographs_trained_on: int | None
    of_photographs: int
    roles: tuple[str, ...] = ()


RUN_FIELDS = {
    "adapters": dict[str, dict[str, Any]] | None,
    **dict.fromkeys(("cases", "questions"), int),
    **dict.fromkeys(("references", "severity"), int | None),
    **dict.fromkeys(("dataset", "split", "reference", "corruption", "answer", "answers", "server"), str | None),
    CUT: dict[str, int],
    CONTINUED_WITH: tuple[dict[str, Any], ...],
    "trained_on": tuple[TrainingSource, ...] | None,
    "warnings": tuple[str, ...],
}
"""The types of the fields of run.json that scores and comparisons read."""

CARD_FIELDS = {"dataset": str, "dataset_fingerprint": str, "leaks": dict[str, str]}
"""The types of the fields of an adapter's entry in run.json that they read."""


@dataclass(frozen=True)
class Run:
    """The content of a run folder, or of an answer file from another program."""

    folder: Path
    """Path of the folder or file."""
    predictions: list[Prediction]
    """The answers to questions with options."""
    provenance: dict[str, Any]
    """run.json with the fingerprint of predictions.jsonl, or path and fingerprint of the answer file."""
    warnings: list[str]
    rejections: list[Rejection]
    grounding: list[Prediction] = field(default_factory=list)
    """The answers to questions of the type GROUNDING."""
    complete: bool = True
    """Whether every question of the run has an answer."""


def load_run(folder: Path, keep_unlabelled: bool = False) -> Run:
    """Load the run in `folder`. Raises EchoError if it is not a run, is damaged, or has no predictions.

    Answers about images without a condition cannot be scored and are left out, unless `keep_unlabelled`.
    """
    meta, rows = folder / "run.json", folder / "predictions.jsonl"
    if not folder.is_dir():
        raise EchoError(f"there is no folder {folder}; create a run with python -m evaluation.run --output {folder}")
    for path in (meta, rows):
        if not path.is_file():
            raise EchoError(f"{folder} is not a run (it has no {path.name}); create one with python -m evaluation.run")
    try:
        provenance = read_json_object(meta)
    except (OSError, ValueError) as error:
        raise EchoError(f"{meta} is not JSON ({error}); rerun the same evaluation.run command") from error
    try:
        check_fields(provenance, RUN_FIELDS)
        for card in (provenance.get("adapters") or {}).values():
            check_fields(card, CARD_FIELDS)
        for note in provenance.get(CONTINUED_WITH, []):
            check_fields(note, RUN_FIELDS)
    except TypeError as error:
        raise EchoError(f"{meta} has been changed by hand ({error}); restore it, or run into another output") from error
    fault = changed_file(folder, provenance)
    if fault:
        raise EchoError(f"{fault} since the run ended; restore it, or run again into another output")
    provenance.pop(ROW_DIGESTS, None)
    content = _content(rows)
    predictions, rejections = _predictions(rows, content, complete=provenance.get("complete") is True)
    if not predictions:
        raise EchoError(f"{rows} is empty; rerun the same evaluation.run command to resume")
    incomplete = _incomplete_warnings(provenance, predictions)
    known = [one for one in predictions if keep_unlabelled or one.condition != UNLABELLED]
    if not known:
        raise EchoError(
            f"{rows} has only answers about images without a condition, so there is nothing to score; export them "
            "for review with python -m evaluation.export_review, or run another split"
        )
    warnings = [*incomplete, *_unlabelled_warnings(predictions, known), *_run_warnings(provenance)]
    provenance["predictions_fingerprint"] = fingerprint_bytes(content)
    others, grounding = _split_off_boxes(known)
    return Run(folder, others, provenance, warnings, rejections, grounding, complete=not incomplete)


def load_answers(path: Path, questions: Path | None = None) -> tuple[Run, GivenAnswers]:
    """Load an answer file from another program. Return it as a run, and the answers themselves.

    The file is in MMAD's format, JSON lines as `answer_files.plain` describes, or one that RobustMAD's authors publish.
    The last format needs RobustMAD's `questions`. Raises EchoError if the file is damaged or none of its rows can be
    scored.
    """
    given = _read_given(path, questions)
    if not given.predictions:
        first = given.rejections[0]
        raise EchoError(f"{path}: no row can be scored ({first.item}: {first.reason}); check the file")
    provenance = {"answers": str(path), "answers_fingerprint": fingerprint_bytes(_content(path)), **given.provenance}
    others, grounding = _split_off_boxes(given.predictions)
    if not others:
        raise EchoError(
            f"{path} holds only answers to {GROUNDING}; add the model's answers to questions with options, such as "
            "Anomaly Detection"
        )
    return Run(path, others, provenance, given.warnings, given.rejections, grounding), given


def _split_off_boxes(predictions: Sequence[Prediction]) -> tuple[list[Prediction], list[Prediction]]:
    """Return the answers to questions with options, and those to questions about boxes."""
    grounding = [one for one in predictions if one.kind == GROUNDING]
    return [one for one in predictions if one.kind != GROUNDING], grounding


def write_as_run(folder: Path, run: Run) -> None:
    """Write answers from another program into `folder` as a run that `load_run` reads."""
    answers = [*run.predictions, *run.grounding]
    counts = {"cases": len({one.case for one in answers}), "questions": len(answers)}
    warnings = [*run.warnings, *rejection_warnings(run)]
    write_jsonl(folder / "predictions.jsonl", answers)
    write_json(folder / "run.json", {**run.provenance, **counts, "complete": True, "warnings": warnings})


def rejection_warnings(run: Run) -> list[str]:
    """Return a warning with the number of rows that could not be scored."""
    if not run.rejections:
        return []
    first = run.rejections[0]
    return [f"{len(run.rejections)} rows could not be scored and are left out ({first.item}: {first.reason})"]


def _read_given(path: Path, questions: Path | None) -> GivenAnswers:
    lines = path.is_file() and _is_json_lines(path)
    rows = None if lines else _json_list(path)
    if rows and isinstance(rows[0], dict) and ("raw_response" in rows[0] or "mslm_answer" in rows[0]):
        return read_robustmad_answers(path, rows, questions)
    if questions is not None:
        raise EchoError(f"{path} holds no answers to RobustMAD; remove --questions")
    if lines:
        return read_plain_answers(path)
    answers = read_answers(path)
    predictions, rejections = to_predictions(answers)
    return GivenAnswers(predictions, rejections, answers, warnings=_repeated(answers))


def _repeated(answers: Sequence[Answer]) -> list[str]:
    """Warn if a file has several answers to one question. All of them count, as in MMAD's scorer."""
    seen = Counter((one.image, one.question_type, one.question) for one in answers if one.question)
    twice = [image for (image, _, _), count in seen.items() if count > 1]
    return [f"{len(twice)} questions have several answers, which all count (first: {twice[0]})"] if twice else []


def _json_list(path: Path) -> list[Any] | None:
    """Return the content of a file if it is a JSON list, or None."""
    try:
        content = read_json_file(path)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, list) else None


def _is_json_lines(path: Path) -> bool:
    """Return whether a file is JSON lines, judging from its name or from its first line, an object."""
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return True
    start = _content(path).partition(b"\n")[0]
    try:
        return isinstance(read_json(start.decode("utf-8-sig"), unique_keys=False), dict)
    except ValueError:
        return False


def _incomplete_warnings(provenance: Mapping[str, Any], predictions: Sequence[Prediction]) -> list[str]:
    """Warn if cases or questions of the run are missing, even if run.json states that the run is complete."""
    counts = {"cases": len({one.case for one in predictions}), "questions": len(predictions)}
    differing = [
        (count, provenance[name], name) for name, count in counts.items() if provenance.get(name, count) != count
    ]
    done, expected, what = differing[0] if differing else (counts["cases"], provenance.get("cases", "unknown"), "cases")
    if provenance.get("complete") is True and not differing:
        return []
    return [
        f"THE RUN IS NOT COMPLETE: {done} of {expected} {what}; the scores cover only these; rerun the same "
        "evaluation.run command to resume"
    ]


def _unlabelled_warnings(predictions: Sequence[Prediction], known: Sequence[Prediction]) -> list[str]:
    """Return a warning with the number of answers about images without a condition, which are left out."""
    left_out = len(predictions) - len(known)
    images = {one.case for one in predictions} - {one.case for one in known}
    text = f"{left_out} answers about {len(images)} images without a condition are left out of all scores"
    return [text] if left_out else []


def _run_warnings(provenance: Mapping[str, Any]) -> list[str]:
    """Collect the warnings of the run, from the first process and from all processes that resumed it."""
    notes = [provenance, *provenance.get(CONTINUED_WITH, [])]
    return list(dict.fromkeys(str(warning) for note in notes for warning in note.get("warnings", [])))


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except (OSError, ValueError) as error:
        raise EchoError(f"{path} cannot be read ({error}); replace it") from error


def _predictions(path: Path, content: bytes, complete: bool) -> tuple[list[Prediction], list[Rejection]]:
    predictions: list[Prediction] = []
    # splitlines would also split at U+2028, U+2029 and U+0085, which JSON does not escape.
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    for number, line in enumerate(lines, start=1):
        try:
            prediction = from_dict(Prediction, read_json(line.decode(), unique_keys=False))
            _check_probabilities(prediction)
            predictions.append(prediction)
        except (ValueError, TypeError) as error:
            if not complete and number == len(lines):  # the run was killed while it wrote this line
                return predictions, [Rejection(f"{path.name}:{number}", "cut off when the run stopped")]
            raise EchoError(
                f"{path}:{number} is not a prediction ({error}); delete the line and rerun evaluation.run"
            ) from error
    return predictions, []


def _check_probabilities(prediction: Prediction) -> None:
    found = prediction.probabilities or {}
    possible = found.keys() <= prediction.options.keys() and all(0 <= value <= 1 for value in found.values())
    if not possible or (found and not 0 < sum(found.values()) <= MAX_SUM):
        raise ValueError(f"probabilities: {found} does not divide 1 among the options")


def describe_protocol(run: Run) -> str:
    """State how the training data relate to the run's images, what the audit found, and which references were shown.

    Published MMAD scores follow different protocols: MMAD's 1-shot without training, training on some of MMAD's own
    images, and training on other datasets. Scores from different protocols cannot be compared. The facts come from the
    run, the cards of its adapters, and the manifests of the datasets if they are still there and unchanged.
    """
    provenance = run.provenance
    if "dataset" not in provenance:
        return "unknown training data: the answers come from another program"
    dataset = unchanged_dataset(provenance["dataset"], provenance.get("dataset_fingerprint"))
    manifest = dataset.manifest if dataset else {}
    sources = provenance.get("trained_on")
    if sources is None:  # an older version wrote run.json without this field
        cards = (provenance.get("adapters") or {}).values()
        sources = [card for card in cards if {"dataset", "dataset_fingerprint"} <= card.keys()]
    training = dict.fromkeys(_training(source, provenance, dataset) for source in sources)
    return f"{' and '.join(training) or 'not trained'}; {_references(provenance, manifest)}"


def unchanged_dataset(folder: Any, expected: Any) -> Dataset | None:
    """Load a dataset; None if it is missing or has been rebuilt."""
    try:
        dataset = load_dataset(Path(str(folder)))
    except (EchoError, OSError):
        return None
    return dataset if dataset.fingerprint == expected else None


def _share_images(first: Dataset | None, second: Dataset | None) -> bool:
    """Return whether two datasets are known to have an image in common, in any of their splits."""
    try:
        one, other = (read_digests(dataset) or {} if dataset else {} for dataset in (first, second))
    except EchoError:
        return False
    return not {*one.values()}.isdisjoint(other.values())


def _training(source: Mapping[str, Any], provenance: Mapping[str, Any], dataset: Dataset | None) -> str:
    """Describe one training dataset, an entry of `trained_on` or a card, and what the audit found."""
    manifest = dataset.manifest if dataset else {}
    seen, here = source.get("photographs_trained_on"), provenance.get("dataset_fingerprint")
    if seen:
        return f"trained on {seen} of these {source['of_photographs']} images"
    if source["dataset_fingerprint"] == here:
        own = "MMAD's own images" if manifest.get("source") == "mmad" else "the dataset's own images"
        apart = TRAINED_APART.get(manifest.get("config", {}).get("split"))
        name = apart if apart and provenance.get("split") == "test" else f"trained on some of {own}"
        audits = manifest.get("audits", {})
    else:
        trained = unchanged_dataset(source["dataset"], source["dataset_fingerprint"])
        name = f"across datasets, trained on {source['dataset']}"
        if _share_images(trained, dataset):
            name = f"trained on {source['dataset']}, another build with some of the same images"
        audits = trained.manifest.get("audits", {}) if trained else {}
    cards = (provenance.get("adapters") or {}).values()
    same_data = [card for card in cards if card.get("dataset_fingerprint") == source["dataset_fingerprint"]]
    leaks = [card.get("leaks", {}).get(here) for card in same_data]
    found = audits.get(here, {}).get("verdict") or next(filter(None, leaks), NOT_AUDITED)
    return f"{name} ({'no leak found' if found.startswith('no leak') else found})"


def _references(provenance: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Describe the normal references that accompany every image, and whether that is MMAD's 1-shot."""
    config, method = manifest.get("config", {}), provenance.get("reference") or "retrieved"
    count = provenance.get("references") or config.get("k")
    shown = "no reference" if method == "none" else f"{count or 'all'} {method} reference{'s' * (count != 1)} per image"
    if manifest.get("source") != "mmad":
        return shown
    named = method == "retrieved" and count == 1 and config.get("named_references")
    return "MMAD's 1-shot, with the reference that MMAD gives" if named else f"{shown} instead of MMAD's 1-shot"
