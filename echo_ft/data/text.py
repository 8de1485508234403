"""Text in any language: spellings, sentences, lengths and control tokens."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from echo_ft.records import BOX_END, BOX_START

CONTROL_TOKEN = re.compile(r"<\|\w+\|>")
"""A control token of a chat template, such as `<|im_end|>`."""

STOPS = "。！？｡．।॥۔؟။។።፧։"
"""Characters that end a sentence even without a space, in Chinese, Japanese, Hindi, Urdu, Arabic, Burmese, ..."""

SENTENCE_ENDS = ".!?…" + STOPS
"""Characters that can end a sentence."""

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uff9f\U00020000-\U0003ffff"
)
"""Character ranges of scripts without spaces: Thai, Lao, Burmese, Khmer, Japanese and Chinese."""

UNSPACED_PER_WORD = 2
"""Number of these characters that count as a word. Chinese words have about 1.5 characters, Thai words about 4."""

_CLOSERS = "\"'”’»›」』）)】》]"
_OPENERS = "\"'(„“‚‘«‹¿¡「『（[【《"
_STOP = re.compile(rf"(?P<stop>[{re.escape(SENTENCE_ENDS)}]+)[{re.escape(_CLOSERS)}]*(?P<space>\s*)")
_UNSPACED = re.compile(f"[{UNSPACED}]")
_ABBREVIATION = re.compile(r"\b(?:bzw|ca|evtl|ggf|inkl|max|vgl|approx|[a-zäöü]\.\s?\w)\.$")
"""Abbreviations after which a capital does not begin a sentence: `ca.`, `z. B.`, `e.g.`."""
_FIRST_LETTER = re.compile(r"\b[a-zäöü]\.$")
_SECOND_LETTER = re.compile(r"\w\.(?!\w)")

_LIST_MARK = re.compile(
    rf"(?:^|(?<=[\s:：;；{STOPS}]))(?:(?P<number>\d{{1,2}})[.)、）．](?:\s+|(?=[{UNSPACED}])(?!\d))"
    r"|(?P<bullet>[-*+–—])\s+|(?P<dot>[•‣▪·])\s*)"
)


def nfc(text: str) -> str:
    """Return the text in Unicode's composed form (NFC).

    An accented letter can be one character or two. macOS stores two characters in file names, whereas keyboards produce
    one.
    """
    return unicodedata.normalize("NFC", text)


@lru_cache  # this is called for each image, with every entry of its product
def sentences(description: str) -> tuple[str, ...]:
    """Split a description into sentences.

    A full stop, question mark or exclamation mark ends a sentence if a space and a capital follow, or a letter from a
    script without capitals. The marks in STOPS end a sentence everywhere. These rules follow Unicode's UAX #29 with two
    exceptions. A number begins a sentence only in scripts without capitals, and a few abbreviations never end one.
    """
    text = description.strip()
    parts, start = [], 0
    for match in _STOP.finditer(text):
        if _ends_sentence(text, match):
            parts.append(text[start : match.end()].strip())
            start = match.end()
    return tuple(part for part in (*parts, text[start:].strip()) if part)


def without_list_marks(text: str) -> str:
    """Rewrite the list items in a text as sentences: `1. dark spot 2. oil leaks` becomes `Dark spot. Oil leaks.`

    A list begins with `1.`, `1)` or a bullet at the start of the text or a line, or after a colon. Further items may
    follow on the same line, marked by the next number or by the same bullet before a capital.
    """
    items, start, count, bullet = list[str](), 0, 0, ""
    for match in _LIST_MARK.finditer(text):
        before, gap = text[start : match.start()].rstrip(" \t"), match["bullet"] or match["dot"]
        begins = not before.strip() or before[-1] in "\r\n:："
        if match["number"]:
            if int(match["number"]) != count + 1 or not (begins or count):
                continue
            count += 1
        elif not begins and (gap != bullet or text[match.end() : match.end() + 1].islower()):
            continue
        bullet = gap or bullet
        items.append(before)
        start = match.end()
    if not items:
        return text
    lead, *listed = [*items, text[start:]]
    return " ".join(filter(None, (_as_sentence(lead), *(_as_sentence(item, True) for item in listed))))


def _as_sentence(item: str, capital: bool = False) -> str:
    """Return an item that ends with punctuation. A final colon stays, because the sentence continues after it."""
    item = item.strip().rstrip(",;，；、").rstrip()
    if not item:
        return ""
    if item.rstrip(_CLOSERS)[-1:] not in {*SENTENCE_ENDS, *":："}:
        item += "。" if re.match("[\u3000-\u30ff\u3400-\u9fff]", item[-1]) else "."
    return item[0].upper() + item[1:] if capital else item


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
    if not after:
        return False
    if match["stop"][-1] in STOPS:
        return not after.isdigit() or match["stop"] != "．"  # this includes the decimal point between full-width digits
    if not match["space"]:
        return bool(_UNSPACED.match(before) and _UNSPACED.match(after))
    if after in _OPENERS:
        return True
    if after.isdigit():
        return _has_no_case(before)
    return after.isalpha() and not after.islower() and not _abbreviates(text, match)


def _has_no_case(letter: str) -> bool:
    return letter.isalpha() and not letter.islower() and not letter.isupper()


def _abbreviates(text: str, match: re.Match[str]) -> bool:
    head = text[: match.end("stop")]
    initial = _FIRST_LETTER.search(head) and _SECOND_LETTER.match(text, match.end())  # for example the `z.` of `z. B.`
    return bool(initial or _ABBREVIATION.search(head))


def visible(text: str) -> str:
    """Return the text without format characters (Unicode's category Cf), such as soft hyphens and zero-width spaces."""
    return "".join(one for one in text if unicodedata.category(one) != "Cf")


def spelling_key(name: str) -> str:
    """Normalise the case, width and punctuation of a name. Names with equal keys look alike."""
    plain = unicodedata.normalize("NFKC", visible(name)).casefold()
    # Vowel signs, as in Hindi, are marks (M), which Python's \w excludes.
    return " ".join("".join(one if unicodedata.category(one)[0] in "LMN" else " " for one in plain).split())


def without_box_tokens(text: str) -> str:
    """Return a completion without its box tokens, which are the only control tokens that it may contain."""
    return text.replace(BOX_START, "").replace(BOX_END, "")


def control_token(*texts: str) -> str | None:
    """Return the first control token in any of the strings, or None."""
    return next((found.group() for found in map(CONTROL_TOKEN.search, texts) if found), None)


def word_count(text: str) -> int:
    """Return the number of words. In scripts without spaces, UNSPACED_PER_WORD characters count as one word."""
    characters = len(_UNSPACED.findall(text))
    return len(_UNSPACED.sub(" ", text).split()) + -(-characters // UNSPACED_PER_WORD)


@lru_cache(maxsize=1024)  # all images of a product use the same strings
def without_stop(text: str) -> str:
    """Normalise text for comparison: composed, in lower case, with single spaces and without trailing full stops."""
    return " ".join(nfc(text).casefold().split()).rstrip("." + STOPS)
