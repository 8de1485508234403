"""PrefixSharingTrainer: TRL's SFTTrainer on packed prefix-sharing rows."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer

from echo_ft.errors import EchoError
from echo_ft.model.adapters import ADAPTER_CARD, AdapterCard, write_card
from echo_ft.model.loading import PARAMETER_GROUPS, load_model, parameter_group
from echo_ft.model.preparation import packed_inputs, prepare_model
from echo_ft.model.rows import IGNORED
from echo_ft.model.vision import TowerFeatureStore
from echo_ft.terminal import LOGGER
from echo_ft.training.checkpoints import WHOLE
from echo_ft.training.config import EchoConfig
from echo_ft.training.flops import Load, costs, peak
from echo_ft.training.sampler import BalancedSampler


class PrefixSharingTrainer(SFTTrainer):
    """SFTTrainer on packed prefix-sharing rows, with learning rates for tower and merger, and the adapter's card.

    A batch is `per_device_train_batch_size` cases. Logged with the loss, over all processes and since the log before:
    cases/s, questions/s, tokens/s, operations/s, and on a GPU of flops.PEAKS the share of its peak that they are (MFU).
    """

    def __init__(
        self,
        *args: Any,
        config: EchoConfig,
        card: AdapterCard,
        largest: Sequence[int] = (0,),
        store: TowerFeatureStore | None = None,
        implementation: str = "sdpa",
        **kwargs: Any,
    ) -> None:
        """`largest` are the cases that would make the largest batch of a device.

        `implementation` is one of attention.IMPLEMENTATIONS.
        """
        self.config = config
        self.card = card
        super().__init__(*args, **kwargs)
        self.sampler: BalancedSampler | None = None
        self.add_callback(Probe(self, largest))
        self.add_callback(Epochs(self))
        self.implementation = implementation
        if implementation == "flex_attention" and self.args.device.type == "cpu":
            raise EchoError("attn_implementation flex_attention has no backward pass on a CPU (torch 2.15); set sdpa")
        tuned = self.accelerator.unwrap_model(self.model)
        narrow = any(one.requires_grad and one.dtype in (torch.bfloat16, torch.float16) for one in tuned.parameters())
        if self._is_whole and narrow:
            raise EchoError(
                "steps of full tuning round away in weights of 16 bits; set dtype: float32 (with bf16: true, it is "
                "still computed in bfloat16), or take ZeRO, which keeps weights of 32 bits beside them"
            )
        if self.is_fsdp_enabled:
            check_output_layer(tuned)
        core = tuned.get_base_model() if isinstance(tuned, PeftModel) else tuned
        prepare_model(core, store)
        self._costs = costs(core)
        self._peak = None
        if self.args.device.type == "cuda" and (self.args.bf16 or self.args.fp16):
            device = torch.cuda.get_device_name(self.args.device)
            self._peak = peak(device)
            if self._peak:
                self._report(f"MFU is relative to {self._peak / 1e12:g} TFLOP/s per GPU: {device}, dense bfloat16")
        self._done = np.zeros(4)
        self._since = time.monotonic()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss of a packed row, with logits only where there is a label."""
        labels = inputs["labels"]
        # TRL (1.16) makes logits of all positions on a CPU, and of the labelled ones on a GPU alone.
        keep = (labels[0, 1:] != IGNORED).nonzero()[:, 0]
        packed = packed_inputs(inputs, self.implementation) | {"keep": keep, "shift_labels": labels[:, keep + 1]}
        seen = self._total_train_tokens
        loss = super().compute_loss(model, packed, return_outputs, num_items_in_batch)
        if model.training:
            operations = self._costs.of(Load(*inputs["load"]))
            done = torch.tensor(
                [*inputs["done"], labels.numel(), operations], device=labels.device, dtype=torch.float64
            )
            totals = self.accelerator.gather(done[None]).sum(dim=0).cpu().numpy()
            self._done += totals
            self._total_train_tokens = seen + int(totals[2])  # TRL counts the tokens of rows of its own
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def probe(self, cases: Sequence[int]) -> None:
        """Forward and backward of a batch of `cases`; nothing of it stays, neither gradients nor random numbers.

        Raises EchoError where it does not fit into memory, or a trained part gets no gradient. Not where weights are
        shared out among ranks (ZeRO-3, FSDP): there, gradients exist only piece by piece.
        """
        if is_deepspeed_zero3_enabled() or self.is_fsdp_enabled:
            return
        model = self.accelerator.unwrap_model(self.model)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        seen = self._total_train_tokens
        dataset: Any = self.train_dataset
        inputs = self.data_collator([dataset[index] for index in cases])
        words = (
            f"the largest batch ({len(cases)} cases, {inputs['input_ids'].numel()} tokens, "
            f"{len(inputs['image_grid_thw'])} images)"
        )
        try:
            own = [self.args.device] if self.args.device.type == "cuda" else []
            with torch.random.fork_rng(own), self.compute_loss_context_manager():
                inputs = self._prepare_inputs(inputs)
                model.train()
                loss = self.compute_loss(model, inputs)
                # Not loss.backward(): DDP and DeepSpeed would take these gradients for those of step 1.
                found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise EchoError(
                f"{words} does not fit into memory; {smaller(self.args, self.config.max_pixels)}"
            ) from error
        check_gradients(dict(zip(trained, found, strict=True)))
        if torch.cuda.is_available():
            words += f" takes {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            torch.cuda.empty_cache()
        self._report(f"{words}, forward and backward: fits")
        self._total_train_tokens = seen
        self._metrics["train"].clear()
        self._done[:], self._since = 0, time.monotonic()

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """What `total_flos` adds up: the batch's own count; the Trainer's goes through all parameters at every step."""
        return int(self._costs.of(Load(*inputs["load"])))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's evaluation, whose time is not counted as training."""
        start = time.monotonic()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self._since += time.monotonic() - start
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with what was gone through since the last one."""
        if "loss" in logs:
            now = time.monotonic()
            rates = self._done / (now - self._since)
            for name, rate in zip(("cases", "questions", "tokens"), rates.tolist(), strict=False):
                logs[f"{name}_per_second"] = round(rate, 2)
            logs["tflops_per_second"] = round(rates[3] / 1e12, 4)
            if self._peak:
                logs["mfu"] = round(rates[3] / (self._peak * self.args.world_size), 4)
            self._done[:], self._since = 0, now
        super().log(logs, start_time)

    def _report(self, text: str) -> None:
        if self.accelerator.is_main_process:
            LOGGER.info(text)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the vision tower's and the merger's own learning rates."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = {"vision tower": self.config.vision_learning_rate, "merger": self.config.merger_learning_rate}
        if all(rate is None for rate in rates.values()):
            return optimizer
        part = {
            parameter: parameter_group(name)
            for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters()
            if parameter.requires_grad
        }
        for name, rate in rates.items():
            whole = not isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
            if rate is not None and name not in part.values() and not (whole and rate == 0):
                modules = "attn.qkv, attn.proj" if name == "vision tower" else "merger.mlp.0"
                raise EchoError(
                    f"{name.split()[0]}_learning_rate is {rate}, but nothing of the {name} is trained; name its "
                    f"modules in lora_target_modules ({modules}, ...) or take the rate out"
                )
        groups = list(optimizer.param_groups)
        optimizer.param_groups.clear()
        for group in groups:
            for name in PARAMETER_GROUPS:
                members = [parameter for parameter in group["params"] if part[parameter] == name]
                rate = rates.get(name)
                if members:
                    optimizer.add_param_group({**group, "params": members, "lr": group["lr"] if rate is None else rate})
        return optimizer

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        # Gone on with from its last step a run has nothing left to train; transformers (5.23) would take one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's, but that an adapter under ZeRO-2 is saved from the model in memory.

        There, transformers (5.23) first copies all weights, the frozen ones too, into every process's main memory: it
        leaves those out under ZeRO-3 alone.
        """
        deepspeed = self.is_deepspeed_enabled
        adapted = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        self.is_deepspeed_enabled = deepspeed and (is_deepspeed_zero3_enabled() or not adapted)
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.is_deepspeed_enabled = deepspeed

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Under DeepSpeed and FSDP every process comes here.
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            # The card comes last: without one, nobody takes an adapter that was being written for a finished one.
            (folder / ADAPTER_CARD).unlink(missing_ok=True)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_card(folder, self.card)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Balanced over processes, where there are several; `Epochs` sets its epoch."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        if args.world_size == 1 or args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        tokens, seed = dataset[args.length_column_name], args.seed if args.data_seed is None else args.data_seed
        self.sampler = BalancedSampler(
            list(tokens), args.per_device_train_batch_size, args.world_size, args.gradient_accumulation_steps, seed
        )
        return self.sampler

    def _load_best_model(self) -> None:
        if self._is_whole:
            self._load_whole(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._is_whole:
            self._load_whole(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    @property
    def _is_whole(self) -> bool:
        """Whether all weights are in this process and are tuned themselves."""
        adapted = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        return not (adapted or self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _load_whole(self, folder: str) -> None:
        # transformers (5.23) saves a whole Qwen2-VL under the names of older versions; the Trainer looks for today's,
        # finds none and goes on with the weights it has. from_pretrained knows both.
        self.accelerator.unwrap_model(self.model).load_state_dict(load_model(folder).state_dict())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's checkpoint, marked as whole after every process has written its part.

        transformers (5.23) writes into the final folder, and deletes older ones before the new one can be relied on.
        """
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / WHOLE).unlink(missing_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (folder / WHOLE).touch()
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)


class Epochs(TrainerCallback):
    """Tells the balanced sampler its epoch: where batches are skipped, accelerate (1.15) does not pass it on."""

    def __init__(self, trainer: PrefixSharingTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch or 0))


class Probe(TrainerCallback):
    """Before step 1: the largest batch forward and backward, once, so that a run does not end there hours later."""

    def __init__(self, trainer: PrefixSharingTrainer, cases: Sequence[int]) -> None:
        self.trainer = trainer
        self.cases = cases

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self.trainer.probe(self.cases)


def check_output_layer(model: Any) -> None:
    """Raise EchoError where the output layer is trained and has weights of its own, as the 7B's has: not under FSDP.

    TRL (1.16) reads its weights past FSDP's hooks: each process would give its part the gradients of its own cases.
    """
    head = model.get_output_embeddings().weight
    if head.requires_grad and head is not model.get_input_embeddings().weight:
        raise EchoError(
            "full tuning of a model whose output layer has weights of its own (the 7B) gives wrong gradients under "
            "FSDP (TRL 1.16); take recipes/accelerate/zero3.yaml"
        )


def check_gradients(named: Mapping[str, torch.Tensor | None]) -> None:
    """Raise EchoError unless all gradients, by parameter, are finite, and each trained part has one that is not zero.

    LoRA's second matrix starts at zero, so the first one's gradient is zero too at step 1: a part counts, not a matrix.
    """
    alive: dict[str, bool] = {}
    for name, gradient in named.items():
        if gradient is not None and not torch.isfinite(gradient).all():
            raise EchoError(
                f"the first gradient of {name} is not finite; use bf16, not fp16, or full precision, and no use_dora "
                "where the weights have rows of zeros"
            )
        part = parameter_group(name)
        alive[part] = alive.get(part, False) or (gradient is not None and bool(gradient.any()))
    dead = [part for part, has_gradient in alive.items() if not has_gradient]
    if dead:
        raise EchoError(
            f"lora_target_modules names the {' and the '.join(dead)}, but no gradient comes there; set "
            "gradient_checkpointing: false or take those modules out"
        )


def smaller(args: TrainingArguments, max_pixels: int) -> str:
    """The option that makes the largest batch smaller at the least cost, and to what it should be set."""
    batch = args.per_device_train_batch_size
    if not args.gradient_checkpointing:
        return "set gradient_checkpointing: true"
    if batch > 1:
        more = args.gradient_accumulation_steps * math.ceil(batch / (batch // 2))
        return f"set per_device_train_batch_size: {batch // 2} and gradient_accumulation_steps: {more}"
    return f"set max_pixels: {max_pixels // 2}, here and in the run, or take recipes/accelerate/zero3.yaml"
