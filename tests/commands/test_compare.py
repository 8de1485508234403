"""`evaluation.compare` reports paired differences, averages seeds, and rejects runs that cannot be compared."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from echo_ft.errors import EchoError
from echo_ft.records import QUESTION_TYPES, ROLES, Prediction
from evaluation import compare, run_groups, score
from tests.support.runs import make_run, predictions, require_self_contained, run_command


def test_compare_ends_with_the_verdict_and_writes_next_to_the_last_run(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", predictions(0.4, seed=1))
    tuned = make_run(tmp_path / "tuned", random.Random(0).sample(predictions(0.95, seed=2), 80))
    done = run_command("evaluation.compare", base, tuned)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    interval = r"\(95% interval ([\d.]+) to ([\d.]+)\)"
    found = re.fullmatch(rf"tuned is better than base by [\d.]+ points {interval} on 80 questions from 40 cases", last)
    assert found, last
    comparison = json.loads((tmp_path / "compare" / "comparison.json").read_text())
    averages = [run["figures"]["Average"]["value"] for run in comparison["runs"]]
    difference = comparison["differences"][0]["figures"]["Average"]
    assert difference["difference"] == pytest.approx(averages[1] - averages[0])
    assert 0 < difference["interval"][0] < difference["difference"] < difference["interval"][1]
    assert comparison["differences"][0]["mcnemar"]["All questions"]["p_holm"] < 0.001
    page = (tmp_path / "compare" / "compare.html").read_text()
    require_self_contained(page)
    assert all(f"&lt;b&gt;{name}" in page for name in ("crack", "echo-tiny"))


def test_roc_curves_show_the_images_that_their_auroc_covers(tmp_path: Path) -> None:
    """The base has P(defect) only for images that it gets right, so its own curve would be perfect."""
    tuned = predictions(0.6, seed=2)
    base = [
        row if row.parsed == row.answer else dataclasses.replace(row, probabilities=None)
        for row in predictions(0.6, seed=1)
    ]
    compare.main([str(make_run(tmp_path / name, rows)) for name, rows in (("base", base), ("tuned", tuned))])
    found = json.loads((tmp_path / "compare" / "comparison.json").read_text())
    page = (tmp_path / "compare" / "compare.html").read_text()
    chart = next(part for part in page.split("<figure") if "ROC curve;" in part)
    for run, points in zip(found["runs"], re.findall(r'points="([^"]+)"', chart), strict=True):
        xs, ys = zip(*(map(float, point.split(",")) for point in points.split()), strict=True)
        area = sum((x1 - x0) * (416 - y0 - y1) / 2 for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:], strict=False))
        assert area / 200**2 == pytest.approx(run["figures"]["AUROC"]["value"], abs=0.005), run["name"]


def test_seven_runs_have_seven_colours(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run{place}", predictions(0.5, seed=place)) for place in range(7)]
    compare.main([*map(str, runs), "--output", str(tmp_path / "out")])
    page = (tmp_path / "out" / "compare.html").read_text()
    header = page.partition('id="scores"')[2].partition("</thead>")[0]
    used = re.findall(r'class="key" style="background: var\((--run\d+)\)"', header)
    assert len(used) == len(set(used)) == 7
    light, dark = (dict(re.findall(r"(--run\d+): (#[0-9a-f]{6});", half)) for half in page.split("@media screen")[:2])
    for scheme in (light, dark):
        assert len({scheme[name] for name in used}) == 7


def test_a_comparison_of_local_and_served_runs_is_warned_about(tmp_path: Path) -> None:
    for name, server in (("base", None), ("tuned", None), ("served", "http://127.0.0.1:8000/v1")):
        make_run(tmp_path / name, predictions(0.7), server=server)
    compare.main([str(tmp_path / "base"), str(tmp_path / "tuned")])
    assert json.loads((tmp_path / "compare" / "comparison.json").read_text())["warnings"] == []
    compare.main([str(tmp_path / "base"), str(tmp_path / "served"), "--output", str(tmp_path / "other")])
    (warning,) = json.loads((tmp_path / "other" / "comparison.json").read_text())["warnings"]
    assert warning.startswith("a server answered served but not base; a local run reads letters from float32 logits")


def test_runs_of_older_versions_without_some_keys_can_be_compared(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", predictions(0.5))
    newer = make_run(tmp_path / "newer", predictions(0.7), server_model=None, answer="generate")
    compare.main([str(base), str(newer)])
    page = (tmp_path / "compare" / "compare.html").read_text()
    differing, same = page.split("Values that differ between the runs:")[1].split("Values that are the same")
    assert "answer" in differing
    assert "server_model" in same


def test_compare_and_score_give_the_same_scores(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, predictions(0.7, seed)) for seed, name in enumerate(["a", "b", "c"])]
    compare.main([*map(str, folders), "--output", str(tmp_path / "out")])
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [one["run"] for one in comparison["differences"]] == ["b", "c"]
    for folder, run in zip(folders, comparison["runs"], strict=True):
        score.main([str(folder)])
        report = json.loads((folder / "report.json").read_text())
        assert run["figures"]["Average"]["value"] == report["tables"]["strict"]["Average"]["Average"]
        assert run["figures"]["Average"]["interval"] == report["intervals"]["strict"]["Average"]["Average"]
        assert run["figures"]["AUROC"]["interval"] == report["detection"]["All"]["intervals"]["auroc"]
        parts = report["alarms"]["All"]["answers"]["parts"]
        escapes = run["figures"]["Escapes, parts"]
        assert escapes["value"] == pytest.approx(100 * parts["escapes"])
        assert escapes["interval"] == pytest.approx([100 * bound for bound in parts["intervals"]["escapes"]])


def test_runs_of_several_seeds_are_shown_as_mean_and_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_run(tmp_path / "base", predictions(0.4, seed=9))
    seeds = [make_run(tmp_path / f"seed{seed}", predictions(0.9, seed)) for seed in range(3)]
    compare.main([str(base), f"tuned={','.join(map(str, seeds))}", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    single, tuned = comparison["runs"]
    assert (tuned["name"], tuned["members"]) == ("tuned", ["seed0", "seed1", "seed2"])
    assert tuned["counts"]["questions"] == 240
    assert comparison["questions"] == 80
    figure, values = tuned["figures"]["Average"], []
    for folder in seeds:
        score.main([str(folder)])
        values.append(json.loads((folder / "report.json").read_text())["tables"]["strict"]["Average"]["Average"])
    assert figure["values"] == pytest.approx(values)
    assert figure["runs"] == 3
    mean, deviation = sum(values) / 3, statistics.stdev(values)
    assert (figure["value"], figure["standard_deviation"]) == pytest.approx((mean, deviation))
    assert figure["interval"][0] < mean < figure["interval"][1]
    assert single["figures"]["Average"]["standard_deviation"] is None
    difference = comparison["differences"][0]
    assert difference["figures"]["Average"]["difference"] == pytest.approx(mean - single["figures"]["Average"]["value"])
    assert difference["mcnemar"] == {}
    assert re.search(rf"Average +.* {mean:.1f} +{deviation:.1f} +[\d.]+ to [\d.]+\n", printed)
    assert printed.splitlines()[-1].startswith("tuned (3 runs) is better than base by ")
    page = (tmp_path / "out" / "compare.html").read_text()
    require_self_contained(page)
    assert f"mean of 3, sd {deviation:.1f}" in page
    assert page.count("<polyline") == 8, "a ROC curve and a reliability curve per run"


def test_runs_that_were_trained_only_once_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The interval of a single training says nothing about another seed."""

    def run(name: str, fingerprint: str, seed: int = 0) -> str:
        adapters = {ROLES[0]: {"fingerprint": fingerprint}}
        return str(make_run(tmp_path / name, predictions(0.7, seed), adapters=adapters))

    base = str(make_run(tmp_path / "base", predictions(0.4)))
    tuned, other, same = run("tuned", "f00d"), run("other", "beef", 1), run("same", "f00d", 2)
    compared = [
        ([base, tuned], "tuned was trained only once, so the intervals leave out what another seed would change"),
        ([tuned, other], "tuned and other were trained only once, so"),
        ([tuned, same], ""),
        ([base, f"group={tuned},{other}"], ""),
    ]
    for place, (folders, note) in enumerate(compared):
        output = tmp_path / f"out{place}"
        compare.main([*folders, "--output", str(output)])
        found = json.loads((output / "comparison.json").read_text())["note"]
        assert found.startswith(note)
        assert bool(found) == bool(note)
        assert ("trained only once" in capsys.readouterr().out) == bool(note)
        assert ("trained only once" in (output / "compare.html").read_text()) == bool(note)


def test_the_interval_of_several_runs_includes_their_variation(tmp_path: Path) -> None:
    """Compare three very different runs on the same images with three equal runs that have the same mean."""
    base = make_run(tmp_path / "base", predictions(0.7, seed=9))
    widths = []
    for name, skills in (("alike", (0.7, 0.7, 0.7)), ("apart", (0.4, 0.7, 1.0))):
        folders = [make_run(tmp_path / f"{name}{place}", predictions(skill)) for place, skill in enumerate(skills)]
        compare.main([str(base), ",".join(map(str, folders)), "--output", str(tmp_path / name)])
        found = json.loads((tmp_path / name / "comparison.json").read_text())["runs"][1]
        assert found["name"] == f"{name}0, {name}1, {name}2"
        widths.append(found["figures"]["Average"]["interval"])
    assert widths[1][1] - widths[1][0] > 1.5 * (widths[0][1] - widths[0][0])


def test_runs_with_different_setups_cannot_form_a_group(tmp_path: Path) -> None:
    adapters = {role: {"fingerprint": "beef"} for role in ROLES}
    base, one = (make_run(tmp_path / name, predictions(0.5), adapters=adapters) for name in ("base", "one"))
    for key, value, message in (
        ("routing", "paper", "None and paper"),
        ("corruption", "blur", "None and blur"),
        ("severity", 3, "None and 3"),
        ("adapters", {}, "decision_maker, knowledge_guide, reasoning_expert, reference_extractor and none"),
        ("adapters", {"decision_maker": {"fingerprint": "f00d"}}, "reference_extractor and decision_maker"),
    ):
        other = make_run(tmp_path / "other", predictions(0.5), **{"adapters": adapters, key: value})
        with pytest.raises(EchoError, match=f"one and other cannot be one group: their {key} differs .*{message}"):
            compare.main([str(base), f"{one},{other}"])
    logits = make_run(tmp_path / "logits", predictions(0.5), adapters=adapters, answer="logits")
    with pytest.raises(EchoError, match="one and logits cannot be one group: their answer differs"):
        compare.main([str(base), f"{one},{logits}", "--compared", "answer"])
    again = make_run(tmp_path / "again", predictions(0.6), adapters={**adapters, ROLES[0]: {"fingerprint": "f00d"}})
    compare.main([str(base), f"{one},{again}"])
    with pytest.raises(EchoError, match="two of the groups base, base have the same name"):
        compare.main([str(base), f"base={one}"])
    with pytest.raises(EchoError, match="two or more runs"):
        compare.main([f"{base},{one}"])


def test_a_folder_name_may_contain_commas_and_equals_signs(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, predictions(0.5)) for name in ("rate=1e-4,seed=0", "rate=2e-4,seed=0")]
    compare.main([*map(str, folders), "--output", str(tmp_path / "out")])
    named = [run["name"] for run in json.loads((tmp_path / "out" / "comparison.json").read_text())["runs"]]
    assert named == [folder.name for folder in folders]


def test_a_run_is_not_better_than_its_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make_run(tmp_path / name, predictions(0.7)) for name in ("one", "two")]
    compare.main([*map(str, folders)])
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .startswith("two and one cannot be told apart: the difference is +0.0 points (95% interval -8.8 to +8.8)")
    )


def test_many_images_of_one_part_give_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [dataclasses.replace(row, group="one") for row in predictions(1.0)]
    wrong = [dataclasses.replace(row, parsed={"A": "B", "B": "A", "C": "A"}[row.answer]) for row in rows]
    compare.main([str(make_run(tmp_path / "base", wrong)), str(make_run(tmp_path / "tuned", rows))])
    printed = capsys.readouterr().out
    assert "tuned and base cannot be told apart: the difference is +100.0 points" in printed
    assert "fewer than 5 parts gives no interval" in printed
    assert "better" not in printed
    found = json.loads((tmp_path / "compare" / "comparison.json").read_text())
    assert all(figure["interval"] is None for figure in found["differences"][0]["figures"].values())


def test_the_verdict_counts_only_the_questions_that_it_covers(tmp_path: Path) -> None:
    """MMAD's average leaves out other types, and the mean of other types rests on the rarest one."""

    def verdict(name: str, count: int, answered: list[Prediction], other: list[Prediction]) -> str:
        rare = [dataclasses.replace(row, kind="Riddle") for row in other[:count]]
        folders = [
            make_run(tmp_path / name / one, [*rows, *rare])
            for one, rows in (
                ("base", answered),
                ("tuned", [dataclasses.replace(row, parsed=None) for row in answered]),
            )
        ]
        compare.main([*map(str, folders)])
        found = json.loads((tmp_path / name / "compare" / "comparison.json").read_text())
        assert found["questions"] == len(answered) + count
        return found["differences"][0]["verdict"]

    mmads, others = predictions(1.0, images=20), predictions(0.5, images=40)[40:]
    assert verdict("mmad", 6, mmads, others).endswith("on 40 questions from 20 cases")
    puzzles = [dataclasses.replace(row, kind="Puzzle") for row in mmads]
    assert verdict("other", 4, puzzles, others).endswith(
        "on 44 questions from 22 cases, and a question type with fewer than 5 parts gives no interval"
    )


def test_a_comparison_of_other_runs_is_not_replaced_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def warned(*names: str, options: tuple[str, ...] = ()) -> bool:
        compare.main([*(str(tmp_path / name) for name in names), *options])
        return f"the comparison of base, tuned in {tmp_path / 'compare'} was replaced;" in capsys.readouterr().err

    for seed, name in enumerate(("base", "tuned", "other")):
        make_run(tmp_path / name, predictions(0.7, seed, images=10))
    assert not warned("base", "tuned")
    assert not warned("tuned", "base"), "the same runs"
    assert not warned("base", "tuned", options=("--images", "none"))
    assert not warned("base", "other", options=("--output", str(tmp_path / "compare other")))
    assert warned("base", "other")
    found = json.loads((tmp_path / "compare" / "comparison.json").read_text())
    assert [run["name"] for run in found["runs"]] == ["base", "other"]


def test_the_verdict_says_if_a_run_is_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make_run(tmp_path / name, predictions(skill)) for name, skill in (("good", 1.0), ("bad", 0.2))]
    compare.main([*map(str, folders)])
    assert "bad is worse than good by " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (predictions(0.5), {"dataset_fingerprint": "beef"}, "dataset_fingerprint differs.*f00d and beef"),
        (predictions(0.5), {"split": "validation"}, "split differs.*test and validation"),
        (predictions(0.5)[:-1], {}, "1 questions are only in the first run and 0 only in the second"),
        ([dataclasses.replace(row, answer="B") for row in predictions(0.5)], {}, "the answer of question .* differs"),
        ([dataclasses.replace(row, group="one") for row in predictions(0.5)], {}, "the part of question .* differs"),
    ],
)
def test_runs_with_different_questions_are_not_compared(
    tmp_path: Path, rows: list[Prediction], changes: dict[str, Any], message: str
) -> None:
    base, other = make_run(tmp_path / "base", predictions(0.5)), make_run(tmp_path / "other", rows, **changes)
    with pytest.raises(EchoError, match=f"base and other cannot be compared: .*{message}"):
        compare.main([str(base), str(other)])


def test_equal_folder_names_are_made_distinct_and_duplicates_refused(tmp_path: Path) -> None:
    assert run_groups.run_names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    with pytest.raises(EchoError, match="given twice"):
        run_groups.run_names([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_compare_logs_its_table_to_an_offline_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [make_run(tmp_path / name, predictions(skill)) for name, skill in (("base", 0.4), ("tuned", 0.9))]
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    compare.main([*map(str, folders), "--report_to", "wandb"])
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_runs_without_mmads_types_are_compared_by_the_mean_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = dict(zip(QUESTION_TYPES[:2], ("Puzzle", "Riddle"), strict=True))
    folders = [
        make_run(
            tmp_path / name, [dataclasses.replace(row, kind=kinds[row.kind]) for row in predictions(skill, images=60)]
        )
        for name, skill in (("weak", 0.2), ("strong", 0.9))
    ]
    compare.main([str(folder) for folder in folders])
    comparison = json.loads((tmp_path / "compare" / "comparison.json").read_text())
    assert comparison["headline"] == "Average of other types"
    _, strong = (run["figures"] for run in comparison["runs"])
    assert strong["Average"]["value"] is None
    mean = statistics.mean(strong[kind]["value"] for kind in kinds.values())
    assert strong["Average of other types"]["value"] == pytest.approx(mean)
    (difference,) = comparison["differences"]
    low, high = difference["figures"]["Riddle"]["interval"]
    assert 20 < low < difference["figures"]["Riddle"]["difference"] < high <= 100
    assert set(difference["mcnemar"]) == {"All questions", *kinds.values()}
    assert difference["mcnemar"]["All questions"]["only_run"] > 50
    assert "strong is better than weak by" in capsys.readouterr().out
    page = (tmp_path / "compare" / "compare.html").read_text()
    assert re.search(r'<tr class="total"><th scope="row">Average of other types', page)
    score.main([str(folders[1])])
    printed, page = capsys.readouterr().out, (folders[1] / "report.html").read_text()
    assert re.search(r"Riddle +\d+\.\d +\d+\.\d to \d+\.\d +60 +0 +0", printed)
    assert "Other question types" in page
    assert "By question type" not in page, "there is no question of MMAD's types"
    assert "Average of other types, %" in page
    products = json.loads((folders[1] / "report.json").read_text())["products"]
    means = [product["other_types"]["strict"] for product in products.values()]
    counts = [product["questions"] for product in products.values()]
    total = sum(share * count for share, count in zip(means, counts, strict=True)) / sum(counts)
    assert total == pytest.approx(mean), "both types are asked about every image"
    assert json.loads((folders[1] / "answers.json").read_text()) == []
