"""The records that the parts of echo-ft exchange. `echo_ft.files` stores them as JSON lines.

Every intermediate result that a person may want to inspect is one of these records. `Truth` holds the ground truth of
an image (condition, mask, answers), separate from `Seen`. Functions that render prompts receive only `Seen`, so they
cannot leak the truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

GOOD = "good"
"""The condition of a part without a defect."""

UNLABELLED = ""
"""The condition of an image if it is not known. Its questions have the answer `""`, and scores ignore them."""

LETTERS = "ABCDE"
"""The letters that MMAD allows for options."""

QUESTION_TYPES = (
    "Anomaly Detection",
    "Defect Classification",
    "Defect Localization",
    "Defect Description",
    "Defect Analysis",
    "Object Classification",
    "Object Analysis",
)
"""MMAD's seven question types, in the order of its tables."""

GROUNDING = "Defect Grounding"
"""Asks for the boxes of the defects (`images.boxes`). It has no options and is scored separately from MMAD's types."""

BOX_START, BOX_END = "<|box_start|>", "<|box_end|>"
"""Qwen2-VL's tokens around a box (arXiv 2409.12191). They are special tokens, so decoding drops them."""

UNANSWERABLE, ANSWERABLE = "Unanswerable", "Answerable"
"""Questions that do not fit the image, and their counterparts that fit (`data.unanswerable`). MMAD's tables leave them
out."""

ROBUSTMAD_TYPES = {
    "general": "RobustMAD General",
    "standalone": "RobustMAD Stand-alone",
    "pairwise": "RobustMAD Pairwise",
    "unanswerable": "RobustMAD Unanswerable",
}
"""The question types of RobustMAD, keyed by the rows of its tables. They are left out of MMAD's tables."""

UNKNOWN_CONDITION = "unknown"
"""The condition of an image if nothing says whether it shows a defect, as in some answer files from other programs."""

ROLES = ("reference_extractor", "knowledge_guide", "reasoning_expert", "decision_maker")
"""The four expert roles, in the order of the pipeline."""

MAX_NEW_TOKENS = 128
"""Default limit on the tokens that an expert may generate in a run, as in MMAD's own scripts."""

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
"""The appearance and consequences of the defects that each method of `images.synthetic_defects` makes."""

RelativePath = Annotated[str, "a path in the root of the images"]
"""The path of an image or mask, relative to the image root, with forward slashes. It never leads out of the root."""

Knowledge = Mapping[str, Mapping[str, Mapping[str, str]]]
"""{dataset: {product: {condition: description}}}, the schema of MMAD's domain_knowledge.json."""


@dataclass(frozen=True)
class Inspection:
    """One image of one part. Paths are relative to the dataset's image root and use forward slashes."""

    id: str
    image: RelativePath
    dataset: str
    product: str
    condition: str
    group: str
    """Images of the same physical part share one group.

    Assigned splits keep a group together, and retrieval never returns an image of the query's own group.
    """
    split: str | None = None
    mask: RelativePath | None = None
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """Defect boxes as (x0, y0, x1, y1) in pixels of the image, if the source has boxes instead of a mask."""
    reference: RelativePath | None = None
    """The normal image that the source gives as the reference. It is shown instead of the retrieved ones."""
    masks: tuple[RelativePath, ...] = ()
    """Several files that together form one mask, if the source has no single mask file."""
    polygons: tuple[tuple[float, ...], ...] = ()
    """Defect outlines as (x0, y0, x1, y1, ...) in pixels of the image, in addition to or instead of boxes."""
    synthetic: str | None = None
    """The method of `echo_ft.images.synthetic_defects` that made the defect; None for a real image.

    Images with synthetic defects are used only for training.
    """


@dataclass(frozen=True)
class Reference:
    """A normal image for an inspection, retrieved or drawn at random as a control. Ranks start at 1."""

    inspection: str
    image: RelativePath
    similarity: float
    rank: int
    method: str = "retrieved"
    """`retrieved`, `random` or `given`."""


@dataclass(frozen=True)
class Question:
    """A question about an inspection. `kind` is one of QUESTION_TYPES, with options, or GROUNDING, without options.

    `answer` is a letter, or for GROUNDING the boxes as text. It is empty if it is not known, and None in questions that
    the experts see.
    """

    id: str
    inspection: str
    kind: str
    text: str
    options: dict[str, str]
    answer: str | None = None


@dataclass(frozen=True)
class Rejection:
    """An image or row that could not be used, and the reason."""

    item: str
    reason: str
    dropped: str | None = None
    """`mask` or `reference` if only that was dropped and the image is used; None if the whole item was rejected."""


@dataclass(frozen=True)
class Entry:
    """The description of one condition of a product."""

    condition: str
    description: str


@dataclass(frozen=True)
class Seen:
    """Everything that the experts may see of a case."""

    query: RelativePath
    references: tuple[Reference, ...]
    knowledge: tuple[Entry, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Truth:
    """The ground truth of a case, which must never reach a prompt at inference."""

    condition: str
    mask: RelativePath | None
    boxes: tuple[tuple[float, float, float, float], ...]
    answers: dict[str, str]
    """The correct letter, or the boxes as text, keyed by question id."""
    masks: tuple[RelativePath, ...] = ()
    polygons: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Case:
    """A prepared inspection: what the experts may see, and separately the truth."""

    id: str
    dataset: str
    product: str
    group: str
    """Cases of one physical part share one group. Confidence intervals resample groups."""
    seen: Seen
    truth: Truth


@dataclass(frozen=True)
class Branch:
    """One prompt for a role after the shared context, and its target completion (None at inference)."""

    id: str
    prompt: str
    completion: str | None = None


@dataclass(frozen=True)
class Exchange:
    """The full input of one role for a case: the images, then the context that all branches share, then each branch."""

    role: str
    case: str
    images: tuple[RelativePath, ...]
    context: str
    branches: tuple[Branch, ...]
    prompt_version: str


@dataclass(frozen=True)
class Generation:
    """The output of a model for one branch."""

    text: str
    letters: Mapping[str, float]
    """Log-probability of each option letter as the first token. A server may return only some letters."""
    cut: bool = False
    """Whether the text was cut off at the token limit."""


@dataclass(frozen=True)
class Prediction:
    """The answer to one question, with the truth and the keys that group the scores. `kind` is the question type."""

    case: str
    question: str
    dataset: str
    product: str
    group: str
    image: RelativePath
    condition: str
    kind: str
    question_text: str
    options: dict[str, str]
    answer: str
    text: str
    parsed: str | None
    """The letter or the boxes as text, never guessed; None if the answer is unparsed, which counts as wrong."""
    probabilities: dict[str, float] | None = None
    """P(letter) at the answer position, normalised over the question's options; None for GROUNDING."""
    error: str | None = None


@dataclass(frozen=True)
class Trace:
    """The input and output of one role in a run. For roles that answer questions, `branch` is the question's id."""

    case: str
    role: str
    branch: str
    images: tuple[RelativePath, ...]
    context: str
    prompt: str
    text: str
    cut: bool = False
    """Whether the text was cut off at the token limit."""


@dataclass(frozen=True)
class Upstream:
    """The outputs of the earlier roles for a case: predicted in a run, gold or predicted in training data."""

    best: int = 0
    """The index in `Seen.references` of the baseline that the reference extractor selected."""
    normal: str = ""
    guide: str = ""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """The reasoning expert's text, keyed by question id."""
