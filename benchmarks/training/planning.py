"""Planning a large dataset before step 1: `python -m benchmarks.training.planning [--cases 100000]`.

Rows as the decision maker's, one exchange of two images and five questions a case, every case with its own files. A
few drawn images are linked under all those names: reading a header takes a file its own time, decoding would show as
hours. Prints the time and the largest memory of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

from benchmarks.training.workload import MODEL, Workload, exchanges

DRAWN = 100
"""Different cases; the others are these again, under names and with questions of their own."""


def write_rows(folder: Path, cases: int) -> Path:
    """The dataset file of so many cases, and their images."""
    drawn = exchanges(folder, Workload(DRAWN, 5, 1))
    path = folder / "train.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for case in range(cases):
            first = drawn[case % DRAWN]
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
    """Write, plan, print."""
    from echo_ft.files import read_jsonl
    from echo_ft.model.loading import load_processor
    from echo_ft.model.rows import RowBuilder
    from echo_ft.records import Exchange
    from echo_ft.training.planning import plan

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    cases = parser.parse_args().cases
    with tempfile.TemporaryDirectory() as name:
        path = write_rows(Path(name), cases)
        row_builder = RowBuilder(load_processor(MODEL, None, 784, 448 * 448))
        start = time.monotonic()
        planned = plan(row_builder, read_jsonl(path, Exchange), path.parent, max_tokens=32768)
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{cases} cases planned in {seconds:.1f} s, {peak:.2f} GiB at most: {planned.summary()}")


if __name__ == "__main__":
    main()
