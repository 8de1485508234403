"""PrefixSharingTrainer: TRL's SFTTrainer on packed prefix-sharing rows."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints
from trl import SFTTrainer

from echo_ft.errors import EchoError
from echo_ft.files import write_text
from echo_ft.model.adapters import ADAPTER_CARD, AdapterCard, gather_adapter, write_card
from echo_ft.model.loading import load_model
from echo_ft.model.preparation import (
    check_output_layer,
    keep_adapter_input_dtype,
    packed_inputs,
    prepare_model,
    set_part_rates,
    train_in_float32,
)
from echo_ft.model.rows import IGNORED
from echo_ft.model.vision import TowerFeatureStore
from echo_ft.provenance import seal_folder
from echo_ft.terminal import LOGGER
from echo_ft.training.checkpoints import COMPLETE_MARKER, moved_best_checkpoint
from echo_ft.training.config import EarlyStopping, EchoConfig
from echo_ft.training.costs.flops import WorkCounts, device_peak_flops, unit_costs
from echo_ft.training.costs.largest_batch import LargestBatchCheck
from echo_ft.training.mask_loss import attach_mask_heads, load_mask_heads, save_mask_heads
from echo_ft.training.option_changes import apply_options, optimizer_options
from echo_ft.training.sampler import BalancedSampler, DrawnEpoch


class PrefixSharingTrainer(SFTTrainer):
    """SFTTrainer on packed prefix-sharing rows, with adapter cards and separate rates for the tower and the merger.

    A batch has `per_device_train_batch_size` cases. With the loss, it logs cases/s, questions/s, tokens/s and TFLOP/s
    of all processes since the previous log. On a GPU in flops.PEAK_FLOPS, it also logs the fraction of the peak (MFU).
    """

    def __init__(
        self,
        *args: Any,
        config: EchoConfig,
        card: AdapterCard,
        largest_batch: Sequence[int] = (0,),
        largest_evaluation: Sequence[int] = (),
        store: TowerFeatureStore | None = None,
        implementation: str = "sdpa",
        checkpoint: str | None = None,
        **kwargs: Any,
    ) -> None:
        """`largest_batch` and `largest_evaluation` list the cases of a device's largest batch of each kind.

        `implementation` is one of attention.IMPLEMENTATIONS. `checkpoint` is the one that the run resumes from; it also
        holds the heads of the mask loss. Raises EchoError if it cannot train on this device, or if
        the weights cannot be trained in their dtype or topology.
        """
        self.config = config
        self.card = card
        super().__init__(*args, **kwargs)
        self.sampler: BalancedSampler | None = None
        self.add_callback(LargestBatchCheck(self, largest_batch, largest_evaluation))
        self.add_callback(DrawnEpoch(self))
        if config.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(config.early_stopping_patience, config.early_stopping_threshold))
        self.implementation = implementation
        tuned = self.accelerator.unwrap_model(self.model)
        if card.quantization and not self.is_deepspeed_enabled:  # DeepSpeed has 32-bit copies
            train_in_float32(tuned)
        dtypes = {weight.dtype for weight in tuned.parameters() if weight.requires_grad}
        if self._trains_own_weights and dtypes & {torch.bfloat16, torch.float16}:
            raise EchoError(
                "full fine-tuning in 16-bit weights loses small updates to rounding; set dtype: float32 (bf16: true "
                "still computes in bfloat16) or use ZeRO, which keeps 32-bit master weights"
            )
        if self.is_fsdp_enabled:
            check_output_layer(tuned)
        if self.accelerator.is_fsdp2 and self.args.bf16:
            # accelerate (1.15) would round the returned loss to bfloat16: three digits, too few to compare checkpoints.
            plugin = self.accelerator.state.fsdp_plugin
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
        core = tuned.get_base_model() if isinstance(tuned, PeftModel) else tuned
        prepare_model(core, store)
        self.mask_heads = attach_mask_heads(core, checkpoint) if card.mask_loss else None
        if self.args.bf16:
            keep_adapter_input_dtype(tuned)
        self._costs = unit_costs(core)
        self._peak = None
        if self.args.device.type == "cuda" and (self.args.bf16 or self.args.fp16):
            device = torch.cuda.get_device_name(self.args.device)
            self._peak = device_peak_flops(device)
            if self._peak:
                self.report(f"MFU is relative to {self._peak / 1e12:g} TFLOP/s per GPU: {device}, dense bfloat16")
        # Per evaluation batch of all processes: the sum of a loss, and its number of labels.
        self._evaluated: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._work_done = np.zeros(4)  # the cases, questions, tokens and operations since the last log
        self._last_log = time.monotonic()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute TRL's loss on a packed row, with logits only at the labels."""
        labels = inputs["labels"]
        # TRL (1.16) restricts logits to the labels only on a GPU; on a CPU it would compute them at all positions.
        keep = (labels[0, 1:] != IGNORED).nonzero()[:, 0]
        packed = packed_inputs(inputs, self.implementation) | {"keep": keep, "shift_labels": labels[:, keep + 1]}
        seen = self._total_train_tokens
        if self.mask_heads is not None:
            self.mask_heads.batch = inputs
        result = self._label_loss(model, inputs, packed, return_outputs, num_items_in_batch)
        if self.mask_heads is not None:
            loss, *outputs = result if return_outputs else (result,)
            loss = loss + self._mask_loss(inputs, num_items_in_batch, model.training)
            result = (loss, *outputs) if return_outputs else loss
        if model.training:
            operations = self._costs.flops(WorkCounts(*inputs["work_counts"]))
            done = torch.tensor(
                [*inputs["done"], labels.numel(), operations], device=labels.device, dtype=torch.float64
            )
            totals = self.accelerator.gather(done[None]).sum(dim=0).cpu().numpy()
            self._work_done += totals
            self._total_train_tokens = seen + int(totals[2])  # TRL's count is valid only for TRL's own rows
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        else:
            total = (result[0] if return_outputs else result).item() * len(keep)
            sums = torch.tensor([[total, len(keep)]], device=labels.device, dtype=torch.float64)
            self._evaluated["loss"].append(self.accelerator.gather(sums).sum(dim=0).cpu())
        return result

    def _label_loss(
        self, model: Any, inputs: Mapping[str, Any], packed: dict[str, Any], return_outputs: bool, labels: Any
    ) -> Any:
        """TRL's loss of `packed`, which `inputs` became; `labels` is the number of labels in the step, if known."""
        return super().compute_loss(model, packed, return_outputs, labels)

    def _mask_loss(self, inputs: Mapping[str, Any], num_items_in_batch: Any, training: bool) -> torch.Tensor | float:
        """Return the weighted mask loss of a batch, scaled like TRL's loss. An evaluation logs it and returns 0."""
        assert self.mask_heads is not None
        total = self.mask_heads.loss()
        self.mask_heads.batch = None
        counted = inputs["mask_labels"][inputs["mask_rows"].unique()].sum()
        sums = self.accelerator.gather(torch.stack([total.detach(), counted])[None]).sum(dim=0)
        if not training:
            self._evaluated["mask_loss"].append(sums.cpu())
            return 0.0
        self._metrics["train"]["mask_loss"].append((sums[0] / sums[1].clamp(min=1)).item())
        if num_items_in_batch is None:
            return self.config.mask_loss * total / inputs["mask_labels"].sum()
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return self.config.mask_loss * scale * total / num_items_in_batch.clamp(min=1)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Return the FLOPs of a batch. The Trainer's estimate would visit all parameters at every step."""
        return int(self._costs.flops(WorkCounts(*inputs["work_counts"])))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the Trainer does, without counting the time as training."""
        start = time.monotonic()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self._last_log += time.monotonic() - start
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as the Trainer does, but take losses, entropy and accuracy as means over the trained tokens.

        transformers (5.23) and TRL (1.16) average over batches, which depends on their size and on the processes.
        """
        self._evaluated.clear()
        output = super().evaluation_loop(*args, **kwargs)
        losses, tokens = torch.stack(self._evaluated["loss"]).unbind(dim=1)
        loss = {f"{kwargs.get('metric_key_prefix', 'eval')}_loss": (losses.sum() / tokens.sum()).item()}
        for name in ("entropy", "mean_token_accuracy"):
            means = torch.tensor(self._metrics["eval"][name], dtype=torch.float64)
            self._metrics["eval"][name] = [(means @ tokens / tokens.sum()).item()]
        if self.mask_heads is not None:
            total, labels = torch.stack(self._evaluated["mask_loss"]).sum(dim=0)
            self._metrics["eval"]["mask_loss"] = [(total / labels.clamp(min=1)).item()]
        return output._replace(metrics={**(output.metrics or {}), **loss})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, and add the throughput since the last log."""
        if "loss" in logs:
            now = time.monotonic()
            rates = self._work_done / (now - self._last_log)
            for name, rate in zip(("cases", "questions", "tokens"), rates.tolist(), strict=False):
                logs[f"{name}_per_second"] = round(rate, 2)
            logs["tflops_per_second"] = round(rates[3] / 1e12, 4)
            if self._peak:
                logs["mfu"] = round(rates[3] / (self._peak * self.args.world_size), 4)
            self._work_done[:], self._last_log = 0, now
        super().log(logs, start_time)

    def restart_logs(self, tokens: int) -> None:
        """Forget what has been measured since the last log; the run has seen this number of tokens."""
        self._total_train_tokens = tokens
        self._metrics["train"].clear()
        self._work_done[:], self._last_log = 0, time.monotonic()

    def report(self, text: str) -> None:
        """Log a line, in the first process only."""
        if self.accelerator.is_main_process:
            LOGGER.info(text)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the Trainer's optimizer, with separate learning rates for the vision tower and the merger."""
        optimizer = super().create_optimizer(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        set_part_rates(optimizer, model, self.config.vision_learning_rate, self.config.merger_learning_rate)
        self._optimizer_options = optimizer_options(optimizer)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            apply_options(self.lr_scheduler, self._optimizer_options)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self.state.best_model_checkpoint = moved_best_checkpoint(self.state, Path(str(self.args.output_dir)))

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        # transformers (5.23) would take a step even if a run resumes from its last step and has nothing left to train.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the Trainer does, except that an adapter under ZeRO-2 or FSDP2 is saved without the frozen weights.

        transformers (5.23) would first copy all weights into main memory, in every process under ZeRO-2 and in the
        first one under FSDP2. It leaves out the frozen weights only under ZeRO-3.
        """
        deepspeed, sharded = self.is_deepspeed_enabled, self.is_fsdp_enabled
        adapted = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        self.is_deepspeed_enabled = deepspeed and (is_deepspeed_zero3_enabled() or not adapted)
        self.is_fsdp_enabled = sharded and not (adapted and self.accelerator.is_fsdp2)
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.is_deepspeed_enabled, self.is_fsdp_enabled = deepspeed, sharded

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Under DeepSpeed and FSDP, every process calls this method.
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            # The card is written last, because it marks a finished adapter.
            (folder / ADAPTER_CARD).unlink(missing_ok=True)
        if state_dict is None and self.accelerator.is_fsdp2:
            state_dict = gather_adapter(self.model, self.args.device)
        super()._save(output_dir, state_dict)
        if self.mask_heads is not None:
            save_mask_heads(self.mask_heads, folder, self.args.should_save)
        if self.args.should_save:
            write_card(folder, self.card)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the sampler, balanced if there are several processes. `DrawnEpoch` sets its epoch."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        if args.world_size == 1 or args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        tokens, seed = dataset[args.length_column_name], args.seed if args.data_seed is None else args.data_seed
        self.sampler = BalancedSampler(
            list(tokens), args.per_device_train_batch_size, args.world_size, args.gradient_accumulation_steps, seed
        )
        return self.sampler

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return the Trainer's loader with all cases: `dataloader_drop_last` drops only training cases."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drops

    def _load_best_model(self) -> None:
        if self._trains_own_weights:
            self._load_full_model(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()
        # Under FSDP and DeepSpeed, the checkpoint that was just loaded holds the heads as well.
        if self.mask_heads is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_mask_heads(self.mask_heads, Path(str(self.state.best_model_checkpoint)))
        step = int(Path(str(self.state.best_model_checkpoint)).name.removeprefix("checkpoint-"))
        self.card = replace(self.card, best_step=step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._trains_own_weights:
            self._load_full_model(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    @property
    def _trains_own_weights(self) -> bool:
        """Whether this run trains the model's own weights and this process holds all of them."""
        adapted = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        return not (adapted or self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _load_full_model(self, folder: str) -> None:
        # transformers (5.23) saves a full Qwen2-VL under the parameter names of older versions. The Trainer looks for
        # the current names, finds none and keeps its current weights. from_pretrained knows both.
        self.accelerator.unwrap_model(self.model).load_state_dict(load_model(folder).state_dict())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint as the Trainer does, and mark it as complete after every process has written its part.

        transformers (5.23) writes into the final folder and deletes older checkpoints before the new one is complete.
        """
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / COMPLETE_MARKER).unlink(missing_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal_folder(folder)
            write_text(folder / COMPLETE_MARKER, "")
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)
