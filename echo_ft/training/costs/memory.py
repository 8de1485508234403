"""Parameter counts and memory estimates for training one role, per topology.

All numbers come from the real architecture on the meta device, with a PEFT adapter attached. The estimates are:

- Weights, gradients and optimizer states under ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3), applied to
  the trainable weights; with LoRA, these are only the adapter.
- Activations (echo_ft/model/activations.py), the pixels of all micro-batches of a step, and an allowance for the CUDA
  context. Tests compare the sum with the peak that `python -m benchmarks.memory` measures on tensors without content.

The estimates do not include fragmentation, kernel workspaces and DoRA's extra activations. Leave 10% of a GPU free.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from echo_ft.model.activations import CUDA_CONTEXT, ActivationBytes, BatchShape, estimate_activations
from echo_ft.model.architectures import add_adapter, count_parameters, frozen_bytes, meta_model
from echo_ft.records import ROLES
from echo_ft.terminal import align_columns, format_gib

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments
    from trl import ModelConfig, SFTConfig

    from echo_ft.training.config import EchoConfig


CPU_LIBRARIES = 2**30
"""Resident memory of Python with torch, transformers and TRL, in bytes. With the trainer imported, it is 0.94 GiB."""

_FP32 = 4
_ADAM_STATES = 2
_REDUCE_BUCKET = 500_000_000
"""DeepSpeed's default reduce_bucket_size, in elements."""
_MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default stage3_max_live_parameters: the maximum number of parameters gathered at once."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per GPU, or on a CPU, in one topology. `host` is the main memory of all processes on a machine."""

    topology: str
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    """Memory that only this topology needs: gradient buckets, or the gathered weights of ZeRO-3."""
    host: int = 0
    context: int = CUDA_CONTEXT
    """The CUDA context, or on a CPU the libraries."""

    @property
    def states(self) -> int:
        """Everything except the activations and the pixels."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.context


@dataclass(frozen=True)
class TrainingEstimate:
    """Bytes that training takes."""

    topologies: list[MemoryEstimate]
    activations: ActivationBytes
    pixels: int

    def total(self, topology: MemoryEstimate, checkpointing: bool) -> int:
        """All bytes per GPU in a topology, with or without gradient checkpointing."""
        return topology.states + self.pixels + self.activations.total(checkpointing)


def trainable_meta_model(config: EchoConfig, base: ModelConfig) -> Any:
    """Return the model on the meta device as it would be trained: with an adapter, or fully with its frozen parts.

    Raises EchoError if the model is not a known Qwen2-VL or a LoRA target matches no linear layer.
    """
    from echo_ft.model.preparation import freeze_parts
    from echo_ft.training.config import ALL_ROLES, lora_config

    model = meta_model(str(base.model_name_or_path), base.model_revision)
    lora = lora_config(config, base, model)
    if lora is not None:
        return add_adapter(model, lora, ROLES if config.role == ALL_ROLES else ("default",))
    return freeze_parts(model, config.vision_learning_rate, config.merger_learning_rate)


def estimate_topologies(
    frozen: int, frozen_count: int, trainable: int, gpus: int, adapter_width: int
) -> list[MemoryEstimate]:
    """Estimate the memory of weights, gradients and AdamW states from `frozen` bytes and `trainable` parameters.

    On one GPU and under DDP, a trainable parameter takes `adapter_width` bytes, and so do its gradient and each of
    AdamW's two states. (The adapter of a bfloat16 model is in float32.) DDP copies the gradients into buckets.
    DeepSpeed trains in bfloat16 and adds a float32 copy and AdamW's states: 12 bytes per parameter (K = 12 in the ZeRO
    paper). ZeRO-2 shards gradients and states over the GPUs, and ZeRO-3 shards the weights too. Offload keeps weights
    and states in main memory. On a CPU, the weights are mapped from their file if it has their dtype, and count once.
    """
    plain = MemoryEstimate(
        topology="one GPU",
        weights=frozen + trainable * adapter_width,
        gradients=trainable * adapter_width,
        optimizer=trainable * adapter_width * _ADAM_STATES,
        buffers=0,
    )
    ddp = MemoryEstimate(f"DDP x{gpus}", plain.weights, plain.gradients, plain.optimizer, trainable * adapter_width)
    half = 2
    weights = frozen + trainable * half
    master = trainable * _FP32 * (1 + _ADAM_STATES)
    live = half * min(frozen_count + trainable, _MAX_LIVE_PARAMETERS)
    gradients, states, bucket = trainable * half // gpus, master // gpus, _REDUCE_BUCKET * half
    host = weights + master + trainable * _FP32
    return [
        plain,
        ddp,
        MemoryEstimate(f"ZeRO-2 x{gpus}", weights, gradients, states, bucket),
        MemoryEstimate(f"ZeRO-3 x{gpus}", weights // gpus, gradients, states, bucket + live),
        MemoryEstimate(f"ZeRO-3 offload x{gpus}", 0, gradients, 0, bucket + live, host),
        replace(plain, topology="CPU", context=CPU_LIBRARIES),
    ]


def pixel_bytes(model: Any, batch: BatchShape, micro_batches: int, width: int) -> int:
    """Return the size of the pixels on the device during a step, at `width` bytes per value.

    transformers (5.23) takes all micro-batches of a step before the first forward pass, and accelerate (1.15) moves
    each to the device. One more is counted for the batch that is being replaced or moved.
    """
    vision = model.config.vision_config
    values = vision.in_channels * vision.temporal_patch_size * batch.max_pixels
    return (micro_batches + 1) * batch.distinct_images * values * width


def loaded_width(model: Any, dtype: str | None) -> int:
    """Return the bytes per weight of `model` with the option `dtype`; `auto` and None load what its config names.

    The configs of the published models, whose weights are in bfloat16, are known without a dtype.
    """
    named = str(model.config.dtype).removeprefix("torch.") if dtype in (None, "auto") else dtype
    return 4 if named == "float32" else 2


def estimate_training(model: Any, batch: BatchShape, sft: SFTConfig, base: ModelConfig, gpus: int) -> TrainingEstimate:
    """Estimate the memory for training `model` (a `trainable_meta_model`). `batch` is the largest batch of a GPU."""
    counts = count_parameters(model)
    total, trainable = sum(count.total for count in counts), sum(count.trainable for count in counts)
    bits = 4 if base.load_in_4bit else 8 if base.load_in_8bit else None
    loaded, width = loaded_width(model, base.dtype), 2 if sft.bf16 or sft.fp16 else 4
    frozen = frozen_bytes(model, loaded, bits, base.use_bnb_nested_quant)
    # Adapters are trained in float32. Full fine-tuning trains the weights as they are.
    adapter_width = 2 if not base.use_peft and loaded == 2 else 4
    return TrainingEstimate(
        estimate_topologies(frozen, total - trainable, trainable, gpus, adapter_width),
        estimate_activations(model, batch, width, stream=loaded),
        pixel_bytes(model, batch, sft.gradient_accumulation_steps, loaded),
    )


def memory_report(
    model: Any, batch: BatchShape, sft: SFTConfig, base: ModelConfig, gpus: int, adapt_from: str = "prefix"
) -> str:
    """Report the parameters and the memory of training `model` (adapted, on the meta device), as text for a terminal.

    `batch` is the largest batch of one GPU.
    """
    late = f"\nAn upper bound: estimated for adapt_from prefix; {adapt_from} needs less."
    bound = "" if adapt_from == "prefix" else late
    counts = count_parameters(model)
    total, trainable = sum(count.total for count in counts), sum(count.trainable for count in counts)
    estimate = estimate_training(model, batch, sft, base, gpus)
    rows = [["parameters", "total", "trainable"]]
    rows += [[count.part, f"{count.total:,}", f"{count.trainable:,}"] for count in counts]
    rows.append(["all", f"{total:,}", f"{trainable:,} ({trainable / total:.2%})"])
    return "\n".join(
        [
            align_columns(rows),
            "",
            f"largest batch per GPU, in exchanges: {batch.rows} x ({batch.images} images of {batch.max_pixels} pixels, "
            f"{batch.text_tokens} text tokens, {batch.label_tokens} of them trained)",
            f"activations, GiB: {format_gib(estimate.activations.total(True))} with gradient checkpointing, "
            f"{format_gib(estimate.activations.total(False))} without; pixels of {sft.gradient_accumulation_steps} "
            f"batches and the next one: {format_gib(estimate.pixels)}",
            "",
            memory_table(estimate, sft.gradient_checkpointing),
            "",
            "* setting of the recipe. Estimated for AdamW and this project's attention, not measured on a GPU.",
            "context: an allowance for the CUDA context, or for the libraries on a CPU. Leave 10% of a GPU free for",
            f"fragmentation and workspaces. host: main memory of all processes on one machine.{bound}",
        ]
    )


def memory_table(estimate: TrainingEstimate, checkpointing: bool) -> str:
    """Return one line per topology, in GiB per GPU. An asterisk marks the total for the recipe's `checkpointing`."""
    marks = ("with checkpointing" + " *" * checkpointing, "without" + " *" * (not checkpointing))
    head = ["GiB per GPU", "weights", "gradients", "optimizer", "buffers", "context", *marks, "host"]
    rows = [
        [
            one.topology,
            *map(format_gib, (one.weights, one.gradients, one.optimizer, one.buffers, one.context)),
            *(format_gib(estimate.total(one, choice)) for choice in (True, False)),
            format_gib(one.host) if one.host else "",
        ]
        for one in estimate.topologies
    ]
    return align_columns([head, *rows])


def hold_step_memory(
    args: TrainingArguments, optimizer: Any, trained: Iterable[torch.Tensor], pixels: torch.Tensor
) -> list[torch.Tensor]:
    """Allocate what a step needs on the device besides its largest batch, so that a check of this batch includes it.

    These are the `pixels` of all other micro-batches, and Adam's two states of the `trained` weights unless a resumed
    `optimizer` has them already. Paged states are in main memory. Release the list after the check.
    """
    import torch
    from transformers.training_args import OptimizerNames

    held = [torch.empty_like(pixels) for _ in range(args.gradient_accumulation_steps)]
    name = OptimizerNames(args.optim).value
    if "adam" in name and "paged" not in name and not optimizer.state:
        dtype = torch.uint8 if "8bit" in name else None
        held += [torch.empty_like(weight, dtype=dtype) for weight in trained for _ in range(2)]
    return held


def peak_bytes(device: torch.device, held: Sequence[torch.Tensor]) -> int:
    """Return the peak memory of this process: allocated on a GPU, otherwise resident, with what `held` will take."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Windows lacks this module, but can score runs from other machines

    unit = 1 if sys.platform == "darwin" else 2**10
    # The pages of `held` are not resident, because nothing was written to them.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + sum(tensor.nbytes for tensor in held)
