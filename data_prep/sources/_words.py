"""Words in several languages for a part without a defect, and words that leave open whether a part has a defect."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from echo_ft.data.text import visible


def plain_word(text: str) -> str:
    """Strip case, accents, spaces, dots, dashes and underscores from `text`: `No_Defect` becomes `nodefect`.

    Invisible characters, such as a soft hyphen, are also stripped. Use the result only to look words up in the lists
    below, because names that differ only in an accent become equal.
    """
    decomposed = unicodedata.normalize("NFKD", visible(text)).casefold()
    return "".join(c for c in decomposed if not (c.isspace() or c in IGNORED or c in ACCENTS))


ACCENTS = frozenset(map(chr, range(0x300, 0x370)))
"""Combining accents of European scripts. In other scripts, marks distinguish words, as in `バリ` and `ハリ`."""


IGNORED = frozenset("_-\u2010\u2011\u2012\u2013\u2014\u2212.!'\u2019\u00b7")
"""Characters that do not distinguish two words: underscores, dashes, dots and apostrophes."""


@lru_cache(maxsize=64)
def plain_words(words: tuple[str, ...]) -> frozenset[str]:
    """Return the plain form of each word."""
    return frozenset(map(plain_word, words))


GOOD_WORDS = plain_words(
    (
        # English words, and values that programs write
        "good", "ok", "okay", "pass", "passed", "normal", "none", "defect-free", "fault-free", "error-free",
        "damage-free", "anomaly-free", "no", "no defect", "no defects", "no fault", "no faults", "no damage",
        "no error", "no errors", "no anomaly", "no anomalies", "no issue", "no issues", "no problem", "nodefect",
        "non-defect", "non-defective", "non defected", "not defective", "not damaged", "not defect", "non-anomalous",
        "not anomalous", "without defect", "without defects", "undamaged", "unbroken", "intact", "flawless",
        "faultless", "perfect", "clean", "healthy", "negative", "accept", "accepted", "acceptable",
        "conforming", "conform", "compliant", "good part", "good parts", "ok part", "false", "0", "0.0", "-",
        # German
        "gut", "gutteil", "in Ordnung", "i.O.", "i.O.-Teil", "i. O.", "einwandfrei", "fehlerfrei", "fehlerlos",
        "kein Fehler", "keine Fehler", "kein Defekt", "keine Defekte", "ohne Fehler", "ohne Defekt", "ohne Befund",
        "o.B.", "mangelfrei", "unbeschädigt", "schadenfrei", "bestanden", "nein", "keine",
        "unauffällig", "unbeschaedigt", "unauffaellig",
        # French
        "bon", "bonne", "bon état", "conforme", "sans défaut", "sans défauts", "aucun défaut", "pas de défaut",
        "normale", "correct", "aucun", "non défectueux", "accepté",
        # Spanish
        "bueno", "buena", "bien", "sin defecto", "sin defectos", "ningún defecto", "no defectuoso", "correcto",
        "aprobado", "sano", "intacto", "ninguno",
        # Italian
        "buono", "buona", "va bene", "senza difetto", "senza difetti", "nessun difetto", "non difettoso", "integro",
        "idoneo", "normali", "nessuno",
        # Portuguese
        "bom", "boa", "sem defeito", "sem defeitos", "nenhum defeito", "não defeituoso", "perfeito", "íntegro",
        "nenhum",
        # Chinese
        "合格", "合格品", "良品", "好品", "正品", "正常", "良好", "完好", "好", "良", "无", "無", "无缺陷", "無缺陷",
        "没有缺陷", "無瑕疵", "无瑕疵", "无异常", "無異常", "无损", "否",
        # Japanese
        "良品", "正常", "正常品", "合格", "異常なし", "欠陥なし", "不良なし", "問題なし", "欠陥無し", "異常無し",
        "無欠陥", "なし",
        # Korean
        "정상", "정상품", "양품", "합격", "양호", "결함 없음", "불량 없음", "이상 없음", "무결함", "없음",
    )
)  # fmt: skip
"""Words that clearly mean a part without a defect, as `plain_word` returns them. A cell of only dashes counts too."""

GOOD_PHRASE = re.compile(
    r"(no|non|not|without)(any|visible|apparent|obvious|surface)*"
    r"(anomal|crack|damage|defect|fault|finding|flaw|scratch)(s|es|d|ed|y|ies)?(found|detected|visible)?"
    r"|(good|ok|okay)(back|bottom|front|left|part|piece|rear|right|sample|side|top|unit|\d)+"
)
"""Phrases that mean a part without a defect, as `plain_word` returns them: `no visible crack`, `ok_front`.

Only these phrases count, because `no solder` is a defect. No part of a repeated group may repeat itself: with `\\d+`, a
name of 50 digits would take years."""

UNKNOWN_WORDS = plain_words(
    (
        "?", "??", "???", "n/a", "na", "n.a.", "nil", "null", "nan",
        # error values of spreadsheets
        "#n/a", "#ref!", "#value!", "#name?", "#div/0!", "#null!", "#num!",
        "unknown", "unk", "unlabeled", "unlabelled", "unannotated", "unlabel", "not labeled",
        "not labelled", "not annotated", "undefined", "unspecified", "undecided", "unclear", "unsure", "uncertain",
        "not sure", "maybe", "todo", "to do", "to-do", "tbd", "pending", "ignore", "ignored",
        "unchecked", "not checked", "checked", "verified", "reviewed", "review", "done", "unbekannt", "unklar",
        "inconnu", "inconnue", "desconocido", "desconocida", "sconosciuto", "sconosciuta", "desconhecido",
        "desconhecida", "未知", "未标注", "未標註", "待定", "不明", "未定", "未確認", "미정", "알 수 없음",
    )
)  # fmt: skip
"""Words that leave open whether a part has a defect, as `plain_word` returns them."""


def is_doubtful(text: str) -> bool:
    """Return whether words such as UNKNOWN_WORDS or `good?` leave open if a part has a defect."""
    word = plain_word(text)
    return word in UNKNOWN_WORDS or word.endswith("?")


GOOD_FLAGS = plain_words(("good", "ok", "okay", "no defect", "no defects", "defect-free"))
"""Image flags that mean a part without a defect even if they are not declared, as `plain_word` returns them.

Other words may describe the annotation: an image can be `accepted`, and a label can be `correct`."""

REVIEW_FLAGS = plain_words(("checked", "verified", "reviewed", "done"))
"""Image flags that mean that the annotations of an image were checked, as `plain_word` returns them."""
