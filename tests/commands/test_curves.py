"""The command draws the figures of an ablation over the severity of each corruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from echo_ft import config as configs
from echo_ft.errors import EchoError
from echo_ft.images.corruptions import CORRUPTIONS, SEVERITIES
from evaluation import ablate, curves
from evaluation.config import RunConfig
from evaluation.curves import Curve, Point
from tests.conftest import ROOT


def cell(name: str, value: float | None, **differs: Any) -> dict[str, Any]:
    """A cell of ablation.json, with the entries that curves do not need."""
    interval = None if value is None else [value - 0.05, value + 0.03]
    figures = {"AUROC": {"value": value, "interval": interval}, "average": {"value": 50.0, "interval": None}}
    return {"name": name, "differs": differs, "figures": figures, "run": name, "seconds": 3.0}


CELLS = [
    cell("tuned", 0.95),
    cell("blur 5", 0.6, corruption="blur", severity=5),
    cell("blur 1", 0.9, corruption="blur", severity=1),
    cell("hardened", 0.94, adapters="runs/hardened"),
    cell("hardened, motion", 0.8, adapters="runs/hardened", corruption="motion", severity=2),
    cell("without reference", 0.7, reference="none"),
]


def write_ablation(folder: Path, cells: list[dict[str, Any]], **shared: Any) -> list[str]:
    options = {"corruption": None, "severity": None, **shared}
    provenance = {one["name"]: {**options, **one.get("differs", {})} for one in cells}
    table = {"baseline": "tuned", "cells": cells, "provenance": provenance}
    (folder / "ablation.json").write_text(json.dumps(table))
    return [str(folder), "--output", str(folder / "pictures" / "curves.svg")]


def read(
    folder: Path, cells: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, *more: str, **shared: Any
) -> list[Curve]:
    """The curves that the command draws."""
    drawn: list[Curve] = []
    monkeypatch.setattr(curves, "draw_curves", lambda found, figure, output: drawn.extend(found))
    curves.main([*write_ablation(folder, cells, **shared), *more])
    return drawn


def test_cells_that_differ_only_in_the_corruption_form_a_curve(tmp_path, monkeypatch):
    tuned, hardened, without = read(tmp_path, CELLS, monkeypatch)
    assert (tuned.name, hardened.name, without.name) == ("tuned", "hardened", "without reference")
    assert tuned.clean == Point(0.95, 0.95 - 0.05, 0.95 + 0.03)
    assert {severity: point.value for severity, point in tuned.corrupted["blur"].items()} == {1: 0.9, 5: 0.6}
    assert hardened.corrupted == {"motion": {2: Point(0.8, 0.8 - 0.05, 0.8 + 0.03)}}
    assert not without.corrupted


def test_the_corruption_may_be_a_shared_option(tmp_path, monkeypatch):
    cells = [cell("clean", 0.9, corruption=None, severity=None), cell("1", 0.8, severity=1), cell("2", 0.7, severity=2)]
    (curve,) = read(tmp_path, cells, monkeypatch, corruption="blur")
    assert (curve.name, curve.clean.value) == ("clean", 0.9)
    assert {severity: point.value for severity, point in curve.corrupted["blur"].items()} == {1: 0.8, 2: 0.7}
    cells = [cell("clean", 0.9, severity=None), cell("blurred", 0.6, corruption="blur")]
    (curve,) = read(tmp_path, cells, monkeypatch, severity=3)
    assert curve.corrupted["blur"][3].value == 0.6


def test_a_cell_has_one_colour_in_all_panels(tmp_path, monkeypatch):
    colours: dict[str, set[int]] = {}
    monkeypatch.setattr(
        curves, "_draw", lambda _panel, _places, _points, index, name: colours.setdefault(name, set()).add(index)
    )
    cells = [cell("base", 0.5, adapters=None), *CELLS]
    found = [curves._read_cell(one, one["differs"]) for one in cells]
    curves.draw_curves(curves.read_curves(found, "AUROC", tmp_path), "AUROC", tmp_path / "curves.svg")
    assert colours == {"base": {0}, "tuned": {1}, "hardened": {2}, "without reference": {3}}


def test_another_figure_is_drawn_by_choice(tmp_path, monkeypatch):
    tuned, *_ = read(tmp_path, CELLS, monkeypatch, "--figure", "average")
    assert tuned.clean == Point(50.0, None, None)


def test_the_picture_has_a_panel_per_corruption_and_is_reproducible(tmp_path):
    command = write_ablation(tmp_path, CELLS)
    curves.main(command)
    picture = Path(command[-1]).read_text()
    for text in ("blur", "motion", "clean images", "severity", "AUROC", "tuned", "hardened"):
        assert f">{text}</text>" in picture
    assert ">noise</text>" not in picture
    curves.main(command)
    assert Path(command[-1]).read_text() == picture


@pytest.mark.parametrize(
    ("cells", "more", "message"),
    [
        (CELLS[:1], [], "has no cell with corruption; add some"),
        (CELLS[1:], [], "the cell 'blur 5' has no counterpart without corruption; add a cell with the same other"),
        ([cell("tuned", None), *CELLS[1:]], [], "the cell 'tuned' has no AUROC; remove the cell or choose another"),
        (CELLS, ["--figure", "recall"], "has no figure 'recall'; choose from AUROC, average"),
        ([{"name": "tuned"}], [], "is not the result of an ablation"),
        (CELLS, ["--output", "curves.pdf"], r"curves.pdf must end in .png or .svg"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, cells, more, message):
    with pytest.raises(EchoError, match=message):
        curves.main([*write_ablation(tmp_path, cells), *more])


def test_a_folder_without_an_ablation_is_refused(tmp_path):
    with pytest.raises(EchoError, match=r"there is no .*ablation.json; run python -m evaluation.ablate first"):
        curves.main([str(tmp_path), "--output", str(tmp_path / "curves.png")])


def test_the_recipe_has_every_severity_for_both_sets_of_adapters():
    recipe = str(ROOT / "recipes" / "tiny" / "curves.yaml")
    shared, ablation = configs.parse([RunConfig, ablate.AblationConfig], ["--config", recipe])
    cells = ablate.read_cells(shared, ablation)
    assert len({cell.config.output for cell in cells}) == len(cells), "no two have the same settings"
    names = [f"{kind} {level}" for kind in CORRUPTIONS for level in SEVERITIES]
    degraded = ["degraded training", *(f"degraded training, {name}" for name in names)]
    assert [cell.name for cell in cells] == ["tuned", *names, *degraded, "scratch is known", "scratch is new"]
    corrupted = [
        (cell.config.adapters, cell.config.corruption, cell.config.severity)
        for cell in cells
        if cell.config.corruption is not None
    ]
    adapters = ("runs/demo/adapters", "runs/demo_degraded/adapters")
    assert corrupted == [(trained, kind, level) for trained in adapters for kind in CORRUPTIONS for level in SEVERITIES]
