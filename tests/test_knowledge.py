from __future__ import annotations

import os
from pathlib import Path

import pytest

from echo_ft.knowledge import (
    appearance,
    brief,
    described,
    effect,
    entries_for,
    load_knowledge,
    misspelt,
    products_of,
    readable,
)
from echo_ft.records import EchoError, Entry

MMAD = (
    " <Broken Teeth>\n Description: The defect is a row of missing teeth. \n It is often near the middle. "
    "This compromises the closing."
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_json_and_yaml_of_the_same_nesting_say_the_same(tmp_path: Path) -> None:
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
        ("k.yaml", "just words", r"k\.yaml is a text where a mapping of datasets"),
        ("k.yaml", "mine: [bolt]", r"k\.yaml: mine is a list where a mapping of products"),
        ("k.yaml", "mine:\n  bolt: even", r"k\.yaml: mine/bolt is a text where a mapping of conditions"),
        ("k.yaml", "mine:\n  bolt:\n    good:", r"mine/bolt/good is empty"),
        ("k.yaml", "mine:\n  bolt:\n    good: 3", r"mine/bolt/good is 3"),
        ("k.yaml", "mine:\n  bolt:\n    no: text", r"the key False, which YAML does not read as text; quote it"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(EchoError, match=message) as raised:
        load_knowledge(write(tmp_path / name, text))
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EchoError, match=r"no knowledge file .*nowhere\.yaml"):
        load_knowledge(tmp_path / "nowhere.yaml")


def test_mmad_form_becomes_plain_text_under_mmad_dataset_name() -> None:
    entries, known = entries_for({"MVTec": {"zipper": {"broken_teeth": MMAD}}}, "DS-MVTec", "zipper", ["broken_teeth"])
    text = "The defect is a row of missing teeth. It is often near the middle. This compromises the closing."
    assert entries == (Entry("broken_teeth", text),) and known
    assert appearance(text) == "The defect is a row of missing teeth."
    assert effect(text) == "This compromises the closing."


def test_good_comes_first_and_all_of_the_product_comes() -> None:
    knowledge = {"d": {"p": {"crack": "A line.", "good": "Even.", "unseen": "Never photographed."}}}
    entries, known = entries_for(knowledge, "d", "p", ["good", "crack", "new_kind"])
    assert [entry.condition for entry in entries] == ["good", "crack", "new_kind", "unseen"] and known
    assert entries[2].description == "new kind" and not described(entries[2]) and described(entries[1])


def test_a_product_without_knowledge_gets_the_names_of_its_conditions() -> None:
    entries, known = entries_for({"d": {"p": {"good": "Even."}}}, "d", "q", ["broken_large", "good"])
    assert entries == (Entry("good", "free of defects"), Entry("broken_large", "broken large")) and not known
    assert not any(map(described, entries))


def test_an_entry_is_misspelt_where_a_condition_of_nearly_that_name_lacks_one() -> None:
    known = {
        "god": "Even.",
        "dnet": "A hollow.",
        "stain": "A blot.",
        "stains": "Blots.",
        "melted": "Never photographed.",
    }
    assert misspelt(known, ["good", "dent", "stain", "crack"]) == {"god": "good", "dnet": "dent"}
    assert misspelt({"dnet": "A hollow.", "dent": "A hollow."}, ["dent"]) == {}


def test_products_are_found_under_mmads_name_for_the_dataset() -> None:
    knowledge = {"MVTec": {"zipper": {"good": "Even."}}}
    assert products_of(knowledge, "MVTec-AD") == products_of(knowledge, "MVTec") == knowledge["MVTec"]
    assert products_of(knowledge, "VisA") == {}


def test_a_last_sentence_that_tells_no_consequence_is_no_effect() -> None:
    assert effect("A dark line.") is None
    assert effect("A dark line. The tile snaps.") == "The tile snaps."
    assert effect("A dark line. It is thin. Common places are the edges.") is None
    assert effect("A dark line. It is thin. The tile may fail under load.") == "The tile may fail under load."


def test_brief_keeps_short_texts_and_the_ends_of_long_ones() -> None:
    short = "Even thread. Nothing else. At all."
    assert brief(short) == short
    middle = "It has " + "many details and " * 20 + "more."
    assert brief(f"A thread. {middle} This affects the grip.") == "A thread. This affects the grip."
    assert brief(f"A thread. {middle} Seen from above.") == "A thread."


def test_names_read_as_words() -> None:
    assert readable("broken_large") == "broken large" and readable("cut-lead") == "cut lead"


@pytest.mark.real_data
def test_mmads_own_file_loads_without_its_marks() -> None:
    folder = Path(os.environ.get("ECHO_FT_DATA", "../shared/data"))
    path = folder / "mmad" / "domain_knowledge.json"
    if not path.is_file():
        pytest.skip(f"no {path}; set ECHO_FT_DATA to the data folder")
    knowledge = load_knowledge(path)
    for dataset, products in knowledge.items():
        for product, conditions in products.items():
            entries, known = entries_for(knowledge, dataset, product, list(conditions))
            assert known and entries[0].condition == "good" and len(entries) == len(conditions)
            for entry in entries:
                assert not entry.description.startswith("<") and "Description:" not in entry.description[:20]
                assert len(brief(entry.description).split()) <= 130
