"""Draw how image quality changes the scores: `python -m evaluation.curves ABLATION_DIR --output FILE`.

ABLATION_DIR is the output of evaluation.ablate with cells that corrupt the inspected images, such as those of
recipes/tiny/curves.yaml. Each kind of corruption has a panel. Cells that differ only in the corruption form a curve
over its severity, and the cell without corruption has severity 0. The last panel compares the cells without corruption.
Bars are 95% intervals over parts.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo_ft import config as configs
from echo_ft.config import named_first, run_main
from echo_ft.errors import EchoError
from echo_ft.files import atomic_file
from echo_ft.images.corruptions import CORRUPTIONS
from echo_ft.inputs import from_dict, read_json_object

COLUMNS = 4
"""Panels in a row of the picture."""
NAME_WIDTH = 12
"""Characters of a cell's name on one line below the last panel."""
FORMATS = (".png", ".svg")
COLOURS = ("#1d5fd1", "#b4540a", "#2f7d4f", "#7a4fb0", "#59636e")


@dataclass(frozen=True)
class CurvesConfig:
    """Options of `python -m evaluation.curves`."""

    ablation: str = field(metadata={"help": "Output folder of evaluation.ablate. The flag --ablation may be omitted."})
    output: str = field(metadata={"help": f"Picture to write: a file that ends in {' or '.join(FORMATS)}."})
    figure: str = field(default="AUROC", metadata={"help": "The figure to draw, as ablation.json names it."})


@dataclass(frozen=True)
class Point:
    """One figure of a cell. `low` and `high` are None if there are too few parts for an interval."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Curve:
    """The figures of cells that differ only in the corruption."""

    name: str
    """The name of the cell without corruption."""
    clean: Point
    corrupted: Mapping[str, Mapping[int, Point]]
    """For each kind of corruption, a point for each severity."""


@dataclass(frozen=True)
class CellFigure:
    """One figure of ablation.json."""

    value: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class AblationCell:
    """What curves need of a cell of ablation.json."""

    name: str
    differs: dict[str, Any]
    figures: dict[str, CellFigure]
    corruption: str | None
    severity: int
    """0 without corruption."""


def main(argv: list[str]) -> None:
    """Draw the curves of an ablation."""
    (config,) = configs.parse([CurvesConfig], named_first(argv, "--ablation"))
    output = Path(config.output)
    if output.suffix not in FORMATS:
        raise EchoError(f"{output} must end in {' or '.join(FORMATS)}")
    source = Path(config.ablation) / "ablation.json"
    if not source.is_file():
        raise EchoError(f"there is no {source}; run python -m evaluation.ablate first")
    try:
        table = read_json_object(source)
        cells = [_read_cell(row, table["provenance"][row["name"]]) for row in table["cells"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EchoError(f"{source} is not the result of an ablation ({error})") from error
    draw_curves(read_curves(cells, config.figure, source), config.figure, output)
    print(f"wrote {output}")


def _read_cell(row: Mapping[str, Any], provenance: Mapping[str, Any]) -> AblationCell:
    """Read a cell. Its corruption comes from its run, because the shared options may name it."""
    content = {name: row[name] for name in ("name", "differs", "figures")}
    corruption = {"corruption": provenance.get("corruption"), "severity": provenance.get("severity") or 0}
    return from_dict(AblationCell, content | corruption)


def read_curves(cells: Sequence[AblationCell], figure: str, source: Path) -> list[Curve]:
    """Return a curve for each cell without corruption, in their order.

    Raises EchoError if no cell corrupts images, if a corrupted cell has no counterpart without corruption, or if a cell
    lacks the figure.
    """
    cleans = {_other_options(cell): cell for cell in cells if cell.corruption is None}
    corrupted: dict[str, dict[str, dict[int, Point]]] = {key: {} for key in cleans}
    for cell in cells:
        if cell.corruption is not None:
            key = _other_options(cell)
            if key not in cleans:
                raise EchoError(
                    f"{source}: the cell {cell.name!r} has no counterpart without corruption; add a cell with the same "
                    "other options"
                )
            corrupted[key].setdefault(cell.corruption, {})[cell.severity] = _point(cell, figure, source)
    if not any(corrupted.values()):
        raise EchoError(f"{source} has no cell with corruption; add some, as recipes/tiny/curves.yaml does")
    return [Curve(cell.name, _point(cell, figure, source), corrupted[key]) for key, cell in cleans.items()]


def _other_options(cell: AblationCell) -> str:
    """Return the options in which a cell differs from the shared ones, except for the corruption."""
    others = {key: value for key, value in cell.differs.items() if key not in ("corruption", "severity")}
    return json.dumps(others, sort_keys=True)


def _point(cell: AblationCell, figure: str, source: Path) -> Point:
    if figure not in cell.figures:
        raise EchoError(f"{source} has no figure {figure!r}; choose from {', '.join(cell.figures)}")
    found = cell.figures[figure]
    if found.value is None:
        raise EchoError(f"{source}: the cell {cell.name!r} has no {figure}; remove the cell or choose another --figure")
    return Point(found.value, *(found.interval or (None, None)))


def draw_curves(curves: Sequence[Curve], figure: str, output: Path) -> None:
    """Write the picture: a panel for each kind of corruption, and one for the cells without corruption.

    Raises EchoError if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise EchoError(f"the picture needs matplotlib ({error}); pip install 'echo-ft[pictures]'") from error

    matplotlib.use("agg")
    # Without a date and with a fixed salt, the same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "echo-ft", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    kinds = [kind for kind in CORRUPTIONS if any(kind in curve.corrupted for curve in curves)]
    rows = -(-(len(kinds) + 1) // COLUMNS)
    picture, grid = pyplot.subplots(
        rows, COLUMNS, figsize=(2.9 * COLUMNS, 2.6 * rows + 0.4), sharey=True, squeeze=False, layout="constrained"
    )
    panels = list(grid.flat)
    drawn = [(index, curve) for index, curve in enumerate(curves) if curve.corrupted]
    for kind, panel in zip(kinds, panels, strict=False):
        for place, (index, curve) in enumerate(drawn):
            points = {0: curve.clean, **dict(sorted(curve.corrupted.get(kind, {}).items()))}
            # Shift the curves against each other, so that their bars do not overlap.
            _draw(panel, [severity + 0.08 * place for severity in points], list(points.values()), index, curve.name)
        panel.set_title(kind.replace("_", " "))
        panel.set_xlabel("severity")
        panel.set_xticks(range(6))
    last = panels[len(kinds)]
    for index, curve in enumerate(curves):
        _draw(last, [index], [curve.clean], index, curve.name)
    last.set_title("clean images")
    last.set_xticks(range(len(curves)), [textwrap.fill(curve.name, NAME_WIDTH) for curve in curves], fontsize=7)
    last.margins(x=0.2)
    for panel in panels[len(kinds) + 1 :]:
        panel.set_axis_off()
    for panel in panels[: len(kinds) + 1]:
        panel.grid(color="#e2dfd8", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    for row in grid:
        row[0].set_ylabel(figure)
    picture.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(drawn), frameon=False)
    metadata = {"Date": None} if output.suffix == ".svg" else {}
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as new:
        picture.savefig(new, format=output.suffix[1:], dpi=120, metadata=metadata)
    pyplot.close(picture)


def _draw(panel: Any, places: Sequence[float], points: Sequence[Point], index: int, name: str) -> None:
    """Draw the points of the curve number `index` at `places` on the x-axis, with their intervals if they have any."""
    colour = COLOURS[index % len(COLOURS)]
    panel.plot(places, [point.value for point in points], "o-", color=colour, markersize=3.5, linewidth=1.4, label=name)
    for place, point in zip(places, points, strict=True):
        if point.low is not None:
            panel.vlines(place, point.low, point.high, color=colour, linewidth=1)


if __name__ == "__main__":
    run_main(main)
