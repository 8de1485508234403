"""Load domain knowledge: descriptions of each product's conditions, written by a person or taken from MMAD.

A file is `{dataset: {product: {condition: text}}}` in JSON (MMAD's domain_knowledge.json) or YAML. The files in a
folder are merged. Any text is valid. If it has several sentences, the first describes what the condition looks like and
the last describes its consequences.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import yaml

from echo_ft.data.export_rows import TAGS
from echo_ft.data.splits import conditions_of, readable_name
from echo_ft.data.text import control_token, nfc, sentences, spelling_key, without_list_marks, without_stop, word_count
from echo_ft.errors import EchoError
from echo_ft.files import walk
from echo_ft.inputs import MAX_YAML_BYTES, read_bytes
from echo_ft.records import GOOD, Entry, Inspection, Knowledge
from echo_ft.strict_yaml import read_json, read_yaml

DATASET_ALIASES = {"DS-MVTec": "MVTec", "MVTec-AD": "MVTec"}
"""Maps a dataset name to the name that MMAD's file uses for it."""

MAX_DESCRIPTION = 20_000
"""Length of the longest description, in characters. No prompt has space for a longer one."""

CONTROL_CHARACTER = re.compile("[\0-\x1f\x7f-\x9f]")
"""Characters that control a terminal. Line breaks and tabs are part of descriptions and count as spaces."""

MAX_BRIEF_WORDS = 40
"""Longer descriptions are shortened in completions (`brief`)."""

EFFECT_WORDS = re.compile(
    r"\b(affect|effect|caus|lead|result|impact|impair|compromis|reduc|weaken|prevent|hinder|interfer|detract|diminish|"
    r"disrupt|fail|risk|concern|unsafe|unusable|so that|can no longer|cannot|will)|"
    # German
    r"beeinträchtig|beeinfluss|auswirk|wirkt sich|verursach|führ(t|en|te)\b|bewirk|zur folge|infolge|sodass|so dass|"
    r"schwäch|gefähr|verhinder|behinder|erschwer|verminder|verringer|versag|versagt|ausfall|ausfäll|fällt aus|risiko|"
    r"unsicher|unbrauchbar|nicht mehr|kann (nicht|kein)|"
    # Chinese, simplified and traditional
    r"影响|影響|导致|導致|造成|引起|引发|引發|使得|降低|减弱|減弱|削弱|妨碍|妨礙|阻碍|阻礙|阻止|干扰|干擾|破坏|破壞|"
    r"失效|故障|失败|失敗|风险|風險|危险|危險|隐患|隱患|无法|無法|不能|不再|将会|將會",
    re.IGNORECASE,
)
"""Words of sentences about consequences, in English, German and Chinese."""


def load_knowledge(path: Path) -> Knowledge:
    """Load the knowledge from a JSON or YAML file, or from all such files in a folder. Descriptions are left unedited.

    Raises EchoError, naming the file and the key, if a file is missing, cannot be parsed or is nested differently. Also
    raises it if a condition has no text, or if two files describe the same product.
    """
    knowledge, files = read_knowledge(path)
    empty = [
        f"{file}: {dataset}/{product}/{condition}"
        for (dataset, product), file in files.items()
        for condition, text in knowledge[dataset][product].items()
        if not text
    ]
    if empty:
        raise EchoError(
            f"knowledge file {empty[0]} is empty{f', and so are {len(empty) - 1} more' if len(empty) > 1 else ''}; "
            "describe what the condition looks like or remove the line (python -m data_prep.knowledge lists them all)"
        )
    return knowledge


def read_knowledge(path: Path) -> tuple[Knowledge, dict[tuple[str, str], Path]]:
    """Read knowledge like `load_knowledge`, but allow empty text. Also return the file of each (dataset, product)."""
    knowledge: dict[str, dict[str, dict[str, str]]] = {}
    files: dict[tuple[str, str], Path] = {}
    for file in knowledge_files(path) if path.is_dir() else [path]:
        for dataset, products in parse_knowledge(file, _read_text(file)).items():
            for product, conditions in products.items():
                if (dataset, product) in files:
                    raise EchoError(
                        f"{files[dataset, product]} and {file} both describe {dataset}/{product}; keep one of them"
                    )
                files[dataset, product] = file
                knowledge.setdefault(dataset, {})[product] = conditions
    if not files and path.is_dir():
        raise EchoError(f"the folder {path} contains no knowledge; add a YAML or JSON file")
    return knowledge, files


def knowledge_files(folder: Path) -> list[Path]:
    """Return the YAML and JSON files at any depth in a folder, as `walk` finds them."""
    return [path for path in walk(folder)[0] if path.suffix in (".yaml", ".yml", ".json")]


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path, MAX_YAML_BYTES).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise EchoError(f"there is no knowledge file {path}; check the path or omit `knowledge`") from error
    except UnicodeDecodeError as error:
        raise EchoError(f"knowledge file {path} is not a UTF-8 text file ({error}); save it as UTF-8") from error
    except (OSError, ValueError) as error:
        raise EchoError(f"knowledge file {path} cannot be read ({error}); replace it") from error


def parse_knowledge(path: Path, content: str) -> dict[str, dict[str, dict[str, str]]]:
    """Parse the content of the file `path`. Everything is in NFC, and missing descriptions become empty strings.

    Raises EchoError as `load_knowledge` does, and also for a control token in a name or description.
    """
    try:
        parsed = read_json(content) if path.suffix == ".json" else read_yaml(content)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise EchoError(f"knowledge file {path} cannot be read: {reason}; correct it there") from error
    found: dict[str, dict[str, dict[str, str]]] = {}
    for dataset, products in _items(path, parsed, "", "datasets"):
        for product, conditions in _items(path, products, dataset, "products"):
            texts = found.setdefault(dataset, {})[product] = {}
            for condition, text in _items(path, conditions, f"{dataset}/{product}", "conditions"):
                if text is not None and not isinstance(text, str):
                    raise EchoError(
                        f"knowledge file {path}: {dataset}/{product}/{condition} is {_kind(text)}; "
                        "describe what the condition looks like, in quotes"
                    )
                _check_text(path, f"{dataset}/{product}/{condition}", text or "")
                texts[condition] = nfc(text) if text and clean(text) else ""
    return found


def _check_text(path: Path, key: str, text: str) -> None:
    if len(text) > MAX_DESCRIPTION:
        raise EchoError(
            f"knowledge file {path}: {key} has {len(text):,} characters; shorten it to a few sentences, at most "
            f"{MAX_DESCRIPTION:,} characters"
        )
    if CONTROL_CHARACTER.search(key + " ".join(text.split())):
        raise EchoError(f"knowledge file {path}: {key} has a control character; remove it")
    token = control_token(key, text)
    if token:
        raise EchoError(
            f"knowledge file {path}: {key} contains {token}, a control token of the model's chat template; remove or "
            f"reword it"
        )


def _items(path: Path, content: object, key: str, what: str) -> list[tuple[str, object]]:
    where = f"{path}: {key}" if key else str(path)
    if not isinstance(content, dict):
        raise EchoError(
            f"knowledge file {where} is {_kind(content)}, not a mapping of {what}; "
            "nest it as dataset: product: condition: text"
        )
    for name in content:
        if not isinstance(name, str):
            raise EchoError(
                f"knowledge file {where} has the key {name!r}, which YAML does not read as a string; quote it"
            )
    spelled: dict[str, str] = {}
    for name in content:
        if nfc(name) in spelled:
            raise EchoError(
                f"knowledge file {where} has the key {name!r} twice, in two Unicode forms; keep one of them"
            )
        spelled[nfc(name)] = name
    return [(composed, content[name]) for composed, name in spelled.items()]


def _kind(content: object) -> str:
    if content is None or content == "":
        return "empty"
    return {"str": "a string", "list": "a list", "dict": "a mapping"}.get(type(content).__name__, f"{content!r}")


def entries_for(
    knowledge: Knowledge, dataset: str, product: str, conditions: Sequence[str]
) -> tuple[tuple[Entry, ...], bool]:
    """Return the entries of a product, `good` first, and whether the product has knowledge.

    The other entries follow, sorted by name. All of them are included, even if no image shows the condition. A
    condition without an entry is described only by its name.
    """
    known = products_of(knowledge, dataset).get(product, {})
    names = sorted({*known, *conditions}, key=lambda name: (name != GOOD, name))
    entries = tuple(Entry(name, clean(known[name]) if name in known else readable_name(name)) for name in names)
    return entries, bool(known)


def products_of(knowledge: Knowledge, dataset: str) -> Mapping[str, Mapping[str, str]]:
    """Return the knowledge of a dataset's products, listed under the dataset's own name or its name in MMAD's file."""
    return knowledge.get(dataset) or knowledge.get(DATASET_ALIASES.get(dataset, dataset)) or {}


def likely_misspellings(known: Mapping[str, str], conditions: Sequence[str]) -> dict[str, str]:
    """Map each entry that matches no condition in the images to the condition its author probably meant.

    The intended condition occurs in the images, has no entry and has a similar name. Entries without a similar
    condition are left out, since knowledge may cover defects that no image shows.
    """
    undescribed = [condition for condition in conditions if condition not in known]
    near = {name: difflib.get_close_matches(name, undescribed, n=1) for name in known if name not in conditions}
    return {name: found[0] for name, found in near.items() if found}


def clean(text: str) -> str:
    """Return a description as plain text on one line, without the `<Title>` and `Description:` that MMAD puts first.

    The items of a list become sentences.
    """
    text = re.sub(r"^\s*<[^<>]*>\s*", "", text)
    text = re.sub(r"^\s*Description:\s*", "", text)
    return " ".join(without_list_marks(text).split())


def has_description(entry: Entry) -> bool:
    """Return whether the entry says more than the name of its condition."""
    return without_stop(entry.description) != without_stop(readable_name(entry.condition))


def appearance(description: str) -> str:
    """Return what the condition looks like: the first sentence."""
    return sentences(description)[0]


def effect(description: str) -> str | None:
    """Return the condition's consequences: the last of at least two sentences, or None.

    Longer descriptions may end with another kind of sentence. If there are three or more sentences, the last one must
    therefore contain a word from EFFECT_WORDS (`affects`, `can lead to`, ...).
    """
    parts = sentences(description)
    if len(parts) < 2 or (len(parts) > 2 and not EFFECT_WORDS.search(parts[-1])):
        return None
    return parts[-1]


def brief(description: str) -> str:
    """Return a description of up to 40 words as it is, and shorten a longer one to its appearance and effect."""
    if word_count(description) <= MAX_BRIEF_WORDS:
        return description
    return " ".join(filter(None, (appearance(description), effect(description))))


def describe_products(inspections: Sequence[Inspection], known: Knowledge) -> tuple[Knowledge, list[str]]:
    """Return the knowledge entries of every product, and the products without knowledge.

    Without knowledge, each condition is described only by its name.
    """
    descriptions: dict[str, dict[str, dict[str, str]]] = {}
    unknown = []
    for (dataset, product), conditions in conditions_of(inspections).items():
        entries, found = entries_for(known, dataset, product, conditions)
        descriptions.setdefault(dataset, {})[product] = {entry.condition: entry.description for entry in entries}
        if not found:
            unknown.append(f"{dataset}/{product}")
    return descriptions, unknown


def knowledge_warnings(inspections: Sequence[Inspection], known: Knowledge) -> list[str]:
    """Return a sentence for each mismatch between the names, the knowledge and the images."""
    found: list[str] = []
    undescribed: list[str] = []
    unknown: dict[str, list[str]] = defaultdict(list)
    for (dataset, product), conditions in conditions_of(inspections).items():
        products = products_of(known, dataset)
        entries = products.get(product, {})
        if not entries:
            available = (
                f"for {dataset}, the file has {first_names(products)}"
                if products
                else f"the file has {first_names(known)}"
            )
            unknown[f"; {available}" if known else ""].append(f"{dataset}/{product}")
            continue
        meant = likely_misspellings(entries, conditions)
        found += [
            f"knowledge: no image of {product} shows condition {name!r}; did you mean {near!r}?"
            for name, near in meant.items()
        ]
        named = {*entries, *meant.values()}
        undescribed += [f"{dataset}/{product}/{condition}" for condition in conditions if condition not in named]
    if undescribed:
        found.append(f"conditions without knowledge (described only by name): {first_names(undescribed)}")
    for available, places in unknown.items():
        found.append(
            f"products without knowledge (conditions described only by name): {first_names(places)}{available}"
        )
    return found + _tag_warnings(inspections, known) + near_duplicate_names(inspections)


def consequence_warnings(inspections: Sequence[Inspection], knowledge: Knowledge) -> list[str]:
    """Return a sentence that names the defects whose descriptions mention no consequence, if there are any."""
    found = [
        f"{dataset}/{product}/{condition}"
        for (dataset, product), conditions in conditions_of(inspections).items()
        for condition in conditions
        if condition != GOOD and _lacks_consequence(condition, knowledge[dataset][product][condition])
    ]
    if not found:
        return []
    return [
        f"descriptions in which no consequence was found, so without a Defect Analysis question: {first_names(found)}; "
        "write what the defect looks like in the first sentence, and what follows from it in the last"
    ]


def _lacks_consequence(condition: str, description: str) -> bool:
    return has_description(Entry(condition, description)) and effect(description) is None


def _tag_warnings(inspections: Sequence[Inspection], known: Knowledge) -> list[str]:
    found = [
        f"{dataset}/{product}/{condition} ({tag.group()})"
        for dataset, product in conditions_of(inspections)
        for condition, text in products_of(known, dataset).get(product, {}).items()
        if (tag := TAGS.search(text))
    ]
    if not found:
        return []
    return [
        f"knowledge with tags that LLaMA-Factory and ms-swift replace: {first_names(found)}; they are plain text here, "
        "but data_prep.convert refuses to write such rows for these trainers"
    ]


def near_duplicate_names(inspections: Sequence[Inspection]) -> list[str]:
    """Return a sentence for each product or condition whose name also occurs with different case or punctuation."""
    found: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for (dataset, product), conditions in conditions_of(inspections).items():
        for what, name in (("products", product), *(("conditions", condition) for condition in conditions)):
            found[dataset, what, spelling_key(name)].add(name)
    return [
        f"{what} of {dataset} that differ only in spelling: {', '.join(sorted(names))}; "
        "if they mean the same thing, use one spelling"
        for (dataset, what, _), names in found.items()
        if len(names) > 1
    ]


def first_names(names: Collection[str], limit: int = 3) -> str:
    """Join the first `limit` names, followed by the number of remaining names."""
    return ", ".join([*names][:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
