"""Write a template for the domain knowledge about a dataset, or check knowledge against the dataset.

    python -m data_prep.knowledge --dataset data/parts --output knowledge
    python -m data_prep.knowledge --dataset data/parts --check knowledge

The first command writes one YAML file per product, `<dataset>/<product>.yaml`, with one line per condition that its
images show. Existing files are kept; missing conditions are added to them. `--check` reports missing, misspelt or too
short descriptions and unknown products or datasets, and exits with status 1 if it finds any. Conditions without an
image are allowed. To use the files in a build, set `knowledge: FOLDER`.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_prep.sources._rows import with_record_names
from echo_ft.config import parse, run_main
from echo_ft.data.dataset import Dataset, load_dataset
from echo_ft.data.knowledge import (
    DATASET_ALIASES,
    clean,
    effect,
    first_names,
    has_description,
    knowledge_files,
    likely_misspellings,
    load_knowledge,
    parse_knowledge,
    products_of,
    read_knowledge,
)
from echo_ft.data.text import nfc, word_count
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl, write_text
from echo_ft.inputs import read_bytes
from echo_ft.records import GOOD, UNLABELLED, Entry, Inspection, Knowledge

MIN_WORDS = 4
"""Smallest number of words in a description. Anything shorter is just a name."""

FILE_HEADER = """\
# Knowledge about the product {product} of {dataset}: two or more sentences per condition.
# The first sentence describes what the condition looks like. It becomes an option of the questions about appearance:
# Defect Description for a defect, Object Analysis for a normal part. The last sentence describes the consequence (it
# may leak, it seals). It becomes an option of Defect Analysis. The knowledge guide is shown the whole text.
"""
"""Comment at the top of a new file."""

ImageCounts = Mapping[tuple[str, str], Mapping[str, int]]
"""Maps (dataset, product) to the number of images per condition, with `good` first and the rest sorted by name."""


@dataclass(frozen=True)
class KnowledgeConfig:
    """Options of `python -m data_prep.knowledge`."""

    dataset: Path = field(metadata={"help": "Dataset folder, made by `python -m data_prep.build`."})
    output: Path | None = field(default=None, metadata={"help": "Folder to write the template to, or to complete."})
    check: Path | None = field(default=None, metadata={"help": "File or folder to check against the dataset."})


def main(argv: list[str]) -> None:
    """Write or complete a template, or check existing knowledge."""
    (config,) = parse([KnowledgeConfig], argv)
    if (config.output is None) == (config.check is None):
        raise EchoError(
            "give either --output FOLDER, to write missing descriptions there, or --check PATH, only to check"
        )
    dataset = load_dataset(config.dataset)
    if config.output is not None:
        for line in write_template(dataset, config.output):
            print(line)
        return
    knowledge, files = read_knowledge(config.check)
    counts = count_images(dataset)
    knowledge = with_names_of(dataset, knowledge, counts)
    findings = list(check_knowledge(knowledge, files, counts))
    print("\n".join([*findings, coverage_summary(knowledge, counts, len(findings))]))
    if findings:
        sys.exit(1)


def count_images(dataset: Dataset) -> ImageCounts:
    """Return the number of images of each product that show each condition."""
    shown = Counter(
        tuple(map(nfc, (i.dataset, i.product, i.condition)))
        for i in read_jsonl(dataset.folder / "inspections.jsonl", Inspection)
        if i.condition != UNLABELLED
    )
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for dataset_name, product, condition in sorted(shown, key=lambda key: (*key[:2], key[2] != GOOD, key[2])):
        counts.setdefault((dataset_name, product), {})[condition] = shown[dataset_name, product, condition]
    return counts


def with_names_of(dataset: Dataset, knowledge: Knowledge, counts: ImageCounts) -> Knowledge:
    """Return the knowledge with the names of the dataset's conditions, as its build reads them."""
    shown = {condition for conditions in counts.values() for condition in conditions}
    return with_record_names(knowledge, shown, tuple(dataset.manifest.get("config", {}).get("good") or ()))


def write_template(dataset: Dataset, folder: Path) -> list[str]:
    """Complete a folder of knowledge with the descriptions that the dataset was built with, and return a report.

    Raises EchoError before anything is written if a file cannot be read, or cannot be completed without changing its
    content.
    """
    if folder.exists() and not folder.is_dir():
        raise EchoError(f"{folder} is a file; give a folder, in which one file per product is written")
    known = load_knowledge(dataset.folder / "knowledge.json")
    existing, files = read_knowledge(folder) if folder.is_dir() and knowledge_files(folder) else ({}, {})
    images = count_images(dataset)
    existing = with_names_of(dataset, existing, images)
    texts: dict[Path, str] = {}
    report = []
    for (name, product), counts in images.items():
        descriptions = _descriptions(counts, known.get(name, {}).get(product, {}))
        key = next((key for key in (name, DATASET_ALIASES.get(name)) if (key, product) in files), None)
        if key is None:
            path = _free_path(folder / _slug(name), _slug(product), texts)
            header = FILE_HEADER.format(product=product, dataset=name)
            entries = (_yaml_entry(item, text, counts.get(item, 0), 4) for item, text in descriptions.items())
            texts[path] = f"{header}{_yaml_key(name)}:\n  {_yaml_key(product)}:\n{''.join(entries)}"
            report.append(f"{path}: written, {len(descriptions)} conditions, {_count_empty(descriptions)} to describe")
            continue
        path = files[key, product]
        misspelt = likely_misspellings(existing[key][product], list(counts))
        report += [f"{path}: {condition!r} is kept; did you mean {near!r}?" for condition, near in misspelt.items()]
        present = {*existing[key][product], *misspelt.values()}
        missing = {condition: text for condition, text in descriptions.items() if condition not in present}
        if missing:
            content = texts.get(path) or read_bytes(path).decode("utf-8")
            texts[path] = _add_conditions(path, content, (key, product), missing, counts)
            report.append(f"{path}: {', '.join(missing)} added, {_count_empty(missing)} to describe")
        else:
            report.append(f"{path}: unchanged")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return report


def _descriptions(counts: Mapping[str, int], known: Mapping[str, str]) -> dict[str, str]:
    """Return the description of each condition with images or knowledge; it is empty if it only repeats the name."""
    names = sorted({*counts, *known}, key=lambda condition: (condition != GOOD, condition))
    texts = {name: clean(known.get(name, "")) for name in names}
    return {name: text if has_description(Entry(name, text)) else "" for name, text in texts.items()}


def _format_images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"


def _count_empty(texts: Mapping[str, str]) -> int:
    return sum(not text for text in texts.values())


def _slug(name: str) -> str:
    return re.sub(r"[^\w-]+", "_", name)


def _free_path(folder: Path, stem: str, taken: Mapping[Path, str]) -> Path:
    """Return a path for a new file. Two products may have the same slug, and a file may hold another product."""
    path, number = folder / f"{stem}.yaml", 1
    while path in taken or path.exists():
        number += 1
        path = folder / f"{stem}_{number}.yaml"
    return path


def _yaml_key(name: str) -> str:
    """Return a YAML key that is read back as exactly this name."""
    return yaml.safe_dump({name: None}, allow_unicode=True, width=sys.maxsize).removesuffix(": null\n")


def _yaml_entry(condition: str, text: str, count: int, indent: int) -> str:
    """Return the lines of a condition: a comment with its number of images, and its description or an empty value."""
    line = yaml.safe_dump({condition: text}, allow_unicode=True, width=100) if text else f"{_yaml_key(condition)}:\n"
    return textwrap.indent(f"# {_format_images(count)}\n{line}", " " * indent)


def _add_conditions(
    path: Path, content: str, product: tuple[str, str], missing: Mapping[str, str], counts: Mapping[str, int]
) -> str:
    """Add conditions after the last one of their product, and return the new content. All other bytes stay.

    Raises EchoError if this is not possible.
    """
    wanted = parse_knowledge(path, content)
    wanted[product[0]][product[1]] |= missing
    try:
        text = _insert_lines(content if content.endswith("\n") else content + "\n", product, missing, counts)
        if path.suffix != ".json" and parse_knowledge(path, text) == wanted:
            return text
    except (EchoError, StopIteration, IndexError):  # an example is a mapping in braces
        pass
    raise EchoError(
        f"{path} cannot be extended without changing its content; add {', '.join(missing)} to {'/'.join(product)} "
        "yourself, one line each"
    )


def _insert_lines(content: str, product: tuple[str, str], missing: Mapping[str, str], counts: Mapping[str, int]) -> str:
    node: Any = yaml.compose(content, yaml.SafeLoader)
    for name in product:
        node = next(value for key, value in node.value if nfc(key.value) == name)
    first, last = node.value[0][0], node.value[-1][1]
    end = last.end_mark.line
    # These blocks end where the next line begins.
    if not (isinstance(last, yaml.ScalarNode) and last.style in ("|", ">")):
        end += 1
    lines = content.splitlines(keepends=True)
    column = first.start_mark.column
    new = "".join(_yaml_entry(name, text, counts.get(name, 0), column) for name, text in missing.items())
    return "".join([*lines[:end], new, *lines[end:]])


def check_knowledge(knowledge: Knowledge, files: Mapping[tuple[str, str], Path], counts: ImageCounts) -> Iterator[str]:
    """Yield a sentence for each mismatch between the knowledge (see `read_knowledge`) and the images."""
    names = {
        dataset: dataset if dataset in knowledge else DATASET_ALIASES.get(dataset, dataset) for dataset, _ in counts
    }
    for dataset in knowledge:
        if dataset not in names.values():
            file = next(file for (name, _), file in files.items() if name == dataset)
            yield f"{file}: the dataset {dataset!r} has no image; the images belong to {', '.join(names)}"
    for dataset, name in names.items():
        shown = [product for place, product in counts if place == dataset]
        products = products_of(knowledge, dataset)
        misspelt = likely_misspellings(dict.fromkeys(products, ""), [p for p in shown if p not in products])
        for product in products:
            if product not in shown:
                hint = f"did you mean {misspelt[product]!r}?" if product in misspelt else "remove or correct it"
                yield f"{files[name, product]}: the product {product!r} of {name} has no image; {hint}"
        for product in shown:
            if product in products:
                where = f"{files[name, product]}: {product}"
                yield from _check_product(where, products[product], counts[dataset, product])
            elif product not in misspelt.values():
                yield f"{name}/{product}: there is no knowledge; --output FOLDER writes a template"


def _check_product(where: str, texts: Mapping[str, str], shown: Mapping[str, int]) -> Iterator[str]:
    misspelt = likely_misspellings(texts, list(shown))
    for condition, count in shown.items():
        if condition not in texts and condition not in misspelt.values():
            yield f"{where}: {condition!r} is missing, but there is {_format_images(count)} of it"
    for condition, text in texts.items():
        if condition in misspelt:
            yield f"{where}: {condition!r} occurs in no image; did you mean {misspelt[condition]!r}?"
        elif not text:
            yield f"{where}: {condition!r} is empty; describe what it looks like and what follows from it"
        elif word_count(clean(text)) < MIN_WORDS:
            yield f"{where}: {condition!r} is too short for a description ({clean(text)!r})"


def coverage_summary(knowledge: Knowledge, counts: ImageCounts, findings: int) -> str:
    """Summarise how many conditions are described, and how many descriptions of defects state no consequence."""
    texts = {
        (dataset, product, condition): clean(text)
        for (dataset, product), shown in counts.items()
        for condition, text in products_of(knowledge, dataset).get(product, {}).items()
        if condition in shown and text
    }
    defects = {"/".join(place): text for place, text in texts.items() if place[-1] != GOOD}
    without_effect = [place for place, text in defects.items() if effect(text) is None]
    parts = [f"{len(texts)} of {sum(map(len, counts.values()))} conditions are described"]
    if without_effect:
        parts.append(
            f"{len(without_effect)} of {len(defects)} defects get no Defect Analysis question, because their "
            f"description states no consequence ({first_names(without_effect)})"
        )
    return "; ".join([*parts, f"{findings} to correct" if findings else "nothing to correct"])


if __name__ == "__main__":
    run_main(main)
