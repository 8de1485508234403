"""Read a bundle, which `python -m train.export` writes: the whole tuned pipeline in one folder.

bundle.json the content of the bundle (`BundleDescription`) adapters/ one folder per role, and probe.json with the
answers that the adapters must give merged/ merged models of single roles, for servers without LoRA processor/ the
tokenizer, the chat template and the image processor references/ the products, their normal images and their knowledge
(echo_ft.retrieval.products) README.md the model card SHA256SUMS the checksums of all other files; `sha256sum -c
SHA256SUMS` checks them as well
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import PipelineConfig
from echo_ft.files import walk
from echo_ft.inference.decision import Calibration
from echo_ft.inputs import from_dict, read_json_object
from echo_ft.model.adapters import Adapter, find_adapters, require_whole_prompt
from echo_ft.model.loading import base_fingerprint, load_processor
from echo_ft.model.rows import RowBuilder
from echo_ft.provenance import CHECKSUMS, digests_of, read_sums, write_sums
from echo_ft.retrieval.products import ProductData, load_products

BUNDLE_FORMAT = "echo-ft bundle 1"
"""Value of `format` in bundle.json. Any other value means that another version wrote the bundle."""

BUNDLE_DESCRIPTION = "bundle.json"

EXAMPLE_PROMPTS = "prompts.json"
"""File with the prompts of all roles for one normal image, for readers who build them without echo-ft."""

NOT_LOADED = ("README.md", "merged", EXAMPLE_PROMPTS)
"""Files and folders of a bundle that are never loaded here, and so are not checked."""


@dataclass(frozen=True)
class BundleDescription:
    """The content of bundle.json."""

    base_model: str
    """The base model as given in training: a name on the Hugging Face Hub, or a folder."""
    base_revision: str
    base_fingerprint: str
    prompt_version: str
    min_pixels: int
    max_pixels: int
    dtype: str
    """The data type in which the bundle was checked, and in which it is loaded by default."""
    pipeline: PipelineConfig
    max_new_tokens: int
    calibration: Calibration | None
    """The temperature and the threshold of P(defect); None if P(defect) is used without calibration."""
    references: str
    """How the bundle stores the normal images, one of `REFERENCE_CHOICES`."""
    adapters: dict[str, str]
    """The fingerprint of each adapter, by role."""
    licences: dict[str, str]
    versions: dict[str, str]
    commit: str
    max_lora_rank: int
    """The smallest --max-lora-rank with which vLLM serves the adapters."""
    tower_is_adapted: bool
    largest_logit_difference: dict[str, float]
    """The largest difference between logits of each part and those of the trained adapter on the probe."""
    share_of_the_update: dict[str, float]
    """The RMS of these differences for each part, relative to the adapter's effect."""
    not_merged: dict[str, str]
    """Why a merged model is missing, by role."""
    format: str = field(default=BUNDLE_FORMAT)


def read_bundle(folder: Path) -> BundleDescription:
    """Read the description of the bundle in `folder`, and verify the checksums of the files that inference loads.

    Raises EchoError if there is no bundle, if another version wrote it, or if a file is missing, added or changed.
    """
    path = folder / BUNDLE_DESCRIPTION
    if not path.is_file():
        problem = f"{folder} is not a bundle (it has no {path.name})" if folder.is_dir() else f"there is no {folder}"
        raise EchoError(f"{problem}; write one with python -m train.export --adapters DIR --output {folder}")
    try:
        found = read_json_object(path)
    except (OSError, ValueError) as error:
        raise EchoError(f"{path} is not a JSON object ({error}); export the bundle again") from error
    format_found = found.get("format")
    if format_found != BUNDLE_FORMAT:
        raise EchoError(f"{path} has the format {format_found!r}, not {BUNDLE_FORMAT!r}; export the bundle again")
    verify_checksums(folder)
    try:
        return from_dict(BundleDescription, found)
    except TypeError as error:
        raise EchoError(f"{path} does not describe a bundle ({error}); export the bundle again") from error


def load_bundle_products(folder: Path, description: BundleDescription) -> ProductData:
    """Load the products of a bundle. Raises EchoError as `load_products` does, or if the bundle has none."""
    if description.references == "none":
        raise EchoError(
            f"{folder} was exported without normal images, so it cannot inspect; export it again with --references "
            "copy or path"
        )
    return load_products(folder / "references", folder)


def load_bundle_rows(folder: Path, description: BundleDescription) -> RowBuilder:
    """Return the row builder of a bundle's own processor. Raises EchoError if the processor cannot be loaded."""
    budget = description.min_pixels, description.max_pixels
    return RowBuilder(load_processor(str(folder / "processor"), None, *budget))


def bundle_adapters(
    folder: Path, description: BundleDescription, base_model: str, has_weights: bool = True
) -> dict[str, Adapter]:
    """Find the adapters of a bundle, and check them against the base model and the bundle's description.

    `has_weights` is False if a server holds the weights of the base model. Raises EchoError as `find_adapters` does, if
    the base model is not there, or if an adapter is not the one that was exported.
    """
    weights = _fingerprint(folder, base_model, description.base_revision) if has_weights else None
    found = find_adapters(folder / "adapters", base_model, weights, description.min_pixels, description.max_pixels)
    require_whole_prompt(found, "a bundle")
    for role, adapter in found.items():
        if adapter.fingerprint != description.adapters.get(role):
            raise EchoError(
                f"{adapter.path} is not the adapter that was exported (fingerprint {adapter.fingerprint}, not "
                f"{description.adapters.get(role)}); export the bundle again"
            )
    return {role: replace(one, card=replace(one.card, base_model=base_model)) for role, one in found.items()}


def _fingerprint(folder: Path, base_model: str, revision: str) -> str:
    try:
        return base_fingerprint(base_model, revision)
    except EchoError as error:
        raise EchoError(
            f"the base model {base_model} of {folder} is not here ({str(error).splitlines()[0]}); pass its folder as "
            "base_model"
        ) from error


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files of a bundle, in the format of sha256sum."""
    write_sums(folder, digests_of(folder, _files(folder)))


def verify_checksums(folder: Path) -> None:
    """Check all files of a bundle that are loaded. Hidden and system files are ignored.

    Raises EchoError if a file is missing, added or changed.
    """
    try:
        listed = read_sums(folder)
    except (OSError, ValueError) as error:
        raise EchoError(f"{folder} has no readable {CHECKSUMS} ({error}); export the bundle again") from error
    expected = {name: digest for name, digest in listed.items() if _is_loaded(name)}
    present = [name for name in _files(folder) if _is_loaded(name)]
    different = sorted(expected.keys() ^ set(present))
    if different:
        problem = "is missing" if different[0] in expected else f"is not in {CHECKSUMS}"
        raise EchoError(f"{folder / different[0]} {problem}; copy the bundle again, or export it again")
    changed = [name for name, digest in digests_of(folder, present).items() if digest != expected[name]]
    if changed:
        raise EchoError(
            f"{folder / changed[0]} has changed since the export ({len(changed)} of {len(present)} files differ from "
            f"{CHECKSUMS}); copy the bundle again, or export it again"
        )


def _files(folder: Path) -> list[str]:
    files, _ = walk(folder)
    return [path.relative_to(folder).as_posix() for path in files if path != folder / CHECKSUMS]


def _is_loaded(name: str) -> bool:
    return name.split("/")[0] not in NOT_LOADED
