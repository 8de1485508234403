"""The lessons that echo-tiny is pretrained on: rows of drawn images and text with several prompts and completions each.

Images come from a pool (train.tiny.pool). Words of other inspection tasks occur only in meaningless text (random
combinations of `WORDS`), alone or beside images, so that the model learns to read, bind and repeat them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from echo_ft.experts.roles import GROUND_INSTRUCTION
from echo_ft.images.boxes import NO_BOXES, format_boxes
from echo_ft.images.masks import PLACES
from echo_ft.records import LETTERS
from train.tiny.pool import COLOUR_NAMES, DEFECT_NAMES, EXTENT_NAMES, KIND_NAMES, TONE_NAMES
from train.tiny.words import WORDS

INSTRUCTION = "Answer with the letter of the correct option only."


class Lesson(NamedTuple):
    """One branch of a row."""

    prompt: str
    completion: str
    skill: str
    """What it teaches, such as `detection`, `place` or `text`. Measurements are grouped by it."""

    @property
    def is_letter(self) -> bool:
        """Whether the completion is the letter of an option."""
        return self.prompt.endswith(INSTRUCTION)


@dataclass(frozen=True)
class LessonRow:
    """One prefix (images, then text that all branches share) and its branches."""

    images: tuple[NDArray[np.uint8], ...]
    """Each (height, width, 3), with sides that are multiples of 28."""
    context: str
    branches: tuple[Lesson, ...]


@dataclass(frozen=True)
class PartLabels:
    """What a lesson can ask about the inspected part. Fields are empty if they are unknown or there is no defect."""

    kind: str
    colour: str = ""
    defect: str = ""
    tone: str = ""
    extent: str = ""
    place: str = ""
    boxes: str = NO_BOXES
    """The boxes of the defects as an answer names them."""

    @property
    def mark(self) -> str:
        """The defect with its tone, such as `dark crack`."""
        return f"{self.tone} {self.defect}".strip()

    @property
    def part(self) -> str:
        """The part with its colour, such as `red gear`."""
        return f"{self.colour} {self.kind}".strip()


def random_labels(rng: np.random.Generator) -> PartLabels:
    """Draw labels without an image, for the words that lessons use."""
    kind, colour = _pick(rng, KIND_NAMES), _pick(rng, COLOUR_NAMES)
    if rng.random() < 0.3:
        return PartLabels(kind, colour)
    tone, extent = _pick(rng, TONE_NAMES), _pick(rng, EXTENT_NAMES)
    x, y, width, height = rng.integers(1, 500, size=4).tolist()
    boxes = format_boxes([(x, y, x + width, y + height)])
    return PartLabels(kind, colour, _pick(rng, DEFECT_NAMES), tone, extent, _pick(rng, PLACES), boxes)


def image_lessons(
    rng: np.random.Generator, labels: PartLabels, normals: int, best: int | None = None
) -> tuple[str, tuple[Lesson, ...]]:
    """Draw the context and three to five lessons on the last image of a row, after `normals` images of normal parts.

    `best` is the index of the normal image most similar to the last image, or None if the question does not ask for it.
    """
    context = _pick(rng, _CONTEXTS[min(normals, 2)])
    if best is not None:
        context = (
            f"The first {normals} images are candidates 1 to {normals}, normal parts. The last image is the part.\n"
        )
    branches = [_detection(rng, labels)]
    if best is not None:
        branches.append(Lesson(_pick(rng, _BEST_PROMPTS), str(best + 1), "best"))
    if rng.random() < 0.4:
        branches.append(_caption(rng, labels, normals))
    if rng.random() < BOX_SHARE:
        branches.append(Lesson(f"{_pick(rng, _BOX_PROMPTS)}{GROUND_INSTRUCTION}", labels.boxes, "boxes"))
    if rng.random() < 0.15:
        name = labels.defect or "good"
        notes = _notes(rng, name, ("good", *DEFECT_NAMES), int(rng.integers(1, 4)))
        context += "Notes:\n" + _lines(notes)
        prompt = "Which note fits the part?"
        branches.append(Lesson(prompt, f"{name}: {notes[name]}", "note"))
        branches.append(_choice(rng, prompt, notes[name], list(notes.values()), "note"))
    elif rng.random() < STATED_SHARE:
        stated, lessons = _stated(rng, labels)
        context += stated
        branches += lessons
    questions = _questions(labels)
    for index in rng.permutation(len(questions))[: max(1, 4 - len(branches))]:
        text, answer, answers, skill = questions[index]
        if rng.random() < 0.8:
            branches.append(_choice(rng, text, answer, answers, skill))
        else:
            branches.append(Lesson(_question_text(rng, text), _sentence(answer), skill))
    order = rng.permutation(len(branches))
    return context, tuple(branches[index] for index in order)


BOX_SHARE = 0.35
"""Fraction of the rows with images that ask for boxes."""
STATED_SHARE = 0.4
"""Fraction of the rows with images but without notes in which the text states the answers."""
STATEMENTS = ("Note", "Hint", "Remark", "Guide", "Reasoning")
"""Words before a statement."""
_BOX_PROMPTS = ("", "Where are the defects?\n", "Question: What is different, and where?\n")
_BEST_PROMPTS = (
    "Which candidate is most like the last image? Answer with its number.",
    "Which candidate fits the last image best? Answer with its number.",
)
_CONTEXTS = (
    ("", "The image is the part under inspection.\n", "Look at the part.\n"),
    (
        "The first image is a normal part. The second image is the part under inspection.\n",
        "The first image shows a normal part. Look at the second image.\n",
        "Image 1 is normal, image 2 is to be checked.\n",
        "A good part, then the part to check.\n",
    ),
    (
        "All images but the last show normal parts. Look at the last image.\n",
        "Normal parts come first. The last image is to be checked.\n",
    ),
)


def _stated(rng: np.random.Generator, labels: PartLabels) -> tuple[str, list[Lesson]]:
    """Draw two questions beside images. The answers are in text: a note in the context, or a line of the prompt."""
    if rng.random() < 0.5:
        name = labels.defect or "good"
        notes = _notes(rng, name, ("good", *DEFECT_NAMES), 3)
        kind = _choice(rng, "What is the type of the defect?", name, ["good", *DEFECT_NAMES], "stated")
        look = _choice(rng, "What is the appearance of the defect?", notes[name], list(notes.values()), "stated")
        return f"{_pick(rng, STATEMENTS)}: {name}: {notes[name]}\n", [kind, look]
    lessons = []
    for _ in range(2):
        answers = [_phrase(rng) if rng.random() < 0.5 else _sentence(" ".join(_words(rng, 1, 2))) for _ in range(4)]
        subject, seen = _pick(rng, WORDS), labels.place and f"at the {labels.place} a {labels.extent} {labels.mark}. "
        stated = f"{_pick(rng, STATEMENTS)}: {seen}the {subject} is: {answers[0]}\n"
        lessons.append(_choice(rng, f"What is the {subject}?", answers[0], answers, "stated", stated, after_share=0.7))
    return "", lessons


def _caption(rng: np.random.Generator, labels: PartLabels, normals: int) -> Lesson:
    if not normals or rng.random() < 0.3:
        detail = (
            f" with a {labels.extent} {labels.mark} at the {labels.place}." if labels.defect else " without a defect."
        )
        prompt = _pick(rng, ("Describe the part.", "What is shown?", "Describe the image."))
        return Lesson(prompt, f"A {labels.part}{detail}", "caption")
    prompt = _pick(rng, ("What is different?", "Compare the images.", "Describe the difference."))
    if not labels.defect:
        return Lesson(prompt, "Nothing is different. There is no defect.", "caption")
    found = f"At the {labels.place} there is a {labels.extent} {labels.mark}. It is a defect, a {labels.defect}."
    return Lesson(prompt, found, "caption")


def _detection(rng: np.random.Generator, labels: PartLabels) -> Lesson:
    text = _pick(rng, ("Is there any defect in the object?", "Is the part defective?", "Does the part have a defect?"))
    answer = "Yes." if labels.defect else "No."
    if rng.random() < 0.85:
        return _choice(rng, text, answer, ["Yes.", "No."], "detection")
    return Lesson(_question_text(rng, text), answer, "detection")


def _questions(labels: PartLabels) -> list[tuple[str, str, Sequence[str], str]]:
    """Return (text, answer, all possible answers, skill) of each question about the part."""
    questions: list[tuple[str, str, Sequence[str], str]] = [
        ("What kind of part is it?", labels.kind, KIND_NAMES, "kind")
    ]
    if not labels.defect:
        colour = ("What is the colour of the part?", labels.colour, COLOUR_NAMES, "colour")
        return [*questions, colour] if labels.colour else questions
    # The type and the place are the hardest to learn, so they are asked most.
    for opening in ("", "There is a defect. ", "There is a defect in the object. "):
        questions.append((f"{opening}What is the type of the defect?", labels.defect, DEFECT_NAMES, "type"))
        questions.append((f"{opening}Where is the defect?", labels.place, PLACES, "place"))
    questions.append(("There is a defect. How large is the defect?", labels.extent, EXTENT_NAMES, "extent"))
    if labels.tone:
        questions.append(("There is a defect. What is its tone?", labels.tone, TONE_NAMES[1:], "tone"))
    return questions


def draw_text_row(seed: int) -> LessonRow:
    """Draw a row without images, with lessons to repeat, find and choose what the text states."""
    rng = np.random.default_rng((seed, 6))
    return draw_binding_row(seed, after_share=0.3) if rng.random() < 0.6 else _notes_row(rng)


def draw_binding_row(seed: int, after_share: float) -> LessonRow:
    """Draw short questions with a statement of the answer.

    The statement comes after the options in a share `after_share` of the questions, otherwise before the question.
    """
    rng = np.random.default_rng((seed, 7))
    branches = []
    for _ in range(6):
        answers = [_sentence(" ".join(_words(rng, 1, 2))) for _ in range(4)]
        spelling = answers[0] if rng.random() < 0.7 else answers[0].lower()
        subject = _pick(rng, WORDS)
        stated = f"{_pick(rng, ('Note', 'Hint', 'Remark'))}: the {subject} is {spelling}\n"
        branches.append(_choice(rng, f"What is the {subject}?", answers[0], answers, "text", stated, after_share))
    return LessonRow((), "", tuple(branches))


def _notes_row(rng: np.random.Generator) -> LessonRow:
    names = [" ".join(_words(rng, 1, 2)) for _ in range(int(rng.integers(2, 4)))]
    notes = {name: _phrase(rng) for name in names}
    name = _pick(rng, tuple(notes))
    branches = [
        Lesson("Repeat the notes.", _lines(notes).rstrip(), "text") if rng.random() < 0.5 else _letters(rng),
        Lesson(f"Repeat the note on {name}.", f"{name}: {notes[name]}", "text")
        if rng.random() < 0.5
        else _letters(rng),
        _choice(rng, f"What is said about {name}?", notes[name], list(notes.values()), "text"),
    ]
    for _ in range(4):
        long = rng.random() < 0.2
        answers = [_phrase(rng) if long else _sentence(" ".join(_words(rng, 1, 2))) for _ in range(4)]
        spelling = answers[0] if rng.random() < 0.7 else answers[0].lower()
        if rng.random() < 0.3:
            branches.append(_choice(rng, f"Which option is: {spelling}", answers[0], answers, "text"))
            continue
        subject = _pick(rng, WORDS)
        stated = f"{_pick(rng, ('Note', 'Hint', 'Remark'))}: the {subject} is {spelling}\n"
        branches.append(_choice(rng, f"What is the {subject}?", answers[0], answers, "text", stated))
    return LessonRow((), "Notes:\n" + _lines(notes), tuple(branches))


def _letters(rng: np.random.Generator) -> Lesson:
    """Draw options, and ask for the letter of each in another order.

    A letter on its own line is the same token as in an option.
    """
    options = [_sentence(" ".join(_words(rng, 1, 2))) for _ in range(4)]
    lines = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=False))
    order = rng.permutation(4).tolist()
    questions = " ".join(options[index] for index in order)
    completion = "\n".join(f"{options[index]}\n{LETTERS[index]}" for index in order)
    return Lesson(f"{lines}Give the letters of: {questions}", completion, "text")


def _choice(
    rng: np.random.Generator,
    text: str,
    answer: str,
    answers: Sequence[str],
    skill: str,
    stated: str = "",
    after_share: float = 0.5,
) -> Lesson:
    """Draw a multiple-choice question with two to four options in random order.

    The text `stated` contains the answer. It comes after the options with probability `after_share`, otherwise before
    the question.
    """
    wrong = [other for other in dict.fromkeys(answers) if other != answer]
    count = min(len(wrong), int(rng.integers(1, 4)))
    options = [answer, *(wrong[index] for index in rng.permutation(len(wrong))[:count])]
    order = rng.permutation(len(options)).tolist()
    lines = "".join(f"{LETTERS[i]}. {_sentence(options[source])}\n" for i, source in enumerate(order))
    before, after = ("", stated) if rng.random() < after_share else (stated, "")
    return Lesson(f"{before}{_question_text(rng, text)}\n{lines}{after}{INSTRUCTION}", LETTERS[order.index(0)], skill)


def _question_text(rng: np.random.Generator, text: str) -> str:
    return f"Question: {text}" if rng.random() < 0.5 else text


def _notes(rng: np.random.Generator, true: str, names: Sequence[str], count: int) -> dict[str, str]:
    wrong = [name for name in names if name != true]
    noted = [true, *(wrong[index] for index in rng.permutation(len(wrong))[:count])]
    return {noted[index]: _phrase(rng) for index in rng.permutation(len(noted)).tolist()}


def _lines(notes: dict[str, str]) -> str:
    return "".join(f"- {name}: {text}\n" for name, text in notes.items())


def _phrase(rng: np.random.Generator) -> str:
    return _sentence(" ".join(_words(rng, 3, 9)))


def _words(rng: np.random.Generator, low: int, high: int) -> list[str]:
    return [WORDS[index] for index in rng.integers(len(WORDS), size=int(rng.integers(low, high + 1))).tolist()]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _pick(rng: np.random.Generator, items: Sequence):  # type: ignore[type-arg, no-untyped-def]
    return items[int(rng.integers(len(items)))]
