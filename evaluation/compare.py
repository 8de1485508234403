"""Compare runs on the same questions: `python -m evaluation.compare BASELINE_DIR RUN_DIR ...`.

To compare the mean of several runs, such as runs with different seeds, join them with commas:

    python -m evaluation.compare BASELINE_DIR tuned=SEED_0_DIR,SEED_1_DIR,SEED_2_DIR

Writes comparison.json and compare.html. Prints the scores of each run or group, the paired differences from the first
one with intervals, and one sentence per difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo_ft import config as configs
from echo_ft.config import named_first
from echo_ft.errors import EchoError
from echo_ft.files import write_json, write_text
from echo_ft.inputs import read_json_object
from echo_ft.metrics.comparison import build_comparison
from echo_ft.metrics.grounding.comparison import compare_boxes
from echo_ft.terminal import LOGGER
from echo_ft.tracking import REPORT_TO
from evaluation.case_images import IMAGE_CHOICES, IMAGES_HELP, ImageStore
from evaluation.pages import compare_page
from evaluation.run_groups import PROTOCOL, read_groups
from evaluation.terminal import print_comparison
from evaluation.wandb_log import log_comparison


@dataclass(frozen=True)
class CompareConfig:
    """Options of `python -m evaluation.compare`."""

    runs: list[str] = field(
        metadata={
            "help": "Run folders, or W&B runs that evaluation.score has logged (entity/project/id), the baseline "
            "first. The flag --runs may be omitted. Commas join runs into a group, which may have a name: "
            "tuned=SEED_0_DIR,SEED_1_DIR."
        }
    )
    compared: list[str] = field(
        default_factory=list,
        metadata={"help": "Parts of the protocol that may differ between the runs.", "choices": list(PROTOCOL)},
    )
    output: str | None = field(
        default=None, metadata={"help": "Output folder. Default: `compare` next to the last run."}
    )
    images: str = field(default="auto", metadata={"help": IMAGES_HELP, "choices": list(IMAGE_CHOICES)})
    report_to: str = field(default="none", metadata=REPORT_TO)


def main(argv: list[str]) -> None:
    """Load the runs, check that they can be compared, write the comparison, and print it."""
    (config,) = configs.parse([CompareConfig], named_first(argv, "--runs"))
    if len(config.runs) < 2:
        raise EchoError("give two or more runs, the baseline first: python -m evaluation.compare BASE_DIR TUNED_DIR")
    groups = read_groups(config.runs, config.compared)
    comparison = build_comparison(groups) | {"boxes": compare_boxes(groups)}
    output = Path(config.output) if config.output else groups[-1].runs[-1].folder.resolve().parent / "compare"
    output.mkdir(parents=True, exist_ok=True)
    replaced = replaced_runs(output / "comparison.json", comparison) if config.output is None else []
    write_json(output / "comparison.json", comparison)
    images = ImageStore(output / "compare.html", config.images)
    write_text(output / "compare.html", compare_page(comparison, groups, images))
    print(f"wrote comparison.json, compare.html to {output}\n")
    for warning in comparison["warnings"]:
        LOGGER.warning(warning)
    if replaced:
        LOGGER.warning(
            f"the comparison of {', '.join(replaced)} in {output} was replaced; to keep both, repeat it with another "
            "--output"
        )
    print_comparison(comparison)
    if config.report_to == "wandb":
        log_comparison(comparison, groups, output, config)


def replaced_runs(path: Path, comparison: Mapping[str, Any]) -> list[str]:
    """Return the names of the runs in the comparison at `path` if they are others than those of `comparison`."""
    try:
        before, now = (_members(one) for one in (read_json_object(path), comparison))
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it was changed by hand
        return []
    return before if set(before) != set(now) else []


def _members(comparison: Mapping[str, Any]) -> list[str]:
    return [str(name) for run in comparison["runs"] for name in run["members"]]


if __name__ == "__main__":
    configs.run_main(main)
