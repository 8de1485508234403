"""Train the adapter of one role, or of all: `python -m train.launch train/sft.py --config FILE [--key value ...]`.

The options are `EchoConfig` in echo_ft/training/config.py and TRL's SFTConfig and ModelConfig. The adapter and its card
are saved in `output_dir`; evaluation expects this folder to have the name of the role. With `--role all`, `output_dir`
gets one folder per role, as evaluation expects. With `--use_peft false`, all weights are trained and `output_dir` holds
a full model. Pass that folder to evaluation.run as `model_name_or_path`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_ft import config as configs
from echo_ft.data.dataset import Dataset, load_dataset, read_digests, require_unchanged
from echo_ft.errors import EchoError
from echo_ft.files import explain_full_disk
from echo_ft.images.decode import DECODER_VERSION
from echo_ft.inputs import from_dict
from echo_ft.model.adapter_layers import add_adapters
from echo_ft.model.adapters import AdapterCard, audit_leaks, make_card, read_card
from echo_ft.model.loading import load_model, load_processor
from echo_ft.model.rows import RowBuilder
from echo_ft.processes import lock_folder
from echo_ft.provenance import ANSWERING_PACKAGES, CORRUPTING_PACKAGES
from echo_ft.records import Exchange, Inspection
from echo_ft.terminal import LOGGER
from echo_ft.tracking import (
    adapter_artifact,
    dataset_artifact,
    experiment_name,
    log_run,
    resume_wandb_run,
    use_artifact,
)
from echo_ft.training.checkpoints import Checkpoint, find_checkpoint, require_cases
from echo_ft.training.costs.memory import trainable_meta_model
from echo_ft.training.option_changes import training_options
from echo_ft.training.planning import Plan, dry_run_report

if TYPE_CHECKING:
    from echo_ft.training.config import EchoConfig


_RESUME = "--resume_from_checkpoint true resumes from the last checkpoint, if one was saved"


@dataclass(frozen=True)
class CheckedRun:
    """The checked inputs of a training run."""

    dataset: Dataset
    digests: dict[str, str] | None
    """The SHA-256 of each image, as `read_digests` returns it."""
    row_builder: RowBuilder
    cases: Any
    """Training cases as a `datasets.Dataset`."""
    validation: Any
    """Validation cases as a `datasets.Dataset`, or None without evaluation."""
    plan: Plan
    validation_plan: Plan
    """The plan of the validation cases; empty without evaluation."""
    cards: dict[str, AdapterCard]
    """The card of each adapter by its folder in output_dir, which is `.` unless all roles are trained. Empty in a dry
    run, because a card needs the base model's weights."""
    checkpoint: Checkpoint | None
    marks: dict[str, Inspection] | None
    """The inspections by case that the mask loss learns from, or None without it."""
    meta_model: Any
    """The model on the meta device as it will be trained."""


def main(argv: list[str]) -> None:
    """Parse the options, lock output_dir, then plan or train."""
    from trl import ModelConfig

    from echo_ft.training.checks import check_options, check_precision, runs_on_cpu
    from echo_ft.training.config import EchoConfig, TrainingConfig, check_early_stopping

    if configs.is_true(argv, "dry_run"):  # without a GPU, transformers rejects bf16 unless the CPU is requested
        argv = [*argv, "--use_cpu", "true"]
    config, sft, base = configs.parse([EchoConfig, TrainingConfig, ModelConfig], argv)
    check_options(sft, base, config)
    check_precision(sft, base, runs_on_cpu(sft, config.dry_run))
    check_early_stopping(config, sft)
    with ExitStack() as stack:
        if sft.process_index == 0 and not config.dry_run:
            output = Path(sft.output_dir)
            try:
                output.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise EchoError(
                    f"output_dir {output} cannot be created ({error.strerror}); choose another folder"
                ) from error
            stack.enter_context(lock_folder(output, "output_dir"))
        checked = check(config, sft, base)
        if config.dry_run:
            dry_run(checked, config, sft, base)
        else:
            with log_training(checked, config, sft):
                fit(checked, config, sft, base)


def check(config: EchoConfig, sft: Any, base: Any) -> CheckedRun:
    """Check the dataset, the checkpoint and every row. `sft` and `base` are TRL's SFTConfig and ModelConfig."""
    from echo_ft.training.cases import load_training_cases, pad_cases, require_a_batch
    from echo_ft.training.checks import check_optimizer, check_trained_parts
    from echo_ft.training.config import check_adapt_from
    from echo_ft.training.mask_loss import check_mask_metric, load_marks

    if config.mask_loss and not base.use_peft:
        raise EchoError("mask_loss trains adapters only; set use_peft: true or remove mask_loss")
    dataset = load_dataset(Path(config.dataset))
    digests = read_digests(dataset)
    marks = load_marks(dataset, sft.process_index == 0) if config.mask_loss else None
    if marks is not None and sft.eval_strategy != "no":
        check_mask_metric(sft.metric_for_best_model, marks)
    processor = load_processor(base.model_name_or_path, base.model_revision, config.min_pixels, config.max_pixels)
    row_builder = RowBuilder(processor)
    model = trainable_meta_model(config, base)
    check_trained_parts(model, config)
    check_adapt_from(config, base, model)
    check_optimizer(sft, model)
    if sft.process_index == 0:
        for verdict in audit_leaks(dataset).values():
            LOGGER.warning(verdict)
    cards: dict[str, AdapterCard] = {}
    checkpoint = None
    if not config.dry_run:
        cards = make_cards(config, sft, base, dataset, row_builder, model, config.mask_loss if marks else 0.0)
        checkpoint = find_checkpoint(sft, cards)
        if checkpoint is not None:
            cards = {folder: replace(card, resumed=checkpoint.resumed[folder]) for folder, card in cards.items()}
    cases, planned = load_training_cases(row_builder, dataset, config, sft, "train")
    cards = {folder: replace(card, cases=len(cases)) for folder, card in cards.items()}
    if checkpoint is not None and not sft.ignore_data_skip:
        require_cases(checkpoint, len(cases))
    require_a_batch(len(cases), sft)
    if sft.world_size > 1 and not sft.dataloader_drop_last:
        cases = pad_cases(cases, sft.world_size * sft.per_device_train_batch_size, sft.length_column_name)
    validation, validation_plan = None, Plan()
    if sft.eval_strategy != "no":
        validation, validation_plan = load_training_cases(row_builder, dataset, config, sft, "validation")
        if sft.world_size > 1:
            validation = pad_cases(validation, sft.world_size * sft.per_device_eval_batch_size, sft.length_column_name)
    plans = planned, validation_plan
    return CheckedRun(dataset, digests, row_builder, cases, validation, *plans, cards, checkpoint, marks or None, model)


def make_cards(
    config: EchoConfig,
    sft: Any,
    base: Any,
    dataset: Dataset,
    row_builder: RowBuilder,
    model: Any,
    mask_loss: float,
) -> dict[str, AdapterCard]:
    """The card of each adapter, by its folder in output_dir. `model` is the one that will be trained."""
    from echo_ft.training.config import adapter_folder, role_arguments, trained_roles

    lora = next(iter(model.peft_config.values())) if base.use_peft else None
    return {
        str(adapter_folder(config, Path(), role)): make_card(
            role,
            base.model_name_or_path,
            base.model_revision,
            config.min_pixels,
            config.max_pixels,
            dataset,
            config.corrupted_share,
            "4bit" if base.load_in_4bit else "8bit" if base.load_in_8bit else "",
            mask_loss,
            training_options(config, role_arguments(sft, config, role), base, lora),
            config.adapt_from,
            row_builder.generation_prompt if config.adapt_from == "answer" else (),
        )
        for role in trained_roles(config)
    }


def dry_run(checked: CheckedRun, config: EchoConfig, sft: Any, base: Any) -> None:
    """Print the plan of the training. Raises EchoError if an image has changed since the build."""
    if sft.process_index != 0:
        return
    dataset, cases = checked.dataset, checked.cases
    # Training verifies each image when it reads it, because the GPUs would have to wait if all were hashed first.
    names = (name for case in cases for exchange in case["exchanges"] for name in exchange["images"])
    require_unchanged(dataset, names)
    first = from_dict(Exchange, cases[0]["exchanges"][0])
    report = dry_run_report(
        checked.plan, first, checked.row_builder, dataset.root, checked.meta_model, sft, base, config.adapt_from
    )
    print(report, flush=True)


def fit(checked: CheckedRun, config: EchoConfig, sft: Any, base: Any) -> None:
    """Train, and save the adapters or the full model with their cards."""
    trainer = make_trainer(checked, config, sft, base)
    with explain_full_disk(Path(sft.output_dir), f"free some space; {_RESUME}"):
        trainer.train(resume_from_checkpoint=checked.checkpoint.path if checked.checkpoint else None)
        trainer.save_model(sft.output_dir)
        trainer.save_state()
    kind = "full model" if not base.use_peft else "adapter" if len(checked.cards) == 1 else "adapter for each role"
    best = trainer.card.best_step
    chosen = f" from step {best}, the best in evaluation," if best else ""
    if sft.load_best_model_at_end and not best and sft.process_index == 0:
        LOGGER.warning("there is no best checkpoint to load, so the %s is the one from the last step", kind)
    trainer.accelerator.print(f"{config.role}: the {kind}{chosen} is in {sft.output_dir}")
    trainer.end()


def make_trainer(checked: CheckedRun, config: EchoConfig, sft: Any, base: Any) -> Any:
    """Load the model and return its trainer."""
    from echo_ft.model.preparation import freeze_parts
    from echo_ft.training.all_roles import AllRolesTrainer
    from echo_ft.training.collator import Collator
    from echo_ft.training.config import ALL_ROLES, lora_config, quantization_config
    from echo_ft.training.trainer import PrefixSharingTrainer

    first, *_ = checked.cards.values()
    settings = checked.row_builder.image_processor.to_json_string()
    store = feature_store(first, config, sft, base, settings) if config.features else None
    model = load_model(
        base.model_name_or_path,
        base.model_revision,
        base.dtype,
        attn_implementation="sdpa",  # only the vision tower uses sdpa; the language model uses echo_ft.model.attention
        quantization_config=quantization_config(base),
    )
    lora = lora_config(config, base, model)
    if lora is None:
        freeze_parts(model, config.vision_learning_rate, config.merger_learning_rate)
    collator = Collator(
        checked.row_builder,
        checked.dataset.root,
        store,
        always_encode=sft.world_size > 1,
        pixel_dtype=model.dtype,
        marks=checked.marks,
        digests=checked.digests,
        adapt_from=config.adapt_from,
        by_role=config.role == ALL_ROLES,
    )
    options: dict[str, Any] = {
        "args": sft,
        "data_collator": collator,
        "train_dataset": checked.cases,
        "eval_dataset": checked.validation,
        "processing_class": checked.row_builder.processor,
        "config": config,
        "largest_batch": checked.plan.largest_batch(sft.per_device_train_batch_size),
        "largest_evaluation": checked.validation_plan.largest_batch(sft.per_device_eval_batch_size),
        "store": store,
        "implementation": base.attn_implementation or "sdpa",
    }
    if config.role == ALL_ROLES:
        adapted = add_adapters(model, lora, list(checked.cards), sft.seed)
        return AllRolesTrainer(model=adapted, cards=checked.cards, **options)
    checkpoint = checked.checkpoint.path if checked.checkpoint else None
    return PrefixSharingTrainer(model=model, peft_config=lora, card=first, checkpoint=checkpoint, **options)


@contextmanager
def log_training(checked: CheckedRun, config: EchoConfig, sft: Any) -> Iterator[None]:
    """If `report_to` enables Weights & Biases, log this block's training to it with the dataset, card and adapter.

    The transformers callback logs its curves and options to the run that is already active.
    """
    if "wandb" not in (sft.report_to or ()) or sft.process_index != 0:
        yield
        return
    resume_wandb_run(sft)
    output = Path(sft.output_dir)
    folders = [output / name for name in checked.cards]
    first, *_ = checked.cards.values()
    name, options = sft.run_name or output.resolve().name, {**asdict(config), "card": asdict(first)}
    with log_run("train", name, experiment_name(folders[0]), options) as run:
        use_artifact(run, dataset_artifact(checked.dataset.folder, checked.dataset.manifest))
        yield
        for folder in folders:
            run.log_artifact(adapter_artifact(folder, asdict(read_card(folder))))


def feature_store(card: AdapterCard, config: EchoConfig, sft: Any, base: Any, image_processor: str) -> Any:
    """Return the store for features of the frozen vision tower. `image_processor` has the processor's settings as JSON.

    Its key has all that they depend on, except the image.
    """
    from echo_ft.model.vision import TowerFeatureStore
    from echo_ft.training.config import quantization_config

    packages = {*ANSWERING_PACKAGES, *CORRUPTING_PACKAGES, "bitsandbytes"} - {"peft"}
    key = {
        "base": card.base_fingerprint,
        "pixels": [config.min_pixels, config.max_pixels],
        "image_processor": image_processor,
        "decoder": DECODER_VERSION,
        "precision": [base.dtype, sft.bf16, sft.fp16],
        "quantization": str(quantization_config(base)),
        "versions": {name: card.versions[name] for name in sorted(packages)},
    }
    most_bytes = int(config.features_gib * 2**30)
    return TowerFeatureStore(Path(str(config.features)), json.dumps(key), most_bytes, sft.world_size)


if __name__ == "__main__":
    configs.run_main(main, _RESUME)
