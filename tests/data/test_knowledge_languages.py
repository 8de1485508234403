"""Knowledge in any language gives the same questions as in English, and control tokens in it are refused."""

from __future__ import annotations

import dataclasses
import itertools
import unicodedata
from pathlib import Path

import pytest

from data_prep.knowledge import check_knowledge
from echo_ft.data.knowledge import (
    EFFECT_WORDS,
    appearance,
    brief,
    consequence_warnings,
    effect,
    entries_for,
    has_description,
    knowledge_warnings,
    load_knowledge,
    read_knowledge,
)
from echo_ft.data.questions import write_questions
from echo_ft.errors import EchoError
from echo_ft.experts.targets import training_exchanges
from echo_ft.files import to_json
from echo_ft.metrics.experts import concluded_letter
from echo_ft.records import Entry, Inspection
from tests.conftest import make_case

TEXTS = {
    "en": {
        "good": ("The ring is even and closed.", "It seals."),
        "dent": ("A dark round spot lies on the ring.", "Oil leaks under pressure."),
        "crack": ("A thin line runs across the ring.", "It will break."),
    },
    "de": {
        "good": ("Der Ring ist gleichmäßig und geschlossen.", "Er dichtet."),
        "dent": ("Ein dunkler runder Fleck liegt auf dem Ring.", "Öl tritt unter Druck aus."),
        "crack": ("Eine schmale Linie läuft quer über den Ring.", "Überdruck lässt ihn brechen."),
    },
    "zh": {
        "good": ("圆环完整闭合。", "密封良好。"),
        "dent": ("圆环上有一个深色圆点。", "受压时会漏气。"),
        "crack": ("圆环上有一条细长裂纹。", "裂纹会扩展并导致断裂。"),
    },
    "ko": {
        "good": ("링이 고르고 닫혀 있다.", "밀봉된다."),
        "dent": ("링에 어둡고 둥근 점이 있다.", "압력을 받으면 기름이 샌다."),
        "crack": ("링을 가로지르는 가는 선이 있다.", "링이 부러진다."),
    },
    "hi": {
        "good": ("छल्ला समान और बंद है।", "यह सील करता है।"),
        "dent": ("छल्ले पर काला गोल धब्बा है।", "दबाव में तेल रिसता है।"),
        "crack": ("छल्ले पर पतली रेखा है।", "छल्ला टूट जाएगा।"),
    },
    "ar": {
        "good": ("الحلقة متساوية ومغلقة.", "إنها محكمة."),
        "dent": ("توجد بقعة داكنة على الحلقة.", "يتسرب الزيت تحت الضغط."),
        "crack": ("يمر خط رفيع عبر الحلقة.", "سوف تنكسر."),
    },
}
"""Language to condition to (what it looks like, what it leads to)."""

SPACES = {"zh": "", "hi": ""}
"""What separates two sentences, if not a space."""


def inspection(condition: str, product: str = "gasket") -> Inspection:
    return Inspection(f"{condition}.png", f"{condition}.png", "parts", product, condition, condition)


@pytest.mark.parametrize("language", TEXTS)
def test_every_language_gives_the_kinds_of_english(language: str, tmp_path: Path) -> None:
    space, texts = SPACES.get(language, " "), TEXTS[language]
    entries = tuple(Entry(condition, space.join(parts)) for condition, parts in texts.items())
    for condition in ("good", "dent"):
        written = write_questions(inspection(condition), entries, [*texts], ["gasket", "nut"], tmp_path, 0)
        kinds = {question.kind: question for question in written}
        if condition == "good":
            assert [*kinds] == ["Anomaly Detection", "Object Classification", "Object Analysis"]
            assert set(kinds["Object Analysis"].options.values()) == {parts[0] for parts in texts.values()}
            continue
        wanted = ["Anomaly Detection", "Defect Classification", "Defect Description", "Defect Analysis"]
        assert [*kinds] == wanted
        for position, kind in enumerate(wanted[2:]):
            assert set(kinds[kind].options.values()) == {texts[name][position] for name in ("dent", "crack")}
            assert kinds[kind].options[str(kinds[kind].answer)] == texts["dent"][position]


@pytest.mark.parametrize(
    ("place", "consequence"),
    [
        ("It is often at the rim.", "This impairs the seal."),
        ("Er sitzt oft am Rand.", "Das beeinträchtigt die Dichtung."),
        ("Häufig liegt er innen.", "So kann der Ring ausfallen, was zu Schäden führt."),
        ("Er ist meist rund.", "Der Ring dichtet nicht mehr."),
        ("圆点多在边缘。", "这会影响密封。"),
        ("圓點多在邊緣。", "這會導致漏氣。"),
        ("圆点颜色均匀。", "圆环无法使用。"),
    ],
)
def test_the_last_of_three_sentences_must_name_a_consequence(place: str, consequence: str) -> None:
    first = "圆环上有一个圆点。" if place[0] > "\u3000" else "A spot."
    assert effect(f"{first} {place} {consequence}") == consequence
    assert effect(f"{first} {consequence} {place}") is None
    assert appearance(f"{first} {place} {consequence}") == first
    assert not EFFECT_WORDS.search(place)


def test_long_chinese_texts_are_shortened_and_short_ones_are_not() -> None:
    first, last = "圆环上有一个深色圆点。", "这会影响密封。"
    assert brief(first + last) == first + last
    assert brief(first + "圆点的边缘清晰可见。" * 10 + last) == f"{first} {last}"


def test_a_name_is_no_description_in_any_form() -> None:
    assert not has_description(Entry("Einschluß", unicodedata.normalize("NFD", "Einschluß.")))
    assert not has_description(Entry("裂纹", "裂纹。"))
    assert has_description(Entry("裂纹", "圆环上有裂纹。"))


def test_defects_without_a_consequence_are_named(tmp_path: Path) -> None:
    texts = {
        "good": "Even.",
        "dent": "Ein Fleck, der Öl austreten lässt.",
        "จุด": "วงแหวนมีจุดสีดำ น้ำมันรั่ว",
        "crack": "A line. The ring breaks.",
        "rust": "rust",
    }
    images = [inspection(condition) for condition in texts]
    (found,) = consequence_warnings(images, {"parts": {"gasket": texts}})
    assert "without a Defect Analysis question: parts/gasket/dent, parts/gasket/จุด; write what" in found
    assert consequence_warnings(images[:1] + images[3:], {"parts": {"gasket": texts}}) == []


def test_chinese_descriptions_are_not_too_short(tmp_path: Path) -> None:
    texts = {condition: "".join(parts) for condition, parts in TEXTS["zh"].items()} | {"rust": "锈斑"}
    file = tmp_path / "k.json"
    file.write_text(to_json({"parts": {"gasket": texts}}), encoding="utf-8")
    found = list(check_knowledge(*read_knowledge(file), {("parts", "gasket"): dict.fromkeys(texts, 1)}))
    assert [line for line in found if "too short" in line] == found
    assert len(found) == 1
    assert "'rust'" in found[0]


@pytest.mark.parametrize(("written", "shown"), itertools.permutations(["NFC", "NFD"]))
def test_knowledge_belongs_to_names_in_either_unicode_form(written: str, shown: str, tmp_path: Path) -> None:
    names = {"dataset": "Werk Süd", "product": "힘줄", "condition": "Überhöhung"}
    first, second = (
        {key: unicodedata.normalize(form, name) for key, name in names.items()} for form in (written, shown)
    )
    (tmp_path / "k.yaml").write_text(
        f"{first['dataset']}:\n  {first['product']}:\n    {first['condition']}: A bump. It leaks.\n", encoding="utf-8"
    )
    known = load_knowledge(tmp_path / "k.yaml")
    assert known == {names["dataset"]: {names["product"]: {names["condition"]: "A bump. It leaks."}}}
    entries, found = entries_for(known, names["dataset"], names["product"], [names["condition"]])
    assert found
    assert entries == (Entry(names["condition"], "A bump. It leaks."),)
    both = f"parts:\n  {first['product']}:\n    good: Even.\n  {second['product']}:\n    good: Odd.\n"
    (tmp_path / "k.yaml").write_text(both, encoding="utf-8")
    with pytest.raises(EchoError, match=r"k\.yaml: parts has the key .* twice, in two Unicode forms"):
        load_knowledge(tmp_path / "k.yaml")


def test_a_file_with_a_byte_order_mark_is_read_and_another_encoding_is_not(tmp_path: Path) -> None:
    for name, text in (
        ("k.json", '{"d": {"p": {"Ölfleck": "A spot."}}}'),
        ("k.yaml", "d:\n  p:\n    Ölfleck: A spot.\n"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_knowledge(tmp_path / name) == {"d": {"p": {"Ölfleck": "A spot."}}}
        (tmp_path / name).write_text(text, encoding="cp1252")
        with pytest.raises(EchoError, match=rf"{name} is not a UTF-8 text file.*save it as UTF-8"):
            load_knowledge(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (
            {"parts": {"gasket": {"dent": "A dark spot <|im_end|> lies there."}}},
            r"parts/gasket/dent contains <\|im_end\|>",
        ),
        ({"parts": {"gasket": {"<|image_pad|>": "A spot."}}}, r"<\|image_pad\|> contains <\|image_pad\|>"),
        ({"parts": {"a <|vision_start|>": {"dent": "A spot."}}}, r"contains <\|vision_start\|>"),
    ],
)
def test_a_control_token_is_refused_with_file_and_entry(content: dict, named: str, tmp_path: Path) -> None:
    file = tmp_path / "k.json"
    file.write_text(to_json(content), encoding="utf-8")
    with pytest.raises(EchoError, match=rf"k\.json: .*{named}.*remove or reword it"):
        load_knowledge(file)


def test_other_tags_are_text(tmp_path: Path) -> None:
    text = "A spot as in <image> or <bbox>. It <may> leak."
    file = tmp_path / "k.json"
    file.write_text(to_json({"parts": {"gasket": {"dent": text}}}), encoding="utf-8")
    assert load_knowledge(file)["parts"]["gasket"]["dent"] == text


def test_names_that_differ_only_by_a_vowel_sign_are_not_reported_as_one() -> None:
    images = [inspection("की"), inspection("का"), inspection("Paint run"), inspection("paint_run")]
    (found,) = [line for line in knowledge_warnings(images, {}) if "differ only in spelling" in line]
    assert "Paint run, paint_run" in found
    assert "की" not in found


@pytest.mark.parametrize("language", TEXTS)
def test_a_reasoned_conclusion_names_the_answer_in_every_language(language: str, tmp_path: Path) -> None:
    case = make_case(tmp_path)
    (question,) = [one for one in case.seen.questions if one.kind == "Defect Analysis"]
    texts = [parts[1] for parts in TEXTS[language].values()]
    question = dataclasses.replace(question, options=dict(zip("ABC", texts, strict=True)))
    seen, truth = (
        dataclasses.replace(case.seen, questions=(question,)),
        dataclasses.replace(case.truth, answers={question.id: "B"}),
    )
    case = dataclasses.replace(case, seen=seen, truth=truth)
    (exchange,) = training_exchanges(case, "reasoning_expert", tmp_path, "full")
    completion = str(exchange.branches[0].completion)
    assert completion.endswith(texts[1])
    assert concluded_letter(completion, question.options) == "B"
    assert concluded_letter(completion[:-1], question.options) == "B"
    assert concluded_letter(f"Conclude: {texts[2]}", question.options) == "C"
