"""Export a run for review in other tools: `python -m evaluation.export_review RUN_DIR --format FORMAT --output DIR`.

| format | files | opens in |
|---|---|---|
| `labelstudio` | tasks.json, config.xml | Label Studio |
| `coco` | instances.json | CVAT, Roboflow, pycocotools and others |
| `fiftyone` | samples.json, metadata.json | FiftyOne |

Every image has its truth as annotations, and its reference, the words of each expert, P(defect), the answers and tags.
Images without a condition have no annotation, and COCO cannot hold them.
The files refer to the images instead of copying them. `data_prep.build --corrections FILE` reads corrected files of the
first two formats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from echo_ft import config as configs
from echo_ft.config import named_first
from echo_ft.errors import EchoError
from echo_ft.files import atomic_folder
from echo_ft.images.decode import image_size
from echo_ft.inputs import FRAME
from echo_ft.metrics.loading import load_run
from echo_ft.records import UNLABELLED
from echo_ft.terminal import LOGGER
from evaluation.review import TAGS, ReviewCase, review_cases, run_dataset
from evaluation.review_formats import FORMATS


@dataclass(frozen=True)
class ReviewConfig:
    """Options of `python -m evaluation.export_review`."""

    run: str = field(metadata={"help": "Run folder, written by evaluation.run. The flag --run may be omitted."})
    format: str = field(metadata={"help": "Tool to export to.", "choices": [*FORMATS]})
    output: str | None = field(
        default=None,
        metadata={"help": "Folder to write. It must not exist. Default: `review_FORMAT` in the run folder."},
    )
    tags: list[str] = field(
        default_factory=list,
        metadata={"help": "Export only images with one of these tags. Default: all images.", "choices": [*TAGS]},
    )


def main(argv: list[str]) -> None:
    """Write the files of the format and print how many images have which tag."""
    (config,) = configs.parse([ReviewConfig], named_first(argv, "--run"))
    run = load_run(Path(config.run), keep_unlabelled=True)
    dataset = run_dataset(run)
    cases = [case for case in review_cases(run, dataset) if not config.tags or {*config.tags} & {*case.tags}]
    if not cases:
        raise EchoError(f"no image of {config.run} has a tag of {', '.join(config.tags)}; give other tags, or none")
    framed = next((one for case in cases if FRAME.fullmatch(one := case.inspection.image)), None)
    if framed:
        raise EchoError(f"{framed} is a frame of a file, which other tools cannot show; build from PNG files instead")
    unlabelled = sum(case.inspection.condition == UNLABELLED for case in cases)
    if unlabelled and config.format == "coco":
        raise EchoError(
            f"{unlabelled} images of {config.run} have no condition, but in COCO an image without annotations is good; "
            "use --format labelstudio or fiftyone"
        )
    output = Path(config.output or run.folder / f"review_{config.format}")
    if output.exists():
        raise EchoError(f"{output} already exists; choose another --output or delete it")
    cases = readable_cases(cases, dataset.root)
    with atomic_folder(output) as folder:
        FORMATS[config.format](folder, cases, dataset.root, run.folder.resolve().name)
    counts = Counter(tag for case in cases for tag in case.tags)
    tagged = ", ".join(f"{counts[tag]} {tag}" for tag in TAGS if counts[tag]) or "none tagged"
    print(f"{len(cases)} images ({tagged}) for {config.format} in {output}; images are in {dataset.root}")


def readable_cases(cases: Sequence[ReviewCase], root: Path) -> list[ReviewCase]:
    """Return the cases whose image a tool can show, and warn about the others. Raises EchoError if there are none."""
    found, problems = [], []
    for case in cases:
        try:
            image_size(root / case.inspection.image)
            found.append(case)
        except EchoError as error:
            problems.append(str(error))
    if not found:
        raise EchoError(f"none of the {len(cases)} images can be read (first: {problems[0]})")
    if problems:
        LOGGER.warning(f"{len(problems)} images cannot be read and are left out (first: {problems[0]})")
    return found


if __name__ == "__main__":
    configs.run_main(main)
