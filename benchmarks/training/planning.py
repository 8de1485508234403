"""Measure planning of a large dataset before step 1: `python -m benchmarks.training.planning [--cases 100000]`.

The rows are those of the decision maker: one exchange of two images and five questions per case. Every case has its own
files, which are links to a few drawn images. Reading an image header takes the same time for every link. Decoding all
images would take hours. The benchmark prints the time and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

from benchmarks.training.workload import MODEL, Workload, make_exchanges

DRAWN_CASES = 100
"""Distinct cases. All other cases repeat them with other file names and questions."""


def write_rows(folder: Path, cases: int) -> Path:
    """Write the rows and images of `cases` cases; returns the path of the rows."""
    drawn = make_exchanges(folder, Workload(DRAWN_CASES, 5, 1))
    path = folder / "train.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for case in range(cases):
            first = drawn[case % DRAWN_CASES]
            images = [f"{case}_{name}" for name in first.images]
            for name, image in zip(first.images, images, strict=True):
                os.link(folder / name, folder / image)
            branches = [
                {
                    "id": f"{case}#{branch.id}",
                    "prompt": branch.prompt.replace("mark number", f"mark number {case} or"),
                    "completion": branch.completion,
                }
                for branch in first.branches
            ]
            row = {
                "role": first.role,
                "case": str(case),
                "images": images,
                "context": first.context,
                "branches": branches,
                "prompt_version": first.prompt_version,
            }
            file.write(json.dumps(row) + "\n")
    return path


def main() -> None:
    """Write the rows, plan them and print the cost."""
    from echo_ft.files import read_jsonl
    from echo_ft.model.loading import load_processor
    from echo_ft.model.rows import RowBuilder
    from echo_ft.records import Exchange
    from echo_ft.training.planning import plan

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="Cases to plan.")
    cases = parser.parse_args().cases
    with tempfile.TemporaryDirectory() as name:
        path = write_rows(Path(name), cases)
        row_builder = RowBuilder(load_processor(MODEL, None, 784, 448 * 448))
        start = time.monotonic()
        planned = plan(row_builder, read_jsonl(path, Exchange), path.parent, max_tokens=32768)
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{cases} cases planned in {seconds:.1f} s, peak memory {peak:.2f} GiB: {planned.summary()}")


if __name__ == "__main__":
    main()
