"""Log an experiment to Weights & Biases: builds, trainings, evaluations, comparisons and exports.

Every command with the option `report_to` starts one W&B run with this module. W&B's own environment variables apply,
such as WANDB_PROJECT, WANDB_RUN_GROUP, WANDB_NAME, WANDB_MODE and WANDB_DIR. Datasets, adapters, evaluations and
bundles are artifacts. Each run uses the artifacts that it reads, which records the lineage from the data to the bundle.
In W&B, an artifact with unchanged content keeps its version, whichever run logs it.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_ft.errors import EchoError
from echo_ft.files import write_text
from echo_ft.terminal import LOGGER

if TYPE_CHECKING:
    import numpy as np
    import wandb
    from numpy.typing import NDArray
    from PIL.Image import Image

REPORT_TO = {
    "help": "Where to log besides the terminal and files. wandb: Weights & Biases, offline without an API key.",
    "choices": ["none", "wandb"],
}
"""Metadata of the option `report_to`, the same option that train/sft.py inherits from transformers."""

PROJECT = "echo-ft"
"""The W&B project if WANDB_PROJECT names none."""

REPORT_FILES = ("report.json", "report.html")

EVALUATION_FILES = ("run.json", "predictions.jsonl", "traces.jsonl", "permutations.jsonl", *REPORT_FILES)
"""Files of a run folder that its artifact contains. `evaluation.compare` needs the first two."""

WANDB_RUN_FILE = "wandb_run_id.txt"
"""Name of the file in output_dir that holds the id of the W&B run."""

_RUN_PATH = re.compile(r"(https?://[^/]+/)?(\w[\w.-]*/\w[\w.-]*)/(?:runs/)?([\w-]+)/?(?:\?.*)?")


@dataclass(frozen=True)
class Picture:
    """An image in a table."""

    image: Image
    mask: NDArray[np.bool_] | None = None
    """(height, width), True on the defect, or None."""
    label: str = ""
    """The caption of the mask."""
    predicted: tuple[tuple[int, int, int, int], ...] = ()
    """Predicted boxes as (x0, y0, x1, y1), in thousandths of the image's width and height."""


def experiment_name(output: Path) -> str:
    """Return the name of an output folder's experiment, which is the name of the folder around it.

    It is `demo` for `runs/demo/tuned` and for adapters in `runs/demo/adapters` or `runs/demo/late_adapters`.
    """
    folder = output.resolve().parent
    return folder.parent.name if folder.name.endswith("adapters") else folder.name


@contextmanager
def log_run(job_type: str, name: str, group: str, config: Mapping[str, Any]) -> Iterator[wandb.Run]:
    """Start a W&B run and finish it after the block, as failed if the block raises.

    Without an API key, or if the server cannot be reached, the run is logged offline and the command to upload it is
    shown. WANDB_MODE takes precedence. W&B never asks for a key, so a job cannot wait for one.
    """
    run = _start(job_type, name, group, config)
    try:
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def _start(job_type: str, name: str, group: str, config: Mapping[str, Any]) -> wandb.Run:
    import wandb

    def start(mode: Any) -> wandb.Run:
        return wandb.init(
            # wandb (0.31) reads its variables only once per process.
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", name),
            group=os.environ.get("WANDB_RUN_GROUP", group),
            dir=os.environ.get("WANDB_DIR"),
            id=os.environ.get("WANDB_RUN_ID"),
            resume=os.environ.get("WANDB_RESUME"),  # type: ignore[arg-type]
            job_type=job_type,
            config=_json(config),
            mode=mode,
            settings=wandb.Settings(init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", "30"))),
        )

    chosen = os.environ.get("WANDB_MODE")
    if chosen:
        return start(chosen)
    reason = "there is no API key (wandb login)"
    if has_api_key():
        try:
            return start("online")
        except wandb.errors.AuthenticationError:  # this is a CommError too, but the key is wrong
            raise
        except wandb.errors.CommError as error:
            reason = f"the run cannot start online ({str(error).splitlines()[0]})"
    run = start("offline")
    LOGGER.warning("W&B logs offline: %s. Upload the run with: wandb sync %s", reason, Path(run.dir).parent)
    return run


def has_api_key() -> bool:
    """Return whether W&B has an API key in a variable, in .netrc or in its settings. Never prompts for a key."""
    import wandb
    from wandb.sdk.lib import wbauth  # wandb (0.31) has no public function that does not prompt for a key

    host = wandb.setup().settings.base_url
    return wbauth.authenticate_session(host=host, source="echo-ft", prompt=False, update_session=False) is not None


def use_artifact(run: wandb.Run, artifact: wandb.Artifact) -> None:
    """Record that a run reads an artifact. Its content is logged too unless W&B has it already."""
    if run.offline:
        # run.use_artifact of wandb (0.31) refuses to work offline. Online, it logs a draft with these two flags, which
        # `wandb sync` reads. Once it works offline, this branch can go.
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)


def dataset_artifact(folder: Path, manifest: Mapping[str, Any]) -> wandb.Artifact:
    """Return the artifact of a dataset folder.

    It references the records and copies only the manifest and the preview pages. digests.json identifies the images by
    their SHA-256.
    """
    audits = {name: found.get("verdict") for name, found in manifest.get("audits", {}).items()}
    kept = ("fingerprint", "images_fingerprint", "config", "counts", "splits", "prompt_version", "commit", "warnings")
    facts = {name: manifest[name] for name in kept if name in manifest}
    artifact = _artifact(f"dataset-{folder.resolve().name}", "dataset", facts | {"audits": audits or "not audited"})
    copied = ("manifest.json", "preview.html", "audit.html")
    _add_files(artifact, folder, copied)
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.jsonl"), *folder.glob("sft/*/*.jsonl")]):
        if path.name not in copied:
            artifact.add_reference(path.resolve().as_uri(), name=path.relative_to(folder).as_posix())
    return artifact


def adapter_artifact(folder: Path, card: Mapping[str, Any]) -> wandb.Artifact:
    """Return the artifact of an adapter, or of a fully fine-tuned model, whose weights are only referenced."""
    parts = [experiment_name(folder), folder.resolve().parent.name, folder.resolve().name]
    if parts[1] == "adapters" or not parts[1].endswith("adapters"):
        del parts[1]
    artifact = _artifact("-".join(parts), "model", card)
    _add_files(artifact, folder, ("adapter_model.safetensors", "adapter_config.json", "echo_ft.json", "README.md"))
    if (folder / "config.json").is_file():
        for path in sorted([folder / "config.json", *folder.glob("model*.safetensors*")]):
            artifact.add_reference(path.resolve().as_uri(), name=path.name)
    return artifact


def evaluation_artifact(folder: Path, report: Path | None = None) -> wandb.Artifact:
    """Return the artifact of a run folder, which `download_run` reads back. Its report may be in another folder."""
    place = {"experiment": experiment_name(folder), "run": folder.resolve().name}
    artifact = _artifact(f"{place['experiment']}-{place['run']}", "evaluation", place)
    for name in EVALUATION_FILES:
        _add_files(artifact, report if report is not None and name in REPORT_FILES else folder, [name])
    return artifact


def bundle_artifact(folder: Path, facts: Mapping[str, Any]) -> wandb.Artifact:
    """Return the artifact of a bundle with all its files. W&B reads them in place when it uploads them."""
    artifact = _artifact(f"{experiment_name(folder)}-{folder.resolve().name}", "model", facts)
    artifact.add_dir(str(folder), policy="immutable")
    return artifact


def _artifact(name: str, kind: str, metadata: Mapping[str, Any]) -> wandb.Artifact:
    import wandb

    return wandb.Artifact(re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[:128], kind, metadata=_json(metadata))


def _add_files(artifact: wandb.Artifact, folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (folder / name).is_file():
            artifact.add_file(str(folder / name), name=name)


def _json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` as JSON represents them. Paths become strings."""
    found: dict[str, Any] = json.loads(json.dumps(dict(values), default=str))
    return found


def link_bundle(run: wandb.Run, artifact: wandb.Artifact, registry: str, aliases: Sequence[str]) -> None:
    """Link a logged bundle to a collection of the W&B registry, such as `wandb-registry-model/inspection`."""
    if run.offline:
        LOGGER.warning(
            "W&B links only online, so the bundle is not linked to %s; after wandb sync, link its artifact %s there",
            registry,
            artifact.name,
        )
        return
    run.link_artifact(artifact, registry, list(aliases))


def numbers_by_path(values: Mapping[str, Any]) -> dict[str, float]:
    """Return every number in nested mappings, keyed by its path, such as `tables/strict/Average/Average`.

    The bounds of an interval end with `/low` and `/high`. Other lists are left out.
    """
    return dict(_numbers(values, ""))


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(part, f"{path}/{key}" if path else str(key))
    elif isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)):
        yield from zip((f"{path}/low", f"{path}/high"), value, strict=True)
    elif _is_number(value):
        yield path, value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def make_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> wandb.Table:
    """Return a W&B table. Cells are strings, numbers, None or a `Picture`. A repeated picture is stored only once."""
    import wandb

    table = wandb.Table(columns=list(columns))
    pictures: dict[int, Any] = {}
    kept = []  # this keeps every Picture alive, so that no two have the same id

    def cell(value: Any) -> Any:
        if not isinstance(value, Picture):
            return value
        if id(value) not in pictures:
            kept.append(value)
            pictures[id(value)] = _wandb_image(value)
        return pictures[id(value)]

    for row in rows:
        table.add_data(*map(cell, row))
    return table


def _wandb_image(picture: Picture) -> wandb.Image:
    import wandb

    masks = None
    if picture.mask is not None:
        masks = {"truth": {"mask_data": picture.mask.astype("uint8"), "class_labels": {1: picture.label}}}
    data = [
        {"position": dict(zip(("minX", "minY", "maxX", "maxY"), (v / 1000 for v in box), strict=True)), "class_id": 1}
        for box in picture.predicted
    ]
    boxes = {"predicted": {"box_data": data, "class_labels": {1: "predicted"}}} if data else None
    return wandb.Image(picture.image, masks=masks, boxes=boxes, file_type="jpg")


def local_run(text: str) -> Path:
    """Return the folder of the run that a user names: a folder, or the path or URL of a W&B run to download.

    A W&B run has the path `entity/project/id`. An existing folder takes precedence. Raises EchoError if the run has no
    evaluation or cannot be downloaded.
    """
    found = _RUN_PATH.fullmatch(text)
    if found is None or Path(text).exists():
        return Path(text)
    address, project, identifier = found.groups()
    if not has_api_key():
        if address is None:
            return Path(text)  # most likely a misspelt folder, which is reported when it is read
        raise EchoError(f"{text} is a W&B run, but there is no API key; run wandb login, or give the run's folder")
    return download_run(f"{project}/{identifier}", text)


def download_run(path: str, name: str) -> Path:
    """Download the evaluation of the W&B run `path` (entity/project/id) and return its folder.

    Error messages refer to the run as `name`.

    The folder is in WANDB_ARTIFACT_DIR (by default `artifacts`), under the path of the run.
    """
    import wandb

    try:
        logged = [one for one in wandb.Api().run(path).logged_artifacts() if one.type == "evaluation"]
    except (wandb.errors.Error, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EchoError(
            f"there is no folder {name}, and W&B finds no run {path} ({reason}); check the path, which is "
            "entity/project/id"
        ) from error
    place = logged[-1].metadata if logged else {}
    names = [Path(str(place.get(key, ""))).name for key in ("experiment", "run")]
    if not all(names) or ".." in names:  # another program may log artifacts of this type too
        raise EchoError(
            f"the W&B run {path} has no evaluation; log one with python -m evaluation.score RUN_DIR --report_to wandb, "
            "and give that run"
        )
    folder = Path(os.environ.get("WANDB_ARTIFACT_DIR", "artifacts"), *path.split("/"), *names)
    logged[-1].download(root=str(folder))
    return folder


def resume_wandb_run(sft: Any) -> None:
    """Let a resumed training run continue its W&B run.

    transformers' callback starts a new W&B run each time unless W&B's own environment variables say otherwise. If the
    user has set those variables, they take precedence.
    """
    if "wandb" not in (sft.report_to or ()) or sft.process_index != 0 or "WANDB_RUN_ID" in os.environ:
        return
    folder = Path(str(sft.output_dir))
    file = folder / WANDB_RUN_FILE
    if (sft.resume_from_checkpoint or "false").lower() == "false" or not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, uuid.uuid4().hex[:8])
    os.environ["WANDB_RUN_ID"] = file.read_text(encoding="utf-8").strip()
    os.environ.setdefault("WANDB_RESUME", "allow")
