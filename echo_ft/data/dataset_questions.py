"""Write the questions of a whole dataset, image by image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from echo_ft.data.questions import open_questions, write_box_question, write_questions
from echo_ft.data.splits import UNLABELLED_SPLIT, conditions_of, queries
from echo_ft.data.unanswerable import write_unanswerable_questions
from echo_ft.records import UNLABELLED, Entry, Inspection, Knowledge, Question


def write_dataset_questions(
    inspections: Sequence[Inspection],
    source_questions: Sequence[Question],
    knowledge: Knowledge,
    training_knowledge: Knowledge,
    root: Path,
    seed: int,
    grounding: bool = False,
    unanswerable: float = 0.0,
) -> Iterator[Question]:
    """Yield the source's questions about each image. For an image without such questions, yield written ones.

    With `grounding`, the question from `write_box_question` follows them. `unanswerable`, from 0 to 1, is the fraction
    of images that also get the questions of `write_unanswerable_questions`. An unlabelled image gets
    `open_questions` instead.

    Questions about the test split are written from `knowledge` and name all products. All other questions are written
    from `training_knowledge` and name only the products outside the test split.
    """
    given: dict[str, list[Question]] = defaultdict(list)
    for question in source_questions:
        given[question.inspection].append(question)
    labelled = [inspection for inspection in inspections if inspection.condition != UNLABELLED]
    real = queries([inspection for inspection in labelled if inspection.synthetic is None])
    tested = conditions_of(real)  # synthetic images are left out, because they must not change the test questions
    conditions = conditions_of(inspections)
    products = sorted({inspection.product for inspection in real})
    untrained = ("test", UNLABELLED_SPLIT)
    trained = sorted({inspection.product for inspection in inspections if inspection.split not in untrained})
    premises = {
        True: _named_conditions(tested, knowledge, products),
        False: _named_conditions(conditions, training_knowledge, trained),
    }
    for inspection in inspections:
        test = inspection.split == "test"
        if inspection.condition == UNLABELLED:
            named = tested.get((inspection.dataset, inspection.product), [])
            yield from open_questions(inspection.id, named, grounding, answer="")
            continue
        if inspection.id in given:
            yield from given[inspection.id]
        else:
            texts = (knowledge if test else training_knowledge)[inspection.dataset][inspection.product]
            shown = (tested if test else conditions)[inspection.dataset, inspection.product]
            shown = [name for name in shown if name in texts]
            entries = tuple(Entry(*item) for item in texts.items())
            yield from write_questions(inspection, entries, shown, products if test else trained, root, seed)
        if grounding and (about_boxes := write_box_question(inspection, root)):
            yield about_boxes
        if unanswerable:
            others = premises[test].get(inspection.dataset, {})
            yield from write_unanswerable_questions(inspection, others, root, unanswerable, seed)


def _named_conditions(
    found: Mapping[tuple[str, str], Sequence[str]], knowledge: Knowledge, products: Sequence[str]
) -> dict[str, dict[str, list[str]]]:
    """Return the conditions that occur in each product's images and in its knowledge, keyed by dataset and product."""
    named: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for (dataset, product), conditions in found.items():
        if product in products:
            texts = knowledge.get(dataset, {}).get(product, {})
            named[dataset][product] = [name for name in conditions if name in texts]
    return named
