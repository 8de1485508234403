"""Domain knowledge loads from JSON and YAML, and `data_prep.knowledge` writes, completes and checks it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_prep.build import main as build
from data_prep.knowledge import check_knowledge, count_images, coverage_summary, main, write_template
from echo_ft.data.dataset import Dataset, load_dataset
from echo_ft.data.knowledge import (
    appearance,
    brief,
    effect,
    entries_for,
    has_description,
    likely_misspellings,
    load_knowledge,
    products_of,
    read_knowledge,
)
from echo_ft.data.splits import readable_name
from echo_ft.errors import EchoError
from echo_ft.files import write_jsonl
from echo_ft.records import Entry, Inspection
from tests.conftest import ROOT

MMAD = (
    " <Broken Teeth>\n Description: The defect is a row of missing teeth. \n It is often near the middle. "
    "This compromises the closing."
)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_json_and_yaml_give_the_same_entries(tmp_path: Path) -> None:
    json = write(tmp_path / "k.json", '{"mine": {"bolt": {"good": "Even thread.", "rust": "Brown spots."}}}')
    yaml = write(
        tmp_path / "k.yaml", "mine:\n  bolt:\n    rust: Brown spots.\n    good: >\n      Even\n      thread.\n"
    )
    expected = (Entry("good", "Even thread."), Entry("rust", "Brown spots.")), True
    for path in (json, yaml):
        assert entries_for(load_knowledge(path), "mine", "bolt", ["rust", "good"]) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("k.json", "{", r"k\.json cannot be read"),
        ("k.yaml", "a: [", r"k\.yaml cannot be read"),
        ("k.yaml", "just words", r"k\.yaml is a string, not a mapping of datasets"),
        ("k.yaml", "mine: [bolt]", r"k\.yaml: mine is a list, not a mapping of products"),
        ("k.yaml", "mine:\n  bolt: even", r"k\.yaml: mine/bolt is a string, not a mapping of conditions"),
        ("k.yaml", "mine:\n  bolt:\n    good:", r"mine/bolt/good is empty"),
        ("k.yaml", "mine:\n  bolt:\n    good: 3", r"mine/bolt/good is 3"),
        ("k.yaml", "mine:\n  bolt:\n    no: text", r"the key False, which YAML does not read as a string; quote it"),
        ("k.yaml", "mine:\n  bolt:\n    dent: A.\n    dent: B.", r"duplicate key 'dent'.* line 4"),
        ("k.json", '{"m": {"b": {"good": "A."}, "b": {"dent": "B."}}}', r"duplicate key 'b'"),
        ("k.yaml", "mine:\n  {bolt}:\n    dent: A.", r"a key is a list or a mapping; quote .* line 2"),
        ("k.yaml", "[mine]:\n  bolt:\n    dent: A.", r"a key is a list or a mapping; quote .* line 1"),
    ],
)
def test_malformed_files_are_reported_with_their_key(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(EchoError, match=message) as raised:
        load_knowledge(write(tmp_path / name, text))
    assert "\n" not in str(raised.value)


def test_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(EchoError, match=r"no knowledge file .*nowhere\.yaml"):
        load_knowledge(tmp_path / "nowhere.yaml")


def test_mmad_descriptions_become_plain_text() -> None:
    entries, known = entries_for({"MVTec": {"zipper": {"broken_teeth": MMAD}}}, "DS-MVTec", "zipper", ["broken_teeth"])
    text = "The defect is a row of missing teeth. It is often near the middle. This compromises the closing."
    assert entries == (Entry("broken_teeth", text),)
    assert known
    assert appearance(text) == "The defect is a row of missing teeth."
    assert effect(text) == "This compromises the closing."


def test_entries_start_with_good_and_include_the_whole_product() -> None:
    knowledge = {"d": {"p": {"crack": "A line.", "good": "Even.", "unseen": "Not in any image."}}}
    entries, known = entries_for(knowledge, "d", "p", ["good", "crack", "new_kind"])
    assert [entry.condition for entry in entries] == ["good", "crack", "new_kind", "unseen"]
    assert known
    assert entries[2].description == "new kind"
    assert not has_description(entries[2])
    assert has_description(entries[1])


def test_product_without_knowledge_gets_condition_names() -> None:
    entries, known = entries_for({"d": {"p": {"good": "Even."}}}, "d", "q", ["broken_large", "good"])
    assert entries == (Entry("good", "free of defects"), Entry("broken_large", "broken large"))
    assert not known
    assert not any(map(has_description, entries))


def test_misspelt_entries_point_to_conditions_without_an_entry() -> None:
    known = {
        "god": "Even.",
        "dnet": "A hollow.",
        "stain": "A blot.",
        "stains": "Blots.",
        "melted": "Not in any image.",
    }
    assert likely_misspellings(known, ["good", "dent", "stain", "crack"]) == {"god": "good", "dnet": "dent"}
    assert likely_misspellings({"dnet": "A hollow.", "dent": "A hollow."}, ["dent"]) == {}


def test_products_are_found_under_mmads_dataset_name() -> None:
    knowledge = {"MVTec": {"zipper": {"good": "Even."}}}
    assert products_of(knowledge, "MVTec-AD") == products_of(knowledge, "MVTec") == knowledge["MVTec"]
    assert products_of(knowledge, "VisA") == {}


def test_effect_of_a_long_text_must_name_a_consequence() -> None:
    assert effect("A dark line.") is None
    assert effect("A dark line. The tile snaps.") == "The tile snaps."
    assert effect("A dark line. It is thin. Common places are the edges.") is None
    assert effect("A dark line. It is thin. The tile may fail under load.") == "The tile may fail under load."


def test_brief_keeps_short_texts_and_shortens_long_ones() -> None:
    short = "Even thread. Nothing else. At all."
    assert brief(short) == short
    middle = "It has " + "many details and " * 20 + "more."
    assert brief(f"A thread. {middle} This affects the grip.") == "A thread. This affects the grip."
    assert brief(f"A thread. {middle} Seen from above.") == "A thread."


def test_readable_names_have_spaces() -> None:
    assert readable_name("broken_large") == "broken large"
    assert readable_name("cut-lead") == "cut lead"


@pytest.mark.real_data
def test_real_mmad_file_loads_without_markup() -> None:
    folder = Path(os.environ.get("ECHO_FT_DATA", "../shared/data"))
    path = folder / "mmad" / "domain_knowledge.json"
    if not path.is_file():
        pytest.skip(f"no {path}; set ECHO_FT_DATA to the data folder")
    knowledge = load_knowledge(path)
    for dataset, products in knowledge.items():
        for product, conditions in products.items():
            entries, known = entries_for(knowledge, dataset, product, list(conditions))
            assert known
            assert entries[0].condition == "good"
            assert len(entries) == len(conditions)
            for entry in entries:
                assert not entry.description.startswith("<")
                assert "Description:" not in entry.description[:20]
                assert len(brief(entry.description).split()) <= 130


def test_folder_counts_as_one_file(tmp_path: Path) -> None:
    write(tmp_path / "a" / "bolt.yaml", "mine:\n  bolt:\n    good: Even thread.\n")
    write(tmp_path / "a" / "deep" / "nut.json", '{"mine": {"nut": {"good": "Six even sides."}}}')
    write(tmp_path / "a" / ".bolt.yaml.swp.yaml", "not: finished")
    write(tmp_path / "a" / "notes.txt", "none")
    expected = {"mine": {"bolt": {"good": "Even thread."}, "nut": {"good": "Six even sides."}}}
    assert load_knowledge(tmp_path / "a") == expected
    assert load_knowledge(write(tmp_path / "one.json", json.dumps(expected))) == expected


def test_folder_without_or_with_duplicate_knowledge_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(EchoError, match="contains no knowledge"):
        load_knowledge(tmp_path)
    for name in ("a.yaml", "b.yaml"):
        write(tmp_path / name, "mine:\n  bolt:\n    good: Even thread.\n")
    with pytest.raises(EchoError, match=r"a\.yaml and .*b\.yaml both describe mine/bolt"):
        load_knowledge(tmp_path)


def built_dataset(folder: Path, knowledge: dict[str, dict[str, dict[str, str]]] | None = None, *more: str) -> Dataset:
    """The parts of a two-product dataset that concern knowledge: the records of images, and knowledge.json."""
    shown = ["d/cap/good", "d/cap/good", "d/cap/no", "d/cap/dent", "d/nut: 5/good", "d/nut: 5/crack", *more]
    inspections = []
    for number, place in enumerate(shown):
        dataset, product, condition = place.split("/")
        inspections.append(Inspection(str(number), "x.png", dataset, product, condition, str(number)))
    write_jsonl(folder / "inspections.jsonl", inspections)
    names = {place.split("/")[2]: readable_name(place.split("/")[2]) for place in shown if "/cap/" in place}
    given = knowledge or {"d": {"cap": names, "nut: 5": {"good": "Six even sides. It holds.", "crack": "crack"}}}
    write(folder / "knowledge.json", json.dumps(given))
    return Dataset(folder, folder, {})


def test_template_lists_all_conditions_and_known_descriptions(tmp_path: Path) -> None:
    write_template(built_dataset(tmp_path / "dataset"), tmp_path / "k")
    texts, files = read_knowledge(tmp_path / "k")
    assert list(texts["d"]["cap"].items()) == [("good", ""), ("dent", ""), ("no", "")]
    assert texts["d"]["nut: 5"] == {"good": "Six even sides. It holds.", "crack": ""}
    assert files == {
        ("d", "cap"): tmp_path / "k" / "d" / "cap.yaml",
        ("d", "nut: 5"): tmp_path / "k" / "d" / "nut_5.yaml",
    }
    page = (tmp_path / "k" / "d" / "cap.yaml").read_text()
    assert "    # 2 images\n    good:\n    # 1 image\n    dent:\n" in page
    assert "first sentence" in page
    assert "last" in page
    with pytest.raises(EchoError, match=r"cap\.yaml: d/cap/good is empty, and so are 3 more; describe what"):
        load_knowledge(tmp_path / "k")


def test_products_with_similar_names_get_separate_files(tmp_path: Path) -> None:
    write_template(built_dataset(tmp_path / "dataset", None, "d/nut. 5/good"), tmp_path / "k")
    assert {file.name for file in read_knowledge(tmp_path / "k")[1].values()} == {
        "cap.yaml",
        "nut_5.yaml",
        "nut_5_2.yaml",
    }


EXISTING_FILE = """\
# my notes
d:   # the line
  # caps, old drawing
  cap:
    good: The rim is even. It seals.   # checked by Ada
    dent: >
      A hollow in the rim,
      seen from the side. It leaks.

  # nuts have their own page
  washer: {good: A flat ring. It spreads the load.}
"""


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_existing_file_keeps_every_line_and_is_completed(tmp_path: Path, ending: str) -> None:
    text = EXISTING_FILE.rstrip("\n") + ending if ending != "\r\n" else EXISTING_FILE.replace("\n", ending)
    mine = tmp_path / "k" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_bytes(text.encode())
    before = yaml.safe_load(text)
    write_template(built_dataset(tmp_path / "dataset"), tmp_path / "k")
    after = mine.read_bytes().decode()
    added = [line for line in after.splitlines() if line not in text.splitlines()]
    assert added == ["    # 1 image", "    'no':"]
    assert after.index("'no':") < after.index("# nuts")
    assert [line for line in after.splitlines() if line not in added] == text.splitlines()
    assert yaml.safe_load(after) == {"d": {**before["d"], "cap": {**before["d"]["cap"], "no": None}}}
    assert read_knowledge(tmp_path / "k")[1]["d", "nut: 5"].name == "nut_5.yaml"
    write_template(built_dataset(tmp_path / "dataset"), tmp_path / "k")
    assert mine.read_bytes().decode() == after


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mine.yaml", "d: {cap: {good: The rim is even. It seals.}}\n"),
        ("mine.yaml", "d:\n  cap: {}\n"),
        ("mine.yaml", "x:\n  cap: &cap\n    good: The rim is even.\nd:\n  cap: *cap\n"),
        ("mine.json", '{"d": {"cap": {\n"good": "The rim is even. It seals."\n}}}'),
    ],
)
def test_file_that_cannot_be_completed_is_left_unchanged(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path / "k" / name, text)
    with pytest.raises(EchoError, match=rf"{name} cannot be extended .*; add .*dent, no to d/cap"):
        write_template(built_dataset(tmp_path / "dataset"), tmp_path / "k")
    assert [path.name for path in (tmp_path / "k").rglob("*")] == [name]
    assert (tmp_path / "k" / name).read_text() == text


def test_misspelt_condition_is_not_added_again(tmp_path: Path) -> None:
    text = "d:\n  cap:\n    good: The rim is even. It seals.\n    dnet: A hollow. It leaks.\n    'no': No cap at all.\n"
    write(tmp_path / "k" / "cap.yaml", text)
    report = write_template(built_dataset(tmp_path / "dataset"), tmp_path / "k")
    assert any("'dnet' is kept; did you mean 'dent'?" in line for line in report)
    assert (tmp_path / "k" / "cap.yaml").read_text() == text


COMPLETE_KNOWLEDGE = {
    "cap": {"good": "The rim is even. It seals.", "dent": "A hollow in the rim. It leaks.", "no": "No cap at all."},
    "nut: 5": {"good": "Six even sides. It holds.", "crack": "A dark line. The nut may fail."},
}


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({}, None),
        ({"cap": {"dent": None}}, "'dent' is missing, but there is 1 image of it"),
        ({"cap": {"dent": ""}}, "'dent' is empty"),
        ({"cap": {"dent": "A dent."}}, "'dent' is too short for a description ('A dent.')"),
        (
            {"cap": {"dent": None, "dnet": "A hollow in the rim. It leaks."}},
            "'dnet' occurs in no image; did you mean 'dent'?",
        ),
        ({"cap": {"melted": "The rim has run. It leaks."}}, None),  # no image shows it yet
        ({"cap": None}, "d/cap: there is no knowledge"),
        ({"cap": None, "caps": COMPLETE_KNOWLEDGE["cap"]}, "the product 'caps' of d has no image; did you mean 'cap'?"),
        (
            {"gear": {"good": "Even teeth all around. It turns."}},
            "the product 'gear' of d has no image; remove or correct it",
        ),
    ],
)
def test_check_reports_exactly_what_is_wrong(tmp_path: Path, change: dict, finding: str | None) -> None:
    changed = {product: dict(texts) for product, texts in COMPLETE_KNOWLEDGE.items()}
    for product, texts in change.items():
        changed[product] = {**changed.get(product, {}), **(texts or {})}
        changed[product] = {name: text for name, text in changed[product].items() if texts and text is not None}
    content = {"d": {product: texts for product, texts in changed.items() if texts}}
    knowledge, files = read_knowledge(write(tmp_path / "k.json", json.dumps(content)))
    found = list(check_knowledge(knowledge, files, count_images(built_dataset(tmp_path / "dataset"))))
    assert len(found) == (finding is not None), found
    assert finding is None or finding in found[0]


def test_check_reports_unknown_datasets_but_knows_mmads_names(tmp_path: Path) -> None:
    counts = count_images(built_dataset(tmp_path / "dataset"))
    texts = {"e": COMPLETE_KNOWLEDGE, "d": COMPLETE_KNOWLEDGE}
    knowledge, files = read_knowledge(write(tmp_path / "k.json", json.dumps(texts)))
    assert [line for line in check_knowledge(knowledge, files, counts) if "the dataset 'e' has no image" in line]
    renamed = {("MVTec-AD", product): shown for (_, product), shown in counts.items()}
    knowledge, files = read_knowledge(write(tmp_path / "k.json", json.dumps({"MVTec": COMPLETE_KNOWLEDGE})))
    assert list(check_knowledge(knowledge, files, renamed)) == []
    assert coverage_summary(knowledge, renamed, 0) == (
        "5 of 5 conditions are described; 1 of 3 defects get no Defect Analysis question, because their "
        "description states no consequence (MVTec-AD/cap/no); "
        "nothing to correct"
    )


def test_commands_lead_from_template_to_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", str(ROOT / "recipes/tiny/data.yaml"), "--parts", "8", "--k", "1", "--output"]
    build([*options, str(tmp_path / "dataset"), "--knowledge", str(ROOT / "recipes/tiny/knowledge.yaml")])
    main(["--dataset", str(tmp_path / "dataset"), "--output", str(tmp_path / "k")])
    assert load_knowledge(tmp_path / "k") == load_knowledge(ROOT / "recipes/tiny/knowledge.yaml")
    build([*options, str(tmp_path / "again"), "--knowledge", str(tmp_path / "k")])
    assert load_dataset(tmp_path / "again").fingerprint == load_dataset(tmp_path / "dataset").fingerprint
    flange = tmp_path / "k" / "synthetic" / "flange.yaml"
    flange.write_text(flange.read_text().replace("chip:", "chipp:"))
    command = [sys.executable, "-m", "data_prep.knowledge", "--dataset", tmp_path / "again", "--check", tmp_path / "k"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "'chipp' occurs in no image; did you mean 'chip'?" in done.stdout, done.stderr
    flange.write_text(flange.read_text().replace("chipp:", "chip:"))
    capsys.readouterr()
    main(["--dataset", str(tmp_path / "again"), "--check", str(tmp_path / "k")])
    assert capsys.readouterr().out.endswith("nothing to correct\n")


@pytest.mark.parametrize("options", [[], ["--output", "k", "--check", "k"]])
def test_command_needs_either_output_or_check(tmp_path: Path, options: list[str]) -> None:
    with pytest.raises(EchoError, match="give either --output FOLDER"):
        main(["--dataset", str(tmp_path), *options])
