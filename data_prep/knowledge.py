"""Knowledge that people write: a skeleton of it from a dataset, and a check of it against one.

    python -m data_prep.knowledge --dataset data/parts --output knowledge
    python -m data_prep.knowledge --dataset data/parts --check knowledge

The first writes a YAML file for each product, `<dataset>/<product>.yaml`, with a line for each condition that its
photographs show. A file that is there keeps every word and only gets the conditions that it lacks. The second says
what is missing, misspelt or too short, or about a product or dataset that is none, and exits with 1 where something
is; a condition that nobody has photographed yet may stand there. `knowledge: FOLDER` of a build
reads the files.
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

from echo_ft.config import parse, run_main
from echo_ft.data.dataset import Dataset, load_dataset
from echo_ft.data.knowledge import (
    ALIASES,
    clean,
    described,
    effect,
    knowledge_files,
    load_knowledge,
    misspelt,
    parse_knowledge,
    products_of,
    read_knowledge,
)
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl, write_text
from echo_ft.records import GOOD, Entry, Inspection, Knowledge

FEWEST = 4
"""Words of the shortest description: fewer are a name."""

HEAD = """\
# What is known about the product {product} of {dataset}, a description of two or more sentences for each condition.
# The first sentence says what it looks like: it is an option of the questions on appearance (of a defect: Defect
# Description; of a normal part: Object Analysis). The last says what follows from it (it may leak, it seals): an option
# of Defect Analysis. The knowledge guide is shown the whole text.
"""

Counts = Mapping[tuple[str, str], Mapping[str, int]]
"""(dataset, product) to the number of photographs of each condition, `good` first and the others by name."""


@dataclass(frozen=True)
class KnowledgeConfig:
    """Options of `python -m data_prep.knowledge`."""

    dataset: Path = field(metadata={"help": "a dataset folder, made by python -m data_prep.build"})
    output: Path | None = field(default=None, metadata={"help": "folder for the skeleton, or to complete"})
    check: Path | None = field(default=None, metadata={"help": "a file or folder to compare with the dataset"})


def main(argv: list[str]) -> None:
    """Command line: write or complete a skeleton, or check what is written."""
    (config,) = parse([KnowledgeConfig], argv)
    if (config.output is None) == (config.check is None):
        raise EchoError("give either --output FOLDER, to write what is lacking there, or --check PATH, to look only")
    dataset = load_dataset(config.dataset)
    if config.output is not None:
        for line in skeleton(dataset, config.output):
            print(line)
        return
    knowledge, files = read_knowledge(config.check)
    counts = count_images(dataset)
    findings = list(check_knowledge(knowledge, files, counts))
    print("\n".join([*findings, missing_summary(knowledge, counts, len(findings))]))
    if findings:
        sys.exit(1)


def count_images(dataset: Dataset) -> Counts:
    """How many photographs of each product show each condition."""
    shown = Counter(
        (i.dataset, i.product, i.condition) for i in read_jsonl(dataset.folder / "inspections.jsonl", Inspection)
    )
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for dataset_name, product, condition in sorted(shown, key=lambda key: (*key[:2], key[2] != GOOD, key[2])):
        counts.setdefault((dataset_name, product), {})[condition] = shown[dataset_name, product, condition]
    return counts


def skeleton(dataset: Dataset, folder: Path) -> list[str]:
    """Write what a folder of knowledge lacks, with the descriptions that the dataset was built with; says what it did.

    Raises EchoError, before anything is written, for a file that cannot be read, and for one that cannot be added to
    without changing what a person wrote there.
    """
    if folder.exists() and not folder.is_dir():
        raise EchoError(f"{folder} is a file; give a folder, which gets a file for each product")
    known = load_knowledge(dataset.folder / "knowledge.json")
    there, files = read_knowledge(folder) if folder.is_dir() and knowledge_files(folder) else ({}, {})
    texts: dict[Path, str] = {}
    said = []
    for (name, product), counts in count_images(dataset).items():
        new = _descriptions(counts, known.get(name, {}).get(product, {}))
        under = next((key for key in (name, ALIASES.get(name)) if (key, product) in files), None)
        if under is None:
            path = _free(folder / _slug(name), _slug(product), texts)
            head = HEAD.format(product=product, dataset=name)
            body = "".join(_entry(condition, text, counts.get(condition, 0), 4) for condition, text in new.items())
            texts[path] = f"{head}{_key(name)}:\n  {_key(product)}:\n{body}"
            said.append(f"{path}: written, {len(new)} conditions, {_to_write(new)} to describe")
            continue
        path = files[under, product]
        meant = misspelt(there[under][product], list(counts))
        said += [f"{path}: {condition!r} stays; did you mean {near!r}?" for condition, near in meant.items()]
        named = {*there[under][product], *meant.values()}
        lacking = {condition: text for condition, text in new.items() if condition not in named}
        if lacking:
            written = texts.get(path) or path.read_bytes().decode("utf-8")
            texts[path] = _added(path, written, (under, product), lacking, counts)
            said.append(f"{path}: {', '.join(lacking)} added, {_to_write(lacking)} to describe")
        else:
            said.append(f"{path}: left as it is")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return said


def _descriptions(counts: Mapping[str, int], known: Mapping[str, str]) -> dict[str, str]:
    """Each condition that is photographed or known, with its description; empty where its name stands in for one."""
    names = sorted({*counts, *known}, key=lambda condition: (condition != GOOD, condition))
    return {c: text if described(Entry(c, text)) else "" for c in names for text in [clean(known.get(c, ""))]}


def _shown(count: int) -> str:
    return f"{count} photograph{'' if count == 1 else 's'}"


def _to_write(texts: Mapping[str, str]) -> int:
    return sum(not text for text in texts.values())


def _slug(name: str) -> str:
    return re.sub(r"[^\w-]+", "_", name)


def _free(folder: Path, stem: str, taken: Mapping[Path, str]) -> Path:
    """A path for a new file: two products may differ in nothing but a slash, and a file may hold another product."""
    path, number = folder / f"{stem}.yaml", 1
    while path in taken or path.exists():
        number += 1
        path = folder / f"{stem}_{number}.yaml"
    return path


def _key(name: str) -> str:
    """A name as a key that YAML reads as this text."""
    return yaml.safe_dump({name: None}, allow_unicode=True, width=sys.maxsize).removesuffix(": null\n")


def _entry(condition: str, text: str, count: int, indent: int) -> str:
    """The lines of a condition: how many photographs show it, and its description or the place for it."""
    line = yaml.safe_dump({condition: text}, allow_unicode=True, width=100) if text else f"{_key(condition)}:\n"
    return textwrap.indent(f"# {_shown(count)}\n{line}", " " * indent)


def _added(
    path: Path, written: str, place: tuple[str, str], lacking: Mapping[str, str], counts: Mapping[str, int]
) -> str:
    """The text of a file with conditions more, after the last one of their product; all else stays, comments too."""
    wanted = parse_knowledge(path, written)
    wanted[place[0]][place[1]] |= lacking
    try:
        text = _inserted(written if written.endswith("\n") else written + "\n", place, lacking, counts)
        if path.suffix != ".json" and parse_knowledge(path, text) == wanted:
            return text
    except (EchoError, StopIteration, IndexError):  # as where it is written in braces
        pass
    raise EchoError(
        f"{path} cannot be added to without changing what stands there; write {', '.join(lacking)} into "
        f"{'/'.join(place)} yourself, a line each"
    )


def _inserted(written: str, place: tuple[str, str], lacking: Mapping[str, str], counts: Mapping[str, int]) -> str:
    node: Any = yaml.compose(written, yaml.SafeLoader)
    for name in place:
        node = next(value for key, value in node.value if key.value == name)
    first, last = node.value[0][0], node.value[-1][1]
    end = last.end_mark.line
    if not (isinstance(last, yaml.ScalarNode) and last.style in ("|", ">")):  # these end where the next line begins
        end += 1
    lines = written.splitlines(keepends=True)
    new = "".join(_entry(name, text, counts.get(name, 0), first.start_mark.column) for name, text in lacking.items())
    return "".join([*lines[:end], new, *lines[end:]])


def check_knowledge(knowledge: Knowledge, files: Mapping[tuple[str, str], Path], counts: Counts) -> Iterator[str]:
    """What does not fit between the knowledge (see `read_knowledge`) and the photographs, a sentence each."""
    names = {dataset: dataset if dataset in knowledge else ALIASES.get(dataset, dataset) for dataset, _ in counts}
    for dataset in knowledge:
        if dataset not in names.values():
            file = next(file for (name, _), file in files.items() if name == dataset)
            yield f"{file}: no photograph is of the dataset {dataset!r}, but of {', '.join(names)}"
    for dataset, name in names.items():
        shown = [product for place, product in counts if place == dataset]
        products = products_of(knowledge, dataset)
        meant = misspelt(dict.fromkeys(products, ""), [p for p in shown if p not in products])
        for product in products:
            if product not in shown:
                hint = f"did you mean {meant[product]!r}?" if product in meant else "take it out or correct it"
                yield f"{files[name, product]}: no photograph is of the product {product!r} of {name}; {hint}"
        for product in shown:
            if product in products:
                yield from _product(f"{files[name, product]}: {product}", products[product], counts[dataset, product])
            elif product not in meant.values():
                yield f"{name}/{product}: nothing is written; --output FOLDER writes a skeleton"


def _product(where: str, texts: Mapping[str, str], shown: Mapping[str, int]) -> Iterator[str]:
    meant = misspelt(texts, list(shown))
    for condition, count in shown.items():
        if condition not in texts and condition not in meant.values():
            yield f"{where}: {condition!r} is missing, on {_shown(count)}"
    for condition, text in texts.items():
        if condition in meant:
            yield f"{where}: {condition!r} occurs in no photograph; did you mean {meant[condition]!r}?"
        elif not text:
            yield f"{where}: {condition!r} is empty; write what it looks like and what follows from it"
        elif len(clean(text).split()) < FEWEST:
            yield f"{where}: {condition!r} is too short to be a description ({clean(text)!r})"


def missing_summary(knowledge: Knowledge, counts: Counts, findings: int) -> str:
    """How much is described, and of how many defects not what follows from them."""
    texts = [
        (condition, clean(text))
        for place, shown in counts.items()
        for condition, text in products_of(knowledge, place[0]).get(place[1], {}).items()
        if condition in shown and text
    ]
    defects = [text for condition, text in texts if condition != GOOD]
    without = sum(effect(text) is None for text in defects)
    words = [f"{len(texts)} of {sum(map(len, counts.values()))} conditions are described"]
    if without:
        words.append(f"{without} of {len(defects)} defects get no question of Defect Analysis, as no effect is told")
    return "; ".join([*words, f"{findings} to correct" if findings else "nothing to correct"])


if __name__ == "__main__":
    run_main(main)
