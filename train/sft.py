"""Train one role's adapter: `accelerate launch train/sft.py --config FILE [--key value ...]`.

Options: `EchoConfig` in echo_ft/training.py, and TRL's SFTConfig and ModelConfig. The adapter and its card end in
`output_dir`, which the evaluation expects to be named after the role. With `--use_peft false` all weights are tuned,
and a whole model ends there, which a run takes as its `model_name_or_path`.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_ft import config as configs
from echo_ft.data.dataset import load_dataset, require_unchanged
from echo_ft.errors import EchoError
from echo_ft.files import from_dict, lock
from echo_ft.model.adapters import audit_leaks, make_card
from echo_ft.model.architectures import meta_model
from echo_ft.model.loading import check_lora_targets, load_model, load_processor
from echo_ft.model.rows import RowBuilder
from echo_ft.records import Exchange
from echo_ft.terminal import LOGGER
from echo_ft.training.checkpoints import continue_wandb, find_checkpoint
from echo_ft.training.memory import adapt
from echo_ft.training.planning import dry_run

if TYPE_CHECKING:
    from echo_ft.training.config import EchoConfig


def main(argv: list[str]) -> None:
    """Parse, and train, alone in the output folder."""
    from trl import ModelConfig, SFTConfig

    from echo_ft.training.config import EchoConfig, check_options

    if "--dry_run" in argv:  # transformers refuses bf16 on a machine without a GPU unless it is told to use the CPU
        argv = [*argv, "--use_cpu", "true"]
    config, sft, base = configs.parse([EchoConfig, SFTConfig, ModelConfig], argv)
    check_options(sft, base)
    with ExitStack() as stack:
        if sft.process_index == 0 and not config.dry_run:
            output = Path(sft.output_dir)
            try:
                output.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise EchoError(f"output_dir {output} cannot be made ({error.strerror}); choose another") from error
            stack.enter_context(lock(output, "output_dir"))
        train(config, sft, base)


def train(config: EchoConfig, sft: Any, base: Any) -> None:
    """Plan, train, save. `sft` and `base` are TRL's SFTConfig and ModelConfig."""
    from trl import get_peft_config, get_quantization_config

    from echo_ft.model.preparation import freeze_parts
    from echo_ft.model.vision import TowerFeatureStore
    from echo_ft.training.cases import load_training_cases
    from echo_ft.training.collator import Collator
    from echo_ft.training.trainer import PrefixSharingTrainer

    if not 0 <= config.corrupted_share <= 1:
        raise EchoError(f"corrupted_share is {config.corrupted_share:g}; it is a share of the cases, from 0 to 1")
    dataset = load_dataset(Path(config.dataset))
    processor = load_processor(base.model_name_or_path, base.model_revision, config.min_pixels, config.max_pixels)
    row_builder = RowBuilder(processor)
    if sft.process_index == 0:
        for verdict in audit_leaks(dataset).values():
            LOGGER.warning(verdict)
    if not config.dry_run:  # which does without the weights that a card tells of
        card = make_card(
            config.role,
            base.model_name_or_path,
            base.model_revision,
            config.min_pixels,
            config.max_pixels,
            dataset,
            config.corrupted_share,
            "4bit" if base.load_in_4bit else "8bit" if base.load_in_8bit else "",
        )
        checkpoint = find_checkpoint(sft, card)
    cases, planned = load_training_cases(row_builder, dataset, config, sft, "train")
    validation = (
        load_training_cases(row_builder, dataset, config, sft, "validation")[0] if sft.eval_strategy != "no" else None
    )
    if config.dry_run:
        if sft.process_index == 0:
            # Training itself reads them one after another; to hash them all first would keep its GPUs waiting.
            require_unchanged(dataset, (name for row in cases for one in row["exchanges"] for name in one["images"]))
            first = from_dict(Exchange, cases[0]["exchanges"][0])
            model = meta_model(base.model_name_or_path, base.model_revision)
            model = (
                adapt(model, get_peft_config(base))
                if base.use_peft
                else freeze_parts(model, config.vision_learning_rate, config.merger_learning_rate)
            )
            print(dry_run(planned, first, row_builder, dataset.root, model, sft, base), flush=True)
        return

    continue_wandb(sft)
    store = None
    if config.features:
        seen_with = {
            "base": card.base_fingerprint,
            "pixels": [config.min_pixels, config.max_pixels],
            "precision": [base.dtype, sft.bf16, sft.fp16],
            "quantization": str(get_quantization_config(base)),
            "versions": {name: card.versions[name] for name in ("torch", "transformers", "bitsandbytes")},
        }
        store = TowerFeatureStore(
            Path(config.features), json.dumps(seen_with), int(config.features_gib * 2**30), sft.world_size
        )

    model = load_model(
        base.model_name_or_path,
        base.model_revision,
        base.dtype,
        attn_implementation="sdpa",  # of the vision tower; the language model's is echo_ft.model.attention
        quantization_config=get_quantization_config(base),
    )
    lora: Any = get_peft_config(base)  # a LoraConfig
    if lora is None:
        freeze_parts(model, config.vision_learning_rate, config.merger_learning_rate)
    else:
        lora.target_modules = check_lora_targets(model, lora.target_modules)
    trainer = PrefixSharingTrainer(
        model=model,
        args=sft,
        data_collator=Collator(row_builder, dataset.root, store, always_look=sft.world_size > 1),
        train_dataset=cases,
        eval_dataset=validation,
        processing_class=processor,
        peft_config=lora,
        config=config,
        card=card,
        largest=planned.largest(sft.per_device_train_batch_size),
        store=store,
        implementation=base.attn_implementation or "sdpa",
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(sft.output_dir)
    trainer.save_state()
    what = "adapter" if base.use_peft else "whole model"
    trainer.accelerator.print(f"{config.role}: the {what} is in {sft.output_dir}")
    trainer.end()


if __name__ == "__main__":
    configs.run_main(main, "--resume_from_checkpoint true goes on from the last checkpoint, if one was saved")
