"""Sentences, lengths and spellings follow the same rules in every language."""

from __future__ import annotations

import itertools
import unicodedata

import pytest

from echo_ft.data.knowledge import clean
from echo_ft.data.text import control_token, nfc, sentences, spelling_key, without_list_marks, without_stop, word_count

SENTENCES = {
    "English": ("A thin dark line.", "The disc breaks!", '"Snap" is heard?', "(It is loud.)"),
    "English with numbers": ("The hole is 3.5 mm wide, e.g. Ring 2.", "It leaks 5 ml per min. 3 holes are open."),
    "English quotation": ('Inspectors call it a "poke."', "It leaks."),
    "German": ("Ein Fleck liegt auf dem Ring.", "Öl tritt unter Druck aus.", "„Überdruck“ lässt ihn brechen."),
    "German abbreviations": ("Die Tiefe ist ca. 3 mm bzw. 5 % der Wand, z. B. Übergänge, max. Öl.", "Er bricht."),
    "French": ("Une tache sombre.", "Étanchéité perdue.", "À remplacer."),
    "Russian": ("Тёмное пятно на кольце.", "Масло вытекает."),
    "Greek": ("Μια σκούρα κηλίδα.", "Έχει διαρροή."),
    "Chinese": ("圆环上有一个深色圆点。", "受压时会漏气！", "无法密封？", "3个孔。"),
    "Chinese with Latin stops": ("圆环上有一个深色圆点.", "受压时会漏气."),
    "Chinese quotation": ("标记为“凹痕。”", "会漏气。"),
    "Japanese": ("リングに黒い点がある。", "油が漏れる。", "Oリングを交換する。"),
    "Korean": ("링에 어두운 점이 있다.", "압력을 받으면 기름이 샌다.", "3개의 구멍이 있다."),
    "Hindi": ("छल्ले पर काला धब्बा है।", "दबाव में तेल रिसता है।"),
    "Arabic": ("توجد بقعة داكنة على الحلقة.", "هل يتسرب الزيت؟", "يتسرب الزيت تحت الضغط."),
    "Urdu": ("حلقے پر ایک سیاہ دھبہ ہے۔", "تیل رستا ہے۔"),
    "Hebrew": ("כתם כהה על הטבעת.", "השמן דולף."),
    "Burmese": ("ကွင်းပေါ်တွင် အစက်ရှိသည်။", "ဆီယိုသည်။"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("language", SENTENCES)
def test_sentences_end_where_a_reader_ends_them(language: str, form: str) -> None:
    parts = tuple(unicodedata.normalize(form, part) for part in SENTENCES[language])
    assert sentences(" ".join(parts)) == parts
    if language in ("Chinese", "Japanese", "Hindi", "Urdu", "Burmese"):
        assert sentences("".join(parts)) == parts


@pytest.mark.parametrize(
    "text",
    [
        "A dark line of 3.5 mm",
        "it ends. with small letters. and more",
        "孔径３．５毫米",
        "版本2.5的圆环",
        "วงแหวนมีจุดสีดำ น้ำมันรั่ว",
        "...",
        "",
    ],
)
def test_other_stops_end_no_sentence(text: str) -> None:
    assert sentences(text) == ((text,) if text else ())


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("1. A dark spot. 2. Oil leaks.", ("A dark spot.", "Oil leaks.")),
        ("1. A spot of 2.5 mm 2. Oil leaks 3. It fails", ("A spot of 2.5 mm.", "Oil leaks.", "It fails.")),
        ("1) a dark spot;\n 2) oil leaks;\n", ("A dark spot.", "Oil leaks.")),
        ("Look for: 1. a spot, 2. a leak.", ("Look for: A spot.", "A leak.")),
        ("- a dark spot\n- oil leaks", ("A dark spot.", "Oil leaks.")),
        (
            "The ring is damaged\n• a spot - or line\n• oil leaks!",
            ("The ring is damaged.", "A spot - or line.", "Oil leaks!"),
        ),
        ("- A dark spot - or line - Oil leaks", ("A dark spot - or line.", "Oil leaks.")),
        ("1.圆环上有黑点；2.会漏气", ("圆环上有黑点。", "会漏气。")),
        ("1、圆环上有黑点。\n2、会漏气。", ("圆环上有黑点。", "会漏气。")),
    ],
)
def test_items_of_a_list_are_sentences_without_their_marks(text: str, items: tuple[str, ...]) -> None:
    assert sentences(without_list_marks(text)) == items
    assert without_list_marks(" ".join(items)) == " ".join(items)
    assert clean(f"Description: {text}") == " ".join(items)


@pytest.mark.parametrize(
    "text",
    [
        "It lies on ring 1. Oil leaks at ring 2. It fails.",
        "A dark spot - or line - on the ring - leaks. 3 holes",
        "1.5 mm wide, at 20 - 30 mm",
        "１．５毫米",
        "2. Ring",
        "-5 mm",
        "",
    ],
)
def test_other_numbers_and_dashes_are_no_list(text: str) -> None:
    assert without_list_marks(text) == text


def test_sentences_of_any_two_languages_follow_each_other() -> None:
    for first, second in itertools.permutations(SENTENCES.values(), 2):
        if second[0][0] not in "(":
            assert sentences(f"{first[0]} {second[0]}") == (first[0], second[0])


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("A dark spot - on the ring.", 7),
        ("", 0),
        ("凹痕", 1),
        ("圆环上有一个深色圆点。", 6),
        ("링에 어두운 점이 있다.", 4),
        ("O型圈 at 3 mm", 5),
    ],
)
def test_words_are_counted_without_spaces_too(text: str, count: int) -> None:
    assert word_count(text) == count


def test_unicode_forms_are_one_spelling() -> None:
    for text in ("Dübel", "グループ", "힘줄", "quế"):
        forms = {unicodedata.normalize(form, text) for form in ("NFC", "NFD")}
        assert len(forms) == 2
        assert {nfc(one) for one in forms} == {text}
        assert len({without_stop(one) for one in forms}) == 1
    assert without_stop("Ein  Riss.") == without_stop("ein riss") == "ein riss"
    assert without_stop("裂纹。") == "裂纹"


def test_names_that_look_alike_share_a_key_but_vowel_signs_differ() -> None:
    assert spelling_key("Paint-Run") == spelling_key("paint_run") == spelling_key("ｐａｉｎｔ run")
    assert spelling_key("की") != spelling_key("का")
    assert spelling_key("เส้น") != spelling_key("สน")


def test_only_control_tokens_are_found() -> None:
    assert control_token("A <|im_end|> here.") == "<|im_end|>"
    assert control_token("fine", "<|image_pad|>") == "<|image_pad|>"
    assert control_token("<image> <|> |im_end| < |x| >", "a<b|c>d") is None
