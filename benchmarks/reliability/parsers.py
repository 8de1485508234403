"""Every parser of text from outside, as a function that takes bytes, with valid examples for a fuzzer to change."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai
from openai._models import construct_type
from openai.types.chat import ChatCompletion
from PIL import Image
from transformers import HfArgumentParser  # noqa: F401  # otherwise the first config would import it, for seconds

from data_prep.config import BuildConfig
from data_prep.sources import SourceConfig, manifest
from echo_ft import config as configs
from echo_ft.data.knowledge import load_knowledge
from echo_ft.errors import EchoError
from echo_ft.experts.roles import parse_best, parse_letter
from echo_ft.files import read_jsonl
from echo_ft.images.boxes import format_boxes, parse_boxes
from echo_ft.inference.replies import read_completion
from echo_ft.metrics.answer_files.robustmad import guess_letter, parse_cut_letter
from echo_ft.metrics.loading import load_answers
from echo_ft.records import Branch, Exchange, Inspection, Prediction, Question, Reference

OPTIONS = {"A": "Crack.", "B": "Dent.", "C": "No.", "D": "A long text, with a comma."}


@dataclass(frozen=True)
class Parser:
    """A parser, and what a fuzzer needs to know about it."""

    read: Callable[[bytes, Path], object]
    """Parses the bytes. It may write files to the folder, which holds an image a.png of 48 x 32 pixels."""
    examples: tuple[bytes, ...]
    """Valid inputs."""
    refusals: tuple[type[Exception], ...] = (EchoError,)
    """What it may raise for an invalid input. Everything else is a bug."""


def prepare_folder(folder: Path) -> Path:
    """Draw the image that the examples describe, and return the folder."""
    Image.new("RGB", (48, 32), "grey").save(folder / "a.png")
    return folder


RECORDS: tuple[Any, ...] = (
    Inspection("1", "a.png", "d", "p", "dent", "1", "test", boxes=((1.0, 2.0, 3.0, 4.0),), polygons=((1.0, 2.0) * 3,)),
    Reference("1", "a.png", 0.5, 1),
    Question("1#q", "1", "Anomaly Detection", "Is there a defect?", {"A": "Yes.", "B": "No."}, "A"),
    Exchange("decision_maker", "1", ("a.png",), "context", (Branch("1#q", "prompt", "A"),), "1"),
    Prediction(
        case="1", question="1#q", dataset="d", product="p", group="1", image="a.png", condition="dent",
        kind="Anomaly Detection", question_text="?", options={"A": "Yes.", "B": "No."}, answer="A", text="A",
        parsed="A", probabilities={"A": 0.75, "B": 0.25}, error=None,
    ),
)  # fmt: skip


def _records(content: bytes, folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    errors = []
    for record in RECORDS:
        try:
            list(read_jsonl(path, type(record)))
        except EchoError as error:
            errors.append(error)
    if len(errors) == len(RECORDS):
        raise errors[0]


def _source(name: str, annotations: bool = True) -> Callable[[bytes, Path], None]:
    def read(content: bytes, folder: Path) -> None:
        (folder / name).write_bytes(content)
        list(manifest.read(SourceConfig(folder, folder / name if annotations else None)))

    return read


def _config(content: bytes, folder: Path) -> None:
    path = folder / "c.yaml"
    path.write_bytes(content)
    configs.parse([BuildConfig], ["--config", str(path)])


def _knowledge(name: str) -> Callable[[bytes, Path], None]:
    def read(content: bytes, folder: Path) -> None:
        (folder / name).write_bytes(content)
        load_knowledge(folder / name)

    return read


def _answers(content: bytes, folder: Path) -> None:
    path = folder / "answers.json"
    path.write_bytes(content)
    load_answers(path)


def _letters(content: bytes, folder: Path) -> None:
    text = content.decode(errors="replace")
    for found in (parse_letter(text, OPTIONS), parse_cut_letter(text, OPTIONS)):
        assert found is None or found in OPTIONS
    assert (best := parse_best(text, 3)) is None or 0 <= best < 3
    guess_letter(text)


def _boxes(content: bytes, folder: Path) -> None:
    boxes = parse_boxes(content.decode(errors="replace"))
    if boxes is not None:
        assert parse_boxes(format_boxes(boxes)) == boxes
        assert all(0 <= x0 < x1 <= 1000 and 0 <= y0 < y1 <= 1000 for x0, y0, x1, y1 in boxes)


def _reply(content: bytes, folder: Path) -> None:
    found = read_completion(construct_type(value=json.loads(content), type_=ChatCompletion))
    assert all(logprob <= 1 and logprob == logprob for logprob in found.letters.values())
    found.text.encode()


REPLY_ERRORS = (openai.APIError, AttributeError, IndexError, TypeError, ValueError, RecursionError)
"""The errors by which `Server` recognises an unusable reply."""


def _json(*values: Any) -> tuple[bytes, ...]:
    return tuple(json.dumps(value).encode() for value in values)


_ROW = {"image": "a.png", "product": "cap", "condition": "dent", "mask": None, "boxes": [[1, 2, 9, 8]], "group": "1"}
_COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 48, "height": 32}],
    "annotations": [
        {"image_id": 1, "category_id": 1, "bbox": [4, 6, 8, 4]},
        {"image_id": 1, "category_id": 1, "bbox": [4, 6, 8, 4], "segmentation": [[1, 2, 9, 2, 9, 8]]},
    ],
    "categories": [{"id": 1, "name": "dent"}],
}
_LABELME = {
    "imagePath": "a.png", "imageWidth": 48, "imageHeight": 32, "flags": {"good": False, "dent": True},
    "shapes": [
        {"label": "dent", "shape_type": "polygon", "points": [[1, 1], [5, 5], [1, 5]]},
        {"label": "dent", "shape_type": "circle", "points": [[9, 9], [5, 5]]},
        {"label": "dent", "shape_type": "rectangle", "points": [[9, 9], [5, 5]]},
    ],
}  # fmt: skip
_TASKS = [
    {
        "data": {"image": "/data/local-files/?d=a.png", "product": "cap"},
        "annotations": [
            {
                "result": [
                    {
                        "type": "rectanglelabels", "original_width": 48, "original_height": 32,
                        "value": {"x": 10, "y": 10, "width": 20, "height": 20, "rectanglelabels": ["dent"]},
                    },
                    {"type": "choices", "value": {"choices": ["dent"]}},
                ]
            }
        ],
    }
]  # fmt: skip
_MMAD = [
    {
        "image": "DS/p/test/bad/000.png", "question_type": "Anomaly Detection", "question": "?",
        "options": {"A": "Yes", "B": "No"}, "correct_answer": "A", "gpt_answer": "A",
    }
]  # fmt: skip
_LINE = {
    "image": "a.png", "kind": "Anomaly Detection", "question": "?", "options": {"A": "Yes", "B": "No"}, "answer": "A",
    "text": "A", "condition": "dent", "probabilities": {"A": 0.7, "B": 0.3},
}  # fmt: skip
_LIKELY = [{"token": "A", "logprob": -0.1, "bytes": [65], "top_logprobs": [{"token": "A", "logprob": -0.1}]}]
_REPLY = {
    "id": "1", "object": "chat.completion", "created": 1, "model": "m", "usage": {"prompt_tokens": 7},
    "choices": [
        {
            "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "A"},
            "logprobs": {"content": _LIKELY},
        }
    ],
}  # fmt: skip

PARSERS = {
    "records": Parser(_records, _json(*map(asdict, RECORDS))),
    "csv": Parser(
        _source("parts.csv"),
        (
            b"image,product,condition,boxes,group,split\n"
            b'a.png,cap,dent,"[[1, 2, 9, 8]]",1,test\na.png,cap,dent,,1,test\n',
            b"sep=;\nimage;product;condition\na.png;cap;dent\n",
        ),
    ),
    "jsonl": Parser(_source("parts.jsonl"), _json(_ROW)),
    "coco": Parser(_source("c.json"), _json(_COCO)),
    "labelstudio": Parser(_source("c.json"), _json(_TASKS)),
    "labelme": Parser(_source("a.json", annotations=False), _json(_LABELME)),
    "knowledge": Parser(
        _knowledge("k.yaml"),
        (
            b"parts:\n  cap:\n    good: An even surface.\n    dent: &d A dark spot. It weakens.\n    crack: *d\n",
            b"parts:\n  cap:\n    good: 'Even.'\n    dent: |\n      A dark spot.\n    'bent': >-\n      Bent.\n",
        ),
    ),
    "knowledge-json": Parser(_knowledge("k.json"), _json({"parts": {"cap": {"good": "Even.", "dent": "Dark."}}})),
    "configs": Parser(
        _config,
        (
            b"source: synthetic\noutput: x\ndescriptor: skimage\nk: 3\nparts: 8\nfractions: [0.6, 0.1, 0.3]\nseed: 0\n",
            b"source: manifest\noutput: x\nannotations: a.csv\nrouting: paper\noverwrite: true\ngood: [ok, fine]\n",
        ),
    ),
    "answers": Parser(_answers, (*_json(_MMAD, _LINE), b"\n".join(_json(_LINE, {**_LINE, "question": "!"})))),
    "letters": Parser(_letters, (b"B. Dent.", b"(A)", b"D", b" A \n", b"The answer is B.", b"Best: 2.", b"C: No.")),
    "boxes": Parser(
        _boxes,
        (b"none.", b"<|box_start|>(1,2),(30,400)<|box_end|><|box_start|>(1,2),(3,1000)<|box_end|>", b"(1,2),(3,4)"),
    ),
    "replies": Parser(_reply, _json(_REPLY), REPLY_ERRORS),
}
"""The parsers by name."""
