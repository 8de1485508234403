"""The records that the parts of echo-ft exchange, and how they travel as JSON lines.

Everything a person may want to inspect between two steps is one of these. The truth about a photograph
(condition, mask, answers) is kept in `Truth`, apart from `Seen`, so that a function which renders a prompt
cannot reach it: it is never handed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

GOOD = "good"
"""The condition of a part without a defect."""

LETTERS = "ABCDE"
"""Option letters that MMAD admits."""

QUESTION_TYPES = (
    "Anomaly Detection",
    "Defect Classification",
    "Defect Localization",
    "Defect Description",
    "Defect Analysis",
    "Object Classification",
    "Object Analysis",
)
"""MMAD's seven kinds of question, in the order of its tables."""

ROLES = ("reference_extractor", "knowledge_guide", "reasoning_expert", "decision_maker")
"""The four experts, in the order of the pipeline."""

SYNTHETIC_DESCRIPTIONS = {
    "cutpaste": "A rectangular patch of the surface lies where it does not belong, with hard straight edges. "
    "The surface is not continuous there, which can affect how the part works.",
    "scar": "A short thin strip of another shade crosses the surface at a slant. "
    "The surface is damaged along it and can fail there.",
    "perlin": "A blotch with ragged edges shows another texture than the surface around it. "
    "It may be dirt or another material, which will affect coating and fit.",
    "poisson": "A patch of the surface has the structure of another place, and its edges fade into the surroundings. "
    "The part is out of shape there, which can affect its fit.",
}
"""What a defect made by each method of `images.synthetic_defects` looks like, and what follows from it."""

Knowledge = Mapping[str, Mapping[str, Mapping[str, str]]]
"""{dataset: {product: {condition: description}}}: the schema of MMAD's domain_knowledge.json."""


@dataclass(frozen=True)
class Inspection:
    """One photograph of one part. Paths are relative to the dataset's image root, with forward slashes."""

    id: str
    image: str
    dataset: str
    product: str
    condition: str
    group: str
    """Photographs of the same physical part share one; splits and references respect it."""
    split: str | None = None
    mask: str | None = None
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """Defects as (x0, y0, x1, y1) in pixels of the image, where the source has boxes instead of a mask."""
    reference: str | None = None
    """A normal image that the source itself names for this one; it stands as given."""
    masks: tuple[str, ...] = ()
    """Several files that count as one mask, where the source has no single one."""
    polygons: tuple[tuple[float, ...], ...] = ()
    """Outlines of defects as (x0, y0, x1, y1, ...) in pixels of the image, beside boxes or instead of them."""
    synthetic: str | None = None
    """The method of `echo_ft.images.synthetic_defects` that made the defect, where no camera saw it: for training alone."""


@dataclass(frozen=True)
class Reference:
    """A normal image for an inspection, from retrieval or as the random control; rank counts from 1."""

    inspection: str
    image: str
    similarity: float
    rank: int
    method: str = "retrieved"
    """`retrieved`, `random` or `given`."""


@dataclass(frozen=True)
class Question:
    """A multiple-choice question about an inspection. `answer` is None in what the experts see."""

    id: str
    inspection: str
    kind: str
    text: str
    options: dict[str, str]
    answer: str | None = None


@dataclass(frozen=True)
class Rejection:
    """An image or row that could not be used, and why."""

    item: str
    reason: str
    dropped: str | None = None
    """`mask` or `reference`, where that alone could not be used and the photograph is; None where the item is out."""


@dataclass(frozen=True)
class Entry:
    """What is known about one condition of a product."""

    condition: str
    description: str


@dataclass(frozen=True)
class Seen:
    """All that the experts may see of a case."""

    query: str
    references: tuple[Reference, ...]
    knowledge: tuple[Entry, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Truth:
    """What is known about a case and must never reach a prompt of a run."""

    condition: str
    mask: str | None
    boxes: tuple[tuple[float, float, float, float], ...]
    answers: dict[str, str]
    """Question id to letter."""
    masks: tuple[str, ...] = ()
    polygons: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Case:
    """An inspection made ready: what the experts may see, and the truth apart from it."""

    id: str
    dataset: str
    product: str
    group: str
    """Cases of one physical part share one; intervals resample groups."""
    seen: Seen
    truth: Truth


@dataclass(frozen=True)
class Branch:
    """One thing that is asked of a role after the shared context, and what it should say (None at inference)."""

    id: str
    prompt: str
    completion: str | None = None


@dataclass(frozen=True)
class Exchange:
    """What one role is shown and asked about a case: images first, then what all branches share, then each branch."""

    role: str
    case: str
    images: tuple[str, ...]
    context: str
    branches: tuple[Branch, ...]
    prompt_version: str


@dataclass(frozen=True)
class Generation:
    """What a model generated for one branch."""

    text: str
    letters: Mapping[str, float]
    """Log-probability of each option letter as the first token; a server may return only some of them."""


@dataclass(frozen=True)
class Prediction:
    """The decision about one question, with the truth and the breakdown keys that a scorer needs beside it."""

    case: str
    question: str
    dataset: str
    product: str
    group: str
    image: str
    condition: str
    kind: str
    question_text: str
    options: dict[str, str]
    answer: str
    text: str
    parsed: str | None
    """The option letter, or None where the text is not one: counted as wrong, never guessed."""
    probabilities: dict[str, float] | None = None
    """P(letter) at the answer position, normalised over the question's options."""
    error: str | None = None


@dataclass(frozen=True)
class Trace:
    """What one role saw and said in a run; `branch` is the question's id for roles that answer questions."""

    case: str
    role: str
    branch: str
    images: tuple[str, ...]
    context: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Upstream:
    """What the earlier roles said about a case: predicted in a run, gold or predicted in training data."""

    best: int = 0
    """Index into `Seen.references` of the baseline that the reference extractor chose."""
    normal: str = ""
    guide: str = ""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Question id to the reasoning expert's words."""
