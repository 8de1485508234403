"""What training one role's adapter takes: parameters counted exactly, memory estimated for each topology.

Everything is read off the true architecture on the meta device, with PEFT's own adapter on it. What is estimated:

- Weights, gradients, optimizer states, after ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3), where the
  trainable part is the adapter alone.
- Activations, by the method of Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1): the tensors that the backward
  pass needs, counted operation by operation. A frozen linear layer keeps no input, so LoRA's counts are their own; a
  test compares them with what autograd saves on a small model.

Left out: the CUDA context and libraries (about 1 GiB), fragmentation, gradients of activations and kernel workspaces
while one layer runs backward, DoRA's extra activations. Leave a tenth to a fifth of a GPU free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from echo_ft.model.loading import PARAMETER_GROUPS, check_lora_targets, parameter_group

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig


_FP32 = 4
_ADAM_STATES = 2
_BUCKET = 500_000_000
"""DeepSpeed's default reduce_bucket_size, in elements."""
_LIVE = 1_000_000_000
"""DeepSpeed's default stage3_max_live_parameters: gathered at once at most."""
_HEAD_TILE = (4096, 32768)
"""Tokens x vocabulary of one tile of TRL's fused LM head, which never holds all logits."""


@dataclass(frozen=True)
class Batch:
    """The largest batch of one device: rows, and what each row holds."""

    rows: int
    images: int
    max_pixels: int
    text_tokens: int
    label_tokens: int


@dataclass(frozen=True)
class Count:
    """Parameters of one part of the model."""

    part: str
    total: int
    trainable: int


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU in one topology; `host` is what all processes of a machine hold in its main memory."""

    topology: str
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    """What the topology itself keeps: buckets of gradients to reduce, and ZeRO-3's gathered weights."""
    host: int = 0

    @property
    def states(self) -> int:
        """All but the activations."""
        return self.weights + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True)
class Activations:
    """Bytes that the backward pass needs from the forward pass on each GPU, whatever the topology."""

    kept: int
    """Without gradient checkpointing."""
    inputs: int
    """With it: the input of every layer, and what lies between and after the layers."""
    layer: int
    """With it: the largest layer in full, while it is computed again."""
    logits: int

    def total(self, checkpointing: bool) -> int:
        """All of them, with or without gradient checkpointing."""
        return (self.inputs + self.layer if checkpointing else self.kept) + self.logits


def adapt(model: Any, peft_config: Any) -> Any:
    """`model` (on the meta device) with PEFT's adapter, after `check_lora_targets`."""
    from peft import get_peft_model

    peft_config.target_modules = check_lora_targets(model, peft_config.target_modules)
    return get_peft_model(model, peft_config)


def count_parameters(model: Any) -> list[Count]:
    """Total and trainable parameters of each of PARAMETER_GROUPS; tied weights count once."""
    parts = [(parameter_group(name), parameter) for name, parameter in model.named_parameters()]
    return [
        Count(
            group,
            sum(parameter.numel() for part, parameter in parts if part == group),
            sum(parameter.numel() for part, parameter in parts if part == group and parameter.requires_grad),
        )
        for group in PARAMETER_GROUPS
    ]


def frozen_bytes(model: Any, width: int, bits: int | None = None, nested: bool = False) -> int:
    """Bytes of the frozen weights, `width` bytes each; bitsandbytes' 4 or 8 `bits` for linear layers but the LM head.

    4 bits come with a scale for every 64 weights: 4 bytes, or 1 byte and a share of a second scale where `nested`
    (QLoRA, arXiv 2305.14314, section 3).
    """
    import torch

    scale = (1 + 4 / 256) / 64 if nested else 4 / 64
    quantized = {None: float(width), 4: 0.5 + scale, 8: 1.0}[bits]
    linear = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    }
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return round(sum(weight.numel() * (quantized if id(weight) in linear else width) for weight in frozen))


def topologies(frozen: int, frozen_count: int, trainable: int, gpus: int, adapter_width: int) -> list[Estimate]:
    """Bytes of weights, gradients and AdamW states for `frozen` bytes of frozen weights and `trainable` parameters.

    One GPU and DDP: the adapter has `adapter_width` bytes a parameter (PEFT keeps it in float32 beside a bfloat16
    model), so have its gradient and AdamW's two states; DDP copies gradients into buckets. DeepSpeed trains in bfloat16
    with a float32 copy and AdamW's states, 12 bytes a parameter (K = 12 in the ZeRO paper): ZeRO-2 shares gradients and
    states out among the GPUs, ZeRO-3 the weights too, offload keeps weights and states in main memory.
    """
    plain = Estimate(
        topology="one GPU",
        weights=frozen + trainable * adapter_width,
        gradients=trainable * adapter_width,
        optimizer=trainable * adapter_width * _ADAM_STATES,
        buffers=0,
    )
    ddp = Estimate(f"DDP x{gpus}", plain.weights, plain.gradients, plain.optimizer, trainable * adapter_width)
    half = 2
    weights = frozen + trainable * half
    master = trainable * _FP32 * (1 + _ADAM_STATES)
    live = half * min(frozen_count + trainable, _LIVE)
    gradients, states, bucket = trainable * half // gpus, master // gpus, _BUCKET * half
    return [
        plain,
        ddp,
        Estimate(f"ZeRO-2 x{gpus}", weights, gradients, states, bucket),
        Estimate(f"ZeRO-3 x{gpus}", weights // gpus, gradients, states, bucket + live),
        Estimate(f"ZeRO-3 offload x{gpus}", 0, gradients, 0, bucket + live, weights + master + trainable * _FP32),
    ]


def activations(model: Any, batch: Batch, width: int) -> Activations:
    """Bytes of activations of an adapted Qwen2-VL under `echo_ft.model.attention`, `width` bytes a value.

    Of a language model layer, per token (hidden size h, MLP size f, row length L): both RMSNorms keep a float32 copy
    and a factor (8h + 8), attention its query, key and value (for the branches repeated to all heads), its output
    (4h values) and a float32 log-sum-exp a head, for each token of text the branch mask as an additive bias (L values;
    a token of text that the branches share has none), SwiGLU three products (3f values).
    Of a vision block, per patch (size E, MLP size M): both LayerNorms in float32 (8E), queries, keys, the projection
    that the values are a view of, and the output (6E values), a log-sum-exp a head, quick GELU (2M values).
    Every LoRA layer keeps its input (one more byte a value for the dropout mask) and r values; a linear layer that is
    tuned itself keeps its input, which q, k and v have in common, and gate and up; a norm what it scales.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    config = model.config
    text, vision = config.text_config, config.vision_config
    merged = vision.spatial_merge_size**2
    image_tokens = batch.max_pixels // (vision.patch_size**2 * merged)
    length = batch.images * image_tokens + batch.text_tokens
    tokens = batch.rows * length
    patches = batch.rows * batch.images * image_tokens * merged
    seen = {"language model": tokens, "vision tower": patches, "merger": patches // merged}

    lora = dict.fromkeys(seen, 0)
    layers: list[tuple[str, Any]] = [pair for pair in model.named_modules() if isinstance(pair[1], LoraLayer)]
    for name, layer in layers:
        dropout = any(type(module).__name__ == "Dropout" for module in layer.lora_dropout.values())
        part, rank = parameter_group(name), sum(layer.r.values())
        lora[part] += seen[part] * (layer.in_features * (width + dropout) + rank * width)

    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or not weight.requires_grad or "lora_" in name:
            continue
        if isinstance(module, torch.nn.Linear) and not name.endswith(("k_proj", "v_proj", "up_proj", "lm_head")):
            lora[parameter_group(name)] += seen[parameter_group(name)] * module.in_features * width
        elif weight.ndim == 1:  # a norm, and what it scales
            lora[parameter_group(name)] += seen[parameter_group(name)] * weight.numel() * width

    hidden, heads = text.hidden_size, text.num_attention_heads
    attention = width * 4 * hidden + _FP32 * heads
    masks = batch.rows * batch.text_tokens * length
    decoder = tokens * (8 * hidden + 8 + attention + width * 3 * text.intermediate_size) + width * masks
    embed, mlp = vision.embed_dim, vision.embed_dim * vision.mlp_ratio
    block = patches * (8 * embed + width * (6 * embed + 2 * mlp) + _FP32 * vision.num_heads)
    merger = patches * (_FP32 * embed + width * embed) + lora["merger"]
    ends = tokens * _FP32 * hidden + masks  # the last norm, and the masks themselves

    layer_count, depth = text.num_hidden_layers, vision.depth
    kept = layer_count * decoder + lora["language model"] + ends
    inputs = width * layer_count * tokens * hidden + ends
    largest = decoder + lora["language model"] // layer_count
    if lora["vision tower"] or lora["merger"]:  # otherwise the trainer runs the tower without a graph
        kept += merger
        # Under checkpointing enable_input_require_grads hooks patch_embed: the blocks are in a merger's graph too.
        inputs += width * depth * patches * embed + merger
        largest = max(largest, block + lora["vision tower"] // depth)
    if lora["vision tower"]:
        kept += depth * block + lora["vision tower"]
    # The fused LM head keeps the hidden states of the labels and holds one tile of logits at a time.
    labels = batch.rows * batch.label_tokens
    logits = width * (labels * hidden + min(labels, _HEAD_TILE[0]) * min(text.vocab_size, _HEAD_TILE[1]))
    return Activations(kept, inputs, largest, logits)


def report(model: Any, batch: Batch, sft: SFTConfig, base: ModelConfig, gpus: int) -> str:
    """What training `model` (adapted, on the meta device) on its largest batch takes, as text for a terminal."""
    counts = count_parameters(model)
    total, trainable = sum(count.total for count in counts), sum(count.trainable for count in counts)
    bits = 4 if base.load_in_4bit else 8 if base.load_in_8bit else None
    frozen = frozen_bytes(model, 4 if base.dtype == "float32" else 2, bits, base.use_bnb_nested_quant)
    acts = activations(model, batch, 2 if sft.bf16 or sft.fp16 else 4)
    # PEFT keeps an adapter in float32, unless the model is quantized; full tuning trains the weights as they are.
    width = 2 if bits or (not base.use_peft and base.dtype != "float32") else 4
    estimates = topologies(frozen, total - trainable, trainable, gpus, width)
    rows = [["parameters", "total", "trainable"]]
    rows += [[count.part, f"{count.total:,}", f"{count.trainable:,}"] for count in counts]
    rows.append(["all", f"{total:,}", f"{trainable:,} ({trainable / total:.2%})"])
    return "\n".join(
        [
            aligned(rows),
            "",
            f"largest batch of a GPU, exchanges: {batch.rows} x ({batch.images} images of {batch.max_pixels} pixels, "
            f"{batch.text_tokens} text tokens, {batch.label_tokens} of them trained on)",
            f"activations, GiB: {gib(acts.inputs + acts.layer)} with gradient checkpointing, {gib(acts.kept)} without; "
            f"logits: {gib(acts.logits)} (fused LM head, one tile at a time)",
            "",
            memory_table(estimates, acts, sft.gradient_checkpointing),
            "",
            "* the recipe's. An estimate with AdamW and this project's attention; leave a tenth to a fifth of a",
            "GPU free for the CUDA context (about 1 GiB), fragmentation and workspaces. host: main memory of all",
            "processes of a machine together.",
        ]
    )


def gib(count: int) -> str:
    """Bytes as GiB with one decimal; what is there but rounds to nothing shows as `<0.1`."""
    return "<0.1" if 0 < count < 0.05 * 2**30 else f"{count / 2**30:.1f}"


def memory_table(estimates: list[Estimate], acts: Activations, checkpointing: bool) -> str:
    """One line a topology, GiB a GPU; `checkpointing` tells which of the two totals is the recipe's."""
    marks = ("with checkpointing" + " *" * checkpointing, "without" + " *" * (not checkpointing))
    head = ["GiB a GPU", "weights", "gradients", "optimizer", "buffers", *marks, "host"]
    rows = [
        [
            estimate.topology,
            *map(gib, (estimate.weights, estimate.gradients, estimate.optimizer, estimate.buffers)),
            *(gib(estimate.states + acts.total(choice)) for choice in (True, False)),
            gib(estimate.host) if estimate.host else "",
        ]
        for estimate in estimates
    ]
    return aligned([head, *rows])


def aligned(rows: list[list[str]]) -> str:
    """Columns of text, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        [row[0].ljust(widths[0]), *(cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)
