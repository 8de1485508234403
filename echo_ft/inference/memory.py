"""Memory estimates for runs of the four experts on one GPU, from the architecture and the shape of a batch.

An exchange has one prefix and N branches. Its prefix runs once, in groups of at most PREFILL_TOKENS, and every branch
continues from a copy of the prefix's key-value cache (echo_ft/inference/engine.py). The peak is either the last group,
next to the caches of all prefixes, or the end of decoding. A test compares the estimate with the peak that
`python -m benchmarks.memory` measures on tensors without content.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from echo_ft.inference.engine import LOOK_TOKENS, PREFILL_TOKENS
from echo_ft.model.activations import CUDA_CONTEXT
from echo_ft.model.vision import RECENT_IMAGES
from echo_ft.records import ROLES
from echo_ft.terminal import align_columns, format_gib

_FP32 = 4
_HEAD_BLOCK = 16_384
"""Rows of the output layer that `float32_logits` converts at once."""


@dataclass(frozen=True)
class RunShape:
    """The largest batch of a role in a run. All exchanges of the batch have the same shape."""

    exchanges: int
    images: int
    max_pixels: int
    prefix_text: int
    """Number of tokens in the prefix, without those of the images."""
    branches: int
    branch_tokens: int
    max_new_tokens: int
    max_batch_tokens: int | None

    def prefix(self, image_tokens: int) -> int:
        """Number of tokens in a prefix, if an image has `image_tokens`."""
        return self.images * image_tokens + self.prefix_text

    def together(self, image_tokens: int) -> int:
        """Return how many exchanges run together within max_batch_tokens (at least one)."""
        if self.max_batch_tokens is None:
            return self.exchanges
        cached = self.branches * (self.prefix(image_tokens) + self.branch_tokens + self.max_new_tokens)
        return min(self.exchanges, max(1, self.max_batch_tokens // cached))


@dataclass(frozen=True)
class RunEstimate:
    """Memory that a run takes on one GPU, in bytes."""

    weights: int
    adapters: int
    features: int
    """Memory of the features of recent images, and of those that an ablation keeps."""
    prefill: int
    """The peak while prefixes run, with the caches of all prefixes."""
    decode: int
    """The peak while branches are decoded, with their caches."""
    kept: int = 0
    """The keys and values of images that adapters which act after the prefix keep for the next role."""
    context: int = CUDA_CONTEXT

    @property
    def total(self) -> int:
        """The peak of the run."""
        return self.weights + self.adapters + self.features + self.kept + max(self.prefill, self.decode) + self.context


def image_tokens(model: Any, max_pixels: int) -> int:
    """Number of visual tokens of an image of `max_pixels`."""
    vision = model.config.vision_config
    return int(max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2)


def estimate_run(
    model: Any,
    adapter_parameters: int,
    shape: RunShape,
    width: int,
    features_bytes: int = 0,
    adapt_from: str = "prefix",
) -> RunEstimate:
    """Estimate the memory of a run.

    `model` is a Qwen2-VL on the meta device without adapters, and each value takes `width` bytes.

    `adapter_parameters` counts the parameters of one role's adapter; 0 means no adapters. They act from `adapt_from`
    on. `features_bytes` is the size of the image features that an ablation keeps. With hidden size h and MLP size f, a
    prefix token in a layer needs 3f + 5h values for SwiGLU, the residual stream and the norms. With adapters, the sum
    of base layer and adapter adds f.
    """
    text = model.config.text_config
    hidden, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    image = image_tokens(model, shape.max_pixels)
    prefix, together = shape.prefix(image), shape.together(image)
    head = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    cache = width * 2 * layers * text.num_key_value_heads * head
    token = width * ((4 if adapter_parameters else 3) * inner + 5 * hidden)
    group = prefix * max(1, min(together, PREFILL_TOKENS // prefix))
    branches = together * shape.branches
    started = branches * (prefix + shape.branch_tokens)
    decoded = started + branches * shape.max_new_tokens
    # A branch's attention has a mask, so transformers (5.23) repeats keys and values for all heads.
    repeated = width * 2 * hidden
    logits = _FP32 * (2 * branches * text.vocab_size + _HEAD_BLOCK * hidden)
    return RunEstimate(
        weights=width * sum(weight.numel() for weight in model.parameters()),
        adapters=width * adapter_parameters * len(ROLES),
        features=width * RECENT_IMAGES * image * hidden + features_bytes,
        prefill=group * token + together * prefix * cache,
        decode=decoded * (cache + cache // layers)
        + max(started * repeated, branches * shape.branch_tokens * token, logits),
        kept=0 if adapt_from == "prefix" else cache * min(LOOK_TOKENS, shape.exchanges * shape.images * image),
    )


def run_report(
    model: Any,
    adapter_parameters: int,
    shapes: Mapping[str, RunShape],
    width: int,
    features_bytes: int = 0,
    adapt_from: str = "prefix",
) -> str:
    """Return the estimates as text for a terminal: a line per role for a run with adapters, and one for the base model.

    The arguments are those of `estimate_run`; `shapes` has the largest batch of each role.
    """
    late = ("kept",) if adapt_from != "prefix" else ()
    parts = ("weights", "adapters", "features", *late, "prefill", "decode", "context", "total")
    rows = [["GiB on one GPU", *parts]]
    base = 0
    for role, shape in shapes.items():
        tuned = estimate_run(model, adapter_parameters, shape, width, features_bytes, adapt_from)
        rows.append([role, *(format_gib(getattr(tuned, part)) for part in parts)])
        base = max(base, estimate_run(model, 0, shape, width, features_bytes).total)
    return "\n".join(
        [
            align_columns(rows),
            "",
            f"The base model without adapters needs {format_gib(base)} GiB. All figures are estimates, not measured on "
            "a GPU. The",
            "total has the larger of prefill and decode. features: of recent images and those that an ablation keeps.",
            *(["kept: keys and values of the images, for the next role."] if late else []),
        ]
    )
