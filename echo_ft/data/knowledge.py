"""What is known about the conditions of each product, as a person or MMAD wrote it.

A file is `{dataset: {product: {condition: text}}}`, as JSON (MMAD's domain_knowledge.json) or YAML; a folder of them
counts as one. A text is free; where it has several sentences, the first says what the condition looks like and the last
what follows from it.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import yaml

from echo_ft.data.splits import conditions_of, readable
from echo_ft.errors import EchoError
from echo_ft.records import GOOD, Entry, Inspection, Knowledge
from echo_ft.strict_yaml import read_json, read_yaml

ALIASES = {"DS-MVTec": "MVTec", "MVTec-AD": "MVTec"}
"""Datasets that MMAD's file keeps under another name."""

LONG = 40
"""Words from which a description is shortened where a role has to say it."""

EFFECT = re.compile(
    r"\b(affect|effect|caus|lead|result|impact|impair|compromis|reduc|weaken|prevent|hinder|interfer|detract|diminish|"
    r"disrupt|fail|risk|concern|unsafe|unusable|so that|can no longer|cannot|will)",
    re.IGNORECASE,
)


def load_knowledge(path: Path) -> Knowledge:
    """The knowledge in a JSON or YAML file, or in all those of a folder, texts as they stand.

    Raises EchoError, with the file and the key, where it is missing, cannot be parsed, is not nested like that, where
    nothing is written about a condition, and where two files of a folder describe the same product.
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
            f"knowledge file {empty[0]} is empty{f', as are {len(empty) - 1} more' if len(empty) > 1 else ''}; write "
            "what the condition looks like, or take the line out (python -m data_prep.knowledge lists them all)"
        )
    return knowledge


def read_knowledge(path: Path) -> tuple[Knowledge, dict[tuple[str, str], Path]]:
    """As `load_knowledge`, with an empty text where nothing is written yet; and the file of each (dataset, product)."""
    knowledge: dict[str, dict[str, dict[str, str]]] = {}
    files: dict[tuple[str, str], Path] = {}
    for file in knowledge_files(path) if path.is_dir() else [path]:
        for dataset, products in parse_knowledge(file, _written(file)).items():
            for product, conditions in products.items():
                if (dataset, product) in files:
                    raise EchoError(
                        f"{files[dataset, product]} and {file} both describe {dataset}/{product}; keep one of them"
                    )
                files[dataset, product] = file
                knowledge.setdefault(dataset, {})[product] = conditions
    if not files and path.is_dir():
        raise EchoError(f"the folder {path} holds no knowledge; it needs a YAML or JSON file")
    return knowledge, files


def knowledge_files(folder: Path) -> list[Path]:
    """The YAML and JSON files of a folder and of those in it, hidden ones left out."""
    found = [path for path in sorted(folder.rglob("*")) if path.suffix in (".yaml", ".yml", ".json")]
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _written(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise EchoError(f"there is no knowledge file {path}; check the path, or leave `knowledge` out") from error
    except (OSError, UnicodeDecodeError) as error:
        raise EchoError(f"knowledge file {path} cannot be read: {error}") from error


def parse_knowledge(path: Path, written: str) -> dict[str, dict[str, dict[str, str]]]:
    """What is written in the file `path`; a text is empty where there is none yet."""
    try:
        content = read_json(written) if path.suffix == ".json" else read_yaml(written)
    except (ValueError, yaml.YAMLError) as error:
        raise EchoError(f"knowledge file {path} cannot be read: {' '.join(str(error).split())}") from error
    found: dict[str, dict[str, dict[str, str]]] = {}
    for dataset, products in _items(path, content, "", "datasets"):
        for product, conditions in _items(path, products, dataset, "products"):
            texts = found.setdefault(dataset, {})[product] = {}
            for condition, text in _items(path, conditions, f"{dataset}/{product}", "conditions"):
                if text is not None and not isinstance(text, str):
                    raise EchoError(
                        f"knowledge file {path}: {dataset}/{product}/{condition} is {_kind(text)}; "
                        "write what the condition looks like, in quotes"
                    )
                texts[condition] = text if text and clean(text) else ""
    return found


def _items(path: Path, content: object, key: str, what: str) -> list[tuple[str, object]]:
    where = f"{path}: {key}" if key else str(path)
    if not isinstance(content, dict):
        raise EchoError(
            f"knowledge file {where} is {_kind(content)} where a mapping of {what} is needed; "
            "the file is dataset: product: condition: text"
        )
    for name in content:
        if not isinstance(name, str):
            raise EchoError(f"knowledge file {where} has the key {name!r}, which YAML does not read as text; quote it")
    return list(content.items())


def _kind(content: object) -> str:
    if content is None or content == "":
        return "empty"
    return {"str": "a text", "list": "a list", "dict": "a mapping"}.get(type(content).__name__, f"{content!r}")


def entries_for(
    knowledge: Knowledge, dataset: str, product: str, conditions: Sequence[str]
) -> tuple[tuple[Entry, ...], bool]:
    """What is known about a product, `good` first and the others by name; and whether the knowledge has the product.

    All entries of the product come, whichever of them the photographs show. A condition of the photographs without
    one, and every condition of a product that the knowledge does not have, is described by its name alone.
    """
    known = products_of(knowledge, dataset).get(product, {})
    names = sorted({*known, *conditions}, key=lambda name: (name != GOOD, name))
    entries = tuple(Entry(name, clean(known[name]) if name in known else readable(name)) for name in names)
    return entries, bool(known)


def products_of(knowledge: Knowledge, dataset: str) -> Mapping[str, Mapping[str, str]]:
    """What is known about the products of a dataset, under its own name or the one that MMAD's file has for it."""
    return knowledge.get(dataset) or knowledge.get(ALIASES.get(dataset, dataset)) or {}


def misspelt(known: Mapping[str, str], conditions: Sequence[str]) -> dict[str, str]:
    """Entries of a product that none of its photographs shows, each with the condition that it is likely meant for.

    That is a condition of the photographs without an entry and of nearly that name. An entry that resembles none is
    left out: a defect may be known that was not photographed.
    """
    bare = [condition for condition in conditions if condition not in known]
    near = {name: difflib.get_close_matches(name, bare, n=1) for name in known if name not in conditions}
    return {name: found[0] for name, found in near.items() if found}


def clean(text: str) -> str:
    """A description as plain text on one line, without MMAD's `<Title>` and `Description:` before it."""
    text = re.sub(r"^\s*<[^<>]*>\s*", "", text)
    text = re.sub(r"^\s*Description:\s*", "", text)
    return " ".join(text.split())


def described(entry: Entry) -> bool:
    """Whether the entry says more than its condition's name."""
    return entry.description.casefold().rstrip(".") != readable(entry.condition).casefold()


@lru_cache  # every photograph of a product asks for the sentences of all that is known about it
def sentences(description: str) -> tuple[str, ...]:
    """The sentences of a description: each ends in a full stop, question or exclamation mark before a capital."""
    return tuple(part for part in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(])", description.strip()) if part)


def appearance(description: str) -> str:
    """What the condition looks like: the first sentence."""
    return sentences(description)[0]


def effect(description: str) -> str | None:
    """What follows from the condition: the last sentence, of two or more.

    A longer text may end with something else; from three sentences on, its last one must name a consequence
    (`affects`, `can lead to`, ...). None where there is no such sentence.
    """
    parts = sentences(description)
    if len(parts) < 2 or (len(parts) > 2 and not EFFECT.search(parts[-1])):
        return None
    return parts[-1]


def brief(description: str) -> str:
    """The description itself up to 40 words; of a longer one, what it looks like and what follows from it."""
    if len(description.split()) <= LONG:
        return description
    return " ".join(filter(None, (appearance(description), effect(description))))


def describe_products(inspections: Sequence[Inspection], known: Knowledge) -> tuple[Knowledge, list[str]]:
    """The knowledge entries of every product, and the products that nothing is known about.

    For those the names of the conditions stand in.
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
    """Where names, the knowledge and the photographs do not fit together, a sentence each."""

    found: list[str] = []
    bare: list[str] = []
    unknown: dict[str, list[str]] = defaultdict(list)
    for (dataset, product), conditions in conditions_of(inspections).items():
        products = products_of(known, dataset)
        entries = products.get(product, {})
        if not entries:
            held = (
                f"of {dataset} the file holds {first_names(products)}"
                if products
                else f"the file holds {first_names(known)}"
            )
            unknown[f"; {held}" if known else ""].append(f"{dataset}/{product}")
            continue
        meant = misspelt(entries, conditions)
        found += [
            f"knowledge: condition {name!r} of {product} occurs in no photograph; did you mean {near!r}?"
            for name, near in meant.items()
        ]
        named = {*entries, *meant.values()}
        bare += [f"{dataset}/{product}/{condition}" for condition in conditions if condition not in named]
    if bare:
        found.append(f"no knowledge of conditions, so their names stand in: {first_names(bare)}")
    for held, places in unknown.items():
        found.append(f"no knowledge, so the names of the conditions stand in: {first_names(places)}{held}")
    return found + near_duplicate_names(inspections)


def near_duplicate_names(inspections: Sequence[Inspection]) -> list[str]:
    """Products, and conditions, of a dataset whose names differ in case and marks alone, a sentence for each name."""
    found: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for (dataset, product), conditions in conditions_of(inspections).items():
        for what, name in (("products", product), *(("conditions", condition) for condition in conditions)):
            found[dataset, what, " ".join(re.findall(r"[^\W_]+", name.casefold()))].add(name)
    return [
        f"{what} of {dataset} that differ in their spelling alone: {', '.join(sorted(names))}; "
        "if they are one, spell them alike"
        for (dataset, what, _), names in found.items()
        if len(names) > 1
    ]


def first_names(names: Collection[str], most: int = 3) -> str:
    """The first of the names, and how many more there are."""
    return ", ".join([*names][:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
