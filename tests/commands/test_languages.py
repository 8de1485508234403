"""Names and text in any script can be built, converted and trained on; a build reports control tokens in them."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from data_prep.build import build
from data_prep.convert import convert
from data_prep.sources import SourceConfig, folder
from echo_ft.data.dataset import load_dataset
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl
from echo_ft.records import GOOD, Inspection, Question, Rejection
from tests.support.collected import collect
from tests.support.drawn_manifest import draw_part, edit_rows, make_config
from tests.support.training import run_in_process, tiny_options

PRODUCT, DENT, SCRATCH = "힘줄 Dübel", "Überhöhung 凹痕", "שריטה"
KNOWLEDGE = {
    GOOD: "圆环完整闭合。密封良好。",
    DENT: "Ein dunkler Fleck liegt auf dem Dübel. Öl tritt aus.",
    SCRATCH: "שריטה דקה עוברת על הטבעת. השמן דולף.",
}
SPLITS = ("train", "train", "validation", "test")


def in_form(form: str, text: str) -> str:
    return unicodedata.normalize(form, text)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Images whose file names use decomposed Unicode, and a manifest that uses composed Unicode in every second row."""
    rows = []
    for condition in (GOOD, DENT, SCRATCH):
        for number, split in enumerate(SPLITS):
            form = ("NFC", "NFD")[number % 2]
            name = f"{PRODUCT}/{condition}-{number}.png"
            draw_part(tmp_path / "Bilder" / in_form("NFD", name), len(rows), condition != GOOD)
            row = {"image": name, "product": PRODUCT, "condition": condition, "group": f"Teil ü{number}-{condition}"}
            row = {key: in_form(form, text) for key, text in row.items()} | {"split": split}
            rows.append(row | ({"mask": row["image"].replace(".png", "_mask.png")} if condition != GOOD else {}))
    path = tmp_path / "Bilder" / "부품.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "Wissen.json").write_text(json.dumps({"부품": {in_form("NFD", PRODUCT): KNOWLEDGE}}), encoding="utf-8")
    return path


def test_names_in_any_script_and_form_build_convert_and_train(raw: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "Datensätze [신규]"
    manifest = build(make_config(raw, output, knowledge=tmp_path / "Wissen.json", split="given"))
    assert not list(read_jsonl(output / "rejected.jsonl", Rejection))
    assert not [text for text in manifest["warnings"] if "spelling" in text or "knowledge" in text or "conseq" in text]
    inspections = list(read_jsonl(output / "inspections.jsonl", Inspection))
    assert {(i.product, i.condition) for i in inspections} == {(PRODUCT, c) for c in KNOWLEDGE}
    assert all(i.image == in_form("NFD", i.image) for i in inspections), "paths are those on disk"
    assert all(i.group == in_form("NFC", i.group) for i in inspections)
    assert all(i.mask for i in inspections if i.condition != GOOD)
    questions = list(read_jsonl(output / "questions.jsonl", Question))
    kinds = {q.kind: q for q in questions if DENT in in_form("NFC", q.inspection)}
    assert kinds["Defect Description"].options[str(kinds["Defect Description"].answer)].endswith("auf dem Dübel.")
    assert kinds["Defect Analysis"].options[str(kinds["Defect Analysis"].answer)] == "Öl tritt aus."
    assert sum(convert(load_dataset(output), "ms_swift", tmp_path / "행").values()) > 0
    recipe = tiny_options("decision_maker", output, tmp_path / "실행", "--dry_run", "--per_device_train_batch_size", 1)
    run_in_process(*recipe)
    assert "0 rows rejected" in capsys.readouterr().out


def test_a_control_token_in_knowledge_stops_the_build_and_a_tag_stops_only_the_conversion(
    raw: Path, tmp_path: Path
) -> None:
    knowledge = tmp_path / "Wissen.json"
    config = make_config(raw, tmp_path / "out", knowledge=knowledge, split="given")
    text = knowledge.read_text()
    knowledge.write_text(text.replace("Ein dunkler", "Ein <|im_end|> dunkler"))
    with pytest.raises(EchoError, match=r"Wissen\.json: 부품/.*contains <\|im_end\|>"):
        build(config)
    assert not (tmp_path / "out").exists()
    knowledge.write_text(text.replace("Ein dunkler", "Ein <image> dunkler"))
    manifest = build(config)
    (warning,) = [one for one in manifest["warnings"] if "LLaMA-Factory" in one]
    assert f"부품/{PRODUCT}/{DENT} (<image>)" in warning
    assert sum(convert(load_dataset(tmp_path / "out"), "trl", tmp_path / "trl").values()) > 0
    for form in ("llamafactory", "ms_swift"):
        with pytest.raises(EchoError, match=r"Ein <image> dunkler.*contains <image>.*or convert to trl"):
            convert(load_dataset(tmp_path / "out"), form, tmp_path / form)


@pytest.mark.parametrize(
    ("field", "name", "reason"),
    [
        ("product", "cap <|vision_start|>", "contains <|vision_start|>, a control token"),
        ("condition", "<|im_start|>", "contains <|im_start|>, a control token"),
        ("condition", "dent \ud800", "an unpaired surrogate"),
        ("group", "\udcff", "an unpaired surrogate"),
    ],
)
def test_an_image_whose_name_no_model_can_be_shown_is_rejected(
    small_manifest: Path, tmp_path, field, name, reason
) -> None:
    def rename(row: dict) -> None:
        if row["image"] == "cap/dent-0-1.png":
            row[field] = name

    edit_rows(small_manifest, rename)
    build(make_config(small_manifest, tmp_path / "out"))
    (rejected,) = read_jsonl(tmp_path / "out" / "rejected.jsonl", Rejection)
    assert rejected.item in ("cap/dent-0-1.png", "parts.jsonl:13")
    assert reason in rejected.reason


@pytest.mark.parametrize(("images", "masks"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_folders_and_masks_in_two_forms_belong_together(tmp_path: Path, images: str, masks: str) -> None:
    product = tmp_path / in_form(images, "Dübel")
    for number, name in enumerate(("Öse", "größe")):
        draw_part(product / "test" / in_form(images, "Überhöhung") / in_form(images, f"{name}.png"), number, True)
        drawn = product / "test" / in_form(images, "Überhöhung") / in_form(images, f"{name}_mask.png")
        place = "Öse_mask.png" if name == "Öse" else "größe/1.png"
        moved = product / "ground_truth" / in_form(masks, "Überhöhung") / in_form(masks, place)
        moved.parent.mkdir(parents=True, exist_ok=True)
        drawn.rename(moved)
    inspections, _, rejections = collect(folder.read(SourceConfig(tmp_path)), tmp_path)
    assert rejections == []
    assert {(i.product, i.condition) for i in inspections} == {("Dübel", "Überhöhung")}
    assert [i.mask and in_form("NFC", i.mask) for i in sorted(inspections, key=lambda one: in_form("NFC", one.id))] == [
        "Dübel/ground_truth/Überhöhung/größe/1.png",
        "Dübel/ground_truth/Überhöhung/Öse_mask.png",
    ]


def test_a_question_of_the_source_with_a_control_token_is_rejected(tmp_path: Path) -> None:
    draw_part(tmp_path / "a.png", 0)
    options = {"A": "Yes.", "B": "No <|endoftext|>."}
    questions = [
        Question("a#0", "a", "Anomaly Detection", "Is it <image>?", {"A": "Yes.", "B": "No."}, "A"),
        Question("a#1", "a", "Anomaly Detection", "Is it?", options, "A"),
        Question("a#2", "a", "Anomaly Detection", "Is it <|image_pad|>?", {"A": "Yes.", "B": "No."}, "A"),
    ]
    _, usable, rejections = collect([Inspection("a", "a.png", "d", "cap", GOOD, "a"), *questions], tmp_path)
    assert usable == questions[:1]
    assert [(one.item, one.reason.split(",")[0]) for one in rejections] == [
        ("a#1", "it contains <|endoftext|>"),
        ("a#2", "it contains <|image_pad|>"),
    ]
