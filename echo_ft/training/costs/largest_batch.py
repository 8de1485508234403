"""Check before step 1 that the largest batches fit into memory and that training reaches every trained part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from echo_ft.errors import EchoError
from echo_ft.model.preparation import check_gradients
from echo_ft.training.costs.memory import hold_step_memory, peak_bytes


class LargestBatchCheck(TrainerCallback):
    """Checks the largest batches before step 1, so that a run does not fail on them hours later."""

    def __init__(self, trainer: Any, cases: Sequence[int], evaluated: Sequence[int]) -> None:
        """`cases` are those of training, and `evaluated` those of the validation split."""
        self.trainer = trainer
        self.cases = cases
        self.evaluated = evaluated

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        check_largest_batch(self.trainer, self.cases)
        check_evaluation_batch(self.trainer, self.evaluated)


def check_largest_batch(trainer: Any, cases: Sequence[int]) -> None:
    """Run `cases` forward and backward as one batch, without changing gradients, random state or logs.

    Raises EchoError if the batch does not fit into memory or a trained part gets no gradient. Does nothing if ranks
    share the weights (ZeRO-3, FSDP), where gradients exist only piece by piece.
    """
    if is_deepspeed_zero3_enabled() or trainer.is_fsdp_enabled:
        return
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    seen = trainer._total_train_tokens
    inputs = trainer.data_collator([trainer.train_dataset[index] for index in cases])
    summary = f"the largest batch ({_size(cases, inputs)})"
    with _must_fit(summary, _less_memory(args, trainer.config.max_pixels)):
        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), trainer.compute_loss_context_manager():
            inputs = trainer._prepare_inputs(inputs)
            held = hold_step_memory(args, trainer.optimizer, _own_states(trainer, trained), inputs["pixel_values"])
            model.train()
            with trainer.maybe_activation_offload_context:
                loss = trainer.compute_loss(model, inputs)
                # With loss.backward(), DDP and DeepSpeed would treat these gradients as those of step 1.
                found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    # The heads have gradients even if none reaches the adapter.
    check_gradients({name: one for name, one in zip(trained, found, strict=True) if "mask_heads." not in name})
    peak = peak_bytes(args.device, held) / 2**30
    del held
    torch.cuda.empty_cache()  # does nothing without a GPU
    trainer.report(f"{summary} takes {peak:.1f} GiB with the optimizer's states and the pixels of a step: fits")
    trainer.restart_logs(seen)


def check_evaluation_batch(trainer: Any, cases: Sequence[int]) -> None:
    """Run `cases` of the validation split forward as one batch, without changing logs.

    Does nothing if they are no more than a training batch, whose activations take more memory, or if ranks share the
    weights. Raises EchoError if the batch does not fit into memory.
    """
    args, most = trainer.args, trainer.args.per_device_train_batch_size
    if len(cases) <= most or is_deepspeed_zero3_enabled() or trainer.is_fsdp_enabled:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    inputs = trainer.data_collator([trainer.eval_dataset[index] for index in cases])
    summary = f"the largest batch of an evaluation ({_size(cases, inputs)})"
    with (
        _must_fit(summary, f"set per_device_eval_batch_size: {most}, as in training"),
        torch.no_grad(),
        trainer.compute_loss_context_manager(),
    ):
        inputs = trainer._prepare_inputs(inputs)
        held = hold_step_memory(args, trainer.optimizer, _own_states(trainer, trained), inputs["pixel_values"][:0])
        model.eval()
        trainer.compute_loss(model, inputs)
    del held
    torch.cuda.empty_cache()  # does nothing without a GPU
    trainer._metrics["eval"].clear()


def _own_states(trainer: Any, trained: Mapping[str, torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """The `trained` weights whose optimizer states do not exist yet; DeepSpeed has them already."""
    return [] if trainer.is_deepspeed_enabled else list(trained.values())


def _size(cases: Sequence[int], inputs: Mapping[str, Any]) -> str:
    """The size of a batch of `cases`, in words."""
    tokens, images = inputs["input_ids"].numel(), len(inputs["image_grid_thw"])
    return f"{len(cases)} cases, {tokens} tokens, {images} images"


@contextmanager
def _must_fit(summary: str, remedy: str) -> Iterator[None]:
    """Raise EchoError if the block, which runs the batch of this `summary`, runs out of memory."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise EchoError(f"{summary} does not fit into memory; {remedy}") from error


def _less_memory(args: TrainingArguments, max_pixels: int) -> str:
    """The option that shrinks the largest batch at the lowest cost, with the value to set."""
    batch = args.per_device_train_batch_size
    if not args.gradient_checkpointing:
        return "set gradient_checkpointing: true"
    if batch > 1:
        smaller = next(size for size in range(batch // 2, 0, -1) if batch % size == 0)  # keeps the cases of a step
        more = args.gradient_accumulation_steps * (batch // smaller)
        return f"set per_device_train_batch_size: {smaller} and gradient_accumulation_steps: {more}"
    return f"set max_pixels: {max_pixels // 2}, here and in the run, or use recipes/accelerate/zero3.yaml"
