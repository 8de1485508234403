"""The lessons that echo-tiny is pretrained on: rows of drawn images and text with several prompts and completions each.

Images show only the pretraining parts of echo_ft.drawn.parts. Words of other inspection tasks occur only in meaningless
rows of text (random combinations of `WORDS`), so that the model learns to read, bind and repeat them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from echo_ft.drawn.parts import (
    COLOURS,
    IMAGE_SIZE,
    PLACES,
    PRETRAINING_DEFECTS,
    PRETRAINING_KINDS,
    SURFACES,
    Part,
    grid_cell,
    random_defect,
    random_style,
    render_part,
    size_word,
)
from echo_ft.records import LETTERS

INSTRUCTION = "Answer with the letter of the correct option only."

WORDS = """
a an and are as at be by can cannot does fit from has have here in into is it its less makes may more near no not of
off on once one only or other out over seen should so some such than that the then there these this through to under
up very which while will with within without what where when who how why all any both each every few most same
abnormal abrasion absent accurate acceptable adhesive air alignment allow along alter aluminium angle appearance area
assembly attached axis back bad ball balls band base bearing bent blade blank block blowhole blurred body bolt bolts
bore bottle break breaks bridge bright bristle broken brown bubble bulge bump burr burn cable candle cap capacitor
capsule carpet carrier casing cast cause causes cavity cell ceramic chain changes channel chip chipped chips circle
circuit circular clean clear cloth coating cold colour color comb combined compare complete component concentric
condition conclude connection connector contact contacts contamination copper core corner corners corrosion cotton
covered crack cracks cross crushed current curve curved cut cylinder damage damaged dark debris deep defect defective
defects deform deformed dent dents depth deposit difference different dirt dirty discoloration discolored disc dot
dots drill dry dust edge edges effect effects electrical electronic empty enamel end error even evenly exposed face
failure fabric fade fail faint fast fastened fatigue fault faulty fibre fill filled film fine finish fixed flake
flange flat flawless fluid foil folded force foreign form fracture fragment frame fray frayed free friction front full
function gap gear generator glass glossy glue good grain grey grid grinding grip groove ground guide hair handle
hardness hazelnut head heat heavy high hole holes hollow housing hub hydraulic ignored image impact important impurity
inclusion increase indentation inner inside inspected inspection intact intended internal iron irregular jagged joint
joints large lateral layer leak leakage leaking leather left lens level life light lighter line lines liquid load
local location long loose loss lost low lower lubricant machine magnet magnetic main mark marks material matte
mechanical melted mesh metal middle misaligned misplaced missing moisture mould mounted moved motor narrow neat nick
noise noisy normal nothing number nut object observe oil open opening operation orange outer outline outside oval
oxidation oxide packaging pad paint pale panel part particle parts patch pattern pcb permanent piece pill pin pins
pipe pit pits place plain plastic plate plug point polished poor pore porous position possible power precise present
press pressure print printed product profile protection proper protrusion pulled purpose quality race random reduced
reduces reference region reliability remains residue resistance rim right ring risk rolling roller rotation rough
round rows rubber rust safe safety sagging scale scar scrap scratch scratched scratches screw screws seal sealed
sealing seat section separate shadow shaft shallow shape sharp sheet shift shiny shows short side sides sign signal
silver single slot slots slight small smear smooth socket soft solder sound speck speckles spill split spot spots
spread spring squeezed stain stained stains standard steel step stick straight strand strands streak streaks strength
stress strong structure stuck surface surfaces swapped tear teeth texture thick thin thread tile tilted tin tool tooth
top torn toothbrush torque tough transistor translucent trapped tube turned twisted type typical undamaged uneven
uniform unit upper usable vibration void visible wall warm warped washer water wavy weak weakens weaker wear weld
wheel white wide wire wires wood worn wrong yellow zipper zone
""".split()  # noqa: SIM905

PHRASES = (
    "Is there any defect in the object?",
    "There is a defect in the object.",
    "There are some defects in the object.",
    "What is the type of the defect?",
    "Where is the defect?",
    "What is the appearance of the defect?",
    "What is the effect of the defect?",
    "What kind of product is in the image?",
    "What is the purpose of the object?",
    "What is the appearance of the object?",
    "The image is the part under inspection.",
    "The first image is a normal part.",
    "Known conditions of this part:",
    "look for this.",
    "Observe: compare: conclude: Question: Guide: Normal: Reasoning: Candidate candidates",
    "there is no defect.",
    "Yes. No.",
)
"""Phrases of other tasks, for the tokenizer's vocabulary."""


class Lesson(NamedTuple):
    """One branch of a row."""

    prompt: str
    completion: str
    skill: str
    """`caption`, `detection`, `attribute`, `note` or `text`. The measurement groups by it."""

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
class _PartLabels:
    """What a lesson can ask about a part. The last four are empty for a part without a defect."""

    kind: str
    colour: str
    defect: str = ""
    tone: str = ""
    extent: str = ""
    place: str = ""

    @property
    def mark(self) -> str:
        return f"{self.tone} {self.defect}".strip()


_TONES = ("dark", "bright", *COLOURS)
_EXTENTS = ("small", "medium", "large")
_SURFACE_SIZES = ((168, 168), (112, 252), (252, 112), (140, 196), (196, 140), (224, 224), (168, 280), (280, 112))


def draw_row(seed: int) -> LessonRow:
    """Draw row number `seed` of an endless sequence of lessons."""
    rng = np.random.default_rng((seed, 5))
    draw = rng.random()
    if draw < 0.3:
        return draw_text_row(seed)
    return _image_row(rng, normals=0 if draw < 0.42 else 1 if draw < 0.93 else int(rng.integers(2, 4)))


def _image_row(rng: np.random.Generator, normals: int) -> LessonRow:
    # Only a normal part next to it shows which marks belong to the product and which are defects.
    style = random_style(rng, marks=normals > 0 and rng.random() < 0.4)
    size = _pick(rng, _SURFACE_SIZES) if style.kind in SURFACES and rng.random() < 0.5 else IMAGE_SIZE
    defect = random_defect(rng, style) if rng.random() < (0.6 if normals else 0.5) else None
    seeds = rng.integers(2**31, size=2 * (normals + 1)).tolist()
    inspected = render_part(Part(style, seeds[0], defect), seeds[1], size)
    labels = _PartLabels(style.kind, style.colour)
    if defect and inspected.mask.sum() >= 8:
        labels = _PartLabels(
            style.kind, style.colour, defect.name, defect.tone, size_word(inspected.mask), grid_cell(inspected.mask)
        )
    elif defect:  # the defect lies outside the outline of the part
        inspected = render_part(Part(style, seeds[0]), seeds[1], size)
    normal = [render_part(Part(style, a), b, size).image for a, b in zip(seeds[2::2], seeds[3::2], strict=True)]

    branches = [_caption(rng, labels, normals), _detection(rng, labels)]
    context = _pick(rng, _CONTEXTS[min(normals, 2)])
    name = labels.defect or "good"
    if rng.random() < 0.3:
        notes = _notes(rng, name, ("good", *PRETRAINING_DEFECTS), int(rng.integers(1, 4)))
        context += "Notes:\n" + _lines(notes)
        prompt = "Which note fits the part?"
        branches.append(Lesson(prompt, f"{name}: {notes[name]}", "note"))
        branches.append(_choice(rng, prompt, notes[name], list(notes.values()), "note"))
    questions = _questions(labels)
    for index in rng.permutation(len(questions))[: 5 - len(branches)]:
        text, answer, answers = questions[index]
        if rng.random() < 0.75:
            branches.append(_choice(rng, text, answer, answers, "attribute"))
        else:
            branches.append(Lesson(_question_text(rng, text), _sentence(answer), "attribute"))
    order = rng.permutation(len(branches))
    return LessonRow((*normal, inspected.image), context, tuple(branches[index] for index in order))


_CONTEXTS = (
    ("", "", "Look at the part.\n"),
    (
        "The first image shows a normal part. Look at the second image.\n",
        "Image 1 is normal, image 2 is to be checked.\n",
        "A good part, then the part to check.\n",
    ),
    (
        "All images but the last show normal parts. Look at the last image.\n",
        "Normal parts come first. The last image is to be checked.\n",
    ),
)


def _caption(rng: np.random.Generator, labels: _PartLabels, normals: int) -> Lesson:
    if not normals or rng.random() < 0.3:
        part = f"A {labels.colour} {labels.kind}"
        detail = (
            f" with a {labels.extent} {labels.mark} at the {labels.place}." if labels.defect else " without a defect."
        )
        prompt = _pick(rng, ("Describe the part.", "What is shown?", "Describe the image."))
        return Lesson(prompt, part + detail, "caption")
    prompt = _pick(rng, ("What is different?", "Compare the images.", "Describe the difference."))
    if not labels.defect:
        return Lesson(prompt, "Nothing is different. There is no defect.", "caption")
    found = f"At the {labels.place} there is a {labels.extent} {labels.mark}. It is a defect, a {labels.defect}."
    return Lesson(prompt, found, "caption")


def _detection(rng: np.random.Generator, labels: _PartLabels) -> Lesson:
    text = _pick(rng, ("Is there any defect in the object?", "Is the part defective?", "Does the part have a defect?"))
    answer = "Yes." if labels.defect else "No."
    if rng.random() < 0.8:
        return _choice(rng, text, answer, ["Yes.", "No."], "detection")
    return Lesson(_question_text(rng, text), answer, "detection")


def _questions(labels: _PartLabels) -> list[tuple[str, str, Sequence[str]]]:
    """(text, answer, all possible answers) of each question about the part."""
    part_questions: list[tuple[str, str, Sequence[str]]] = [
        ("What kind of part is it?", labels.kind, PRETRAINING_KINDS),
        ("What is the colour of the part?", labels.colour, tuple(COLOURS)),
    ]
    if not labels.defect:
        return part_questions
    defect_questions: list[tuple[str, str, Sequence[str]]] = [
        ("There is a defect. What is the type of the defect?", labels.defect, tuple(PRETRAINING_DEFECTS)),
        ("There is a defect. Where is the defect?", labels.place, PLACES),
        ("There is a defect. How large is the defect?", labels.extent, _EXTENTS),
    ]
    if labels.tone:
        defect_questions.append(("There is a defect. What is the tone of the defect?", labels.tone, _TONES))
    return part_questions[:1] + defect_questions


def draw_caption_row(seed: int) -> LessonRow:
    """Draw one image with its caption, the cheapest lesson for learning to see."""
    full = _image_row(np.random.default_rng((seed, 8)), normals=0)
    return LessonRow(full.images, "", tuple(lesson for lesson in full.branches if lesson.skill == "caption"))


def draw_text_row(seed: int) -> LessonRow:
    """Draw a row without images: repeat, find and choose what the text states."""
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
    """Options, and the letter of each in another order. On its own line, a letter is the same token as in an option."""
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
    """A multiple-choice question with two to four options in random order.

    The text `stated` states the answer. It comes after the options with probability `after_share`, otherwise before the
    question.
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
