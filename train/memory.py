"""Estimate the memory of a recipe: `python -m train.memory --config recipes/qwen2_vl_7b/decision_maker.yaml`.

This command finds every LoRA target in the real architecture, counts the parameters exactly and estimates the memory of
each topology at the recipe's largest batch. echo_ft/training/costs/memory.py describes the method and its limits. No
weights are downloaded, and no GPU is needed.

`--run recipes/qwen2_vl_7b/run.yaml` also estimates a run with adapters like the recipe's. The file may be a config of
evaluation.run or of evaluation.ablate (echo_ft/inference/memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import yaml

from echo_ft import config as configs
from echo_ft.errors import EchoError
from echo_ft.inputs import from_dict, read_yaml_file
from echo_ft.model.activations import BatchShape
from echo_ft.model.architectures import count_parameters, meta_model
from echo_ft.training.costs.memory import loaded_width, memory_report, trainable_meta_model

if TYPE_CHECKING:
    from trl import SFTConfig

    from echo_ft.inference.memory import RunShape
    from echo_ft.training.config import EchoConfig

_EXCHANGE_SIZES = {
    "reference_extractor": (4, 384, 96),
    "knowledge_guide": (2, 1024, 128),
    "reasoning_expert": (2, 1536, 640),
    "decision_maker": (2, 1536, 16),
}
"""(images, text tokens, label tokens) of a large exchange: three candidates, eight knowledge entries and five
questions."""
_BRANCHES = {"reference_extractor": 2, "knowledge_guide": 1, "reasoning_expert": 3, "decision_maker": 3}
"""Branches of a large exchange in a run. Half of the text tokens are shared by all branches."""
_EXCHANGES_PER_CASE = {"reasoning_expert": 2, "decision_maker": 2}
"""Exchanges per case for the roles with more than one. In full routing, Object Classification gets no knowledge and has
its own prefix."""
_ORDERS = 4
"""Number of cyclic orders of a question with four options, as most of MMAD's have."""


@dataclass(frozen=True)
class MemoryConfig:
    """Options of `python -m train.memory` in addition to the recipe."""

    gpus: int = field(default=4, metadata={"help": "Number of GPUs in topologies with several GPUs."})
    images: int | None = field(
        default=None, metadata={"help": "Images in the largest exchange; default: depends on the role."}
    )
    exchanges: int | None = field(
        default=None,
        metadata={
            "help": "Exchanges per case; default: as many as the role has under full routing (paper routing has 4)."
        },
    )
    text_tokens: int | None = field(
        default=None,
        metadata={"help": "Text tokens in the longest exchange with all branches; default: depends on the role."},
    )
    run: str | None = field(
        default=None, metadata={"help": "Config for a run to estimate as well, with the recipe's adapters."}
    )
    label_tokens: int | None = field(
        default=None, metadata={"help": "Trained tokens among the text tokens; default: depends on the role."}
    )


@dataclass(frozen=True)
class RunOptions:
    """The options of a run on which its memory depends."""

    model_name_or_path: str
    max_pixels: int
    batch_size: int = 8
    max_new_tokens: int = 128
    max_batch_tokens: int | None = None
    dtype: str | None = None
    option_order: str = "given"
    """`cyclic` if any cell of an ablation asks in every cyclic order."""
    features_gib: float = 0.0
    """Size limit of the features that evaluation.ablate keeps."""


def main(argv: list[str]) -> None:
    """Parse the options, then print the parameter counts and the memory estimate."""
    from trl import ModelConfig, SFTConfig

    from echo_ft.training.checks import check_options
    from echo_ft.training.config import EchoConfig, trained_roles

    # Without a GPU, transformers rejects bf16 unless the CPU is requested explicitly.
    own, config, sft, base = configs.parse(
        [MemoryConfig, EchoConfig, SFTConfig, ModelConfig], [*argv, "--use_cpu", "true"]
    )
    check_options(sft, base, config)
    for name in ("gpus", "images", "exchanges", "text_tokens", "label_tokens"):
        value = getattr(own, name)
        if value is not None and value < 1:
            raise EchoError(f"{name} is {value}; set it to 1 or more")
    model = trainable_meta_model(config, base)
    print(f"{base.model_name_or_path}, {config.role}")
    print(memory_report(model, largest_batch(own, config, sft), sft, base, own.gpus, config.adapt_from))
    if own.run is not None:
        trained = sum(count.trainable for count in count_parameters(model))
        adapter = trained // len(trained_roles(config)) if base.use_peft else 0
        adapters = "four adapters like the recipe's" if base.use_peft else "no adapters"
        print(f"\n{own.run}, with {adapters}")
        print(_run_report(own.run, str(base.model_name_or_path), base.model_revision, adapter, config.adapt_from))


def _run_report(path: str, model_name: str, revision: str | None, adapter_parameters: int, adapt_from: str) -> str:
    from echo_ft.inference.memory import run_report

    options = read_run(path)
    if options.model_name_or_path != model_name:
        raise EchoError(
            f"{path} runs {options.model_name_or_path}, but the recipe trains {model_name}; give a recipe and a "
            "run with the same model"
        )
    features = int(options.features_gib * 2**30)
    model = meta_model(model_name, revision)
    width = loaded_width(model, options.dtype)
    return run_report(model, adapter_parameters, run_shapes(options), width, features, adapt_from)


def read_run(path: str) -> RunOptions:
    """Read the config of a run. Raises EchoError if it cannot be read, lacks an option or has an unusable value."""
    try:
        given = read_yaml_file(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EchoError(f"{path} cannot be read ({error}); give the YAML file for a run") from error
    for name in ("max_pixels", "model_name_or_path"):
        if not isinstance(given, dict) or name not in given:
            raise EchoError(f"{path} has no {name}; give the YAML file for a run")
    names = [option.name for option in fields(RunOptions)]
    try:
        options = from_dict(RunOptions, {name: given[name] for name in names if name in given})
    except TypeError as error:
        raise EchoError(f"{path}: {error}; correct it") from error
    for name in ("max_pixels", "batch_size", "max_new_tokens", "max_batch_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise EchoError(f"{path}: {name} is {value}; set it to 1 or more")
    if options.features_gib < 0:
        raise EchoError(f"{path}: features_gib is {options.features_gib:g}; set it to 0 or more")
    cells = given["cells"].values() if isinstance(given.get("cells"), dict) else ()
    # A cell with braces has a list of values.
    cyclic = any("cyclic" in str(cell.get("option_order")) for cell in (given, *cells) if isinstance(cell, dict))
    return replace(options, option_order="cyclic") if cyclic else options


def run_shapes(options: RunOptions) -> dict[str, RunShape]:
    """Return the largest batch of each role in a run with these options."""
    from echo_ft.inference.memory import RunShape

    orders = {"decision_maker": _ORDERS if options.option_order == "cyclic" else 1}
    return {
        role: RunShape(
            exchanges=options.batch_size * _EXCHANGES_PER_CASE.get(role, 1),
            images=images,
            max_pixels=options.max_pixels,
            prefix_text=text // 2,
            branches=_BRANCHES[role] * orders.get(role, 1),
            branch_tokens=text // 2 // _BRANCHES[role],
            max_new_tokens=options.max_new_tokens,
            max_batch_tokens=options.max_batch_tokens,
        )
        for role, (images, text, _) in _EXCHANGE_SIZES.items()
    }


def largest_batch(own: MemoryConfig, config: EchoConfig, sft: SFTConfig) -> BatchShape:
    """The largest batch of a recipe on one GPU, with exchanges of the sizes in `own` or those of the roles."""
    from echo_ft.training.config import trained_roles

    roles = trained_roles(config)
    images, text_tokens, label_tokens = map(max, zip(*(_EXCHANGE_SIZES[role] for role in roles), strict=True))
    images = images if own.images is None else own.images
    exchanges = sum(_EXCHANGES_PER_CASE.get(role, 1) for role in roles) if own.exchanges is None else own.exchanges
    return BatchShape(
        rows=sft.per_device_train_batch_size * exchanges,
        images=images,
        max_pixels=config.max_pixels,
        text_tokens=text_tokens if own.text_tokens is None else own.text_tokens,
        label_tokens=label_tokens if own.label_tokens is None else own.label_tokens,
        distinct_images=sft.per_device_train_batch_size * images,
    )


if __name__ == "__main__":
    configs.run_main(main)
