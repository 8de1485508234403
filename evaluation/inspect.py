"""Inspect images with a bundle or with trained adapters: `python -m evaluation.inspect IMAGE_OR_FOLDER --bundle DIR`.

Prints one line per image: the verdict, P(defect) against the threshold, and what the experts say. The exit status is 3
if an image of a folder was not inspected, or else 1 if an image was flagged, or else 0.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from echo_ft import config as configs
from echo_ft.config import named_first
from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import BackendError
from echo_ft.experts.roles import one_line
from echo_ft.files import to_json
from echo_ft.images.snapshot import list_images
from echo_ft.inference.inspector import Inspector, Result
from echo_ft.inference.watch import FolderWatch, RejectedResultError, check_webhook, post
from echo_ft.inputs import image_file
from echo_ft.terminal import LOGGER, printable
from evaluation import inspection_page

HOST, PORT = "127.0.0.1", 7860
"""The default address of the page."""


@dataclass(frozen=True)
class InspectConfig:
    """Options of `python -m evaluation.inspect`."""

    images: str | None = field(
        default=None, metadata={"help": "An image, or a folder of images. The flag --images may be omitted."}
    )
    watch: str | None = field(
        default=None,
        metadata={
            "help": "Instead of images: a folder to watch for new images until Ctrl-C. Each image is inspected once."
        },
    )
    serve: bool = field(
        default=False,
        metadata={"help": "Instead of images: serve a page until Ctrl-C, on which you can drop images. Needs Gradio."},
    )
    host: str | None = field(
        default=None,
        metadata={
            "help": f"With --serve: address of the page. Everyone who can reach it can use the page. Default: {HOST}."
        },
    )
    port: int | None = field(
        default=None, metadata={"help": f"With --serve: port of the page. 0 selects a free one. Default: {PORT}."}
    )
    webhook: str | None = field(
        default=None, metadata={"help": "URL to which each result is posted as JSON. Redirects are not followed."}
    )
    bundle: str | None = field(
        default=None,
        metadata={
            "help": "Bundle written by `train.export`. It has everything that an inspection needs, except the base "
            "model."
        },
    )
    adapters: str | None = field(
        default=None,
        metadata={"help": "Instead of a bundle: folder with one adapter per role, written by train/sft.py."},
    )
    server: str | None = field(
        default=None,
        metadata={
            "help": "URL of an OpenAI-compatible server that has the adapters of the bundle, http://HOST:PORT/v1."
        },
    )
    server_timeout: float = field(default=300.0, metadata={"help": "With --server: timeout of a request in seconds."})
    base_model: str | None = field(
        default=None, metadata={"help": "With a bundle: current folder of the base model. Default: as in the bundle."}
    )
    product: str | None = field(
        default=None,
        metadata={"help": "Product in the images. Default: that of the most similar normal image."},
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "With adapters: dataset with the normal references. Default: the training dataset."},
    )
    calibration: str | None = field(
        default=None,
        metadata={"help": "With adapters: report.json of a run with them, for its options, temperature and threshold."},
    )
    threshold: float | None = field(
        default=None,
        metadata={
            "help": "P(defect) at which an image is flagged, from 0 to 1. Default: the calibrated one, or else 0.5."
        },
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON object per image."})


def main(argv: list[str]) -> None:
    """Inspect the images and print the results. Exits with 1 or 3 as `inspect_images` says."""
    arguments = named_first(argv, "--images")
    require_one_path(arguments)
    (config,) = configs.parse([InspectConfig], arguments)
    if [config.images is not None, config.watch is not None, config.serve].count(True) != 1:
        raise EchoError("give images, a folder to watch, or --serve: IMAGE_OR_FOLDER, --watch FOLDER or --serve")
    for name in ("webhook", "product", "json") if config.serve else ("host", "port"):
        value = getattr(config, name)
        if value is not None and value is not False:
            raise EchoError(f"--{name} cannot be used {'with' if config.serve else 'without'} --serve; remove it")
    if config.serve:
        host, port = config.host or HOST, PORT if config.port is None else config.port
        inspection_page.serve(lambda: load_inspector(config), host, port)
        return
    if config.webhook is not None:
        check_webhook(config.webhook)
    with only_results() if config.json else nullcontext():
        if config.watch is not None:
            with FolderWatch(Path(config.watch)) as watch:
                inspect_new(watch, load_inspector(config), config)
        elif status := inspect_images(Path(str(config.images)), config):
            sys.exit(status)


def require_one_path(arguments: Sequence[str]) -> None:
    """Raise EchoError if `--images` has several values, as when a shell replaces `*.png` by all names."""
    start = arguments.index("--images") + 1 if "--images" in arguments else len(arguments)
    given = [*takewhile(lambda argument: not argument.startswith("-"), arguments[start:])]
    if len(given) > 1:
        raise EchoError(
            f"{len(given)} images or folders are given ({given[0]}, {given[1]}{', ...' if given[2:] else ''}); "
            "give one image, or the folder that contains the images, and quote a path that contains spaces"
        )


@contextmanager
def only_results() -> Iterator[None]:
    """Keep progress off stdout, from which a program may read JSON. Warnings go to stderr as always."""
    level = LOGGER.level
    LOGGER.setLevel(logging.WARNING)
    try:
        yield
    finally:
        LOGGER.setLevel(level)


def inspect_images(path: Path, config: InspectConfig) -> int:
    """Inspect an image or the images of a folder, and return the exit status.

    It is PARTLY_DONE if an image of the folder could not be inspected or the webhook rejected its result, or else 1 if
    an image was flagged, or else 0. Raises EchoError if a single image cannot be inspected.
    """
    is_folder = path.is_dir()
    images = list_images(path) if is_folder else [path]
    if not image_file(images[0]).is_file():
        raise EchoError(f"there is no image or folder {path}; check the path")
    flagged = failed = rejected = 0
    for image, found in inspect_each(load_inspector(config), images, config.product):
        try:
            if isinstance(found, Result):
                flagged += found.pred_label
                report(found, config)
            elif is_folder:
                failed += 1
                if config.json:
                    print(to_json({"image": str(image), "error": str(found)}), flush=True)
                report_failure(image, str(found), str(found), config)
            else:
                raise found
        except RejectedResultError as rejection:
            if not is_folder:
                raise
            rejected += 1
            warn_of_rejection(image, rejection)
    if not config.json:
        summary = f"{flagged} of {len(images)} images flagged"
        summary += f", {failed} not inspected" if failed else ""
        print(summary + (f", {rejected} not accepted by the webhook" if rejected else ""))
    if failed or rejected:
        return configs.PARTLY_DONE
    return 1 if flagged else 0


def inspect_each(
    inspector: Inspector, images: Sequence[Path], product: str | None
) -> Iterator[tuple[Path, Result | EchoError]]:
    """Yield each image with its result, or with the reason why it cannot be inspected.

    Raises EchoError for an unknown product, and BackendError if no image can be inspected.
    """
    inspector.possible_products(product)
    done = 0
    while done < len(images):
        failure = None
        try:
            for result in inspector.stream(images[done:], product):
                yield images[done], result
                done += 1
        except BackendError:
            raise
        except EchoError as error:
            failure = error
        if failure is not None:
            yield images[done], failure
            done += 1


def inspect_new(watch: FolderWatch, inspector: Inspector, config: InspectConfig) -> None:
    """Inspect the new images of a folder forever.

    Reports an image that cannot be inspected, or whose result the webhook rejects, and continues with the next. Raises
    EchoError for an unknown product and for a webhook that takes no result, and BackendError if no image can be
    inspected.
    """
    inspector.possible_products(config.product)
    for path, error in watch.images():
        problem, result = f"the image {path} cannot be read: {error}", None
        if error is None:
            try:
                result = inspector.predict(path, config.product)
            except BackendError:
                raise
            except EchoError as failure:
                problem = error = str(failure)
                watch.fail(error)
        try:
            if result is None:
                report_failure(path, problem, str(error), config)
            else:
                report(result, config)
        except RejectedResultError as rejection:
            warn_of_rejection(path, rejection)
            watch.fail(error or str(rejection))


def report(result: Result, config: InspectConfig) -> None:
    """Print a result, and post it to the webhook if there is one."""
    print(to_json(result) if config.json else describe(result), flush=True)
    if config.webhook is not None:
        post(config.webhook, result)


def report_failure(image: Path, problem: str, error: str, config: InspectConfig) -> None:
    """Warn about an image that was not inspected, and post `error` to the webhook if there is one."""
    LOGGER.warning(f"{printable(problem)}; it was not inspected")
    if config.webhook is not None:
        post(config.webhook, {"image": str(image), "error": error})


def warn_of_rejection(image: Path, rejection: RejectedResultError) -> None:
    """Warn that the webhook rejects what was posted about an image."""
    LOGGER.warning(f"{printable(str(image))}: {rejection}; it is not posted again")


def load_inspector(config: InspectConfig) -> Inspector:
    """Load the inspector for these options. Raises EchoError if they are incompatible."""
    if (config.bundle is None) == (config.adapters is None):
        raise EchoError(
            "give either a bundle or adapters: add --bundle DIR (written by train.export) or --adapters DIR"
        )
    kind, foreign = (
        ("bundle", ("dataset", "calibration")) if config.adapters is None else ("adapters", ("server", "base_model"))
    )
    for name in foreign:
        if getattr(config, name) is not None:
            other = "adapters" if kind == "bundle" else "bundle"
            raise EchoError(f"--{name} cannot be used with --{kind}; remove it, or use --{other}")
    if config.adapters is not None:
        return Inspector.from_adapters(
            config.adapters, dataset=config.dataset, calibration=config.calibration, threshold=config.threshold
        )
    assert config.bundle is not None
    if config.server is not None:
        if config.base_model is not None:
            raise EchoError("--base_model cannot be used with --server, which has the base model; remove it")
        if config.server_timeout <= 0:
            raise EchoError(f"server_timeout is {config.server_timeout:g}; set it to more than 0")
        return Inspector.from_server(
            config.server, config.bundle, threshold=config.threshold, timeout=config.server_timeout
        )
    return Inspector.from_bundle(config.bundle, base_model=config.base_model, threshold=config.threshold)


def describe(result: Result) -> str:
    """Return one line about an image."""
    verdict = "DEFECT" if result.pred_label else "ok"
    named = f" {result.condition}" if result.condition else ""
    score = f"P(defect) {result.pred_score:.3f} (threshold {result.threshold:g})"
    line = f"{result.image}: {verdict}{named}, {score}, {result.product}. {one_line(result.explanation)}"
    return printable(line).replace("\n", r"\n").rstrip()


if __name__ == "__main__":
    configs.run_main(main, "rerun the same command; with --watch, it continues where it stopped")
