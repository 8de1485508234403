"""The preview page shows a dataset completely and filters it in a browser without network access."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from skimage.draw import disk, polygon2mask

from data_prep import preview
from data_prep.build import build
from data_prep.config import BuildConfig
from data_prep.preview import sample_inspections
from echo_ft.files import read_jsonl
from echo_ft.images.masks import outline_path
from echo_ft.records import ROLES, Exchange, Inspection, Question
from tests.conftest import ROOT
from tests.support.browser import Browser, start_browser

METHOD = "cut&paste"
"""A made-up synthesis method. Both HTML and URLs must escape its name."""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A dataset of drawn parts, with every scratch marked as a synthetic defect."""
    output = tmp_path_factory.mktemp("built") / "parts"
    knowledge = ROOT / "recipes" / "tiny" / "knowledge.yaml"
    write = preview.write_preview

    def marked(folder, root, manifest, draft):
        changed = [
            dataclasses.replace(i, synthetic=METHOD if i.condition == "scratch" else None) for i in draft.inspections
        ]
        write(folder, root, manifest, dataclasses.replace(draft, inspections=changed))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.build.write_preview", marked)
        build(
            BuildConfig("synthetic", output, knowledge=knowledge, descriptor="skimage", k=2, parts=24, routing="paper")
        )
    return output


def strata(count: int, *places: tuple[str, str, str]) -> list[Inspection]:
    return [
        Inspection(f"{place}/{number}", "x.png", "d", place[1], place[2], "g", place[0])
        for place in places
        for number in range(count)
    ]


def test_every_condition_of_every_product_comes_before_repeats():
    many = strata(1000, ("test", "cap", "good"), ("train", "cap", "good"), ("train", "cap", "dent"))
    few = strata(1, *(("test", "nut", f"kind {number}") for number in range(8)))
    sampled = sample_inspections([*many, *few], 4, 100)
    assert Counter((one.product, one.condition) for one in sampled) == Counter(
        [("cap", "good"), ("cap", "dent"), *(("nut", f"kind {number}") for number in range(8))]
    )
    assert {one.split for one in sampled if one.product == "cap"} == {"train"}
    sampled = sample_inspections([*many, *few], 20, 100)
    assert sorted(Counter((one.split, one.product, one.condition) for one in sampled).values()) == [1] * 8 + [4] * 3
    assert [one.split for one in sampled] == ["train"] * 8 + ["test"] * 12
    assert sample_inspections(few, 4, 6) == few[:6]
    assert sample_inspections([], 4, 6) == []


def test_a_sample_is_reproducible_and_not_only_neighbours():
    many = strata(1000, ("train", "cap", "good"))
    assert sample_inspections(many, 10, 10) == sample_inspections(many, 10, 10) != many[:10]
    assert len({one.id for one in sample_inspections(many, 10, 10)}) == 10


def test_a_page_states_how_many_cases_it_shows(built, tmp_path, monkeypatch):
    assert re.search(
        r"48 of \d+ cases, sampled evenly from .* Every condition of every product is included", page(built)
    )
    for typical, limit, statement in (
        (500, 500, r"All \d+ cases\."),
        (2, 3, r"3 of \d+ cases.* \d+ of the 15 pairs of product and condition are missing"),
    ):
        monkeypatch.setattr(preview, "TYPICAL_CARDS", typical)
        monkeypatch.setattr(preview, "MAX_CARDS", limit)
        output = tmp_path / str(typical)
        build(BuildConfig("synthetic", output, descriptor="skimage", k=1, parts=10))
        assert re.search(statement, page(output))


def filled(path: str, shape: tuple[int, int]) -> np.ndarray:
    """A mask of the pixels whose centres lie inside an SVG path of straight lines, by the even-odd rule."""
    inside = np.zeros(shape, dtype=bool)
    for line in path.removeprefix("M").removesuffix("Z").split("ZM"):
        points = np.array([point.split() for point in line.split("L")], dtype=float)
        inside ^= polygon2mask(shape, points[:, ::-1] - 0.5)  # its whole numbers are pixel centres
    return inside


def test_outlines_are_the_borders_of_the_mask():
    mask = np.zeros((60, 90), dtype=bool)
    mask[0:20, 70:90] = True  # touches two sides
    mask[disk((35, 30), 20)] = True
    mask[disk((35, 30), 8)] = False  # a hole
    mask[50, 60] = True
    path = outline_path(mask)
    assert path.count("M") == path.count("Z") == 4
    assert (filled(path, mask.shape) ^ mask).sum() <= 0.01 * mask.sum()


class Page(HTMLParser):
    """The text of a page, its cases and whether each is shown, the open roles of each, and the filters' values."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cases: dict[str, bool] = {}
        self.open: dict[str, set[str]] = {}
        self.offered: dict[str, list[str]] = {}
        self.text: list[str] = []
        self.in_option = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if found.get("class") == "case" and tag == "li":
            self.cases[found["data-case"]] = "hidden" not in found
        if tag == "details" and "open" in found and "hidden" not in found:
            self.open.setdefault(list(self.cases)[-1], set()).add(found["data-of"])
        if tag == "select":
            self.offered[found["name"]] = []
        self.in_option = tag == "option"

    def handle_data(self, data):
        self.text.append(data)
        if self.in_option and data.strip():
            list(self.offered.values())[-1].append(data)


def page(folder: Path) -> str:
    return (folder / "preview.html").read_text(encoding="utf-8")


def test_the_page_shows_prompts_and_targets_of_each_role(built):
    parsed = Page(page(built))
    text = "".join(parsed.text)
    assert len(parsed.cases) == 48
    for role in ROLES:
        for row in read_jsonl(built / "sft" / role / "train.jsonl", Exchange):
            if row.case in parsed.cases:
                for branch in row.branches:
                    assert branch.prompt in text
                    assert branch.completion in text
    for question in read_jsonl(built / "questions.jsonl", Question):
        if question.inspection in parsed.cases:
            assert f"{question.answer}. {question.options[question.answer]} ✓" in text
    assert page(built).count('class="outline"') > 10


def test_the_charts_count_what_the_manifest_counts(built):
    counts = json.loads((built / "manifest.json").read_text())["counts"]
    rows = dict(re.findall(r'data-value="([^"]+)">[^<]+</button></th>.*?</td>((?:<td>[\d,]+</td>)+)</tr>', page(built)))
    for key in ("cases", "products"):
        for name in {name for found in counts[key].values() for name in found}:
            expected = [counts[key][split].get(name, 0) for split in ("train", "validation", "test")]
            assert list(map(int, re.findall(r"\d+", rows[name]))) == expected
    for role in ROLES:
        numbers = list(map(int, re.findall(r"\d+", rows[role])))
        assert sum(numbers[:2]) == counts["sft_rows"][f"{role}/train"]
        assert sum(numbers[2:]) == counts["sft_rows"][f"{role}/validation"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with start_browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


def browse(browser: Browser, folder: Path, fragment: str = "") -> Page:
    """The preview in a browser. Checks that it prints no message and requests nothing."""
    browser.open(folder / "preview.html", fragment)
    assert (browser.messages, browser.foreign_requests()) == ([], [])
    return Page(browser.run("document.documentElement.outerHTML"))


def test_requests_and_errors_are_noticed_and_the_page_blocks_both(browser, built, tmp_path):
    reach = '<img src="http://parts.invalid/x.png"><script>nothing.there()</script></body>'
    open_page, closed_page = tmp_path / "open.html", tmp_path / "closed.html"
    closed_page.write_text(page(built).replace("</body>", reach))
    open_page.write_text(re.sub("<meta http-equiv.*>", "", closed_page.read_text()))
    browser.open(open_page)
    assert browser.foreign_requests() == ["http://parts.invalid/x.png"]
    assert any("nothing is not defined" in message for message in browser.messages)
    browser.open(closed_page)
    blocked = [message for message in browser.messages if "Content Security Policy" in message]
    assert len(blocked) == len(browser.messages) == 2
    assert "parts.invalid" in "".join(blocked)
    assert "inline script" in "".join(blocked)


def matching(folder: Path, wanted: dict[str, str | None]) -> set[str]:
    """Ids of the inspections whose records have these values. `role` selects inspections with rows for that role."""
    wanted = dict(wanted)
    role = wanted.pop("role", None)
    splits = ("train", "validation")
    files = [folder / "sft" / str(role) / f"{split}.jsonl" for split in splits] if role else []
    trained = {row.case for file in files for row in read_jsonl(file, Exchange)}
    found = set()
    for one in read_jsonl(folder / "inspections.jsonl", Inspection):
        one = dataclasses.replace(one, synthetic=METHOD if one.condition == "scratch" else None)
        if all(getattr(one, name) == value for name, value in wanted.items()) and (role is None or one.id in trained):
            found.add(one.id)
    return found


@pytest.mark.parametrize(
    ("fragment", "wanted"),
    [
        ("", {}),
        ("#product=flange&condition=missing+bolt", {"product": "flange", "condition": "missing bolt"}),
        ("#synthetic=cut%26paste&split=train", {"synthetic": METHOD, "split": "train"}),
        ("#role=knowledge_guide", {"role": "knowledge_guide"}),
        ("#product=gasket", {"product": "gasket"}),
    ],
)
def test_filters_in_the_address_select_the_matching_cases(browser, built, fragment, wanted):
    seen = browse(browser, built, fragment)
    shown = {case for case, shown in seen.cases.items() if shown}
    assert shown == set(seen.cases) & matching(built, wanted)
    assert f"{len(shown)} of 48 shown" in "".join(seen.text)
    assert bool(shown) == ("gasket" not in fragment)
    if "role" in wanted:
        assert {case: seen.open[case] for case in shown} == {case: {wanted["role"]} for case in shown}


DRIVE = """
const record = [];
function note() {
  const shown = cases.filter(item => !item.hidden);
  const open = shown.flatMap(item => [...item.querySelectorAll("details[open]:not([hidden])")]);
  record.push({at: location.hash, plain: document.body.className, shown: shown.map(item => item.dataset.case),
    open: [...new Set(open.map(details => details.dataset.of))], selected: selects.map(select => select.value)});
}
function choose(name, value) {
  const input = form.elements[name];
  if (input.type === "checkbox") input.click();
  else { input.value = value; input.dispatchEvent(new Event("change", {bubbles: true})); }
  note();
}
STEPS
return record;"""


def test_selects_and_bars_filter_and_change_the_address(browser, built):
    chosen = [
        ("condition", "chip"),
        ("split", "test"),
        ("condition", ""),
        ("split", ""),
        *(("role", role) for role in ROLES),
    ]
    steps = [f"choose({name!r}, {value!r});" for name, value in [*chosen, ("outlines", "")]]
    steps.append("document.querySelector('button[data-value=\"missing bolt\"]').click(); note();")
    steps.append("document.querySelector('button[type=reset]').click(); note(); form.requestSubmit();")
    browser.open(built / "preview.html")
    record = browser.run(f"(() => {{{DRIVE.replace('STEPS', chr(10).join(steps))}}})()")
    assert (browser.messages, browser.foreign_requests()) == ([], [])
    everything, wanted = set(record[-1]["shown"]), {}
    assert len(everything) == 48
    for (name, value), state in zip(chosen, record, strict=False):
        wanted = {key: text for key, text in {**wanted, name: value}.items() if text}
        assert set(state["shown"]) == everything & matching(built, wanted)
        assert state["at"] == ("#" + urlencode(wanted) if wanted else "")
        if name == "role":
            assert state["open"] == [value]
    outlines_off, bar, reset = record[len(chosen) :]
    assert outlines_off["plain"] == "plain"
    assert outlines_off["shown"] == record[len(chosen) - 1]["shown"]
    assert bar["at"] == "#condition=missing+bolt"
    assert set(bar["shown"]) == everything & matching(built, {"condition": "missing bolt"})
    assert reset["at"] == reset["plain"] == ""
    assert not any(reset["selected"])


def test_filters_offer_the_values_on_the_page(browser, built):
    seen = browse(browser, built)
    shown = [one for one in read_jsonl(built / "inspections.jsonl", Inspection) if one.id in seen.cases]
    first = {"any": 0, "good": 1}
    for name in ("product", "condition"):
        values = {"any", *(getattr(one, name) for one in shown)}
        assert seen.offered.pop(name) == sorted(values, key=lambda value: (first.get(value, 2), value))
    splits = ["any", "train", "validation", "test"]
    assert seen.offered == {"split": splits, "role": ["any", *ROLES], "synthetic": ["any", METHOD, "no"]}
