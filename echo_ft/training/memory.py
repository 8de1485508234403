"""Parameter counts and memory estimates for training one role, per topology.

All numbers come from the real architecture on the meta device, with a PEFT adapter attached. The estimates are:

- Weights, gradients and optimizer states under ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3), applied to
  the trainable weights; with LoRA, these are only the adapter.
- Activations by the method of Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1): the tensors that the backward
  pass needs, counted operation by operation. A frozen linear layer stores no input, so layers with LoRA are counted
  separately. A test compares the estimate with what autograd saves on a small model.

The estimates leave out the CUDA context and libraries (about 1 GiB), fragmentation and DoRA's extra activations. They
also leave out the gradients of activations and the kernel workspaces while one layer runs backward. Leave 10 to 20% of
a GPU free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from echo_ft.model.architectures import meta_model
from echo_ft.model.loading import PARAMETER_GROUPS, check_lora_targets, parameter_group

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

    from echo_ft.training.config import EchoConfig


_FP32 = 4
_ADAM_STATES = 2
_REDUCE_BUCKET = 500_000_000
"""DeepSpeed's default reduce_bucket_size, in elements."""
_MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default stage3_max_live_parameters: the maximum number of parameters gathered at once."""
_HEAD_TILE = (4096, 32768)
"""(tokens, vocabulary) of one tile of TRL's fused LM head, which never holds all logits."""


@dataclass(frozen=True)
class BatchShape:
    """The largest batch of one device: the number of rows, and the content of each row."""

    rows: int
    images: int
    max_pixels: int
    text_tokens: int
    label_tokens: int


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one part of the model."""

    part: str
    total: int
    trainable: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per GPU in one topology. `host` is the main memory of all processes on a machine."""

    topology: str
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    """Memory of the topology itself: gradient buckets, and the gathered weights of ZeRO-3."""
    host: int = 0

    @property
    def states(self) -> int:
        """Everything except the activations."""
        return self.weights + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes per GPU that the forward pass keeps for the backward pass. They do not depend on the topology."""

    full: int
    """Without gradient checkpointing."""
    inputs: int
    """With checkpointing: the input of every layer, and what lies between and after the layers."""
    layer: int
    """With checkpointing: all activations of the largest layer, while it is recomputed."""
    logits: int

    def total(self, checkpointing: bool) -> int:
        """Bytes with or without gradient checkpointing."""
        return (self.inputs + self.layer if checkpointing else self.full) + self.logits


def trainable_meta_model(config: EchoConfig, base: ModelConfig) -> Any:
    """The model on the meta device as it would be trained: with an adapter, or for full fine-tuning with frozen parts.

    Raises EchoError if the model is not a known Qwen2-VL or a LoRA target matches no linear layer.
    """
    from trl import get_peft_config

    from echo_ft.model.preparation import freeze_parts

    model = meta_model(str(base.model_name_or_path), base.model_revision)
    if base.use_peft:
        return add_adapter(model, get_peft_config(base))
    return freeze_parts(model, config.vision_learning_rate, config.merger_learning_rate)


def add_adapter(model: Any, peft_config: Any) -> Any:
    """`model` (on the meta device) with a PEFT adapter. Raises EchoError if `check_lora_targets` does."""
    from peft import get_peft_model

    peft_config.target_modules = check_lora_targets(model, peft_config.target_modules)
    return get_peft_model(model, peft_config)


def count_parameters(model: Any) -> list[ParameterCount]:
    """Total and trainable parameters of each part in PARAMETER_GROUPS. Tied weights count once."""
    parts = [(parameter_group(name), parameter) for name, parameter in model.named_parameters()]
    return [
        ParameterCount(
            group,
            sum(parameter.numel() for part, parameter in parts if part == group),
            sum(parameter.numel() for part, parameter in parts if part == group and parameter.requires_grad),
        )
        for group in PARAMETER_GROUPS
    ]


def frozen_bytes(model: Any, width: int, bits: int | None = None, nested: bool = False) -> int:
    """Bytes of the frozen weights at `width` bytes each.

    With `bits` 4 or 8, bitsandbytes quantizes the linear layers of the language model, except the LM head. 4 bits need
    a scale for every 64 weights: 4 bytes, or with `nested` 1 byte and a share of a second scale (QLoRA, arXiv
    2305.14314, section 3).
    """
    import torch

    scale = (1 + 4 / 256) / 64 if nested else 4 / 64
    quantized = {None: float(width), 4: 0.5 + scale, 8: 1.0}[bits]
    linear = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head") and ".visual." not in f".{name}."
    }
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return round(sum(weight.numel() * (quantized if id(weight) in linear else width) for weight in frozen))


def estimate_topologies(
    frozen: int, frozen_count: int, trainable: int, gpus: int, adapter_width: int
) -> list[MemoryEstimate]:
    """Bytes of weights, gradients and AdamW states, from `frozen` bytes of frozen weights and `trainable` parameters.

    On one GPU and under DDP, a trainable parameter takes `adapter_width` bytes, and so do its gradient and each of
    AdamW's two states. (PEFT keeps the adapter of a bfloat16 model in float32.) DDP copies the gradients into buckets.
    DeepSpeed trains in bfloat16 and adds a float32 copy and AdamW's states: 12 bytes per parameter (K = 12 in the ZeRO
    paper). ZeRO-2 shards gradients and states over the GPUs, and ZeRO-3 shards the weights too. Offload keeps weights
    and states in main memory.
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
    ]


def estimate_activations(model: Any, batch: BatchShape, width: int) -> ActivationBytes:
    """Activation memory of an adapted Qwen2-VL with `echo_ft.model.attention`, at `width` bytes per value.

    A language model layer with hidden size h and MLP size f keeps, per token:
    - 8h + 8 bytes for the two RMSNorms, each with a float32 copy and a factor
    - 4h values for attention: query, key, value (repeated to all heads for the branches) and output
    - one float32 log-sum-exp per head
    - L values for the branch mask as an additive bias, with row length L. Only branch tokens have one.
    - 3f values for the three products of SwiGLU

    A vision block with hidden size E and MLP size M keeps, per patch:
    - 8E bytes for the two LayerNorms in float32
    - 6E values for query, key, the projection that the values are a view of, and output
    - one float32 log-sum-exp per head, and 2M values for quick GELU

    Every LoRA layer also keeps its input and r values. With dropout, it keeps one more byte per input value, for the
    mask. A trained linear layer keeps its input; q, k and v share one, and so do gate and up. A trained norm keeps the
    values that it scales.
    """
    text, vision = model.config.text_config, model.config.vision_config
    merged = vision.spatial_merge_size**2
    image_tokens = batch.max_pixels // (vision.patch_size**2 * merged)
    length = batch.images * image_tokens + batch.text_tokens
    tokens = batch.rows * length
    patches = batch.rows * batch.images * image_tokens * merged
    trained = _trained_layer_bytes(
        model, {"language model": tokens, "vision tower": patches, "merger": patches // merged}, width
    )

    hidden, heads = text.hidden_size, text.num_attention_heads
    attention = width * 4 * hidden + _FP32 * heads
    masks = batch.rows * batch.text_tokens * length
    decoder = tokens * (8 * hidden + 8 + attention + width * 3 * text.intermediate_size) + width * masks
    embed, mlp = vision.embed_dim, vision.embed_dim * vision.mlp_ratio
    block = patches * (8 * embed + width * (6 * embed + 2 * mlp) + _FP32 * vision.num_heads)
    merger = patches * (_FP32 * embed + width * embed) + trained["merger"]
    ends = tokens * _FP32 * hidden + masks  # the last norm, and the masks themselves

    layer_count, depth = text.num_hidden_layers, vision.depth
    full = layer_count * decoder + trained["language model"] + ends
    inputs = width * layer_count * tokens * hidden + ends
    largest = decoder + trained["language model"] // layer_count
    if trained["vision tower"] or trained["merger"]:  # otherwise the trainer runs the tower without a graph
        full += merger
        # Under checkpointing, enable_input_require_grads hooks patch_embed, so a merger's graph includes the blocks.
        inputs += width * depth * patches * embed + merger
        largest = max(largest, block + trained["vision tower"] // depth)
    if trained["vision tower"]:
        full += depth * block + trained["vision tower"]
    # The fused LM head keeps the hidden states of the labels and holds one tile of logits at a time.
    labels = batch.rows * batch.label_tokens
    logits = width * (labels * hidden + min(labels, _HEAD_TILE[0]) * min(text.vocab_size, _HEAD_TILE[1]))
    return ActivationBytes(full, inputs, largest, logits)


def _trained_layer_bytes(model: Any, positions: dict[str, int], width: int) -> dict[str, int]:
    """Bytes that LoRA layers and trained layers keep, per part. `positions` counts the tokens or patches of a part."""
    import torch
    from peft.tuners.lora import LoraLayer

    kept = dict.fromkeys(positions, 0)
    layers: list[tuple[str, Any]] = [pair for pair in model.named_modules() if isinstance(pair[1], LoraLayer)]
    for name, layer in layers:
        dropout = any(type(module).__name__ == "Dropout" for module in layer.lora_dropout.values())
        part, rank = parameter_group(name), sum(layer.r.values())
        kept[part] += positions[part] * (layer.in_features * (width + dropout) + rank * width)

    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or not weight.requires_grad or "lora_" in name:
            continue
        if isinstance(module, torch.nn.Linear) and not name.endswith(("k_proj", "v_proj", "up_proj", "lm_head")):
            kept[parameter_group(name)] += positions[parameter_group(name)] * module.in_features * width
        elif weight.ndim == 1:  # a norm keeps what it scales
            kept[parameter_group(name)] += positions[parameter_group(name)] * weight.numel() * width
    return kept


def memory_report(model: Any, batch: BatchShape, sft: SFTConfig, base: ModelConfig, gpus: int) -> str:
    """Parameters and memory needed to train `model` (adapted, on the meta device), as text for a terminal.

    `batch` is the largest batch of one GPU.
    """
    counts = count_parameters(model)
    total, trainable = sum(count.total for count in counts), sum(count.trainable for count in counts)
    bits = 4 if base.load_in_4bit else 8 if base.load_in_8bit else None
    frozen = frozen_bytes(model, 4 if base.dtype == "float32" else 2, bits, base.use_bnb_nested_quant)
    activations = estimate_activations(model, batch, 2 if sft.bf16 or sft.fp16 else 4)
    # PEFT keeps an adapter in float32 unless the model is quantized. Full fine-tuning trains the weights as they are.
    width = 2 if bits or (not base.use_peft and base.dtype != "float32") else 4
    estimates = estimate_topologies(frozen, total - trainable, trainable, gpus, width)
    rows = [["parameters", "total", "trainable"]]
    rows += [[count.part, f"{count.total:,}", f"{count.trainable:,}"] for count in counts]
    rows.append(["all", f"{total:,}", f"{trainable:,} ({trainable / total:.2%})"])
    return "\n".join(
        [
            align_columns(rows),
            "",
            f"largest batch per GPU, in exchanges: {batch.rows} x ({batch.images} images of {batch.max_pixels} pixels, "
            f"{batch.text_tokens} text tokens, {batch.label_tokens} of them trained)",
            f"activations, GiB: {format_gib(activations.inputs + activations.layer)} with gradient checkpointing, "
            f"{format_gib(activations.full)} without; logits: {format_gib(activations.logits)} (fused LM head, one "
            "tile at a time)",
            "",
            memory_table(estimates, activations, sft.gradient_checkpointing),
            "",
            "* setting of the recipe. The estimates assume AdamW and this project's attention. Leave 10 to 20% of",
            "a GPU free for the CUDA context (about 1 GiB), fragmentation and workspaces. host: main memory of all",
            "processes on one machine.",
        ]
    )


def format_gib(count: int) -> str:
    """`count` bytes as GiB with one decimal, or `<0.1` if a positive number would round to zero."""
    return "<0.1" if 0 < count < 0.05 * 2**30 else f"{count / 2**30:.1f}"


def memory_table(estimates: list[MemoryEstimate], activations: ActivationBytes, checkpointing: bool) -> str:
    """One line per topology, in GiB per GPU. An asterisk marks the total for the recipe's `checkpointing`."""
    marks = ("with checkpointing" + " *" * checkpointing, "without" + " *" * (not checkpointing))
    head = ["GiB per GPU", "weights", "gradients", "optimizer", "buffers", *marks, "host"]
    rows = [
        [
            estimate.topology,
            *map(format_gib, (estimate.weights, estimate.gradients, estimate.optimizer, estimate.buffers)),
            *(format_gib(estimate.states + activations.total(choice)) for choice in (True, False)),
            format_gib(estimate.host) if estimate.host else "",
        ]
        for estimate in estimates
    ]
    return align_columns([head, *rows])


def align_columns(rows: list[list[str]]) -> str:
    """Text columns: the first aligned left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        [row[0].ljust(widths[0]), *(cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)
