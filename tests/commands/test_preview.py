"""The preview page: what is on it, and what it does in a browser that may reach nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from skimage.draw import disk, polygon2mask

from data_prep import preview
from data_prep.build import build
from data_prep.config import BuildConfig
from data_prep.preview import choose, outlines
from echo_ft.files import read_jsonl
from echo_ft.records import ROLES, Exchange, Inspection, Question
from tests.conftest import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
METHOD = "cut&paste"
"""What stands for the method of synthesis: a word that a page and an address must both escape."""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A dataset of drawn parts, those with a scratch as if they were made synthetically."""
    output = tmp_path_factory.mktemp("built") / "parts"
    knowledge = ROOT / "recipes" / "tiny" / "knowledge.yaml"
    write = preview.write_preview

    def marked(folder, root, manifest, material):
        changed = [
            dataclasses.replace(i, synthetic=METHOD if i.condition == "scratch" else None) for i in material.inspections
        ]
        write(folder, root, manifest, dataclasses.replace(material, inspections=changed))

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


def test_every_condition_of_every_product_is_on_the_page_before_any_is_there_twice():
    many = strata(1000, ("test", "cap", "good"), ("train", "cap", "good"), ("train", "cap", "dent"))
    few = strata(1, *(("test", "nut", f"kind {number}") for number in range(8)))
    chosen = choose([*many, *few], 4, 100)
    assert Counter((one.product, one.condition) for one in chosen) == Counter(
        [("cap", "good"), ("cap", "dent"), *(("nut", f"kind {number}") for number in range(8))]
    )
    assert {one.split for one in chosen if one.product == "cap"} == {"train"}
    chosen = choose([*many, *few], 20, 100)
    assert sorted(Counter((one.split, one.product, one.condition) for one in chosen).values()) == [1] * 8 + [4] * 3
    assert [one.split for one in chosen] == ["train"] * 8 + ["test"] * 12
    assert choose(few, 4, 6) == few[:6]
    assert choose([], 4, 6) == []


def test_a_sample_is_the_same_in_every_build_and_not_only_neighbours():
    many = strata(1000, ("train", "cap", "good"))
    assert choose(many, 10, 10) == choose(many, 10, 10) != many[:10]
    assert len({one.id for one in choose(many, 10, 10)}) == 10


def test_a_page_that_does_not_show_everything_says_so(built, tmp_path, monkeypatch):
    assert re.search(r"48 of \d+ cases, drawn evenly from .* every condition of every product is among", page(built))
    for most, limit, told in (
        (500, 500, r"All \d+ cases\."),
        (2, 3, r"3 of \d+ cases.* \d+ of the 15 conditions of products"),
    ):
        monkeypatch.setattr(preview, "MAX_CARDS", most)
        monkeypatch.setattr(preview, "LIMIT", limit)
        output = tmp_path / str(most)
        build(BuildConfig("synthetic", output, descriptor="skimage", k=1, parts=10))
        assert re.search(told, page(output))


def filled(path: str, shape: tuple[int, int]) -> np.ndarray:
    """The pixels whose centres lie inside an SVG path of straight lines, by the even-odd rule."""
    inside = np.zeros(shape, dtype=bool)
    for line in path.removeprefix("M").removesuffix("Z").split("ZM"):
        points = np.array([point.split() for point in line.split("L")], dtype=float)
        inside ^= polygon2mask(shape, points[:, ::-1] - 0.5)  # whose whole numbers are the pixels' centres
    return inside


def test_outlines_are_the_borders_of_the_mask():
    mask = np.zeros((60, 90), dtype=bool)
    mask[0:20, 70:90] = True  # touches two sides
    mask[disk((35, 30), 20)] = True
    mask[disk((35, 30), 8)] = False  # a hole
    mask[50, 60] = True
    path = outlines(mask)
    assert path.count("M") == path.count("Z") == 4
    assert (filled(path, mask.shape) ^ mask).sum() <= 0.01 * mask.sum()


class Page(HTMLParser):
    """The cases of a page, and which of them are shown; the roles whose targets each shows; what filters offer."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cases: dict[str, bool] = {}
        self.open: dict[str, set[str]] = {}
        self.offered: dict[str, list[str]] = {}
        self.words: list[str] = []
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
        self.words.append(data)
        if self.in_option and data.strip():
            list(self.offered.values())[-1].append(data)


def page(folder: Path) -> str:
    return (folder / "preview.html").read_text(encoding="utf-8")


def test_the_page_shows_each_roles_prompts_and_targets_of_its_cases(built):
    told = Page(page(built))
    text = "".join(told.words)
    assert len(told.cases) == 48
    for role in ROLES:
        for row in read_jsonl(built / "sft" / role / "train.jsonl", Exchange):
            if row.case in told.cases:
                for branch in row.branches:
                    assert branch.prompt in text and branch.completion in text
    for question in read_jsonl(built / "questions.jsonl", Question):
        if question.inspection in told.cases:
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


def visit(path: Path, tmp_path: Path, fragment: str = "") -> tuple[str, list[str], list[str]]:
    """A file as a browser has it after its scripts ran, what the console says, and the addresses that it asked for."""
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH; install it to test the page in a browser")
    log = tmp_path / "net.json"
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", f"--log-net-log={log}",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri() + fragment],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # The browser asks for its own updates too; what a page asks for is isolated under the page's origin.
    asked = [event["url"] for event in events if str(event.get("network_isolation_key", "")).startswith("file:")]
    return done.stdout, said, [address for address in asked if not address.startswith(("file:", "data:"))]


def browse(folder: Path, tmp_path: Path, fragment: str = "") -> Page:
    """The preview in a browser, which must have complained of nothing and asked for nothing."""
    text, said, asked = visit(folder / "preview.html", tmp_path, fragment)
    assert (said, asked) == ([], [])
    return Page(text)


def test_a_request_or_an_error_would_be_noticed_and_the_page_forbids_itself_requests(built, tmp_path):
    reach = '<img src="http://parts.invalid/x.png"><script>nothing.there()</script></body>'
    open_page, closed_page = tmp_path / "open.html", tmp_path / "closed.html"
    closed_page.write_text(page(built).replace("</body>", reach))
    open_page.write_text(re.sub("<meta http-equiv.*>", "", closed_page.read_text()))
    _, said, asked = visit(open_page, tmp_path)
    assert asked == ["http://parts.invalid/x.png"] and len(said) == 1 and "nothing is not defined" in said[0]
    _, said, asked = visit(closed_page, tmp_path)
    assert asked == [] and len(said) == 2 and any("Content Security Policy" in line for line in said)


def fitting(folder: Path, wanted: dict[str, str | None]) -> set[str]:
    """The photographs that have these values, by the records; of `role`, those with rows of it."""
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
def test_a_filter_in_the_address_leaves_the_cases_that_fit_it(built, tmp_path, fragment, wanted):
    seen = browse(built, tmp_path, fragment)
    shown = {case for case, shown in seen.cases.items() if shown}
    assert shown == set(seen.cases) & fitting(built, wanted)
    assert f"{len(shown)} of 48 shown" in "".join(seen.words)
    assert bool(shown) == ("gasket" not in fragment)
    if "role" in wanted:
        assert {case: seen.open[case] for case in shown} == {case: {wanted["role"]} for case in shown}


DRIVE = """<pre id="record"></pre><script>
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
document.getElementById("record").textContent = JSON.stringify(record);
</script></body>"""


def test_selects_and_bars_filter_and_change_the_address(built, tmp_path):
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
    driven = tmp_path / "driven.html"
    driven.write_text(page(built).replace("</body>", DRIVE.replace("STEPS", "\n".join(steps))))
    text, said, asked = visit(driven, tmp_path)
    assert (said, asked) == ([], [])
    record = json.loads(unescape(re.findall(r'<pre id="record">(.*?)</pre>', text)[0]))
    everything, wanted = set(record[-1]["shown"]), {}
    assert len(everything) == 48
    for (name, value), state in zip(chosen, record, strict=False):
        wanted = {key: word for key, word in {**wanted, name: value}.items() if word}
        assert set(state["shown"]) == everything & fitting(built, wanted)
        assert state["at"] == ("#" + urlencode(wanted) if wanted else "")
        if name == "role":
            assert state["open"] == [value]
    outlines_off, bar, reset = record[len(chosen) :]
    assert outlines_off["plain"] == "plain" and outlines_off["shown"] == record[len(chosen) - 1]["shown"]
    assert bar["at"] == "#condition=missing+bolt"
    assert set(bar["shown"]) == everything & fitting(built, {"condition": "missing bolt"})
    assert reset["at"] == reset["plain"] == "" and not any(reset["selected"])


def test_the_filters_offer_what_is_on_the_page(built, tmp_path):
    seen = browse(built, tmp_path)
    shown = [one for one in read_jsonl(built / "inspections.jsonl", Inspection) if one.id in seen.cases]
    first = {"any": 0, "good": 1}
    for name in ("product", "condition"):
        values = {"any", *(getattr(one, name) for one in shown)}
        assert seen.offered.pop(name) == sorted(values, key=lambda value: (first.get(value, 2), value))
    splits = ["any", "train", "validation", "test"]
    assert seen.offered == {"split": splits, "role": ["any", *ROLES], "synthetic": ["any", METHOD, "no"]}
