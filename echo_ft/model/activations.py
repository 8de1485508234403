"""Activations of a Qwen2-VL in training, counted from its architecture.

The method follows Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1): the tensors that the backward pass needs,
counted operation by operation. A frozen linear layer stores no input, so layers with LoRA are counted separately. Tests
compare the estimate with what autograd saves on a small model, and with the peak at real layer widths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from echo_ft.model.loading import PARAMETER_GROUPS, parameter_group

CUDA_CONTEXT = 2**29
"""Allowance for the CUDA context and the workspaces of cuBLAS, in bytes. It was not measured."""

_FP32 = 4
_HEAD_TILE = (4096, 32768)
"""(tokens, vocabulary) of one tile of TRL's fused LM head, which never holds all logits."""
_SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Linear layers of the language model with the same input as another one."""


@dataclass(frozen=True)
class BatchShape:
    """The largest batch of one device: the number of rows, and the content of each row."""

    rows: int
    images: int
    max_pixels: int
    text_tokens: int
    label_tokens: int
    distinct_images: int
    """Number of images in the whole batch. The rows of a case show the same images, which are encoded once."""


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes per GPU of a forward and a backward pass. They do not depend on the topology."""

    full: int
    """What the forward pass keeps for the backward pass, without gradient checkpointing."""
    inputs: int
    """What it keeps with checkpointing: the input of every layer, and the tensors between and after the layers."""
    layer: int
    """With checkpointing: all activations of the largest layer, while it is recomputed."""
    backward: int
    """What the largest layer holds in addition during its backward pass."""
    logits: int
    copies: int
    """16-bit copies of trained float32 weights, which autocast keeps until the end of the forward pass."""

    def total(self, checkpointing: bool) -> int:
        """Return the peak with or without checkpointing: in the last layer's backward pass, or in the LM head."""
        if checkpointing:
            return self.inputs + max(self.layer + self.backward, self.copies + self.logits)
        return self.full + self.copies + max(self.backward, self.logits)


def estimate_activations(model: Any, batch: BatchShape, width: int, stream: int | None = None) -> ActivationBytes:
    """Return the activation memory of an adapted Qwen2-VL with `echo_ft.model.attention`, at `width` bytes per value.

    `stream` is the width of the residual stream and of the norms' outputs, by default `width`. With float32 weights
    under 16-bit autocast it is 4, because only the linear layers compute in 16 bits.

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

    `_trained_layer_bytes` counts what LoRA layers and trained layers keep, and `_backward_bytes` what a layer needs in
    addition during its backward pass.
    """
    stream = stream or width
    text, vision = model.config.text_config, model.config.vision_config
    merged = vision.spatial_merge_size**2
    image_tokens = batch.max_pixels // (vision.patch_size**2 * merged)
    length = batch.images * image_tokens + batch.text_tokens
    tokens = batch.rows * length
    patches = batch.distinct_images * image_tokens * merged
    positions = {"language model": tokens, "vision tower": patches, "merger": patches // merged}
    trained = {part: positions[part] * kept for part, kept in _trained_layer_bytes(model, width, stream).items()}

    hidden, heads, inner = text.hidden_size, text.num_attention_heads, text.intermediate_size
    attention = width * 4 * hidden + _FP32 * heads
    masks = batch.rows * batch.text_tokens * length
    decoder = tokens * (8 * hidden + 8 + attention + width * 3 * inner) + width * masks
    embed, mlp = vision.embed_dim, vision.embed_dim * vision.mlp_ratio
    block = patches * (8 * embed + width * (6 * embed + 2 * mlp) + _FP32 * vision.num_heads)
    merger = patches * (_FP32 * embed + width * embed) + trained["merger"]
    ends = tokens * _FP32 * hidden + masks  # these are the bytes of the last norm and of the masks

    layer_count, depth = text.num_hidden_layers, vision.depth
    full = layer_count * decoder + trained["language model"] + ends
    inputs = stream * layer_count * tokens * hidden + ends
    layer = decoder + trained["language model"] // layer_count
    backward = tokens * _backward_bytes(model, width, stream)
    if trained["vision tower"] or trained["merger"]:  # otherwise the trainer runs the tower without a graph
        full += merger
        # Under checkpointing, enable_input_require_grads hooks patch_embed, so a merger's graph includes the blocks.
        inputs += width * depth * patches * embed + merger
        layer = max(layer, block + trained["vision tower"] // depth)
        backward = max(backward, patches * width * (mlp + 4 * embed))
    if trained["vision tower"]:
        full += depth * block + trained["vision tower"]
    # The fused LM head keeps the hidden states of the labels and holds one tile of logits at a time.
    labels = batch.rows * batch.label_tokens
    logits = width * (labels * hidden + min(labels, _HEAD_TILE[0]) * min(text.vocab_size, _HEAD_TILE[1]))
    return ActivationBytes(full, inputs, layer, backward, logits, _autocast_copies(model, width, stream))


def _backward_bytes(model: Any, width: int, stream: int) -> int:
    """Count the bytes per token that a language model layer needs during its backward pass, besides its activations.

    With hidden size h and MLP size f, this is the larger of two peaks:
    - The end of its second forward pass: the last product of SwiGLU, the gradient of the layer's output, and the
      tensors that the layer is about to return, 4h in all.
    - The backward pass of SwiGLU: three gradients of f values and one of h. The memory that the down projection kept is
      free again.
    """
    text = model.config.text_config
    hidden, inner = text.hidden_size, text.intermediate_size
    down = _trained_layer_bytes(model, width, stream, only="down_proj")["language model"] // text.num_hidden_layers
    return max(width * inner + stream * 4 * hidden, width * 3 * inner + stream * hidden - down)


def _trained_layer_bytes(model: Any, width: int, stream: int, only: str = "") -> dict[str, int]:
    """Count the bytes per token or patch that the LoRA layers and trained layers of each part keep.

    A LoRA layer keeps r values and its input. With dropout, the input is a copy, and each value has a byte for the
    mask. A trained linear layer keeps its input, and a trained norm the values that it scales. Layers with the same
    input share it, unless dropout or a conversion from `stream` to `width` copies it. If `only` is given, count just
    the layers whose names end with it.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    kept = dict.fromkeys(PARAMETER_GROUPS, 0)
    shared: set[str] = set()
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        lora = isinstance(module, LoraLayer)
        tuned = weight is not None and weight.requires_grad and "lora_" not in name
        if not name.endswith(only) or not (lora or tuned):
            continue
        part = parameter_group(name)
        parent, _, own = name.rpartition(".")
        if lora:
            layer: Any = module
            dropout = any(type(one).__name__ == "Dropout" for one in layer.lora_dropout.values())
            kept[part] += sum(layer.r.values()) * width
        elif isinstance(module, torch.nn.Linear) and own != "lm_head":
            dropout = False
        else:
            kept[part] += weight.numel() * stream if weight.ndim == 1 else 0
            continue
        source = f"{parent}.{_SAME_INPUT.get(own, own)}"
        if dropout or stream > width or source not in shared:
            kept[part] += module.in_features * (width + dropout)
        shared.add(source)
    return kept


def _autocast_copies(model: Any, width: int, stream: int) -> int:
    """Count the bytes of the copies at `width` that 16-bit autocast makes of trained float32 weights in linear layers.

    TRL's fused LM head converts its weights one tile at a time.
    """
    import torch

    if width == _FP32 or (stream < _FP32 and not hasattr(model, "peft_config")):  # PEFT keeps adapters in float32
        return 0
    linear = [one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and name != "lm_head"]
    return sum(width * one.weight.numel() for one in linear if one.weight.requires_grad)
