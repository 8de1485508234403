"""Shared fixtures and helpers: echo-tiny, drawn images, cases and small datasets."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from echo_ft.records import Case, Entry, Question, Reference, Seen, Truth

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a background job; tests of Ctrl-C would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the test workers share the cores

ROOT = Path(__file__).resolve().parent.parent
ECHO_TINY = Path(os.environ.get("ECHO_TINY", ROOT / "recipes" / "tiny" / "echo-tiny"))
MIN_PIXELS, MAX_PIXELS = 28 * 28, 112 * 112
ROUNDING = 2e-4
"""What float32 rounding may change in a logit of echo-tiny if its sums have another order. Its attention starts from
large logits, which amplify rounding."""


@pytest.fixture(scope="session", autouse=True)
def _terminal():
    """Show the library's log records on stdout and stderr, as a command does."""
    from echo_ft.terminal import log_to_terminal

    log_to_terminal()


@pytest.fixture(scope="session")
def row_builder():
    from echo_ft.model.loading import load_processor
    from echo_ft.model.rows import RowBuilder

    return RowBuilder(load_processor(str(ECHO_TINY), None, MIN_PIXELS, MAX_PIXELS))


@pytest.fixture(scope="session")
def model():
    from echo_ft.model.loading import load_model

    return load_model(str(ECHO_TINY), dtype="float32").eval()


def draw(path: Path, size: tuple[int, int], seed: int) -> str:
    """Write a noise image of (width, height) to `path` and return the file name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path.name


def make_case(root: Path, name: str = "line/part/1", sizes=((100, 70), (64, 64), (90, 120)), seed: int = 0) -> Case:
    """Make a case with two references and seven questions, and draw its images under `root`."""
    stem = name.replace("/", "_")
    images = [draw(root / f"{stem}_{index}.png", size, seed + index) for index, size in enumerate(sizes)]
    yes_no, four = {"A": "Yes.", "B": "No."}, {"A": "Scratch.", "B": "Dent.", "C": "Stain.", "D": "Chip."}
    kinds: dict[str, tuple[str, dict[str, str], str]] = {
        "Anomaly Detection": ("Is there any defect in the object?", yes_no, "A"),
        "Defect Classification": ("There is a defect in the object. What is the type of the defect?", four, "C"),
        "Defect Localization": (
            "There is a defect in the object. Where is the defect?",
            {"A": "Top left.", "B": "Center."},
            "B",
        ),
        "Defect Description": (
            "There is a defect in the object. What is its appearance?",
            {"A": "A dark spot.", "B": "A thin line."},
            "A",
        ),
        "Defect Analysis": (
            "There is a defect in the object. What is its effect?",
            {"A": "It closes a hole.", "B": "It weakens the coating."},
            "B",
        ),
        "Object Classification": ("What is the object in the image?", {"A": "Washer.", "B": "Bracket."}, "A"),
        "Object Analysis": ("What is normal here?", {"A": "An even surface.", "B": "A red dot.", "C": "A hole."}, "A"),
    }
    questions = tuple(
        Question(f"{name}#{kind}", name, kind, text, options) for kind, (text, options, _) in kinds.items()
    )
    return Case(
        id=name,
        dataset="line",
        product="washer",
        group=name,
        seen=Seen(
            query=images[-1],
            references=tuple(
                Reference(name, image, 0.9 - 0.1 * index, index + 1) for index, image in enumerate(images[:-1])
            ),
            knowledge=(Entry("good", "An even surface."), Entry("stain", "A dark spot. It weakens the coating.")),
            questions=questions,
        ),
        truth=Truth("stain", None, (), {q.id: kinds[q.kind][2] for q in questions}),
    )


@pytest.fixture
def case(tmp_path) -> Case:
    return make_case(tmp_path)


def make_dataset(folder: Path, train: int = 8, validation: int = 2, test: int = 3) -> Path:
    """Write a dataset folder as data_prep.build does, with drawn cases and training rows for all roles."""
    import hashlib
    import json

    from echo_ft.data.dataset import DATASET_FORMAT, DIGESTS, images_fingerprint
    from echo_ft.experts.roles import PROMPT_VERSION
    from echo_ft.experts.targets import training_exchanges
    from echo_ft.files import write_jsonl
    from echo_ft.records import ROLES, Inspection

    counts = {"train": train, "validation": validation, "test": test}
    cases = {
        split: [make_case(folder / "images", f"{split}/{index}", seed=31 * index) for index in range(count)]
        for split, count in counts.items()
    }
    write_jsonl(
        folder / "inspections.jsonl",
        (Inspection(c.id, c.seen.query, "line", "washer", "stain", c.id, s) for s, cs in cases.items() for c in cs),
    )
    all_cases = [case for split in cases.values() for case in split]
    write_jsonl(folder / "references.jsonl", (reference for case in all_cases for reference in case.seen.references))
    write_jsonl(
        folder / "questions.jsonl",
        (dataclasses.replace(q, answer=case.truth.answers[q.id]) for case in all_cases for q in case.seen.questions),
    )
    knowledge = {entry.condition: entry.description for entry in all_cases[0].seen.knowledge}
    (folder / "knowledge.json").write_text(json.dumps({"line": {"washer": knowledge}}))
    for role in ROLES:
        for split in ("train", "validation"):
            write_jsonl(
                folder / "sft" / role / f"{split}.jsonl",
                (row for case in cases[split] for row in training_exchanges(case, role, folder / "images", "full")),
            )
    manifest: dict[str, object] = {"format": DATASET_FORMAT, "root": "images", "fingerprint": "0123456789abcdef"}
    manifest |= {"config": {"routing": "full", "k": 2}, "prompt_version": PROMPT_VERSION}
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "images").iterdir()}
    (folder / DIGESTS).write_text(json.dumps(digests))
    manifest["images_fingerprint"] = images_fingerprint(digests)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def random_adapters(
    folder: Path,
    dataset: Path,
    targets: dict[str, list[str]] | None = None,
    adapt_from: dict[str, str] | None = None,
) -> Path:
    """Write four random adapters of echo-tiny as train/sft.py does.

    `targets` maps a role to its target modules, and `adapt_from` to where its adapter begins to act.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from echo_ft.data.dataset import load_dataset
    from echo_ft.model.adapters import make_card, write_card
    from echo_ft.model.loading import load_model, load_processor
    from echo_ft.model.rows import RowBuilder
    from echo_ft.records import ROLES

    budget = MIN_PIXELS, MAX_PIXELS
    prompt = RowBuilder(load_processor(str(ECHO_TINY), None, *budget)).generation_prompt
    for seed, role in enumerate(ROLES):
        torch.manual_seed(seed)
        modules = targets[role] if targets else ["q_proj", "v_proj"]
        config = LoraConfig(r=4, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(load_model(str(ECHO_TINY), dtype="float32"), config).save_pretrained(folder / role)
        start = (adapt_from or {}).get(role, "prefix")
        acts = {"adapt_from": start, "invocation_tokens": prompt if start == "answer" else ()}
        write_card(folder / role, make_card(role, str(ECHO_TINY), None, *budget, load_dataset(dataset), **acts))
    return folder


@pytest.fixture
def small_manifest(tmp_path: Path) -> Path:
    """A manifest of 24 images of one product, for a test to change."""
    from tests.support.drawn_manifest import draw_manifest

    return draw_manifest(tmp_path / "raw", ("cap",), normals=6, defects=3)
