"""A list of images is read in every plain format that spreadsheets export; other files get an error with a remedy."""

from __future__ import annotations

import itertools
import json
import zipfile
from pathlib import Path

import pytest

from data_prep.sources import ItemPlace, SourceConfig, manifest
from echo_ft.errors import EchoError
from echo_ft.records import Inspection, Rejection
from tests.support.folder_layouts import draw

HEADER = ["image", "product", "condition", "group"]
ROWS = [["부품/Dübel 1.png", "Dübel, groß; 2", "good", "7"], ["b.png", "垫圈", "Riss", "8"]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for row in ROWS:
        draw(tmp_path / row[0])
    return tmp_path


def table(separator: str, newline: str = "\n") -> str:
    quoted = [[f'"{cell}"' if separator in cell else cell for cell in row] for row in [HEADER, *ROWS]]
    return "".join(separator.join(row) + newline for row in quoted)


def read(root: Path, path: Path) -> tuple[list[Inspection], list[str]]:
    items = list(manifest.read(SourceConfig(root, path)))
    assert not [item for item in items if isinstance(item, Rejection)]
    return [i for i in items if isinstance(i, Inspection)], [i.place for i in items if isinstance(i, ItemPlace)]


JSON_LINES = "".join(json.dumps(dict(zip(HEADER, row, strict=True)), ensure_ascii=False) + "\n" for row in ROWS)

READABLE = {
    "csv": ("parts.csv", table(","), 2),
    "csv with old line ends": ("parts.csv", table(",", "\r"), 2),
    "tsv": ("parts.tsv", table("\t"), 2),
    "TSV of Windows": ("parts.TSV", table("\t", "\r\n"), 2),
    "txt with commas": ("parts.txt", table(","), 2),
    "txt with tabs": ("parts.txt", table("\t"), 2),
    "txt of JSON": ("parts.txt", JSON_LINES, 1),
    "no suffix": ("parts", table(","), 2),
    "jsonl": ("parts.jsonl", JSON_LINES, 1),
    "ndjson": ("parts.ndjson", JSON_LINES, 1),
} | {
    f"{line!r} in {suffix}": (f"parts{suffix}", f"{line}\r\n{table(separator)}", 3)
    for (line, separator), suffix in itertools.product(
        [("sep=,", ","), ("SEP=;", ";"), ('"sep=;"', ";"), ("sep=\t", "\t"), ("sep=|", "|"), ("sep=;;;", ";")],
        [".csv", ".txt", ".tsv"],
    )
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", READABLE)
def test_every_plain_format_gives_the_same_records_and_lines(root: Path, name: str, encoding: str) -> None:
    file, text, first = READABLE[name]
    (root / file).write_bytes(text.encode(encoding))
    inspections, places = read(root, root / file)
    assert [[i.image, i.product, i.condition, i.group] for i in inspections] == ROWS
    assert places == [f"{file}:{first}", f"{file}:{first + 1}"]


def workbook(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")


@pytest.mark.parametrize("name", ["parts.xlsx", "parts.XLSM", "parts.ods", "renamed.csv", "renamed.txt"])
def test_a_spreadsheet_needs_an_export(root: Path, name: str) -> None:
    workbook(root / name)
    with pytest.raises(EchoError, match=rf"{name} is a spreadsheet.*File > Save As > CSV UTF-8.*set annotations"):
        read(root, root / name)


@pytest.mark.parametrize("name", ["parts.xls", "renamed.csv"])
def test_an_old_spreadsheet_needs_an_export(root: Path, name: str) -> None:
    (root / name).write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504))
    with pytest.raises(EchoError, match=r"is a spreadsheet.*CSV UTF-8"):
        read(root, root / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("parts.csv", table(",").encode("gb18030"), r"not a UTF-8 text file.*CSV UTF-8"),
        ("parts.csv", "image,product,condition\nb.png,Dübel,good\n".encode("cp1252"), r"not a UTF-8 .*CSV UTF-8"),
        ("late.csv", b"image,product,condition\n" + b"b.png,cap,good\n" * 2000 + b"\xfc", r"not a UTF-8 .*CSV UTF-8"),
        ("parts.txt", "image,product,condition\nb.png,cap,good\n".encode("utf-16-le"), r"null characters.*CSV UTF-8"),
        ("parts.jsonl", JSON_LINES.encode("gb18030"), r"not a UTF-8 text file.*save it as UTF-8"),
        ("parts.csv", table("\t").encode(), r"not tabs, or rename it to \.tsv"),
        ("parts.csv", table(";").encode(), r"not semicolons, or put the line sep=; before the header"),
        ("parts.tsv", table(",").encode(), r"rename the file to \.csv"),
    ],
)
def test_any_other_text_file_gets_its_remedy(root: Path, name: str, content: bytes, message: str) -> None:
    (root / name).write_bytes(content)
    with pytest.raises(EchoError, match=message) as raised:
        read(root, root / name)
    assert "\n" not in str(raised.value)
