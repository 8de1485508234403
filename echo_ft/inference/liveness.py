"""Prove that adapters have an effect.

Their answers to a fixed probe are compared with those of the base model and those recorded in the export.

The export records the answers of every adapter and of the base model. It also records each adapter's answers under two
faults that are otherwise undetectable: the adapter being applied twice, and its vision-tower weights being missing. The
backend must answer as the adapter of the role. If its answer matches another record, that record names the fault.

An answer to the probe has the text of each branch and, where the backend returns them, the log-probabilities of the
option letters at its first token. The log-probabilities decide. The text decides only without them, because small
differences can change it completely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import BackendError
from echo_ft.experts.roles import DECIDE_INSTRUCTION, NORMAL_PROMPT, PROMPT_VERSION, REASON_INSTRUCTION
from echo_ft.files import write_json
from echo_ft.images.decode import image_size, load_image
from echo_ft.inputs import from_dict, read_json_object
from echo_ft.model.rows import RowBuilder
from echo_ft.processes import scratch_folder
from echo_ft.provenance import fingerprint_bytes
from echo_ft.records import ROLES, Branch, Exchange, Generation
from echo_ft.terminal import LOGGER

if TYPE_CHECKING:
    from echo_ft.inference.server import Server

PROBE_FILE = "probe.json"
"""File in a bundle's folder of adapters that holds the record of the export."""

PROBE_TOKENS = 12
"""Number of tokens that are generated for each branch of the probe."""

TOLERANCES = {"float32": 0.01, "bfloat16": 0.3, "float16": 0.1}
"""Smallest tolerated distance from a recorded answer, in nats (RMS over letters). Other machines round differently."""

ALLOWED_SHARE = 0.1
"""Allowed distance from the trained adapter's answers, as a fraction of the adapter's effect (`ProbeRecord.effect`). It
applies only if no recorded fault explains the answers."""

BASE, TWICE, WITHOUT_VISION = "base", "twice", "without vision"

Letters = Mapping[str, float]
ProbeBackend = Callable[[str, Exchange], Sequence[Generation]]
"""Answers the probe with the adapter of a role, or with the base model if the role is `BASE`."""


@dataclass(frozen=True)
class ProbeAnswer:
    """The answer to the probe: per branch, the text and the log-probability of each letter as the first token."""

    texts: tuple[str, ...]
    letters: tuple[Letters, ...]

    def distance(self, other: ProbeAnswer) -> float | None:
        """Return the RMS difference, in nats, of the log-probabilities present in both; None if there are none."""
        differences = [
            ours[letter] - theirs[letter]
            for ours, theirs in zip(self.letters, other.letters, strict=True)
            for letter in ours.keys() & theirs.keys()
        ]
        return math.sqrt(sum(one * one for one in differences) / len(differences)) if differences else None

    def equals(self, other: ProbeAnswer, tolerance: float) -> bool:
        """Return whether two answers are equal, up to `tolerance` nats if both have probabilities."""
        distance = self.distance(other)
        return self.texts == other.texts if distance is None else distance <= tolerance


@dataclass(frozen=True)
class ProbeRecord:
    """The answers that an export records."""

    tokens: str
    """Fingerprint of the probe's tokens, which depend on the tokenizer, the chat template and the pixel budget."""
    dtype: str
    answers: dict[str, ProbeAnswer]
    """`BASE`, the roles, and `<role> <fault>` for `TWICE` and `WITHOUT_VISION`."""

    @property
    def tolerance(self) -> float:
        """The smallest distance in nats that counts as a difference."""
        return TOLERANCES.get(self.dtype, max(TOLERANCES.values()))

    def effect(self, role: str) -> float:
        """Return the distance in nats of a trained adapter's answers from the base model's."""
        return self.answers[role].distance(self.answers[BASE]) or 0.0


@contextmanager
def make_probe() -> Iterator[Exchange]:
    """Yield the probe, which is the same in every version of its record. Its images are in a temporary folder."""
    values = np.random.default_rng(0).integers(0, 255, (2, 96, 128, 3), dtype=np.uint8)
    with scratch_folder("echo-ft-probe-") as folder:
        images = tuple(str(folder / f"{index}.png") for index in range(len(values)))
        for image, value in zip(images, values, strict=True):
            Image.fromarray(value).save(image)
        questions = (
            "Question: Is there any defect in the object?\nA. Yes.\nB. No.\n",
            "Question: What is the type of the defect?\nA. Scratch.\nB. Dent.\nC. Stain.\nD. Crack.\n",
        )
        branches = (
            *(Branch(f"letter {index}", text + DECIDE_INSTRUCTION) for index, text in enumerate(questions)),
            Branch("normal", NORMAL_PROMPT),
            Branch("reason", questions[0] + REASON_INSTRUCTION),
        )
        yield Exchange("decision_maker", "probe", images, "Two images.\n", branches, PROMPT_VERSION)


def load_probe_images(probe: Exchange) -> list[Image.Image]:
    """Load the images of the probe, while `make_probe` keeps them."""
    return [load_image(Path(image)) for image in probe.images]


def probe_tokens(row_builder: RowBuilder, probe: Exchange) -> str:
    """Return the fingerprint of the probe's tokens."""
    sizes = [image_size(Path(image)) for image in probe.images]
    return fingerprint_bytes(row_builder.row(probe, sizes).input_ids.astype("<i8").tobytes())


def answer_probe(backend: ProbeBackend, role: str, probe: Exchange) -> ProbeAnswer:
    """Return a backend's answer to the probe as `role`."""
    generations = backend(role, probe)
    return ProbeAnswer(tuple(one.text for one in generations), tuple(dict(one.letters) for one in generations))


def local_backend(model: Any, row_builder: RowBuilder) -> ProbeBackend:
    """Return the backend of a loaded model, with or without adapters named after the roles."""
    from echo_ft.inference.engine import Engine

    def generate(role: str, probe: Exchange) -> Sequence[Generation]:
        # Each call makes a new engine, because an engine keeps the features of the probe's images.
        engine = Engine(model, row_builder, Path("/"), PROBE_TOKENS)
        with ExitStack() as stack:
            if role == BASE and engine.adapted:
                stack.enter_context(model.disable_adapter())
            return engine.generate(ROLES[0] if role == BASE else role, [probe])[0]

    return generate


def served_backend(
    server: Server, call: Callable[[Coroutine[Any, Any, list[Generation]]], list[Generation]], base_model: str
) -> ProbeBackend:
    """Return the backend of a server; `call` runs its coroutines, and `base_model` is the base model's name there."""

    def generate(role: str, probe: Exchange) -> Sequence[Generation]:
        return call(server.answer_probe(base_model if role == BASE else role, probe, PROBE_TOKENS))

    return generate


def record_probe(model: Any, row_builder: RowBuilder, roles: Sequence[str], dtype: str) -> ProbeRecord:
    """Record the answers of a model with adapters named after the `roles`. The model is unchanged afterwards."""
    backend = local_backend(model, row_builder)
    with make_probe() as probe:
        answers = {name: answer_probe(backend, name, probe) for name in (BASE, *roles)}
        for role in roles:
            with scaled_adapter(model, role, 2, ""):
                answers[f"{role} {TWICE}"] = answer_probe(backend, role, probe)
            with scaled_adapter(model, role, 0, ".visual.") as scaled:
                if scaled:
                    answers[f"{role} {WITHOUT_VISION}"] = answer_probe(backend, role, probe)
        return ProbeRecord(probe_tokens(row_builder, probe), dtype, answers)


@contextmanager
def scaled_adapter(model: Any, role: str, factor: float, part: str) -> Iterator[int]:
    """Multiply an adapter's effect in the modules whose name contains `part`; yields the number of these modules."""
    from peft.tuners.lora.layer import LoraLayer

    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and role in module.scaling and part in name
    ]
    before = [layer.scaling[role] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[role] *= factor
        yield len(layers)
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[role] = scaling


def write_probe(record: ProbeRecord, folder: Path) -> None:
    """Write a record into the folder of the adapters."""
    write_json(folder / PROBE_FILE, asdict(record))


def read_probe(folder: Path) -> ProbeRecord | None:
    """Read the record in a folder of adapters; None if there is none, as in adapters that were not exported.

    Raises EchoError if it cannot be read.
    """
    path = folder / PROBE_FILE
    if not path.is_file():
        return None
    try:
        return from_dict(ProbeRecord, read_json_object(path))
    except (OSError, ValueError, TypeError) as error:
        raise EchoError(f"{path} cannot be read ({error}); export the bundle again") from error


def find_fault(role: str, answer: ProbeAnswer, record: ProbeRecord, base: Callable[[], ProbeAnswer | None]) -> str:
    """Return why a backend does not answer as the adapter of `role` did in the export; empty if it does.

    `base` asks the backend for the base model's answer, and returns None if it has no base model.
    """
    tolerance, trained = record.tolerance, record.answers[role]
    if answer.equals(trained, tolerance):
        return ""
    faults = {
        BASE: "it answers as the base model does, so the adapter is not loaded, is not active, or does not receive the "
        "requests; load it under the name of its role, with weights named after the model's modules",
        f"{role} {TWICE}": "its answers are those of the adapter with twice its effect, so it is applied twice or with "
        "a different lora_alpha; apply it once",
        f"{role} {WITHOUT_VISION}": "its answers are those of the adapter without its weights in the vision tower; "
        "start vLLM with --enable-tower-connector-lora, or serve the merged model",
        **{
            other: f"it answers as the {other} does, so two roles are swapped; load each adapter under the name of its "
            "role"
            for other in ROLES
            if other != role
        },
    }
    near = {
        name: answer.distance(record.answers[name]) or 0.0
        for name in faults
        if name in record.answers and answer.equals(record.answers[name], tolerance)
    }
    if near:
        return faults[min(near, key=lambda name: near[name])]
    # Another precision may change the answers by more than that, if the adapter changes them much more.
    if answer.equals(trained, ALLOWED_SHARE * record.effect(role)):
        return ""
    untuned, distance = base(), answer.distance(trained)
    if untuned is not None and not untuned.equals(record.answers[BASE], tolerance):
        return _base_fault(untuned, record)
    by = "" if distance is None else f" by {distance:.2g} nats"
    return (
        f"its answers differ from those of the trained adapter{by}, and are not the base model's; its scale "
        "(lora_alpha, r, use_rslora) or some of its weights differ, or the base model is a different one or quantized"
    )


def _base_fault(untuned: ProbeAnswer, record: ProbeRecord) -> str:
    """Return what is wrong with a base model that does not answer as in the export."""
    merged = [
        role for role in ROLES if role in record.answers and untuned.equals(record.answers[role], record.tolerance)
    ]
    if merged:
        return (
            f"the base model answers as the {merged[0]}, whose adapter is merged into it or always active; serve the "
            "base model without adapters in it"
        )
    distance = untuned.distance(record.answers[BASE])
    by = "" if distance is None else f", by {distance:.2g} nats"
    return (
        f"the base model itself does not answer as in the export{by}: it is quantized, has a precision other than "
        f"{record.dtype} or a different revision, or its chat template or image processing differs; use the base model "
        "and the processor that bundle.json names"
    )


def check_adapters(
    backend: ProbeBackend, roles: Sequence[str], record: ProbeRecord | None, where: str, row_builder: RowBuilder
) -> None:
    """Check before the first answer that the adapter of every role has an effect, and log the result.

    With the `record` of an export, the answers must be those of the trained adapters. Without it, they are only
    compared with the base model's. Messages refer to the backend as `where`. Raises BackendError if an adapter does not
    behave as it did in the export. A warning lists the adapters whose answers equal the base model's.
    """
    with make_probe() as probe:
        if record is not None and probe_tokens(row_builder, probe) != record.tokens:
            raise BackendError(
                f"{where}: the tokens of the probe differ from those in the export, so the tokenizer, the chat "
                "template or the pixel budget differs; use the processor of the bundle"
            )
        asked: list[ProbeAnswer | None] = []

        def base() -> ProbeAnswer | None:
            if not asked:
                try:
                    asked.append(answer_probe(backend, BASE, probe))
                except EchoError:  # a server may serve only the adapters
                    asked.append(None)
            return asked[0]

        silent: list[str] = []
        unknown: list[str] = []
        unseen: list[str] = []
        for role in roles:
            answer = answer_probe(backend, role, probe)
            if record is not None:
                fault = find_fault(role, answer, record, base)
                if fault:
                    raise BackendError(f"{where}: the {role} adapter does not behave as it did in training: {fault}")
                if answer.equals(record.answers[BASE], record.tolerance):
                    # Without probabilities, equal text hides an effect that the export has measured.
                    hidden = answer.distance(record.answers[BASE]) is None and record.effect(role) > record.tolerance
                    (unseen if hidden else silent).append(role)
            elif (untuned := base()) is None:
                unknown.append(role)
            elif answer.equals(untuned, 0.0):
                silent.append(role)
    if unseen:
        LOGGER.warning(
            f"{where}: without token probabilities, nothing shows that the adapters for {', '.join(unseen)} act: for "
            "the probe, they give the same outputs as the base model; serve with vLLM, or compare a run with the base "
            "model's"
        )
    _report(where, [role for role in roles if role not in unseen], silent, unknown, record is not None)


def _report(where: str, roles: Sequence[str], silent: Sequence[str], unknown: Sequence[str], recorded: bool) -> None:
    """Log which adapters of `roles` act, which do not, and which could not be compared."""
    acting = [role for role in roles if role not in silent and role not in unknown]
    if acting:
        equal = " and equal those of the trained adapter" if recorded else ""
        LOGGER.info(f"{where}: answers differ from the base model's{equal}: {', '.join(acting)}")
    if silent:
        LOGGER.warning(
            f"{where}: the base model gives the same answers to the probe as the adapters for {', '.join(silent)}: "
            "they have hardly any effect; train longer, or check that their weights are not zero"
        )
    if unknown:
        LOGGER.warning(
            f"{where}: there is no base model to compare with, so nothing shows that the adapters for "
            f"{', '.join(unknown)} act; pass the adapters of a bundle (python -m train.export), which has their answers"
        )
